//! The header of images that grow: where the table is, and who the parent is. Big endian.

use super::footer::{NOWHERE, checksum, corrupt};
use super::locator::Locator;
use crate::error::{ErrorKind, Result};
use crate::map::{ByteSource, HostOffset};
use uuid::Uuid;
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the header.
pub(super) const HEADER_BYTES: u64 = 1024;
/// Parent locators of a header.
pub(super) const LOCATORS: usize = 8;
const COOKIE: [u8; 8] = *b"cxsparse";
const VERSION: u32 = 0x0001_0000;
/// UTF-16 units of the parent's name.
const NAME_UNITS: usize = 256;

#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    cookie: [u8; 8],
    data_offset: U64,
    table_at: U64,
    version: U32,
    entries: U32,
    block_bytes: U32,
    checksum: U32,
    parent: [u8; 16],
    parent_time: U32,
    reserved: U32,
    parent_name: [u8; 2 * NAME_UNITS],
    pub(super) locators: [Locator; LOCATORS],
    reserved_too: [u8; 256],
}

/// What the header of a new image says.
#[derive(Clone, Debug)]
pub(super) struct NewHeader<'a> {
    pub(super) table_at: u64,
    pub(super) entries: u32,
    pub(super) block_bytes: u32,
    /// The parent's UUID and name.
    pub(super) parent: Option<(Uuid, &'a str)>,
    pub(super) locators: Vec<Locator>,
}

impl Header {
    pub(super) fn new(n: &NewHeader<'_>) -> Self {
        let mut h = Header::new_zeroed();
        h.cookie = COOKIE;
        h.data_offset = NOWHERE.into();
        h.table_at = n.table_at.into();
        h.version = VERSION.into();
        h.entries = n.entries.into();
        h.block_bytes = n.block_bytes.into();
        h.with_parent(n.parent, &n.locators)
    }

    /// The same with another parent's UUID and name, and the locators that go with it.
    pub(super) fn with_parent(&self, parent: Option<(Uuid, &str)>, locators: &[Locator]) -> Self {
        let mut h = self.clone();
        (h.parent, h.parent_time) = ([0; 16], 0.into());
        h.parent_name = [0; 2 * NAME_UNITS];
        h.locators = std::array::from_fn(|_| Locator::new_zeroed());
        if let Some((id, name)) = parent {
            h.parent = id.to_bytes_le();
            // the last unit stays the closing NUL
            for (out, unit) in h.parent_name.chunks_exact_mut(2).zip(name.encode_utf16().take(NAME_UNITS - 1))
            {
                out.copy_from_slice(&unit.to_be_bytes());
            }
        }
        for (own, new) in h.locators.iter_mut().zip(locators) {
            *own = new.clone();
        }
        h.checksum = h.sum().into();
        h
    }

    fn sum(&self) -> u32 {
        let at = std::mem::offset_of!(Header, checksum);
        checksum(self.as_bytes(), at..at + 4)
    }

    /// # Errors
    /// [`ErrorKind::Corrupt`] where it is none, or another version.
    pub(super) fn read(source: &dyn ByteSource, at: u64) -> Result<Self> {
        let mut h = Header::new_zeroed();
        let there = at >= 512 && at.checked_add(HEADER_BYTES).is_some_and(|end| end <= source.len());
        if !there {
            return Err(corrupt(format!("the header is said to be at byte {at}, where no header can be")));
        }
        source.read_at(HostOffset(at), h.as_mut_bytes())?;
        if h.cookie != COOKIE {
            return Err(corrupt(format!("there is no header at byte {at}: its signature is wrong")));
        }
        if h.checksum.get() != h.sum() {
            return Err(corrupt("the checksum of the header is wrong"));
        }
        if h.version.get() >> 16 != VERSION >> 16 {
            let what = format!("version {:#x} of the header is not supported", h.version.get());
            return Err(crate::error::Error::new(ErrorKind::Unsupported, what));
        }
        Ok(h)
    }

    /// The table has another number of entries. Of the bytes in the file only the first sector's change.
    pub(super) fn set_entries(&mut self, entries: u32) {
        self.entries = entries.into();
        self.checksum = self.sum().into();
    }

    /// Another UUID of the parent. Of the bytes in the file only the first sector's change.
    pub(super) fn set_parent(&mut self, id: Uuid) {
        self.parent = id.to_bytes_le();
        self.checksum = self.sum().into();
    }

    pub(super) fn table_at(&self) -> u64 {
        self.table_at.get()
    }

    pub(super) fn entries(&self) -> u32 {
        self.entries.get()
    }

    pub(super) fn block_bytes(&self) -> u32 {
        self.block_bytes.get()
    }

    /// The parent's UUID.
    pub(super) fn parent(&self) -> Option<Uuid> {
        Some(Uuid::from_bytes_le(self.parent)).filter(|u| !u.is_nil())
    }

    /// The name the header itself gives the parent.
    pub(super) fn parent_name(&self) -> Option<String> {
        let units = self.parent_name.as_chunks::<2>().0.iter().map(|u| u16::from_be_bytes(*u));
        let units: Vec<u16> = units.take_while(|u| *u != 0).collect();
        (!units.is_empty()).then(|| String::from_utf16_lossy(&units))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_the_layout_of_the_format() {
        assert_eq!(size_of::<Header>(), 1024);
        assert_eq!(std::mem::offset_of!(Header, checksum), 36);
        assert_eq!(std::mem::offset_of!(Header, parent_name), 64);
        assert_eq!(std::mem::offset_of!(Header, locators), 576);
    }
}
