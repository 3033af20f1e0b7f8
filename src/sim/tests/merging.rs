//! Merges that are interrupted.

use crate::sim::{Kind, Rng, Stack, interrupted_merge};

const SEEDS: u64 = if cfg!(debug_assertions) { 40 } else { 400 };

/// Spans of all sorts in stacks of these kinds, the base first.
fn merges(kinds: &[Kind]) {
    let name = kinds.iter().map(|k| k.name()).collect::<Vec<_>>().join(" < ");
    let mut states = 0;
    for seed in 0..SEEDS {
        let mut rng = Rng(seed);
        let stack = Stack::new(kinds, &mut rng);
        let from = rng.index(kinds.len());
        let into = (from + 1 + rng.index(kinds.len() - 1)) % kinds.len();
        states += interrupted_merge(&stack, (from, into), 4, &mut rng)
            .unwrap_or_else(|e| panic!("{name} seed {seed}, {from} into {into}: a merge {e}"));
    }
    println!("{name}: {states} states");
    assert!(states > SEEDS * 4, "{states}");
}

#[test]
fn powercut_while_vdis_are_merged() {
    merges(&[Kind::Vdi, Kind::DiffDiscard, Kind::DiffDiscard, Kind::DiffDiscard]);
}

#[test]
fn powercut_while_vhds_are_merged() {
    merges(&[Kind::Vhd, Kind::VhdDiff, Kind::VhdDiff, Kind::VhdDiff]);
}

#[test]
fn powercut_while_vmdks_are_merged() {
    merges(&[Kind::Vmdk, Kind::VmdkDiff, Kind::VmdkZeroed, Kind::VmdkDiff]);
}

#[test]
fn powercut_while_qcow2s_are_merged() {
    merges(&[Kind::Qcow2, Kind::Qcow2Diff, Kind::Qcow2Diff, Kind::Qcow2Diff]);
}

#[test]
fn powercut_while_qeds_are_merged() {
    merges(&[Kind::Qed, Kind::QedDiff, Kind::QedDiff]);
}

#[test]
fn powercut_while_qcows_are_merged() {
    merges(&[Kind::Qcow, Kind::QcowDiff, Kind::QcowDiff]);
}

#[test]
fn powercut_while_parallels_images_are_merged() {
    merges(&[Kind::Parallels, Kind::ParallelsDiff, Kind::ParallelsDiff]);
}

#[test]
fn powercut_while_images_of_many_formats_are_merged() {
    merges(&[Kind::Raw, Kind::QcowDiff, Kind::VhdDiff, Kind::DiffDiscard, Kind::VmdkZeroed, Kind::Qcow2Diff]);
}
