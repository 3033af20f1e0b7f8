//! Arithmetic of a checked header: guest bytes to blocks, places to file offsets.
//!
//! A VHD's blocks may lie anywhere. The places we give new ones begin behind everything that is there, one after the other.

use super::footer::{FOOTER_BYTES, Footer, corrupt};
use super::header::{HEADER_BYTES, Header};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{
    MAX_BLOCK_BYTES, MAX_VHD_DISK_BYTES, MAX_VHD_TABLE_BYTES, META_PAGE_BYTES, MIN_BLOCK_BYTES, SECTOR_BYTES,
};
use crate::map::{BlockIndex, GuestOffset, GuestRange, HostOffset, MetaKey};

/// An entry without a place.
pub(super) const FREE: u32 = u32::MAX;
/// Entries of one page of the table.
const PAGE_ENTRIES: u32 = META_PAGE_BYTES as u32 / 4;
/// Bytes of a page of a sector bitmap.
pub(super) const BITMAP_PAGE_BYTES: u64 = 512;
/// Guest bytes that one such page speaks of.
pub(super) const BITMAP_PAGE_SPAN: u64 = BITMAP_PAGE_BYTES * 8 * SECTOR_BYTES;
/// Where no entry can point any more: sectors have 32-bit numbers.
pub(super) const END_OF_SECTORS: u64 = (u32::MAX as u64) * SECTOR_BYTES;

/// The block table.
pub(super) const TABLE: u8 = 0;
/// The sector bitmaps of blocks, by block and page.
pub(super) const BITMAPS: u8 = 1;
/// The sector bitmaps of places, by place and page.
pub(super) const PLACES: u8 = 2;
/// The copy of the footer at the beginning.
pub(super) const COPY: u8 = 3;

/// Where everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) disk_bytes: u64,
    pub(super) block_shift: u32,
    pub(super) block_bytes: u64,
    /// Bytes of the bitmap in front of each block.
    pub(super) bitmap_bytes: u64,
    /// Entries of the table that the disk needs.
    pub(super) blocks: u32,
    pub(super) table_at: HostOffset,
    /// Ranges of the file that are neither blocks nor the footer at the end, in order.
    pub(super) metadata: Vec<(u64, u64)>,
}

impl Layout {
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Limit`], naming the field.
    pub(super) fn new(footer: &Footer, header: &Header, file_bytes: u64) -> Result<Self> {
        let (disk_bytes, block_bytes) = (footer.size_bytes()?, u64::from(header.block_bytes()));
        if !block_bytes.is_power_of_two() {
            return Err(corrupt(format!("the block size {block_bytes} is no power of two")));
        }
        if !(MIN_BLOCK_BYTES..=MAX_BLOCK_BYTES).contains(&block_bytes) {
            let what = format!(
                "the block size {block_bytes} is outside {MIN_BLOCK_BYTES}..={MAX_BLOCK_BYTES} bytes"
            );
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let entries = u64::from(header.entries());
        let blocks = disk_bytes.div_ceil(block_bytes);
        if blocks > entries {
            let what = format!("the disk has {disk_bytes} bytes, but the table has only {entries} entries");
            return Err(corrupt(what));
        }
        if disk_bytes > MAX_VHD_DISK_BYTES {
            let what = format!("the disk size is {disk_bytes} bytes; {MAX_VHD_DISK_BYTES} are the limit");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        if entries * 4 > MAX_VHD_TABLE_BYTES {
            let what = format!("the table has {} bytes; {MAX_VHD_TABLE_BYTES} are the limit", entries * 4);
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let table_at = header.table_at();
        let table_end = table_at.checked_add((entries * 4).next_multiple_of(SECTOR_BYTES));
        let Some(table_end) = table_end.filter(|_| entries * 4 <= file_bytes.saturating_sub(table_at)) else {
            return Err(corrupt(format!("the table at byte {table_at} ends behind the file's end")));
        };
        let head = (footer.header_at(), footer.header_at() + HEADER_BYTES);
        let mut metadata = vec![(0, FOOTER_BYTES), head, (table_at, table_end)];
        if table_at < FOOTER_BYTES || (table_at < head.1 && head.0 < table_end) {
            return Err(corrupt(format!("the table at byte {table_at} lies in the header")));
        }
        metadata.extend(header.locators.iter().filter_map(|l| l.extent(file_bytes)));
        metadata.sort_unstable();
        Ok(Layout {
            disk_bytes,
            block_shift: block_bytes.trailing_zeros(),
            block_bytes,
            bitmap_bytes: (block_bytes / SECTOR_BYTES / 8).next_multiple_of(SECTOR_BYTES),
            blocks: u32::try_from(blocks).expect("no more than there are entries"),
            table_at: HostOffset(table_at),
            metadata,
        })
    }

    /// Bytes of a block and its bitmap.
    pub(super) fn stride(&self) -> u64 {
        self.bitmap_bytes + self.block_bytes
    }

    pub(super) fn block_at(&self, at: GuestOffset) -> Option<u32> {
        u32::try_from(at.0 >> self.block_shift).ok().filter(|b| *b < self.blocks)
    }

    /// The guest range of a block, clipped to the disk.
    pub(super) fn unit(&self, block: u32) -> GuestRange {
        let start = (u64::from(block) << self.block_shift).min(self.disk_bytes);
        let end = (start + self.block_bytes).min(self.disk_bytes);
        GuestRange::between(GuestOffset(start), GuestOffset(end))
    }

    pub(super) fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.disk_bytes))
    }

    /// Where the block of an entry begins, its bitmap first.
    pub(super) fn start_of(entry: u32) -> u64 {
        u64::from(entry) * SECTOR_BYTES
    }

    /// Bytes of the file that must be there for `block` to be readable at `start`.
    pub(super) fn needed_for(&self, block: u32, start: u64) -> u64 {
        start + self.bitmap_bytes + self.unit(block).len()
    }

    /// The first metadata that a block at `start` would lie on.
    pub(super) fn metadata_in(&self, start: u64) -> Option<(u64, u64)> {
        self.metadata.iter().copied().find(|(from, to)| *from < start + self.stride() && start < *to)
    }

    /// Where the metadata ends that stands in front.
    pub(super) fn metadata_end(&self) -> u64 {
        self.metadata.iter().map(|(_, to)| *to).max().unwrap_or_default()
    }

    /// Pages of one block's bitmap.
    pub(super) fn bitmap_pages(&self) -> u64 {
        self.bitmap_bytes / BITMAP_PAGE_BYTES
    }

    pub(super) fn page_of(&self, block: u32) -> MetaKey {
        MetaKey::Page { table: TABLE, number: u64::from(block / PAGE_ENTRIES) }
    }

    /// The entries of a page: first one, and one behind the last.
    pub(super) fn entries_of(&self, page: u32) -> (u32, u32) {
        let first = page.saturating_mul(PAGE_ENTRIES).min(self.blocks);
        (first, first.saturating_add(PAGE_ENTRIES).min(self.blocks))
    }

    /// Where an entry is in the file.
    pub(super) fn entry_at(&self, block: u32) -> HostOffset {
        self.table_at.plus(u64::from(block) * 4)
    }

    /// The block around `at`; behind the last one for an offset behind the disk.
    pub(super) fn block_or_end(&self, at: GuestOffset) -> u32 {
        self.block_at(at).unwrap_or(self.blocks)
    }

    pub(super) fn claim(&self, at: GuestOffset) -> BlockIndex {
        BlockIndex(u64::from(self.block_or_end(at)))
    }
}

/// A table index as an index of memory.
pub(super) fn idx(n: u32) -> usize {
    usize::try_from(n).expect("32 bits fit")
}
