//! Arithmetic of a checked header: guest bytes to blocks, places to file offsets.

use crate::limits::META_PAGE_BYTES;
use crate::map::{BlockIndex, GuestOffset, GuestRange, HostBlock, HostOffset, MetaKey};

/// A block without a place: the parent's bytes are seen, in a base zeros.
pub(super) const FREE: u32 = 0xffff_ffff;
/// A block of zeros without a place.
pub(super) const ZERO: u32 = 0xffff_fffe;
/// Entries of one page of the table.
pub(super) const PAGE_ENTRIES: u32 = META_PAGE_BYTES as u32 / 4;

/// What a table entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Free,
    Zero,
    At(HostBlock),
}

impl Entry {
    pub(super) fn of(value: u32) -> Self {
        match value {
            FREE => Entry::Free,
            ZERO => Entry::Zero,
            place => Entry::At(HostBlock(place)),
        }
    }
}

/// Where everything is. Made by [`super::header::Header::layout`], which vouches that no sum below passes 2^63.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) disk_bytes: u64,
    pub(super) block_shift: u32,
    pub(super) block_bytes: u64,
    /// Bytes before the data of each block.
    pub(super) extra_bytes: u64,
    /// Entries of the table: blocks of the disk, and most places the file can have.
    pub(super) blocks: u32,
    pub(super) table_at: HostOffset,
    pub(super) data_at: HostOffset,
}

impl Layout {
    pub(super) fn table_bytes(&self) -> u64 {
        u64::from(self.blocks) * 4
    }

    /// Bytes from one place to the next.
    pub(super) fn stride(&self) -> u64 {
        self.block_bytes + self.extra_bytes
    }

    /// Largest power of two that divides the places of table and blocks.
    pub(super) fn alignment(&self) -> u64 {
        let bits = self.table_at.0 | self.data_at.0 | self.extra_bytes | self.block_bytes;
        1 << bits.trailing_zeros()
    }

    /// The guest block around `at`; `None` behind the last one.
    pub(super) fn block_at(&self, at: GuestOffset) -> Option<u32> {
        u32::try_from(at.0 >> self.block_shift).ok().filter(|b| *b < self.blocks)
    }

    /// The guest range of a block, clipped to the disk (empty for blocks wholly behind its end).
    pub(super) fn unit(&self, block: u32) -> GuestRange {
        let start = (u64::from(block) << self.block_shift).min(self.disk_bytes);
        let end = (start + self.block_bytes).min(self.disk_bytes);
        GuestRange::between(GuestOffset(start), GuestOffset(end))
    }

    /// The whole disk.
    pub(super) fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.disk_bytes))
    }

    /// Where a place begins, its extra bytes included.
    pub(super) fn start_of(&self, place: u32) -> HostOffset {
        self.data_at.plus(u64::from(place) * self.stride())
    }

    /// Where the data of a place begins.
    pub(super) fn data_of(&self, place: HostBlock) -> HostOffset {
        self.start_of(place.0).plus(self.extra_bytes)
    }

    /// The place whose data begins there.
    pub(super) fn place_of(&self, data: HostOffset) -> HostBlock {
        let into = data.0.checked_sub(self.data_at.0).expect("data lies in the data area");
        HostBlock(u32::try_from(into / self.stride()).expect("places have 32-bit numbers"))
    }

    /// End of a file that has `places` places.
    pub(super) fn end_of(&self, places: u32) -> HostOffset {
        self.start_of(places)
    }

    /// Bytes of the file that must be there for `block` to be readable at `place`.
    pub(super) fn needed_for(&self, block: u32, place: HostBlock) -> u64 {
        self.data_of(place).0 + self.unit(block).len()
    }

    pub(super) fn page_of(&self, block: u32) -> MetaKey {
        MetaKey::Page { table: 0, number: u64::from(block / PAGE_ENTRIES) }
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
