//! Headers of VMDK's sparse extents: KDMV (hosted, VMware's "Virtual Disk Format 5.0") and COWD (ESX, documented by those who read
//! it). Little endian; sizes and places are in sectors.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_BLOCK_BYTES, MAX_DISK_BYTES, MIN_BLOCK_BYTES, SECTOR_BYTES};
use crate::map::{ByteSource, HostOffset};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const KDMV: [u8; 4] = *b"KDMV";
pub(super) const COWD: [u8; 4] = *b"COWD";
/// Bytes of a KDMV header.
pub(super) const KDMV_BYTES: usize = 512;
/// Where the unclean mark is in it.
pub(super) const UNCLEAN_AT: usize = 72;
/// A directory offset that says: look into the footer.
const IN_FOOTER: u64 = u64::MAX;
/// Largest directory: 2 TiB of COWD's smallest grains, 32 TiB of the usual ones.
pub(super) const MAX_DIRECTORY_BYTES: u64 = 4 << 20;
/// Entries of a table of COWD.
const COWD_ENTRIES: u32 = 4096;

/// The newline bytes are meant to be checked.
pub(super) const FLAG_NEWLINE: u32 = 1;
/// There is a second directory with tables of its own.
pub(super) const FLAG_REDUNDANT: u32 = 1 << 1;
/// Entries of 1 mean zeros.
pub(super) const FLAG_ZEROED: u32 = 1 << 2;
/// Grains are compressed.
pub(super) const FLAG_COMPRESSED: u32 = 1 << 16;
/// Markers lie between grains and tables.
pub(super) const FLAG_MARKERS: u32 = 1 << 17;
const KNOWN_FLAGS: u32 = FLAG_NEWLINE | FLAG_REDUNDANT | FLAG_ZEROED | FLAG_COMPRESSED | FLAG_MARKERS;

/// A KDMV header as it lies in the file.
#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawKdmv {
    pub(super) magic: [u8; 4],
    pub(super) version: U32,
    pub(super) flags: U32,
    pub(super) capacity: U64,
    pub(super) grain: U64,
    pub(super) descriptor_at: U64,
    pub(super) descriptor_len: U64,
    pub(super) entries: U32,
    pub(super) redundant_at: U64,
    pub(super) directory_at: U64,
    pub(super) overhead: U64,
    pub(super) unclean: u8,
    pub(super) newlines: [u8; 4],
    pub(super) compression: U16,
    pub(super) rest: [u8; 433],
}

/// A COWD header up to what matters.
#[derive(Clone, Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawCowd {
    magic: [u8; 4],
    version: U32,
    flags: U32,
    capacity: U32,
    grain: U32,
    directory_at: U32,
    directory_entries: U32,
    next_free: U32,
}

/// What is said of a sparse extent, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SparseHeader {
    /// `None` for COWD.
    pub(super) kdmv_version: Option<u32>,
    pub(super) flags: u32,
    /// Bytes of the disk.
    pub(super) disk_bytes: u64,
    pub(super) grain_bytes: u64,
    /// Entries of a table.
    pub(super) entries: u32,
    pub(super) directory_at: HostOffset,
    pub(super) redundant_at: Option<HostOffset>,
    /// Grains begin behind this.
    pub(super) overhead: HostOffset,
    /// The embedded descriptor: where, and how many bytes.
    pub(super) descriptor: Option<(HostOffset, u64)>,
    pub(super) unclean: bool,
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

/// A place that is given in sectors.
fn place(sectors: u64, what: &str) -> Result<HostOffset> {
    sectors
        .checked_mul(SECTOR_BYTES)
        .and_then(|b| HostOffset(0).checked_add(b))
        .ok_or_else(|| corrupt(format!("the {what} lies at sector {sectors}")))
}

impl SparseHeader {
    /// Reads the header of a sparse extent; where the first one says so, the one in the footer.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`], [`ErrorKind::Corrupt`] or [`ErrorKind::Unsupported`], naming the field.
    pub(super) fn read(source: &dyn ByteSource) -> Result<Self> {
        let mut head = [0; KDMV_BYTES];
        if source.len() < KDMV_BYTES as u64 {
            return Err(corrupt(format!("the file has {} bytes, less than its header", source.len())));
        }
        source.read_at(HostOffset(0), &mut head)?;
        match [head[0], head[1], head[2], head[3]] {
            KDMV => {
                let raw = RawKdmv::read_from_bytes(&head).expect("a header's bytes");
                if raw.directory_at.get() == IN_FOOTER {
                    // the descriptor is where the head says
                    let mut foot = Self::footer(source)?;
                    (foot.descriptor_at, foot.descriptor_len) = (raw.descriptor_at, raw.descriptor_len);
                    return Self::of_kdmv(&foot, source.len());
                }
                Self::of_kdmv(&raw, source.len())
            }
            COWD => Self::of_cowd(&head, source.len()),
            _ => Err(Error::new(ErrorKind::NotThisFormat, "the signature of a VMDK extent is missing")),
        }
    }

    /// The footer of a stream: a header again, before the mark of the end.
    fn footer(source: &dyn ByteSource) -> Result<RawKdmv> {
        let missing = || corrupt("the stream's footer is missing");
        let at = source.len().checked_sub(2 * KDMV_BYTES as u64).ok_or_else(missing)?;
        let mut bytes = [0; KDMV_BYTES];
        source.read_at(HostOffset(at), &mut bytes)?;
        let raw = RawKdmv::read_from_bytes(&bytes).expect("a header's bytes");
        if raw.magic != KDMV || raw.directory_at.get() == IN_FOOTER {
            return Err(missing());
        }
        Ok(raw)
    }

    fn of_kdmv(raw: &RawKdmv, file_bytes: u64) -> Result<Self> {
        let (version, flags) = (raw.version.get(), raw.flags.get());
        if !(1..=3).contains(&version) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("version {version} of VMDK is not known"),
            ));
        }
        if flags & !KNOWN_FLAGS != 0 {
            let what = format!("unknown flags {:#x} in the header", flags & !KNOWN_FLAGS);
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        if flags & FLAG_NEWLINE != 0 && raw.newlines != *b"\n \r\n" {
            return Err(corrupt("line ends were changed in it, as by a transfer in text mode"));
        }
        match (flags & FLAG_COMPRESSED != 0, raw.compression.get()) {
            (true, 1) | (false, 0) => {}
            (_, other) => return Err(corrupt(format!("compression {other} with flags {flags:#x}"))),
        }
        let redundant = flags & FLAG_REDUNDANT != 0 && raw.redundant_at.get() != 0;
        let descriptor = match (raw.descriptor_at.get(), raw.descriptor_len.get()) {
            (0, _) | (_, 0) => None,
            (at, sectors) => Some((place(at, "descriptor")?, place(sectors, "descriptor's end")?.0)),
        };
        let header = SparseHeader {
            kdmv_version: Some(version),
            flags,
            disk_bytes: place(raw.capacity.get(), "end of the disk")?.0,
            grain_bytes: place(raw.grain.get(), "end of a grain")?.0,
            entries: raw.entries.get(),
            directory_at: place(raw.directory_at.get(), "directory")?,
            redundant_at: redundant.then(|| place(raw.redundant_at.get(), "second directory")).transpose()?,
            overhead: place(raw.overhead.get(), "end of the metadata")?,
            descriptor,
            unclean: raw.unclean != 0,
        };
        header.checked(file_bytes)
    }

    fn of_cowd(head: &[u8; KDMV_BYTES], file_bytes: u64) -> Result<Self> {
        let (raw, _) = RawCowd::read_from_prefix(head).expect("a header's bytes");
        if raw.version.get() != 1 {
            let what = format!("version {} of COWD is not known", raw.version.get());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let sectors = |n: U32, what: &str| place(u64::from(n.get()), what);
        let directory_at = sectors(raw.directory_at, "directory")?;
        let header = SparseHeader {
            kdmv_version: None,
            flags: 0,
            disk_bytes: sectors(raw.capacity, "end of the disk")?.0,
            grain_bytes: sectors(raw.grain, "end of a grain")?.0,
            entries: COWD_ENTRIES,
            directory_at,
            redundant_at: None,
            overhead: directory_at,
            descriptor: None,
            unclean: false,
        };
        let header = header.checked(file_bytes)?;
        if u64::from(raw.directory_entries.get()) < header.tables() {
            let what =
                format!("a directory of {} entries for {} tables", raw.directory_entries, header.tables());
            return Err(corrupt(what));
        }
        Ok(header)
    }

    /// Rules that both kinds share.
    fn checked(self, file_bytes: u64) -> Result<Self> {
        if self.disk_bytes == 0 || self.disk_bytes > MAX_DISK_BYTES {
            return Err(corrupt(format!("an extent of {} bytes", self.disk_bytes)));
        }
        // ESX's own snapshots have grains of one sector.
        let least = if self.kdmv_version.is_some() { MIN_BLOCK_BYTES } else { SECTOR_BYTES };
        if !self.grain_bytes.is_power_of_two() || !(least..=MAX_BLOCK_BYTES).contains(&self.grain_bytes) {
            return Err(corrupt(format!("grains of {} bytes", self.grain_bytes)));
        }
        if !self.entries.is_power_of_two() || !(128..=COWD_ENTRIES).contains(&self.entries) {
            return Err(corrupt(format!("tables of {} entries", self.entries)));
        }
        let bytes = self.tables() * 4;
        let inside = |at: HostOffset| {
            at.0 >= SECTOR_BYTES && at.checked_add(bytes).is_some_and(|end| end.0 <= file_bytes)
        };
        if bytes > MAX_DIRECTORY_BYTES || !inside(self.directory_at) || !self.redundant_at.is_none_or(inside)
        {
            return Err(corrupt(format!(
                "the directory of {bytes} bytes at byte {} lies behind the file's end at {file_bytes}",
                self.directory_at.0
            )));
        }
        if let Some((at, len)) = self.descriptor
            && at.checked_add(len).is_none_or(|end| end.0 > file_bytes)
        {
            return Err(corrupt("the descriptor lies behind the end of the file"));
        }
        Ok(self)
    }

    /// Bytes of the disk that one table describes.
    pub(super) fn table_span(&self) -> u64 {
        self.grain_bytes * u64::from(self.entries)
    }

    /// Tables: entries of the directory.
    pub(super) fn tables(&self) -> u64 {
        self.disk_bytes.div_ceil(self.table_span())
    }

    pub(super) fn is_compressed(&self) -> bool {
        self.flags & FLAG_COMPRESSED != 0
    }

    /// An entry of 1 means zeros.
    pub(super) fn has_zeroed(&self) -> bool {
        self.kdmv_version.is_some() && self.flags & FLAG_ZEROED != 0
    }
}
