//! Whole simulations: thousands of requests each, with faults, kills, power cuts and jobs.

use crate::sim::{Play, play};

#[test]
fn a_seed_replays_to_the_byte() {
    for seed in [1, 7, 23] {
        let (a, b) = (play(&Play::seed(seed)), play(&Play::seed(seed)));
        assert_eq!((a.digest, a.requests, a.stats), (b.digest, b.requests, b.stats), "seed {seed}");
        assert_ne!(a.digest, play(&Play::seed(seed + 1)).digest);
    }
}

#[test]
fn simulations_find_nothing() {
    for seed in 0..50 {
        let p = play(&Play::seed(seed));
        assert!(p.wrong.is_none(), "seed {seed}: {:?}", p.wrong);
    }
}
