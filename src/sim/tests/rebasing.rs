//! Changes of parents that are interrupted.

use crate::sim::{Kind, Rng, Stack, interrupted_rebase};

const SEEDS: u64 = if cfg!(debug_assertions) { 40 } else { 400 };

/// The uppermost of these kinds (the base first) onto others, or onto nothing.
fn rebases(kinds: &[Kind], onto: &[Kind]) {
    let name = |kinds: &[Kind]| kinds.iter().map(|k| k.name()).collect::<Vec<_>>().join(" < ");
    let mut states = 0;
    for seed in 0..SEEDS {
        let mut rng = Rng(seed);
        let stack = Stack::new(kinds, &mut rng);
        let other = (!onto.is_empty()).then(|| Stack::new(onto, &mut rng));
        states += interrupted_rebase(&stack, other.as_ref(), 4, &mut rng)
            .unwrap_or_else(|e| panic!("{} onto {} seed {seed}: a rebase {e}", name(kinds), name(onto)));
    }
    println!("{} onto {}: {states} states", name(kinds), name(onto));
    assert!(states > SEEDS * 4, "{states}");
}

#[test]
fn powercut_while_a_vdi_is_rebased() {
    rebases(&[Kind::Vdi, Kind::DiffDiscard], &[Kind::Vdi]);
    rebases(&[Kind::Vdi, Kind::DiffDiscard, Kind::DiffDiscard], &[]);
}

#[test]
fn powercut_while_a_vhd_is_rebased() {
    rebases(&[Kind::Vhd, Kind::VhdDiff], &[Kind::Vdi]);
    rebases(&[Kind::Vhd, Kind::VhdDiff], &[]);
}

#[test]
fn powercut_while_a_vmdk_is_rebased() {
    rebases(&[Kind::Vmdk, Kind::VmdkDiff], &[Kind::Vmdk]);
    rebases(&[Kind::Vmdk, Kind::VmdkZeroed], &[Kind::Raw]);
    rebases(&[Kind::Vmdk, Kind::VmdkDiff], &[]);
}

#[test]
fn powercut_while_a_qcow2_is_rebased() {
    rebases(&[Kind::Qcow2, Kind::Qcow2Diff], &[Kind::Raw, Kind::Qcow2Diff]);
    rebases(&[Kind::Raw, Kind::Qcow2Diff], &[]);
}

#[test]
fn powercut_while_a_qed_or_a_qcow_is_rebased() {
    rebases(&[Kind::Qed, Kind::QedDiff], &[Kind::Raw]);
    rebases(&[Kind::Qcow, Kind::QcowDiff], &[Kind::Qcow2]);
    rebases(&[Kind::Qcow, Kind::QcowDiff], &[]);
}

#[test]
fn powercut_while_a_parallels_image_is_rebased() {
    rebases(&[Kind::Parallels, Kind::ParallelsDiff], &[Kind::Vdi]);
}
