//! Ranges of the file, and what they are multiples of.

use crate::probe::small::unit;

/// What regions and blocks lie behind, and regions are aligned to.
pub(super) const MIB: u64 = 1 << 20;
/// What blocks are aligned to, and bytes of a bitmap.
pub(super) const BLOCK_UNIT: u64 = unit(MIB);

/// A range of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Region {
    pub(super) at: u64,
    pub(super) len: u64,
}

impl Region {
    pub(super) fn end(self) -> u64 {
        self.at.saturating_add(self.len)
    }

    pub(super) fn overlaps(self, at: u64, len: u64) -> bool {
        self.at < at.saturating_add(len) && at < self.end()
    }
}
