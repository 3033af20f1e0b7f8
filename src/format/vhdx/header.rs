//! The file's signature and its two headers, of which the one with the higher number counts.

use super::place::{MIB, Region};
use super::{corrupt, unsupported};
use crate::error::{Error, ErrorKind, Result};
use crate::format::crc32c::checksum;
use crate::limits::MAX_VHDX_LOG_BYTES;
use crate::map::{ByteSource, HostOffset};
use crate::probe::small::unit;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const SIGNATURE: &[u8; 8] = b"vhdxfile";
const HEADERS_AT: [u64; 2] = [64 << 10, 128 << 10];
const HEADER_SIGNATURE: [u8; 4] = *b"head";
/// Shortest log that is written.
pub(super) const MIN_LOG_BYTES: u64 = 16 * unit(64 << 10);
#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    signature: [u8; 4],
    checksum: U32,
    sequence: U64,
    file_write: [u8; 16],
    data_write: [u8; 16],
    log: [u8; 16],
    log_version: U16,
    version: U16,
    log_bytes: U32,
    log_at: U64,
    reserved: [u8; 4016],
}

/// What states of the file are called by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ids {
    pub(super) file_write: Uuid,
    pub(super) data_write: Uuid,
    /// Zeros: no log counts.
    pub(super) log: [u8; 16],
}

/// What the two headers say.
#[derive(Clone, Debug)]
pub(super) struct Headers {
    pub(super) current: Header,
    /// Which of the two it is.
    pub(super) slot: usize,
    /// The other one is good as well.
    pub(super) both_are_good: bool,
}

impl Header {
    fn read(source: &dyn ByteSource, at: u64) -> Result<Option<Self>> {
        let mut h = Header::new_zeroed();
        if source.len() < at + size_of::<Header>() as u64 {
            return Ok(None);
        }
        source.read_at(HostOffset(at), h.as_mut_bytes())?;
        let good = h.signature == HEADER_SIGNATURE && h.checksum.get() == checksum(h.as_bytes(), 4);
        Ok(good.then_some(h))
    }

    /// Where one of the two is.
    pub(super) fn at(slot: usize) -> u64 {
        HEADERS_AT[slot]
    }

    /// A header of a new file, with a place for a log.
    pub(super) fn new(ids: Ids, log: Region) -> Self {
        let mut h = Header::new_zeroed();
        h.signature = HEADER_SIGNATURE;
        h.version = 1.into();
        h.log_at = log.at.into();
        h.log_bytes = u32::try_from(log.len).expect("MAX_VHDX_LOG_BYTES").into();
        h.renewed(ids, 1)
    }

    /// The header after a change of the file: so many numbers on.
    pub(super) fn renewed(&self, ids: Ids, ahead: u64) -> Self {
        let mut h = self.clone();
        h.sequence = self.sequence().saturating_add(ahead).into();
        h.file_write = ids.file_write.to_bytes_le();
        h.data_write = ids.data_write.to_bytes_le();
        h.log = ids.log;
        h.log_version = 0.into();
        h.checksum = checksum(h.as_bytes(), 4).into();
        h
    }

    /// What it calls the file's states by.
    pub(super) fn ids(&self) -> Ids {
        Ids { file_write: self.file_write(), data_write: self.data_write(), log: self.log }
    }

    pub(super) fn sequence(&self) -> u64 {
        self.sequence.get()
    }

    /// Changes whenever the contents of the disk do: what children call their parent by.
    pub(super) fn data_write(&self) -> Uuid {
        Uuid::from_bytes_le(self.data_write)
    }

    pub(super) fn file_write(&self) -> Uuid {
        Uuid::from_bytes_le(self.file_write)
    }

    /// The log, if it has entries that count; their GUID, begin and length.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a log where none can be.
    pub(super) fn log(&self) -> Result<Option<([u8; 16], u64, u64)>> {
        if self.log == [0; 16] {
            return Ok(None);
        }
        let (at, len) = self.log_extent();
        if self.log_version.get() != 0 {
            return Err(unsupported(format!(
                "version {} of the log is not supported",
                self.log_version.get()
            )));
        }
        if !log_fits(at, len) {
            return Err(corrupt(format!("the log is said to have {len} bytes at {at}, where no log can be")));
        }
        Ok(Some((self.log, at, len)))
    }

    /// Where a log can be written, in use or not.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] and [`ErrorKind::Limit`] without such a place.
    pub(super) fn log_place(&self, file_bytes: u64) -> Result<Region> {
        let (at, len) = self.log_extent();
        let fits = log_fits(at, len) && len >= MIN_LOG_BYTES;
        if !fits || at + len > file_bytes {
            return Err(unsupported("it has no place for a log, so it cannot be written"));
        }
        if len > MAX_VHDX_LOG_BYTES {
            let what = format!("its log has {len} bytes; {MAX_VHDX_LOG_BYTES} are the limit for writing");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        Ok(Region { at, len })
    }

    /// Where the log is said to be, in use or not.
    pub(super) fn log_extent(&self) -> (u64, u64) {
        (self.log_at.get(), self.log_bytes.get().into())
    }
}

fn log_fits(at: u64, len: u64) -> bool {
    at >= MIB
        && at.is_multiple_of(MIB)
        && len > 0
        && len.is_multiple_of(unit(MIB))
        && at.checked_add(len).is_some()
}

impl Headers {
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] without the signature, [`ErrorKind::Corrupt`] without a good header,
    /// [`ErrorKind::Unsupported`] for another version, those of reading.
    pub(super) fn read(source: &dyn ByteSource) -> Result<Self> {
        let mut signature = [0; 8];
        if source.len() >= 8 {
            source.read_at(HostOffset(0), &mut signature)?;
        }
        if signature != *SIGNATURE {
            return Err(Error::new(ErrorKind::NotThisFormat, "not a VHDX: the signature is wrong"));
        }
        let [first, second] = HEADERS_AT;
        let (first, second) = (Header::read(source, first)?, Header::read(source, second)?);
        let both_are_good = first.is_some() && second.is_some();
        let found = (0..).zip([first, second]).filter_map(|(slot, h)| Some((slot, h?)));
        let newest = found.max_by_key(|(_, h)| h.sequence());
        let none = || corrupt("neither of its two headers has a right checksum");
        let (slot, current) = newest.ok_or_else(none)?;
        if current.version.get() != 1 {
            return Err(unsupported(format!("VHDX version {} is not supported", current.version.get())));
        }
        Ok(Headers { current, slot, both_are_good })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_the_layout_of_the_format() {
        assert_eq!(size_of::<Header>(), 4096);
        assert_eq!(std::mem::offset_of!(Header, log), 48);
        assert_eq!(std::mem::offset_of!(Header, log_at), 72);
    }
}
