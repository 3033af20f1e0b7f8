//! Small workloads, all of them: most defects of crash consistency need no more than three operations.

use super::images::{Images, Kind, Shape};
use super::judge::Judge;
use super::past::Past;
use super::play::Played;
use super::{Faults, Rng, Trace, World};
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{DiskOptions, Request};

/// An operation of a small workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// A whole block that was not written before.
    Allocate,
    /// A part of a block.
    Partial,
    /// A block that may have been written before.
    Overwrite,
    /// A discard of a block or a part of it.
    Discard,
    /// Zeros over a block.
    Zero,
    /// A flush.
    Flush,
    /// A clean close, and a new start.
    Reopen,
    /// The process is killed, and another starts.
    Kill,
}

impl Op {
    /// Those that workloads are made of.
    pub const ALL: [Op; 7] =
        [Op::Allocate, Op::Partial, Op::Overwrite, Op::Discard, Op::Zero, Op::Flush, Op::Reopen];
}

/// Blocks of a small disk.
const BLOCKS: u64 = 8;
const BLOCK: u64 = 4096;

/// All workloads of one to three operations.
pub fn all_workloads() -> Vec<Vec<Op>> {
    let mut all: Vec<Vec<Op>> = vec![Vec::new()];
    let mut from = 0;
    for _ in 0..3 {
        let upto = all.len();
        for i in from..upto {
            let longer = Op::ALL.map(|op| [&all[i][..], &[op]].concat());
            all.extend(longer);
        }
        from = upto;
    }
    all.remove(0);
    all
}

/// A small disk whose blocks 0 to 2 hold data already (where there is no parent to hold some).
pub fn small_disk(kind: Kind, seed: u64) -> (Images, Vec<Past>) {
    let mut rng = Rng(seed);
    let shape = Shape { kind, size: BLOCKS * BLOCK - 1024, block: BLOCK };
    let (images, past) = Images::new(shape, &mut rng);
    if rng.chance(50) {
        return (images, past);
    }
    let setup = (DiskOptions::default(), Faults::default(), Trace::default());
    let mut w = World::new(&images, setup, past, seed).expect("a new image");
    w.finish(Request::Write(range(0, 3 * BLOCK)), 900).expect("nothing fails");
    w.close().expect("nothing fails");
    let (past, _) = w.afterwards(true);
    (images, past.iter().map(|p| Past::known(p.may[0])).collect())
}

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len).expect("inside the disk")
}

struct Run {
    images: Images,
    world: Option<World>,
    options: DiskOptions,
    rng: Rng,
    fresh: u64,
}

/// Runs a workload on a copy of `disk`, and lets the judge look at every moment at which the power could go.
pub fn powercut_workload(disk: &(Images, Vec<Past>), ops: &[Op], seed: u64, judge: Judge) -> Played {
    let mut rng = Rng(seed);
    let images = disk.0.copy();
    let options = options(images.shape.kind, rng.chance(10));
    let mut world = match World::new(&images, setup(options), disk.1.clone(), rng.draw()) {
        Ok(w) => w,
        Err(e) => return Played::failed(seed, format!("{e}")),
    };
    world.judge_with(judge);
    let mut run = Run { images, world: Some(world), options, rng, fresh: 3 };
    for op in ops {
        if let Err(e) = run.op(*op) {
            return Played::failed(seed, e);
        }
    }
    let mut world = run.world.take().expect("it runs");
    world.look_now();
    world.drain();
    world.look_now();
    Played::of(seed, &mut world)
}

pub(super) fn options(kind: Kind, write_through: bool) -> DiskOptions {
    DiskOptions { write_through, discard: kind != Kind::Diff, ..DiskOptions::default() }
}

fn setup(options: DiskOptions) -> (DiskOptions, Faults, Trace) {
    (options, Faults::default(), Trace::default())
}

impl Run {
    fn op(&mut self, op: Op) -> Result<(), String> {
        let block = 1 + self.rng.below(3);
        let request = match op {
            Op::Allocate => {
                self.fresh = (self.fresh + 1) % BLOCKS;
                let start = self.fresh * BLOCK;
                Request::Write(range(start, BLOCK.min(BLOCKS * BLOCK - 1024 - start)))
            }
            Op::Partial => Request::Write(range(block * BLOCK + 512 * self.rng.below(6), 1024)),
            Op::Overwrite => Request::Write(range(block * BLOCK, BLOCK)),
            Op::Discard if self.rng.chance(30) => Request::Discard(range(block * BLOCK + 1024, 2048)),
            Op::Discard => Request::Discard(range(block * BLOCK, BLOCK)),
            Op::Zero => {
                Request::WriteZeroes { range: range(block * BLOCK, BLOCK), unmap: self.rng.chance(50) }
            }
            Op::Flush => Request::Flush,
            Op::Reopen => return self.start_again(false),
            Op::Kill => return self.start_again(true),
        };
        let w = self.world.as_mut().expect("it runs");
        let value = w.posted + 1 + 16 * (w.flushed & 0xffff);
        while !w.post(0, request, value) {
            w.drain();
        }
        match self.rng.below(3) {
            0 => w.drain(),
            1 => w.poll(0),
            _ => {}
        }
        Ok(())
    }

    fn start_again(&mut self, kill: bool) -> Result<(), String> {
        let mut w = self.world.take().expect("it runs");
        if kill {
            w.look_now();
            w.kill();
        } else {
            w.close().map_err(|e| e.to_string())?;
        }
        let (judge, wrong) = (w.judge.take(), w.wrong.take());
        let (past, flushed) = w.afterwards(false);
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        let mut next = World::new(&self.images, setup(self.options), past, self.rng.draw())
            .map_err(|e| format!("does not open again: {e}"))?;
        next.inherit(flushed);
        next.look_again(false);
        next.judge_with(judge.expect("it was given one"));
        self.world = Some(next);
        Ok(())
    }
}
