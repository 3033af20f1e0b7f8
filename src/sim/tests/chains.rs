//! Long chains, and sessions on them that end with a clean close, against the model.

use crate::format::vdi;
use crate::sim::{Faults, Images, Kind, Left, Rng, Shape, Through, Trace, World};
use crate::vd::DiskOptions;

/// Two sessions, each behind rings or not, on an image over so many parents.
fn sessions(seed: u64, parents: usize) {
    let mut rng = Rng(seed);
    // Now and then blocks larger than a piece of a copy.
    let large = seed % 5 == 4;
    let block = if large { 512 << 10 } else { 4096 << rng.below(5) };
    let size = (block * if large { 3 } else { 20 } + rng.below(block / 512) * 512).min(2 << 20);
    let kind = if parents > 0 { Kind::DiffDiscard } else { Kind::Vdi };
    let (images, past) = Images::with_parents(Shape { kind, size, block }, parents, &mut rng);
    let mut left = Left::new(past);
    for _ in 0..2 {
        let (write_through, skip_syncs) = (rng.chance(20), rng.chance(10));
        let options = DiskOptions { write_through, skip_syncs, ..DiskOptions::default() };
        let through = if rng.chance(50) { Through::Rings } else { Through::Channels };
        let setup = (options, Faults::default(), Trace::default());
        let mut w = World::after(&images, setup, left, through, rng.draw()).unwrap();
        w.steps(600);
        w.drain();
        w.sweep();
        w.close().unwrap();
        assert_eq!(w.wrong.take(), None, "seed {seed}");
        assert!(w.failures.is_empty(), "seed {seed}: {:?}", w.failures);
        let report = vdi::check(&images.top.bytes()).unwrap();
        assert!(report.is_clean(), "seed {seed}: {report:?}");
        let past = w.past.clone();
        drop(w);
        left = Left::new(past);
    }
}

#[test]
fn a_base_behaves_like_a_model() {
    (0..60).for_each(|seed| sessions(seed, 0));
}

#[test]
fn chains_behave_like_a_model() {
    (1000..1030).for_each(|seed| sessions(seed, 1 + (seed % 4) as usize));
}
