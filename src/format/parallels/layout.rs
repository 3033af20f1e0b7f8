//! Arithmetic of a checked header. Header and table are seen as one run of 32-bit words, which is how they are written:
//! pages of the file, from its start.

use crate::limits::{META_PAGE_BYTES, SECTOR_BYTES};
use crate::map::{BlockIndex, GuestOffset, GuestRange, HostBlock, HostOffset, MetaKey};

/// The word of the file in which the first entry is.
pub(super) const FIRST_ENTRY: u32 = 16;
/// Words of a page.
pub(super) const PAGE_WORDS: u32 = META_PAGE_BYTES as u32 / 4;

/// Where everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) disk_bytes: u64,
    pub(super) cluster_bytes: u64,
    /// Clusters of the disk; the table may have more entries.
    pub(super) blocks: u32,
    /// Words of header and table.
    pub(super) words: u32,
    /// What an entry counts: clusters (the new magic), or sectors.
    unit: u64,
    /// Where place 0 is. Places follow each other; whatever the image of another program has between them is still read.
    origin: u64,
}

impl Layout {
    pub(super) fn new(
        disk_bytes: u64,
        cluster_bytes: u64,
        blocks: u32,
        words: u32,
        data_at: u64,
        extended: bool,
    ) -> Self {
        let unit = if extended { cluster_bytes } else { SECTOR_BYTES };
        let origin = data_at.max(u64::from(words) * 4).next_multiple_of(unit);
        Layout { disk_bytes, cluster_bytes, blocks, words, unit, origin }
    }

    /// Largest power of two that divides what lies in the file.
    pub(super) fn alignment(&self) -> u64 {
        1 << (self.origin | self.cluster_bytes | self.unit).trailing_zeros()
    }

    /// Where the data begins.
    pub(super) fn data_at(&self) -> u64 {
        self.origin
    }

    pub(super) fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.disk_bytes))
    }

    /// The block around `at`; behind the last one for an offset behind the disk.
    pub(super) fn block_at(&self, at: GuestOffset) -> u32 {
        u32::try_from(at.0 / self.cluster_bytes).unwrap_or(self.blocks).min(self.blocks)
    }

    /// The guest range of a block, clipped to the disk.
    pub(super) fn unit(&self, block: u64) -> GuestRange {
        let start = block.saturating_mul(self.cluster_bytes).min(self.disk_bytes);
        let end = start.saturating_add(self.cluster_bytes).min(self.disk_bytes);
        GuestRange::between(GuestOffset(start), GuestOffset(end))
    }

    pub(super) fn claim(&self, at: GuestOffset) -> BlockIndex {
        BlockIndex(u64::from(self.block_at(at)))
    }

    /// Where the block is that an entry names; `None`: it names none.
    pub(super) fn place_named(&self, value: u32) -> Option<HostOffset> {
        (value != 0).then(|| HostOffset(u64::from(value) * self.unit))
    }

    /// The entry for a block at a place.
    ///
    /// # Panics
    /// For places that no entry can name: [`Self::most_places`] keeps them from being made.
    pub(super) fn value_for(&self, at: HostOffset) -> u32 {
        debug_assert!(at.0.is_multiple_of(self.unit), "a place between two");
        u32::try_from(at.0 / self.unit).expect("no more places than entries can name")
    }

    pub(super) fn place_at(&self, place: HostBlock) -> HostOffset {
        HostOffset(self.origin + u64::from(place.0) * self.cluster_bytes)
    }

    pub(super) fn end_of(&self, places: u32) -> HostOffset {
        self.place_at(HostBlock(places))
    }

    /// As many places as entries can name.
    pub(super) fn most_places(&self) -> u32 {
        let named = (u64::from(u32::MAX) * self.unit).saturating_sub(self.origin) / self.cluster_bytes;
        u32::try_from(named).unwrap_or(u32::MAX)
    }

    /// The places that a block at `at` touches: one, or two where another program has put it between them.
    pub(super) fn places_touched(&self, at: HostOffset) -> std::ops::RangeInclusive<u32> {
        let into = at.0 - self.origin;
        let place = |b: u64| u32::try_from(b / self.cluster_bytes).unwrap_or(u32::MAX);
        place(into)..=place(into + self.cluster_bytes - 1)
    }

    /// Bytes of the file that must be there for the block to be readable at `at`.
    pub(super) fn needed_for(&self, block: u32, at: HostOffset) -> u64 {
        at.0 + self.unit(u64::from(block)).len()
    }

    /// The word of a block's entry.
    pub(super) fn word_of(&self, block: u32) -> u32 {
        FIRST_ENTRY + block
    }

    pub(super) fn page_of(word: u32) -> MetaKey {
        MetaKey::Page { table: 0, number: u64::from(word / PAGE_WORDS) }
    }

    /// The words of a page: first one, and one behind the last.
    pub(super) fn words_of(&self, page: u32) -> (u32, u32) {
        let first = page.saturating_mul(PAGE_WORDS).min(self.words);
        (first, first.saturating_add(PAGE_WORDS).min(self.words))
    }
}

/// A word's number as an index of memory.
pub(super) fn idx(n: u32) -> usize {
    usize::try_from(n).expect("32 bits fit")
}
