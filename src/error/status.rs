//! VirtualBox's status codes for virtual disks, by number, and which of our kinds each is.

use super::ErrorKind;
use std::fmt;

macro_rules! statuses {
    ($($(#[$doc:meta])+ $name:ident = $number:literal, $word:literal, $kind:expr;)+) => {
        /// A status code of VirtualBox's container. Numbers and names are its own (7.0).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(i32)]
        pub enum Status { $($(#[$doc])+ $name = $number,)+ }

        impl Status {
            /// All of them, by the size of their numbers.
            pub const ALL: &'static [Status] = &[$(Status::$name),+];

            /// The name in VirtualBox's headers.
            pub fn name(self) -> &'static str {
                match self { $(Status::$name => $word,)+ }
            }

            /// What it is for code that has to decide; `None`: no error, but news about a success.
            pub fn kind(self) -> Option<ErrorKind> {
                match self { $(Status::$name => $kind,)+ }
            }
        }
    };
}

statuses! {
    /// The image's type, or its place in the chain, is not possible here.
    InvalidType = -3200, "VERR_VD_INVALID_TYPE", Some(ErrorKind::InvalidArgument);
    /// The call does not fit what is going on.
    InvalidState = -3201, "VERR_VD_INVALID_STATE", Some(ErrorKind::State);
    /// A value that was asked for is not there.
    ValueNotFound = -3202, "VERR_VD_VALUE_NOT_FOUND", Some(ErrorKind::NotFound);
    /// Nothing is open.
    NotOpened = -3203, "VERR_VD_NOT_OPENED", Some(ErrorKind::State);
    /// The container has no image of this number.
    ImageNotFound = -3204, "VERR_VD_IMAGE_NOT_FOUND", Some(ErrorKind::NotFound);
    /// The image is only read.
    ImageReadOnly = -3205, "VERR_VD_IMAGE_READ_ONLY", Some(ErrorKind::ReadOnly);
    /// The image states no geometry.
    GeometryNotSet = -3206, "VERR_VD_GEOMETRY_NOT_SET", Some(ErrorKind::NotFound);
    /// Nothing is allocated there.
    BlockFree = -3207, "VERR_VD_BLOCK_FREE", Some(ErrorKind::NotFound);
    /// A UUID is not the expected one.
    UuidMismatch = -3208, "VERR_VD_UUID_MISMATCH", Some(ErrorKind::ParentMismatch);
    /// An asynchronous request has ended at once.
    AsyncIoFinished = 3209, "VINF_VD_ASYNC_IO_FINISHED", None;
    /// A request is under way.
    AsyncIoInProgress = -3210, "VERR_VD_ASYNC_IO_IN_PROGRESS", Some(ErrorKind::State);
    /// The size is not possible.
    InvalidSize = -3211, "VERR_VD_INVALID_SIZE", Some(ErrorKind::InvalidArgument);
    /// A configuration key is not known.
    UnknownCfgValues = -3212, "VERR_VD_UNKNOWN_CFG_VALUES", Some(ErrorKind::InvalidArgument);
    /// An interface is not known.
    UnknownInterface = -3213, "VERR_VD_UNKNOWN_INTERFACE", Some(ErrorKind::InvalidArgument);
    /// The key of an encrypted disk is missing.
    DekMissing = -3214, "VERR_VD_DEK_MISSING", Some(ErrorKind::NotFound);
    /// The password is not the key store's.
    PasswordIncorrect = -3215, "VERR_VD_PASSWORD_INCORRECT", Some(ErrorKind::PermissionDenied);
    /// The header is of no known format.
    GenInvalidHeader = -3220, "VERR_VD_GEN_INVALID_HEADER", Some(ErrorKind::NotThisFormat);
    /// A VDI's header is wrong.
    VdiInvalidHeader = -3230, "VERR_VD_VDI_INVALID_HEADER", Some(ErrorKind::Corrupt);
    /// No VDI by its signature.
    VdiInvalidSignature = -3231, "VERR_VD_VDI_INVALID_SIGNATURE", Some(ErrorKind::NotThisFormat);
    /// A VDI of a version that is not known.
    VdiUnsupportedVersion = -3232, "VERR_VD_VDI_UNSUPPORTED_VERSION", Some(ErrorKind::Unsupported);
    /// The comment does not fit a VDI.
    VdiCommentTooLong = -3233, "VERR_VD_VDI_COMMENT_TOO_LONG", Some(ErrorKind::InvalidArgument);
    /// A VMDK's header is wrong.
    VmdkInvalidHeader = -3240, "VERR_VD_VMDK_INVALID_HEADER", Some(ErrorKind::Corrupt);
    /// A VMDK of a version that is not known.
    VmdkUnsupportedVersion = -3241, "VERR_VD_VMDK_UNSUPPORTED_VERSION", Some(ErrorKind::Unsupported);
    /// A VMDK's descriptor lacks a value.
    VmdkValueNotFound = -3242, "VERR_VD_VMDK_VALUE_NOT_FOUND", Some(ErrorKind::Corrupt);
    /// A VMDK is in no state for that.
    VmdkInvalidState = -3243, "VERR_VD_VMDK_INVALID_STATE", Some(ErrorKind::State);
    /// A VMDK's descriptor is wrong.
    VmdkInvalidFormat = -3244, "VERR_VD_VMDK_INVALID_FORMAT", Some(ErrorKind::Corrupt);
    /// A VMDK that is written once was written to out of order.
    VmdkInvalidWrite = -3245, "VERR_VD_VMDK_INVALID_WRITE", Some(ErrorKind::InvalidArgument);
    /// A VHD's header is wrong.
    VhdInvalidHeader = -3260, "VERR_VD_VHD_INVALID_HEADER", Some(ErrorKind::Corrupt);
    /// A Parallels image's header is wrong.
    ParallelsInvalidHeader = -3265, "VERR_VD_PARALLELS_INVALID_HEADER", Some(ErrorKind::Corrupt);
    /// A DMG's trailer is wrong.
    DmgInvalidHeader = -3267, "VERR_VD_DMG_INVALID_HEADER", Some(ErrorKind::Corrupt);
    /// A raw file is none.
    RawInvalidHeader = -3270, "VERR_VD_RAW_INVALID_HEADER", Some(ErrorKind::NotThisFormat);
    /// A raw file is of another device.
    RawInvalidType = -3271, "VERR_VD_RAW_INVALID_TYPE", Some(ErrorKind::InvalidArgument);
    /// Metadata has to be read first. VirtualBox says so only to itself.
    NotEnoughMetadata = -3272, "VERR_VD_NOT_ENOUGH_METADATA", Some(ErrorKind::State);
    /// A request is halted. VirtualBox says so only to itself.
    IoctxHalt = -3273, "VERR_VD_IOCTX_HALT", Some(ErrorKind::State);
    /// The container has a cache image already.
    CacheAlreadyExists = -3274, "VERR_VD_CACHE_ALREADY_EXISTS", Some(ErrorKind::Exists);
    /// The container has no cache image.
    CacheNotFound = -3275, "VERR_VD_CACHE_NOT_FOUND", Some(ErrorKind::NotFound);
    /// The cache image is of another state of the images.
    CacheNotUpToDate = -3276, "VERR_VD_CACHE_NOT_UP_TO_DATE", Some(ErrorKind::ParentMismatch);
    /// A discard is not aligned as it would have to be.
    DiscardAlignmentNotMet = -3277, "VERR_VD_DISCARD_ALIGNMENT_NOT_MET", Some(ErrorKind::InvalidArgument);
    /// The image takes no discards.
    DiscardNotSupported = -3278, "VERR_VD_DISCARD_NOT_SUPPORTED", Some(ErrorKind::Unsupported);
    /// The image is damaged.
    ImageCorrupted = -3279, "VERR_VD_IMAGE_CORRUPTED", Some(ErrorKind::Corrupt);
    /// Images of this format are not repaired.
    ImageRepairNotSupported = -3280, "VERR_VD_IMAGE_REPAIR_NOT_SUPPORTED", Some(ErrorKind::Unsupported);
    /// The image is beyond repair.
    ImageRepairImpossible = -3281, "VERR_VD_IMAGE_REPAIR_IMPOSSIBLE", Some(ErrorKind::Corrupt);
    /// A request leaves the disk.
    ReadOutOfRange = -3282, "VERR_VD_READ_OUT_OF_RANGE", Some(ErrorKind::OutOfRange);
    /// What was read is zeros because no image has anything there.
    NewZeroedBlock = 3283, "VINF_VD_NEW_ZEROED_BLOCK", None;
    /// A DMG's property list is wrong.
    DmgXmlParseError = -3284, "VERR_VD_DMG_XML_PARSE_ERROR", Some(ErrorKind::Corrupt);
    /// No DMG was found in an archive.
    DmgNotFoundInsideXar = -3285, "VERR_VD_DMG_NOT_FOUND_INSIDE_XAR", Some(ErrorKind::NotFound);
    /// A raw disk's size is no multiple of 512 bytes.
    RawSizeModulo512 = -3286, "VERR_VD_RAW_SIZE_MODULO_512", Some(ErrorKind::InvalidArgument);
    /// An optical raw disk's size is no multiple of 2048 bytes.
    RawSizeModulo2048 = -3287, "VERR_VD_RAW_SIZE_MODULO_2048", Some(ErrorKind::InvalidArgument);
    /// An optical raw disk is too small.
    RawSizeOpticalTooSmall = -3288, "VERR_VD_RAW_SIZE_OPTICAL_TOO_SMALL", Some(ErrorKind::InvalidArgument);
    /// A floppy disk is too big.
    RawSizeFloppyTooBig = -3289, "VERR_VD_RAW_SIZE_FLOPPY_TOO_BIG", Some(ErrorKind::InvalidArgument);
    /// The image cannot be made smaller.
    ShrinkNotSupported = -3290, "VERR_VD_SHRINK_NOT_SUPPORTED", Some(ErrorKind::Unsupported);
}

impl Status {
    /// The number in VirtualBox's headers: errors are below 0.
    pub fn number(self) -> i32 {
        self as i32
    }

    /// The code of this number.
    pub fn of_number(number: i32) -> Option<Status> {
        Status::ALL.iter().copied().find(|s| s.number() == number)
    }

    /// The code that says as much as the kind does; `None` for kinds that are not about virtual disks, for which the operating system
    /// or VirtualBox's run-time have codes.
    pub fn of_kind(kind: ErrorKind) -> Option<Status> {
        Some(match kind {
            ErrorKind::NotThisFormat => Status::GenInvalidHeader,
            ErrorKind::Corrupt => Status::ImageCorrupted,
            ErrorKind::ReadOnly => Status::ImageReadOnly,
            ErrorKind::ParentMismatch => Status::UuidMismatch,
            ErrorKind::OutOfRange => Status::ReadOutOfRange,
            ErrorKind::State => Status::InvalidState,
            _ => return None,
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn codes_and_numbers_are_one_to_one() {
        let numbers: BTreeSet<_> = Status::ALL.iter().map(|s| s.number()).collect();
        let names: BTreeSet<_> = Status::ALL.iter().map(|s| s.name()).collect();
        assert_eq!((numbers.len(), names.len()), (Status::ALL.len(), Status::ALL.len()));
        for s in Status::ALL {
            assert_eq!(Status::of_number(s.number()), Some(*s));
            assert_eq!(s.number() > 0, s.kind().is_none(), "{s}: only news of successes are above 0");
            assert_eq!(s.name().starts_with("VERR_VD_"), s.kind().is_some(), "{s}");
        }
        assert_eq!(Status::of_number(-1), None);
    }

    /// Facts of VirtualBox's headers, once more by hand.
    #[test]
    fn numbers_are_virtualbox_s() {
        let known = [
            (-3200, "VERR_VD_INVALID_TYPE"),
            (-3203, "VERR_VD_NOT_OPENED"),
            (-3204, "VERR_VD_IMAGE_NOT_FOUND"),
            (-3205, "VERR_VD_IMAGE_READ_ONLY"),
            (-3206, "VERR_VD_GEOMETRY_NOT_SET"),
            (-3214, "VERR_VD_DEK_MISSING"),
            (-3276, "VERR_VD_CACHE_NOT_UP_TO_DATE"),
            (-3278, "VERR_VD_DISCARD_NOT_SUPPORTED"),
            (3283, "VINF_VD_NEW_ZEROED_BLOCK"),
            (-3290, "VERR_VD_SHRINK_NOT_SUPPORTED"),
        ];
        for (number, name) in known {
            assert_eq!(Status::of_number(number).map(Status::name), Some(name));
        }
    }

    #[test]
    fn what_a_kind_says_is_of_that_kind() {
        for s in Status::ALL {
            let Some(kind) = s.kind() else { continue };
            if let Some(back) = Status::of_kind(kind) {
                assert_eq!(back.kind(), Some(kind), "{s}");
            }
        }
    }
}
