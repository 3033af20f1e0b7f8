//! Whole simulations: thousands of requests each, with faults, kills, power cuts and jobs.

use crate::sim::forgetful::loads;
use crate::sim::{Kind, Play, play};

#[test]
fn a_seed_replays_to_the_byte() {
    for seed in [1, 7, 23] {
        let (a, b) = (play(&Play::seed(seed)), play(&Play::seed(seed)));
        assert_eq!((a.digest, a.requests, a.stats), (b.digest, b.requests, b.stats), "seed {seed}");
        assert_ne!(a.digest, play(&Play::seed(seed + 1)).digest);
    }
}

/// A quarter of the simulations hold tables only in parts. They do load them, and go on.
#[test]
fn pages_of_tables_are_loaded_in_the_midst_of_it() {
    let before = loads();
    let seeds = (3..20).step_by(4);
    for seed in seeds.clone() {
        let p = play(&Play { kind: Some(Kind::DiffDiscard), ..Play::seed(seed) });
        assert!(p.wrong.is_none(), "seed {seed}: {:?}", p.wrong);
    }
    assert!(loads() - before > 300 * seeds.count() as u64, "{} loads", loads() - before);
    let before = loads();
    assert!(play(&Play::seed(4)).wrong.is_none());
    assert_eq!(loads(), before, "the others hold them whole");
}

/// An entry whose write failed after its effect: what it names is seen once the process is gone that knew better.
#[test]
fn a_failed_entry_may_be_seen_by_the_next_process() {
    for kind in [Kind::Diff, Kind::DiffDiscard] {
        let p = play(&Play { kind: Some(kind), ..Play::seed(393) });
        assert!(p.wrong.is_none(), "{kind:?}: {:?}", p.wrong);
    }
}

/// Seeds of this run: as many as VDBLK_SEEDS says.
fn seeds() -> u64 {
    let default = if cfg!(debug_assertions) { 500 } else { 3000 };
    std::env::var("VDBLK_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(default)
}

/// A quarter of the seeds each, for as many threads.
fn find_nothing(quarter: u64) {
    let (mut requests, mut lives) = (0, 0);
    for seed in (quarter..seeds()).step_by(4) {
        let p = play(&Play::seed(seed));
        assert!(p.wrong.is_none(), "seed {seed}: {:?}", p.wrong);
        assert!(p.requests >= 2000, "seed {seed} ended after {} requests", p.requests);
        requests += p.requests;
        lives += p.lives;
    }
    println!("{requests} requests to {lives} processes");
}

#[test]
fn simulations_find_nothing_0() {
    find_nothing(0);
}

#[test]
fn simulations_find_nothing_1() {
    find_nothing(1);
}

#[test]
fn simulations_find_nothing_2() {
    find_nothing(2);
}

#[test]
fn simulations_find_nothing_3() {
    find_nothing(3);
}

/// The same on images of which the seeds above know little or nothing.
fn find_nothing_on(kind: Kind) {
    for seed in 0..seeds() / 25 {
        let p = play(&Play { kind: Some(kind), ..Play::seed(seed) });
        assert!(p.wrong.is_none(), "{kind:?} seed {seed}: {:?}", p.wrong);
        assert!(p.requests >= 2000, "seed {seed} ended after {} requests", p.requests);
    }
}

#[test]
fn simulations_find_nothing_on_qcow2() {
    find_nothing_on(Kind::Qcow2);
}

#[test]
fn simulations_find_nothing_on_qcow2_diff() {
    find_nothing_on(Kind::Qcow2Diff);
}

#[test]
fn simulations_find_nothing_on_qed() {
    find_nothing_on(Kind::Qed);
    find_nothing_on(Kind::QedDiff);
}

#[test]
fn simulations_find_nothing_on_qcow() {
    find_nothing_on(Kind::Qcow);
    find_nothing_on(Kind::QcowDiff);
}
