//! Encrypted disks: the same promises, kept of what is read through the filter.

use crate::filter::{Cipher, Crypt, Filters, Secret, Unallocated};
use crate::map::{GuestOffset, GuestRange};
use crate::sim::{
    Faults, Images, Judge, Kills, Kind, Landing, Rng, Shape, Stats, Thorough, Trace, World, all_workloads,
    powercut_after_kills, powercut_workload, small_disk_behind,
};
use crate::vd::Request;
use std::sync::Arc;

fn filters(unallocated: Unallocated) -> Filters {
    let key: Vec<u8> = (0..32).map(|i| i * 7 + 1).collect();
    let crypt = Crypt::new(Cipher::Xts128, &Secret::copy_of(&key)).expect("a key");
    Filters::of(Arc::new(crypt), unallocated)
}

/// Power cuts at every moment of small workloads, some of them after kills.
fn small_workloads(kind: Kind) {
    let filters = filters(Unallocated::Zeros);
    let disks: Vec<_> = (0..4).map(|seed| small_disk_behind(kind, &filters, seed)).collect();
    let most = if cfg!(debug_assertions) { 2 } else { 3 };
    let how = Thorough { every: 8, twice: 1, landings: &[Landing::Chance], exhaustive: 2, samples: 2 };
    let (mut sum, mut lives) = (Stats::default(), 0);
    for (seed, ops) in (0..).zip(all_workloads()).filter(|(_, ops)| ops.len() <= most) {
        let disk = &disks[seed as usize % disks.len()];
        let judge = Judge::new(8, 40, seed);
        let played = powercut_workload(disk, &ops, &Kills::default(), seed, judge);
        assert!(played.wrong.is_none(), "{kind:?} {ops:?} seed {seed}: {:?}", played.wrong);
        sum.add(played.stats);
        let played = powercut_after_kills(disk, &ops, &how, seed);
        assert!(played.wrong.is_none(), "{kind:?} {ops:?} seed {seed}, killed: {:?}", played.wrong);
        sum.add(played.stats);
        lives += played.lives;
    }
    println!("{}: {lives} processes, {sum:?}", kind.name());
    assert!(lives > 100 && sum.states > 2000, "too few: {lives} {sum:?}");
}

/// Random requests, several at a time, of all sizes, over one or more parents; every read is held against a model, and at the end
/// every sector, by new processes too. Nothing of it is on disk as it was written.
fn random_requests(kind: Kind) {
    for seed in 0..8 {
        let mut rng = Rng(seed);
        let shape = Shape { kind, size: 512 * (600 + rng.below(1500)), block: 4096 << rng.below(4) };
        let parents = if kind.has_parent() { 1 + rng.index(2) } else { 0 };
        let (images, past) = Images::filtered(shape, parents, &filters(Unallocated::Zeros), &mut rng);
        let setup = (kind.options(rng.chance(20)), Faults::default(), Trace::default());
        let mut w = World::new(&images, setup.clone(), past, rng.draw()).expect("a new image");
        w.steps(300);
        w.drain();
        // larger than a piece of those that go through the filters
        let large = GuestRange::new(GuestOffset(1024), shape.size - 2048).expect("inside the disk");
        w.finish(Request::Write(large), 7000 + seed).expect("nothing fails");
        w.finish(Request::Read(large), 0).expect("nothing fails");
        w.steps(100);
        w.sweep();
        w.close().expect("nothing fails");
        assert!(w.wrong.is_none(), "{kind:?} seed {seed}: {:?}", w.wrong);
        let left = w.afterwards(false);
        let mut again = World::new(&images, setup, left.past, rng.draw()).expect("it opens again");
        again.sweep();
        assert!(again.wrong.is_none(), "{kind:?} seed {seed}, opened again: {:?}", again.wrong);
        again.close().expect("nothing fails");
        assert!(images.parents_are_untouched());
        let mut bare = images.copy();
        bare.filters = Filters::default();
        let (plain, held) = (images.view(&images.top.bytes()), bare.view(&images.top.bytes()));
        let (plain, held) = (plain.expect("opens"), held.expect("opens"));
        let same =
            plain.chunks(512).zip(held.chunks(512)).filter(|(a, b)| a == b && a.iter().any(|x| *x != 0));
        assert_eq!(same.count(), 0, "{kind:?} seed {seed}: sectors are on disk as they were written");
    }
}

macro_rules! for_each_kind {
    ($($name:ident: $kind:ident),* $(,)?) => {
        mod in_small_workloads {
            $(#[test] fn $name() { super::small_workloads(super::Kind::$kind); })*
        }
        mod in_random_ones {
            $(#[test] fn $name() { super::random_requests(super::Kind::$kind); })*
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
