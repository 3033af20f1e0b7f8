//! Power cuts at every moment of small workloads, and of random ones.

use crate::sim::{
    Judge, Kills, Kind, Landing, Play, Stats, Thorough, all_workloads, play, powercut_after_kills,
    powercut_workload, small_disk,
};

fn workloads(kind: Kind) {
    let disks: Vec<_> = (0..4).map(|seed| small_disk(kind, seed)).collect();
    let mut sum = Stats::default();
    for (seed, ops) in (0..).zip(all_workloads()) {
        let disk = &disks[seed as usize % disks.len()];
        let (exhaustive, samples) = if cfg!(debug_assertions) { (8, 40) } else { (12, 200) };
        let played =
            powercut_workload(disk, &ops, &Kills::default(), seed, Judge::new(exhaustive, samples, seed));
        assert!(played.wrong.is_none(), "{kind:?} {ops:?} seed {seed}: {:?}", played.wrong);
        sum.add(played.stats);
    }
    println!("{}: {sum:?}", kind.name());
    assert!(sum.states > 20_000, "too few states: {sum:?}");
}

#[test]
fn powercut_in_small_workloads_raw() {
    workloads(Kind::Raw);
}

#[test]
fn powercut_in_small_workloads_vdi() {
    workloads(Kind::Vdi);
}

#[test]
fn powercut_in_small_workloads_diff() {
    workloads(Kind::Diff);
}

#[test]
fn powercut_in_small_workloads_diff_discard() {
    workloads(Kind::DiffDiscard);
}

#[test]
fn powercut_in_small_workloads_vhd() {
    workloads(Kind::Vhd);
}

#[test]
fn powercut_in_small_workloads_vhd_diff() {
    workloads(Kind::VhdDiff);
}

#[test]
fn powercut_in_small_workloads_parallels() {
    workloads(Kind::Parallels);
}

#[test]
fn powercut_in_small_workloads_parallels_diff() {
    workloads(Kind::ParallelsDiff);
}

#[test]
fn powercut_in_small_workloads_vmdk() {
    workloads(Kind::Vmdk);
}

#[test]
fn powercut_in_small_workloads_vmdk_diff() {
    workloads(Kind::VmdkDiff);
}

#[test]
fn powercut_in_small_workloads_vmdk_zeroed() {
    workloads(Kind::VmdkZeroed);
}

#[test]
fn powercut_in_small_workloads_vmdk_bare() {
    workloads(Kind::VmdkBare);
}

#[test]
fn powercut_in_small_workloads_vmdk_split() {
    workloads(Kind::VmdkSplit);
}

#[test]
fn powercut_in_small_workloads_qcow2() {
    workloads(Kind::Qcow2);
}

#[test]
fn powercut_in_small_workloads_qcow2_diff() {
    workloads(Kind::Qcow2Diff);
}

#[test]
fn powercut_in_small_workloads_vhdx() {
    workloads(Kind::Vhdx);
}

#[test]
fn powercut_in_small_workloads_vhdx_diff() {
    workloads(Kind::VhdxDiff);
}

#[test]
fn powercut_in_small_workloads_qed() {
    workloads(Kind::Qed);
}

#[test]
fn powercut_in_small_workloads_qed_diff() {
    workloads(Kind::QedDiff);
}

#[test]
fn powercut_in_small_workloads_qcow() {
    workloads(Kind::Qcow);
}

#[test]
fn powercut_in_small_workloads_qcow_diff() {
    workloads(Kind::QcowDiff);
}

/// Every workload, its process killed at moments of it, some of them twice; what it had under way lands or does not.
fn killed(kind: Kind) {
    let disks: Vec<_> = (0..4).map(|seed| small_disk(kind, seed)).collect();
    let few = Thorough { every: 8, twice: 1, landings: &[Landing::Chance], exhaustive: 2, samples: 2 };
    let many = Thorough { every: 1, twice: 1, landings: &Landing::EACH, exhaustive: 4, samples: 4 };
    let how = if cfg!(debug_assertions) { few } else { many };
    let (mut sum, mut lives) = (Stats::default(), 0);
    for (seed, ops) in (0..).zip(all_workloads()) {
        let disk = &disks[seed as usize % disks.len()];
        let played = powercut_after_kills(disk, &ops, &how, seed);
        assert!(played.wrong.is_none(), "{kind:?} {ops:?} seed {seed}: {:?}", played.wrong);
        sum.add(played.stats);
        lives += played.lives;
    }
    println!("{}: {lives} processes, {sum:?}", kind.name());
    assert!(lives > 1000 && sum.states > 2000, "too few: {lives} {sum:?}");
}

#[test]
fn powercut_after_kills_raw() {
    killed(Kind::Raw);
}

#[test]
fn powercut_after_kills_vdi() {
    killed(Kind::Vdi);
}

#[test]
fn powercut_after_kills_diff() {
    killed(Kind::Diff);
}

#[test]
fn powercut_after_kills_diff_discard() {
    killed(Kind::DiffDiscard);
}

#[test]
fn powercut_after_kills_vhd() {
    killed(Kind::Vhd);
}

#[test]
fn powercut_after_kills_vhd_diff() {
    killed(Kind::VhdDiff);
}

#[test]
fn powercut_after_kills_parallels() {
    killed(Kind::Parallels);
}

#[test]
fn powercut_after_kills_parallels_diff() {
    killed(Kind::ParallelsDiff);
}

#[test]
fn powercut_after_kills_vmdk() {
    killed(Kind::Vmdk);
}

#[test]
fn powercut_after_kills_vmdk_diff() {
    killed(Kind::VmdkDiff);
}

#[test]
fn powercut_after_kills_vmdk_zeroed() {
    killed(Kind::VmdkZeroed);
}

#[test]
fn powercut_after_kills_vmdk_bare() {
    killed(Kind::VmdkBare);
}

#[test]
fn powercut_after_kills_vmdk_split() {
    killed(Kind::VmdkSplit);
}

#[test]
fn powercut_after_kills_qcow2() {
    killed(Kind::Qcow2);
}

#[test]
fn powercut_after_kills_qcow2_diff() {
    killed(Kind::Qcow2Diff);
}

#[test]
fn powercut_after_kills_vhdx() {
    killed(Kind::Vhdx);
}

#[test]
fn powercut_after_kills_vhdx_diff() {
    killed(Kind::VhdxDiff);
}

#[test]
fn powercut_after_kills_qed() {
    killed(Kind::Qed);
}

#[test]
fn powercut_after_kills_qed_diff() {
    killed(Kind::QedDiff);
}

#[test]
fn powercut_after_kills_qcow() {
    killed(Kind::Qcow);
}

#[test]
fn powercut_after_kills_qcow_diff() {
    killed(Kind::QcowDiff);
}

#[test]
fn powercut_random() {
    let seeds = if cfg!(debug_assertions) { 12 } else { 40 };
    for kind in Kind::ALL {
        let mut sum = Stats::default();
        for seed in 0..seeds {
            let p = play(&Play::powercut(kind, seed, 30));
            assert!(p.wrong.is_none(), "{kind:?} seed {seed}: {:?}", p.wrong);
            sum.add(p.stats);
        }
        println!("{}: {sum:?}", kind.name());
        assert!(sum.states > 20_000, "too few states: {sum:?}");
    }
}
