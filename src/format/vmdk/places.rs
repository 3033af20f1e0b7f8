//! Places of a sparse extent: as large as a grain, counted from a whole grain on.

use super::layout::{Entry, Layout};
use crate::limits::SECTOR_BYTES;
use crate::map::{Bitmap, HostOffset};

/// Which places of a file are in use, counted from `grid`.
pub(super) fn used_places(layout: &Layout, grid: HostOffset, entries: impl Iterator<Item = u32>) -> Bitmap {
    let size = layout.header.grain_bytes;
    let mut used = Bitmap::new();
    let mut mark = |from: u64, to: u64| {
        let first = from.saturating_sub(grid.0) / size;
        let end = to.saturating_sub(grid.0).div_ceil(size);
        for place in first..end {
            used.insert(u32::try_from(place).expect("below 2^32 sectors"));
        }
    };
    for (from, to) in &layout.metadata {
        mark(from * SECTOR_BYTES, to * SECTOR_BYTES);
    }
    // a table may go on behind the last grain; what stands there is nobody's
    for (_, value) in (0..layout.grains()).zip(entries) {
        if let Entry::At(at) = layout.entry(value) {
            mark(at.0, at.0 + size);
        }
    }
    used
}

/// One more than the highest place in use.
pub(super) fn end_of_used(used: &Bitmap) -> u32 {
    used.last().map_or(0, |p| p + 1)
}

/// The number of the sector at a place, as entries say it.
pub(super) fn sector_of(at: HostOffset) -> u32 {
    u32::try_from(at.0 / SECTOR_BYTES).expect("places are below 2^32 sectors")
}

/// A grain that moves into a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) grain: u64,
    pub(super) from: HostOffset,
    pub(super) to: HostOffset,
}

/// How a file becomes dense.
#[derive(Debug)]
pub(super) struct Dense {
    /// No place is both left and entered.
    pub(super) moves: Vec<Move>,
    /// Where the file ends afterwards.
    pub(super) end: HostOffset,
    /// Places below the highest one in use that belong to nobody before.
    pub(super) holes: u64,
}

impl Dense {
    /// Moves grains from the end of the file into its holes, unless there are more than `most` of them. A grain that lies
    /// across two places does not move.
    pub(super) fn plan<I: Iterator<Item = u32>>(
        layout: &Layout,
        grid: HostOffset,
        entries: &dyn Fn() -> I,
        most: u64,
    ) -> Self {
        let size = layout.header.grain_bytes;
        let place = |n: u32| grid.plus(u64::from(n) * size);
        let mut used = used_places(layout, grid, entries());
        let holes = u64::from(end_of_used(&used)) - used.count() as u64;
        let mut moves = Vec::new();
        if holes > 0 && holes <= most {
            let mut movable: Vec<(HostOffset, u64)> = (0..layout.grains())
                .zip(entries())
                .filter_map(|(grain, e)| match layout.entry(e) {
                    Entry::At(at) if at >= grid && (at.0 - grid.0).is_multiple_of(size) => Some((at, grain)),
                    _ => None,
                })
                .collect();
            movable.sort_unstable();
            let mut hole = 0;
            for (from, grain) in movable.into_iter().rev() {
                while used.contains(hole) {
                    hole += 1;
                }
                if place(hole) > from {
                    break;
                }
                used.insert(hole);
                used.remove(u32::try_from((from.0 - grid.0) / size).expect("below 2^32 sectors"));
                moves.push(Move { grain, from, to: place(hole) });
            }
        }
        Dense { moves, end: place(end_of_used(&used)), holes }
    }
}
