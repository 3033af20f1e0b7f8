//! Power cuts at every moment of small workloads, and of random ones.

use super::sabotaged::find_nothing_in_what_is_sound;
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

/// Every workload, its process killed at moments of it, some of them twice; what it had under way lands or does not.
fn killed(kind: Kind) {
    let disks: Vec<_> = (0..4).map(|seed| small_disk(kind, seed)).collect();
    let every = if cfg!(debug_assertions) { 8 } else { 4 };
    let how = Thorough { every, twice: 1, landings: &[Landing::Chance], exhaustive: 2, samples: 2 };
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

/// Longer workloads of all sorts of requests.
fn random(kind: Kind) {
    let seeds = if cfg!(debug_assertions) { 12 } else { 40 };
    let mut sum = Stats::default();
    for seed in 0..seeds {
        let p = play(&Play::powercut(kind, seed, 30));
        assert!(p.wrong.is_none(), "{kind:?} seed {seed}: {:?}", p.wrong);
        sum.add(p.stats);
    }
    println!("{}: {sum:?}", kind.name());
    assert!(sum.states > 20_000, "too few states: {sum:?}");
}

/// A test of each sort for every kind of image, so that they run side by side.
macro_rules! for_each_kind {
    ($($name:ident: $kind:ident),* $(,)?) => {
        mod in_small_workloads {
            $(#[test] fn $name() { super::workloads(super::Kind::$kind); })*
        }
        mod after_kills {
            $(#[test] fn $name() { super::killed(super::Kind::$kind); })*
        }
        mod in_random_ones {
            $(#[test] fn $name() { super::random(super::Kind::$kind); })*
        }
        mod where_no_rule_is_broken {
            $(#[test] fn $name() { super::find_nothing_in_what_is_sound(super::Kind::$kind); })*
        }
        #[test]
        fn no_kind_is_left_out() {
            let tested = [$(Kind::$kind),*];
            for kind in Kind::ALL {
                assert!(tested.contains(&kind), "{kind:?}");
            }
        }
    };
}

for_each_kind! {
    raw: Raw,
    vdi: Vdi,
    diff: Diff,
    diff_discard: DiffDiscard,
    vhd: Vhd,
    vhd_diff: VhdDiff,
    parallels: Parallels,
    parallels_diff: ParallelsDiff,
    vmdk: Vmdk,
    vmdk_diff: VmdkDiff,
    vmdk_zeroed: VmdkZeroed,
    vmdk_bare: VmdkBare,
    vmdk_split: VmdkSplit,
    qcow2: Qcow2,
    qcow2_diff: Qcow2Diff,
    vhdx: Vhdx,
    vhdx_diff: VhdxDiff,
    qed: Qed,
    qed_diff: QedDiff,
    qcow: Qcow,
    qcow_diff: QcowDiff,
}
