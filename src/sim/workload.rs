//! Small workloads, all of them: most defects of crash consistency need no more than three operations.

use super::images::{Images, Kind, Shape};
use super::judge::Judge;
use super::past::Past;
use super::play::Played;
use super::{Faults, Landing, Rng, Through, Trace, World};
use crate::filter::Filters;
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
    small_disk_behind(kind, &Filters::default(), seed)
}

/// The same behind filters.
pub fn small_disk_behind(kind: Kind, filters: &Filters, seed: u64) -> (Images, Vec<Past>) {
    let mut rng = Rng(seed);
    let shape = Shape { kind, size: BLOCKS * BLOCK - 1024, block: BLOCK };
    let (images, past) = Images::filtered(shape, usize::from(kind.has_parent()), filters, &mut rng);
    if rng.chance(50) {
        return (images, past);
    }
    let setup = (DiskOptions::default(), Faults::default(), Trace::default());
    let mut w = World::new(&images, setup, past, seed).expect("a new image");
    w.finish(Request::Write(range(0, 3 * BLOCK)), 900).expect("nothing fails");
    w.close().expect("nothing fails");
    let left = w.afterwards(true);
    (images, left.past.iter().map(|p| Past::known(p.may[0])).collect())
}

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len).expect("inside the disk")
}

struct Run<'a> {
    images: Images,
    world: Option<World>,
    options: DiskOptions,
    rng: Rng,
    fresh: u64,
    plan: &'a Kills,
    /// Of the plan's kills, how many were carried out.
    killed: usize,
    /// Events since the last kill, without those of the process that runs.
    events: u64,
    /// Events of that process before it was the guest's.
    before: u64,
    /// Processes so far.
    lives: u64,
}

/// Processes that are killed in the midst of a workload; those that come after them go on with it.
#[derive(Clone, Debug, Default)]
pub struct Kills {
    /// Each after so many events since the one before, or since the start.
    pub after: Vec<u64>,
    /// What becomes of the operations under way.
    pub landing: Option<Landing>,
}

/// Runs a workload on a copy of `disk`, and lets the judge look at every moment at which the power could go, from the
/// last kill on.
pub fn powercut_workload(
    disk: &(Images, Vec<Past>),
    ops: &[Op],
    kills: &Kills,
    seed: u64,
    judge: Judge,
) -> Played {
    let mut rng = Rng(seed);
    let images = disk.0.copy();
    let options = images.shape.kind.options(rng.chance(10));
    let mut world = match World::new(&images, setup(options), disk.1.clone(), rng.draw()) {
        Ok(w) => w,
        Err(e) => return Played::failed(seed, format!("{e}")),
    };
    images.top.keep_cuts();
    world.judge = Some(judge);
    let mut run = Run {
        images,
        world: None,
        options,
        rng,
        fresh: 3,
        plan: kills,
        killed: 0,
        events: 0,
        before: 0,
        lives: 1,
    };
    run.begin(world);
    let after_a_kill = [Op::Partial, Op::Flush];
    let more = if kills.after.is_empty() { &[][..] } else { &after_a_kill };
    for op in ops.iter().chain(more) {
        if let Err(e) = run.op(*op).and_then(|()| run.go_on()) {
            return Played::failed(seed, e);
        }
    }
    run.finish(seed)
}

/// How thoroughly workloads are killed.
#[derive(Clone, Copy, Debug)]
pub struct Thorough {
    /// Every so many moments the process is killed.
    pub every: u64,
    /// And the process after it, at so many moments by chance.
    pub twice: u64,
    /// What becomes of the operations under way.
    pub landings: &'static [Landing],
    /// As of the [`Judge`].
    pub exhaustive: u32,
    /// As of the [`Judge`].
    pub samples: u64,
}

/// Runs a workload again and again; each time the process that runs it is killed at another moment, or it and the one
/// that goes on. Then the power may go as in [`powercut_workload`].
pub fn powercut_after_kills(disk: &(Images, Vec<Past>), ops: &[Op], how: &Thorough, seed: u64) -> Played {
    let mut rng = Rng(seed ^ 0x6b69_6c6c);
    let judge = || Judge::new(how.exhaustive, how.samples, seed);
    let mut blind = judge();
    blind.most_states = 0;
    let mut sum = powercut_workload(disk, ops, &Kills::default(), seed, blind);
    let moments = sum.events;
    let mut play = |after: Vec<u64>, landing| {
        let kills = Kills { after, landing: Some(landing) };
        let mut p = powercut_workload(disk, ops, &kills, seed, judge());
        sum.stats.add(p.stats);
        sum.lives += p.lives;
        let wrong = p.wrong.take().map(|w| format!("{kills:?}: {w}"));
        sum.wrong = sum.wrong.take().or(wrong);
        p.events
    };
    let mut k = seed % how.every;
    while k < moments {
        for landing in how.landings {
            let events = play(vec![k], *landing);
            for _ in 0..how.twice.min(events) {
                play(vec![k, rng.below(events)], *landing);
            }
        }
        k += how.every;
    }
    sum
}

fn setup(options: DiskOptions) -> (DiskOptions, Faults, Trace) {
    (options, Faults::default(), Trace::default())
}

impl Run<'_> {
    /// A process is there, which will be killed if the plan says so.
    fn begin(&mut self, mut world: World) {
        let next = self.plan.after.get(self.killed).copied();
        self.before = world.life.events();
        world.life.die_after(next.map(|n| n.saturating_sub(self.events)));
        world.landing = self.plan.landing.unwrap_or(Landing::Chance);
        world.no_look = next.is_some();
        self.world = Some(world);
    }

    /// What the plan says of the process that runs, counted from now.
    fn arm(&mut self) {
        if let Some(world) = self.world.take() {
            self.begin(world);
        }
    }

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
            Op::Reopen => return self.start_again(),
        };
        let w = self.world.as_mut().expect("it runs");
        let value = w.posted + 1 + 16 * (w.flushed & 0xffff);
        while !w.post(0, request, value) {
            if w.life.is_dead() {
                return Ok(());
            }
            w.drain();
        }
        match self.rng.below(3) {
            0 => w.drain(),
            1 => w.poll(0),
            _ => {}
        }
        Ok(())
    }

    /// A clean close, and a new start.
    fn start_again(&mut self) -> Result<(), String> {
        let w = self.world.as_mut().expect("it runs");
        match w.close() {
            Ok(()) => self.another(),
            Err(_) if w.life.is_dead() => Ok(()),
            Err(e) => Err(e.to_string()),
        }
    }

    /// Where the process was killed another takes its place, and ends what the guest still wants.
    fn go_on(&mut self) -> Result<(), String> {
        let w = self.world.as_mut().expect("it runs");
        if !w.life.is_dead() {
            return Ok(());
        }
        self.killed += 1;
        w.kill();
        self.another()?;
        self.events = 0;
        self.arm();
        Ok(())
    }

    fn another(&mut self) -> Result<(), String> {
        let mut w = self.world.take().expect("it runs");
        let (judge, wrong) = (w.judge.take(), w.wrong.take());
        self.events += w.life.events() - self.before;
        let left = w.afterwards(false);
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        let seed = self.rng.draw();
        let mut next = World::after(&self.images, setup(self.options), left, Through::Channels, seed)
            .map_err(|e| format!("does not open again: {e}"))?;
        next.look_again(false);
        next.judge = judge;
        self.lives += 1;
        self.begin(next);
        Ok(())
    }

    fn finish(mut self, seed: u64) -> Played {
        loop {
            let world = self.world.as_mut().expect("it runs");
            world.look_now();
            world.drain();
            if !world.life.is_dead() {
                break;
            }
            if let Err(e) = self.go_on() {
                return Played::failed(seed, e);
            }
        }
        let mut world = self.world.take().expect("it runs");
        world.look_now();
        let events = self.events + world.life.events() - self.before;
        Played { events, lives: self.lives, ..Played::of(seed, &mut world) }
    }
}
