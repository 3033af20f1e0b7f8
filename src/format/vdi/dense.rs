//! Making an image dense: which blocks move where.

use super::layout::Entry;
use super::table::Used;
use crate::map::HostBlock;

/// A block that moves into a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Relocation {
    /// The guest block.
    pub(super) block: u32,
    pub(super) from: HostBlock,
    pub(super) to: HostBlock,
}

/// The moves after which the places in use are exactly `0..count`, each into a hole below `count` from at or
/// above it. No place is both left and entered.
pub(super) fn relocations(entries: impl Iterator<Item = u32>, used: &Used) -> Vec<Relocation> {
    let count = u32::try_from(used.places.count()).expect("places are 32-bit numbers");
    let mut holes = (0..count).filter(|p| !used.places.contains(*p));
    let mut moves = Vec::new();
    for (block, value) in (0u32..).zip(entries) {
        let Entry::At(from) = Entry::of(value) else { continue };
        if from.0 >= count {
            let to = HostBlock(holes.next().expect("as many holes below the count as blocks above it"));
            moves.push(Relocation { block, from, to });
        }
    }
    moves
}
