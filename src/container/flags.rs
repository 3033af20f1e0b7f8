//! Sets of flags with VirtualBox's numbers. A set never holds a bit that its header does not define.

use std::fmt;
use std::ops::BitOr;

macro_rules! flag_set {
    ($(#[$doc:meta])+ $set:ident: $bits:ty { $($(#[$flag_doc:meta])+ $flag:ident = $value:expr, $word:literal;)+ }) => {
        $(#[$doc])+
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub struct $set($bits);

        impl $set {
            $($(#[$flag_doc])+ pub const $flag: $set = $set($value);)+
            /// None of them.
            pub const NONE: $set = $set(0);
            /// Every flag with its name.
            pub const ALL: &'static [($set, &'static str)] = &[$(($set::$flag, $word)),+];
            /// All of them together.
            pub const MASK: $set = $set(0 $(| $value)+);

            /// The set with these bits; `None` if one of them is not defined.
            pub fn from_bits(bits: $bits) -> Option<Self> {
                (bits & !Self::MASK.0 == 0).then_some($set(bits))
            }

            /// The bits, as in VirtualBox's header.
            pub const fn bits(self) -> $bits {
                self.0
            }

            /// All flags of `other` are in the set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// One flag of `other` at least is in the set.
            pub const fn intersects(self, other: Self) -> bool {
                self.0 & other.0 != 0
            }

            /// No flag is in the set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// The set and the flags of `other`.
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                $set(self.0 | other.0)
            }

            /// The set but for the flags of `other`.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                $set(self.0 & !other.0)
            }

            /// The set with the flags of `other`, or without them.
            #[must_use]
            pub const fn set(self, other: Self, on: bool) -> Self {
                if on { self.with(other) } else { self.without(other) }
            }

            /// The names of the flags in the set, in the order of their bits.
            pub fn names(self) -> Vec<&'static str> {
                Self::ALL.iter().filter(|(flag, _)| self.contains(*flag)).map(|(_, name)| *name).collect()
            }
        }

        impl BitOr for $set {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                self.with(other)
            }
        }

        impl fmt::Debug for $set {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($set), "({})"), self.names().join(" | "))
            }
        }
    };
}

flag_set! {
    /// How an image is opened (`VD_OPEN_FLAGS_*`); none of them: for reading and writing.
    OpenFlags: u32 {
        /// Only for reading; others may read it too.
        READONLY = 1, "readonly";
        /// Zeros that are written are kept as blocks with zeros in them, where the format could mark or leave out such.
        HONOR_ZEROES = 1 << 1, "honor-zeroes";
        /// What is written is kept although it is what shows through already.
        HONOR_SAME = 1 << 2, "honor-same";
        /// Only to be asked about: its place in the chain is not checked, and nothing is read from or written to its disk.
        INFO = 1 << 3, "info";
        /// For asynchronous requests. Opening fails where those are not possible.
        ASYNC_IO = 1 << 4, "async-io";
        /// Others may write it as well. Only where no metadata changes, that is with fixed images; otherwise it has no effect.
        SHAREABLE = 1 << 5, "shareable";
        /// It is written from its start to its end: so a new stream-optimized VMDK is made, which takes nothing else. Otherwise ignored, as in VirtualBox's
        /// header; a raw file, whose rest VirtualBox fills with zeros at the close, has zeros there from the start.
        SEQUENTIAL = 1 << 6, "sequential";
        /// Discards are taken. Opening fails where those are not possible.
        DISCARD = 1 << 7, "discard";
        /// Flushes do nothing. After a crash of the host the image may be lost.
        IGNORE_FLUSH = 1 << 8, "ignore-flush";
        /// Reads tell where no image has anything.
        INFORM_ABOUT_ZERO_BLOCKS = 1 << 9, "inform-about-zero-blocks";
        /// Consistency checks that only writing needs are left out. Only with [`Self::READONLY`].
        SKIP_CONSISTENCY_CHECKS = 1 << 10, "skip-consistency-checks";
    }
}

flag_set! {
    /// What an image is like (`VD_IMAGE_FLAGS_*`); none of them: it grows as it is written.
    ImageFlags: u32 {
        /// VMDK: in extents of 2 GB.
        VMDK_SPLIT_2G = 0x1, "split-2g";
        /// VMDK: of a disk of the host, or parts of one.
        VMDK_RAWDISK = 0x2, "rawdisk";
        /// VMDK: packed, written once.
        VMDK_STREAM_OPTIMIZED = 0x4, "stream-optimized";
        /// VMDK: as ESX has them.
        VMDK_ESX = 0x8, "esx";
        /// VDI: new blocks are filled with zeros. Only when it is made; vdblk's blocks always read as zeros first.
        VDI_ZERO_EXPAND = 0x100, "zero-expand";
        /// All of its space is taken from the start.
        FIXED = 0x10000, "fixed";
        /// It lies over a parent.
        DIFF = 0x20000, "diff";
    }
}

impl ImageFlags {
    /// What VMDKs can be.
    pub const VMDK_MASK: ImageFlags = ImageFlags(0x3000f);
    /// What VDIs can be.
    pub const VDI_MASK: ImageFlags = ImageFlags(0x30100);
    /// What an image is if nothing is said.
    pub const DEFAULT: ImageFlags = ImageFlags::NONE;
}

flag_set! {
    /// Which way a filter works (`VD_FILTER_FLAGS_*`).
    FilterFlags: u32 {
        /// On what is written.
        WRITE = 1, "write";
        /// On what is read.
        READ = 2, "read";
        /// Only to be asked about.
        INFO = 4, "info";
    }
}

impl FilterFlags {
    /// Both ways.
    pub const DEFAULT: FilterFlags = FilterFlags(3);
}

flag_set! {
    /// How an image is repaired (`VD_REPAIR_*`).
    RepairFlags: u32 {
        /// Nothing is written: only tells what would be done.
        DRY_RUN = 1, "dry-run";
    }
}

flag_set! {
    /// How a disk is shown as a file (`VD_VFSFILE_*`).
    DiskFileFlags: u32 {
        /// The container goes with the file.
        DESTROY_ON_RELEASE = 1, "destroy-on-release";
    }
}

flag_set! {
    /// A disk of the host, or a part of one, in a raw-disk image (`VDISKRAW_*`).
    RawDiskFlags: u32 {
        /// The whole disk, whatever its partitions.
        DISK = 1, "disk";
        /// Only read, however the image is opened.
        READONLY = 2, "readonly";
    }
}

flag_set! {
    /// What a back-end can do (`VD_CAP_*`).
    BackendCaps: u64 {
        /// Its images have UUIDs of their own.
        UUID = 1, "uuid";
        /// It makes images that take all of their space at once.
        CREATE_FIXED = 1 << 1, "create-fixed";
        /// It makes images that grow.
        CREATE_DYNAMIC = 1 << 2, "create-dynamic";
        /// It makes images in files of less than 2 GB.
        CREATE_SPLIT_2G = 1 << 3, "create-split-2g";
        /// Its images may lie over a parent.
        DIFF = 1 << 4, "diff";
        /// It takes asynchronous requests.
        ASYNC = 1 << 5, "async";
        /// Its images are files.
        FILE = 1 << 6, "file";
        /// It needs to be configured.
        CONFIG = 1 << 7, "config";
        /// It needs a network.
        TCPNET = 1 << 8, "tcpnet";
        /// It touches files only through the I/O interface.
        VFS = 1 << 9, "vfs";
        /// It takes discards.
        DISCARD = 1 << 10, "discard";
        /// It is much used.
        PREFERRED = 1 << 11, "preferred";
    }
}

flag_set! {
    /// How a configuration key is to be handled (`VD_CFGKEY_*`).
    ConfigKeyFlags: u64 {
        /// Without it nothing works.
        MANDATORY = 1, "mandatory";
        /// Not for everybody.
        EXPERT = 1 << 1, "expert";
        /// It only matters when an image is made.
        CREATE_ONLY = 1 << 2, "create-only";
    }
}

flag_set! {
    /// What of each block a segment of an iterator is about (`VD_IOITER_SEG_F_*`).
    SegmentFlags: u32 {
        /// The metadata before the block's data.
        PRE_METADATA = 1, "pre-metadata";
        /// The data.
        MAIN_DATA = 1 << 1, "main-data";
        /// The metadata behind it.
        POST_METADATA = 1 << 2, "post-metadata";
        /// The checksums.
        CHECKSUM = 1 << 3, "checksum";
        /// All there is.
        AVAILABLE = 1 << 4, "available";
    }
}

flag_set! {
    /// How an iterator counts (`VDIOITER_F_*`); not in bytes: in blocks.
    IterFlags: u32 {
        /// Offsets and sizes are bytes.
        BYTE_OFFSET_AND_SIZE = 1, "byte-offset-and-size";
    }
}

flag_set! {
    /// What memory of a buffer manager has to be like (`VD_IOBUFMGR_F_*`).
    BufferFlags: u32 {
        /// It never goes to swap.
        REQUIRE_NOT_PAGEABLE = 1, "require-not-pageable";
    }
}

flag_set! {
    /// How a list of regions counts (`VD_REGION_LIST_F_*`); not in blocks: in bytes.
    RegionListFlags: u32 {
        /// Starts and sizes are blocks.
        LOC_SIZE_BLOCKS = 1, "loc-size-blocks";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_header_s() {
        let open: Vec<_> = OpenFlags::ALL.iter().map(|(f, _)| f.bits()).collect();
        assert_eq!(open, (0..11).map(|n| 1 << n).collect::<Vec<u32>>());
        let caps: Vec<_> = BackendCaps::ALL.iter().map(|(f, _)| f.bits()).collect();
        assert_eq!(caps, (0..12).map(|n| 1 << n).collect::<Vec<u64>>());
        let image: Vec<_> = ImageFlags::ALL.iter().map(|(f, _)| f.bits()).collect();
        assert_eq!(image, [1, 2, 4, 8, 0x100, 0x10000, 0x20000]);
        assert_eq!(FilterFlags::MASK.bits(), 7);
        assert_eq!(FilterFlags::DEFAULT, FilterFlags::WRITE | FilterFlags::READ);
        assert_eq!((RepairFlags::DRY_RUN.bits(), DiskFileFlags::DESTROY_ON_RELEASE.bits()), (1, 1));
        assert_eq!((RawDiskFlags::DISK.bits(), RawDiskFlags::READONLY.bits()), (1, 2));
        let keys = ConfigKeyFlags::ALL.iter().map(|(f, _)| f.bits());
        assert_eq!(keys.collect::<Vec<_>>(), [1, 2, 4]);
        assert_eq!(SegmentFlags::MASK.bits(), 31);
        assert_eq!((IterFlags::BYTE_OFFSET_AND_SIZE.bits(), BufferFlags::MASK.bits()), (1, 1));
        assert_eq!(RegionListFlags::LOC_SIZE_BLOCKS.bits(), 1);
    }

    #[test]
    fn a_set_is_a_set() {
        let a = OpenFlags::READONLY | OpenFlags::DISCARD;
        assert!(a.contains(OpenFlags::DISCARD) && !a.contains(OpenFlags::INFO | OpenFlags::DISCARD));
        assert!(a.intersects(OpenFlags::INFO | OpenFlags::DISCARD) && !a.is_empty());
        assert_eq!(a.without(OpenFlags::DISCARD), OpenFlags::READONLY);
        assert_eq!(a.set(OpenFlags::READONLY, false), OpenFlags::DISCARD);
        assert_eq!(format!("{a:?}"), "OpenFlags(readonly | discard)");
        assert_eq!(OpenFlags::from_bits(a.bits()), Some(a));
        assert_eq!(OpenFlags::from_bits(1 << 11), None, "a bit that is not defined");
        assert_eq!(ImageFlags::VMDK_MASK.with(ImageFlags::VDI_MASK), ImageFlags::MASK);
    }
}
