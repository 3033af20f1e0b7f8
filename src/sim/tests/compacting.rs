//! Compacting that is interrupted.

use super::repairing::lived;
use crate::format::Spare;
use crate::sim::{Images, Kind, Rng, Shape, interrupted_compacting};

const SEEDS: u64 = if cfg!(debug_assertions) { 25 } else { 400 };

/// What `view` need not keep of blocks of `block` bytes, over `beneath`.
fn spare_of(view: &[u8], beneath: &[u8], block: usize) -> Spare {
    let mut spare = Spare::default();
    for (n, (own, other)) in (0u32..).zip(view.chunks(block).zip(beneath.chunks(block))) {
        if own == other {
            spare.same.insert(n);
        } else if own.iter().all(|b| *b == 0) {
            spare.zero.insert(n);
        }
    }
    spare
}

fn compacts(kind: Kind) {
    let (mut states, mut shorter) = (0, 0);
    for seed in 0..SEEDS {
        let mut rng = Rng(seed);
        let shape = Shape { kind, size: 512 * (1 + rng.below(192)), block: 4096 << rng.below(2) };
        let (new, past) = Images::new(shape, &mut rng);
        let beneath = new.beneath().unwrap();
        let images = lived(new, past, &mut rng);
        let mut bytes = images.top.bytes();
        // blocks of zeros come from programs that write them
        let view = images.view(&bytes).unwrap();
        let spare = spare_of(&view, &beneath, usize::try_from(shape.block).unwrap());
        if rng.chance(30) {
            bytes.set_len(bytes.len() + 512 * rng.below(40));
        }
        states += interrupted_compacting(&images, &bytes, &spare, 6, &mut rng)
            .unwrap_or_else(|e| panic!("{} seed {seed}: {e}", kind.name()));
        shorter += u32::from(spare.same.count() + spare.zero.count() > 0);
    }
    println!("{}: {states} states, {shorter} images with something to spare", kind.name());
    assert!(states > 2 * SEEDS && shorter > 0, "{states} {shorter}");
}

#[test]
fn powercut_while_a_vdi_is_compacted() {
    [Kind::Vdi, Kind::DiffDiscard].into_iter().for_each(compacts);
}

#[test]
fn powercut_while_a_vhd_is_compacted() {
    [Kind::Vhd, Kind::VhdDiff].into_iter().for_each(compacts);
}

#[test]
fn powercut_while_a_parallels_image_is_compacted() {
    [Kind::Parallels, Kind::ParallelsDiff].into_iter().for_each(compacts);
}

#[test]
fn powercut_while_a_vmdk_is_compacted() {
    [Kind::Vmdk, Kind::VmdkDiff, Kind::VmdkZeroed].into_iter().for_each(compacts);
}
