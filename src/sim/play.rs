//! A whole simulation from one seed: lives of processes on the same image, with faults, jobs, kills and power cuts.

use super::cut::Cut;
use super::fault::{Failing, Fault, FaultMix, Faults};
use super::foreign;
use super::images::{Images, Kind, Shape, check, copy_target};
use super::judge::{Judge, Stats};
use super::{Left, Rng, Through, Trace, World};
use crate::format::Format;
use crate::io::IoKind;
use crate::job::{CompareJob, CopyJob, Job, Step};
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{Channel, DiskOptions, Request};
use std::sync::Arc;

/// What guests and processes of a simulation are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    /// All sorts of requests to processes that live for a while.
    Usual,
    /// Processes live for a moment, and table pages are what fails: a search for what only closing and starting meet.
    Churn,
    /// What fails is a sync.
    Syncs,
    /// Processes are killed that leave places at the end of the file which the table no longer names, as far as anybody
    /// can read, but as far as is durable still does.
    Tails,
    /// The write of an entry fails and may be on the disk all the same; then other blocks want places, of which there are
    /// none but those with old bytes in them.
    Doubts,
}

/// What is played.
#[derive(Clone, Copy, Debug)]
pub struct Play {
    /// The seed.
    pub seed: u64,
    /// The image; `None`: the seed decides.
    pub kind: Option<Kind>,
    /// Requests, at least.
    pub requests: u64,
    /// Operations fail.
    pub faults: bool,
    /// What guests and processes are like.
    pub habit: Habit,
    /// How the guest reaches its disk.
    pub through: Through,
    /// Copies and comparisons run.
    pub jobs: bool,
    /// Processes of every fourth seed hold tables in parts only, and look whether what they read of them is what they wrote.
    pub forgetful: bool,
    /// All states of a cut with up to so many parts are looked at.
    pub exhaustive: u32,
    /// States by chance of the other cuts.
    pub samples: u64,
    /// No more states than these.
    pub most_states: u64,
    /// Everything is printed.
    pub trace: bool,
    /// Everything is recorded for dm-log-writes.
    pub record: bool,
}

impl Play {
    /// The whole thing, as the daemon of `sim SEED` plays it.
    pub fn seed(seed: u64) -> Play {
        Play {
            seed,
            kind: None,
            requests: 2000,
            faults: true,
            habit: Habit::Usual,
            through: Through::Rings,
            jobs: true,
            forgetful: true,
            exhaustive: 3,
            samples: 4,
            most_states: u64::MAX,
            trace: false,
            record: false,
        }
    }

    /// Power cuts on small images of one kind.
    pub fn powercut(kind: Kind, seed: u64, samples: u64) -> Play {
        let (exhaustive, requests) = (5, 300);
        let (through, jobs) = (Through::Channels, false);
        Play { kind: Some(kind), requests, through, jobs, exhaustive, samples, ..Play::seed(seed) }
    }
}

/// How a simulation went.
#[derive(Debug)]
pub struct Played {
    /// The seed.
    pub seed: u64,
    /// States looked at.
    pub stats: Stats,
    /// Requests of the guest.
    pub requests: u64,
    /// Of a workload: moments since its last kill at which its process could have been killed.
    pub events: u64,
    /// Chains that a process executed again, after another had begun them.
    pub repeated: u64,
    /// Rings that were stopped in the midst of things.
    pub stops: u64,
    /// Processes that served the image.
    pub lives: u64,
    /// A number for the order of all events: equal for two runs of a seed.
    pub digest: u64,
    /// The first thing that was not as promised.
    pub wrong: Option<String>,
    /// What was recorded.
    pub record: Option<super::DmLog>,
}

impl Played {
    pub(super) fn failed(seed: u64, why: String) -> Played {
        let (stats, wrong) = (Stats::default(), Some(why));
        Played {
            seed,
            stats,
            requests: 0,
            events: 0,
            repeated: 0,
            stops: 0,
            lives: 0,
            digest: 0,
            wrong,
            record: None,
        }
    }

    pub(super) fn of(seed: u64, w: &mut World) -> Played {
        let judge = w.judge.take();
        let stats = judge.as_ref().map(|j| j.stats).unwrap_or_default();
        let wrong = w.wrong.take().or(judge.and_then(|j| j.violation));
        Played {
            seed,
            stats,
            requests: w.posted,
            events: 0,
            repeated: 0,
            stops: 0,
            lives: 1,
            digest: 0,
            wrong,
            record: None,
        }
    }
}

struct Game {
    /// What shows where the image on top has nothing.
    beneath: Vec<u64>,
    how: Play,
    images: Images,
    rng: Rng,
    faults: Faults,
    trace: Trace,
    judge: Option<Judge>,
    out: Played,
    /// A process has ended without a clean close.
    untidy: bool,
}

/// Plays a seed to its end, or to the first thing that is not as promised.
pub fn play(how: &Play) -> Played {
    let mut rng = Rng(how.seed);
    // The first four keep most seeds what they were before there were others.
    let (first, others) = Kind::ALL.split_at(4);
    let usual = first[rng.index(4)];
    let other = others[usize::try_from(how.seed / 3).unwrap_or(0) % others.len()];
    let kind = how.kind.unwrap_or(if how.seed % 3 == 2 { other } else { usual });
    // Now and then blocks of the usual size: the files are sparse.
    let large = how.jobs && rng.chance(4);
    let block = if large { 1 << 20 } else { 4096 << rng.below(4) };
    let forgetful = how.forgetful && how.seed % 4 == 3;
    // Enough tables of a QCOW2's that not all of them are remembered.
    let more = if forgetful && kind == Kind::Qcow2 { 128 << 10 } else { 0 };
    let size = (192 << 10) + block * rng.below(4) + 512 * rng.below(8) + more;
    let parents = if rng.chance(25) { 1 + rng.index(4) } else { 1 };
    let shape = Shape { kind, size, block };
    let (mut images, past) = match kind {
        _ if kind.has_parent() => Images::with_parents(shape, parents, &mut rng),
        _ => Images::new(shape, &mut rng),
    };
    images.forgets = forgetful.then_some(how.seed);
    let beneath = past.iter().map(|p| p.may[0]).collect();
    if how.record {
        images.top.record();
    }
    let (exhaustive, samples) = if large { (0, 1) } else { (how.exhaustive, how.samples) };
    let mut judge = Judge::new(exhaustive, samples, how.seed);
    judge.most_states = how.most_states;
    let out = Played { wrong: None, ..Played::failed(how.seed, String::new()) };
    let trace = Trace::printing(how.trace);
    let mut game = Game {
        beneath,
        how: *how,
        images,
        rng,
        faults: Faults::default(),
        trace,
        judge: Some(judge),
        out,
        untidy: false,
    };
    let mut next = Some((Left::new(past), true));
    while let Some((left, cut)) = next.take() {
        if game.out.wrong.is_none() && game.out.requests < how.requests {
            next = game.life(left, cut);
        }
    }
    let mut out = game.out;
    out.digest = game.trace.digest();
    out.record = game.images.top.take_record();
    out
}

impl Game {
    /// One process; what it leaves, and whether the power went.
    fn life(&mut self, left: Left, cut: bool) -> Option<(Left, bool)> {
        self.faults.clear();
        let options = self.images.shape.kind.options(self.rng.chance(15));
        let setup = (options, self.faults.clone(), self.trace.clone());
        let mut w = match World::after(&self.images, setup, left, self.how.through, self.rng.draw()) {
            Ok(w) => w,
            Err(e) => {
                self.out.wrong = Some(format!("does not open: {e}"));
                return None;
            }
        };
        self.out.lives += 1;
        if cut || self.how.through == Through::Channels {
            w.look_again(cut);
        } // else what was in flight goes on, and so does the guest
        w.judge_with(self.judge.take().expect("it comes back after each life"));
        if self.rng.chance(30) {
            w.life.die_after(Some(self.rng.below(600)));
        }
        self.work(&mut w);
        let next = self.end(w);
        let done = self.judge.as_ref().is_some_and(Judge::is_done);
        next.filter(|_| !done)
    }

    fn work(&mut self, w: &mut World) {
        let steps = match self.how.habit {
            Habit::Usual | Habit::Syncs => 40 + self.rng.below(400),
            Habit::Churn => 20 + self.rng.below(30),
            Habit::Tails | Habit::Doubts => self.rng.below(16).saturating_sub(10),
        };
        w.steps(steps);
        if self.how.faults && self.rng.chance(40) {
            let common = self.how.habit != Habit::Churn && self.rng.chance(80);
            let fault = match self.how.habit {
                Habit::Syncs => Fault::of(
                    &[IoKind::Sync, IoKind::WriteThrough],
                    self.rng.below(3),
                    Failing::Error(libc::EIO),
                ),
                _ if common => Fault::by_chance(&FAULTS, &mut self.rng),
                _ => entry_fault(self.images.shape.kind),
            };
            self.trace.event(format_args!("fault planned: {fault:?}"));
            self.faults.add(fault);
            w.steps(steps);
        }
        let quiet = self.faults.hits().is_empty();
        if self.how.jobs && quiet && !w.life.is_dead() && self.rng.chance(20) {
            self.faults.clear();
            w.life.die_after(None);
            self.copy(w);
        }
        match self.how.habit {
            Habit::Tails if !w.life.is_dead() => self.leave_a_tail(w),
            Habit::Doubts if !w.life.is_dead() => self.leave_a_doubt(w),
            _ => {}
        }
        self.check_failures(w);
    }

    /// A block is written, as a rule flushed, and zeroed: what its entry named lies behind everything the table names now,
    /// but only the page cache knows. It is one block, for each further write of a table page makes it less likely
    /// that a power cut leaves an old one.
    fn leave_a_tail(&mut self, w: &mut World) {
        w.drain();
        let (block, size) = (self.images.shape.block, w.disk.size_bytes());
        let from = self.rng.below(size.div_ceil(block)) * block;
        let range = GuestRange::between(GuestOffset(from), GuestOffset(size.min(from + block)));
        let flush = self.rng.chance(70).then_some(Request::Flush);
        let zeros = Request::WriteZeroes { range, unmap: true };
        for request in std::iter::once(Request::Write(range)).chain(flush).chain([zeros]) {
            w.post(0, request, w.posted + 1);
            w.drain();
        }
    }

    /// A block's entry is in doubt; others are written.
    fn leave_a_doubt(&mut self, w: &mut World) {
        w.drain();
        let unsupported = Failing::Error(libc::EOPNOTSUPP);
        self.faults.add(Fault { sticky: true, ..Fault::of(&[IoKind::Allocate], 0, unsupported) });
        self.faults.add(entry_fault(self.images.shape.kind));
        let (block, size) = (self.images.shape.block, w.disk.size_bytes());
        for _ in 0..4 {
            let from = self.rng.below(size.div_ceil(block)) * block;
            let range = GuestRange::between(GuestOffset(from), GuestOffset(size.min(from + block)));
            w.post(0, Request::Write(range), w.posted + 1);
            w.drain();
        }
    }

    /// Nothing fails but by a fault.
    fn check_failures(&mut self, w: &mut World) {
        let hit = !self.faults.hits().is_empty();
        if !hit && let Some((request, why)) = w.failures.first() {
            w.wrong.get_or_insert(format!("{request:?} failed without a fault: {why}"));
        }
    }

    /// A copy under the guest's requests, and one without: that one has to be equal.
    fn copy(&mut self, w: &mut World) {
        let size = w.disk.size_bytes();
        let (busy, _) = self.copy_job(w, size);
        w.add_job(Box::new(busy));
        w.steps(100);
        w.drain();
        let (mut job, target) = self.copy_job(w, size);
        run_job(&mut job, w);
        if let Err(e) = job.close_target() {
            w.wrong.get_or_insert(format!("cannot close the copy: {e}"));
        }
        drop(job);
        let a = w.job_channel(CompareJob::slots());
        let b = self.target_channel(&target, CompareJob::slots(), true);
        let mut compare = CompareJob::new(a, b).expect("two channels");
        run_job(&mut compare, w);
        if let Some(at) = compare.result().difference {
            w.wrong.get_or_insert(format!("a copy differs at byte {at}"));
        }
    }

    fn copy_job(&mut self, w: &mut World, size: u64) -> (CopyJob, Images) {
        let target = copy_target(size);
        let to = self.target_channel(&target, CopyJob::slots(), false);
        let from = w.job_channel(CopyJob::slots());
        (CopyJob::new(from, to).expect("it is large enough"), target)
    }

    fn target_channel(&mut self, target: &Images, slots: u16, read_only: bool) -> Channel {
        let options = DiskOptions { skip_syncs: true, read_only, ..DiskOptions::default() };
        let disk = target.open(options, &Arc::default()).expect("a sound image");
        let engine = super::images::engine_for(target, &Faults::default(), &self.trace, &mut self.rng);
        Channel::new(disk, Box::new(engine), slots).expect("a descriptor is left")
    }

    /// The end of a life: a clean close, a kill, or a power cut at the same moment.
    fn end(&mut self, mut w: World) -> Option<(Left, bool)> {
        let failed_sync = w.sync_has_failed();
        let mut closed = false;
        let (close, power) = match self.how.habit {
            Habit::Usual | Habit::Syncs => (25, 50),
            Habit::Churn => (60, 50),
            Habit::Tails | Habit::Doubts => (10, 20),
        };
        if self.rng.chance(close) && !failed_sync && !w.life.is_dead() {
            self.faults.clear();
            if self.how.faults && self.rng.chance(30) {
                self.faults.add(entry_fault(self.images.shape.kind));
            }
            match w.close() {
                Ok(()) => closed = true,
                Err(e) if self.faults.hits().is_empty() && w.failures.is_empty() && !w.life.is_dead() => {
                    w.wrong.get_or_insert(format!("cannot close: {e}"));
                }
                Err(_) => {}
            }
        }
        // Within this boot, the mark keeps others from opening what a sync has failed on.
        let cut = failed_sync || self.rng.chance(power);
        w.look_now();
        let at_once = cut.then(|| self.images.top.cut_now());
        w.kill();
        if closed && !cut && w.failures.is_empty() {
            self.check_clean(&mut w);
        } else {
            self.untidy = true;
        }
        self.judge = w.judge.take();
        self.out.requests += w.posted;
        self.out.repeated += w.repeated;
        self.out.stops += w.stops;
        let wrong = w.wrong.take();
        let mut left = w.afterwards(cut);
        if self.how.through == Through::Channels && !cut && self.rng.chance(20) {
            self.others_take_blocks_away(&mut left);
        }
        self.out.stats = self.judge.as_ref().map(|j| j.stats).unwrap_or_default();
        let violation = self.judge.as_ref().and_then(|j| j.violation.clone());
        self.out.wrong = wrong.or(violation);
        if let Some(cut) = at_once {
            self.power_cut(&cut);
        }
        Some((left, cut))
    }

    fn others_take_blocks_away(&mut self, left: &mut Left) {
        let Shape { kind, block, .. } = self.images.shape;
        if kind.format() != Format::Vdi {
            return;
        }
        let sectors = usize::try_from(block / 512).expect("a small block");
        for b in foreign::take_away(&self.images.top, &mut self.rng) {
            let from = b as usize * sectors;
            let values = self.beneath.iter().copied();
            let own = left.past.iter_mut().zip(values).skip(from).take(sectors);
            own.for_each(|(p, value)| p.changed_by_another(value));
        }
    }

    fn power_cut(&mut self, cut: &Cut) {
        self.trace.event("power cut");
        let state = cut.random_state(&mut self.rng);
        self.images.top.restart_with(state);
    }

    fn keeps_leaks(&self) -> bool {
        self.images.shape.kind.format() == Format::Qcow2
    }

    fn check_clean(&self, w: &mut World) {
        let format = self.images.shape.kind.format();
        // Who holds a VMDK's tables only in parts does not know which places a killed process has left.
        let may_leak = format == Format::Vmdk && self.images.forgets.is_some();
        match check(format, &self.images.top.bytes()) {
            Ok(None) => {}
            Ok(Some(report)) if report.is_clean() => {}
            Ok(Some(report)) if may_leak && report.corruptions == 0 => {}
            // What a process that died has prepared stays counted where refcounts are believed: a repair finds it.
            Ok(Some(report)) if report.corruptions == 0 && self.untidy && self.keeps_leaks() => {}
            other => {
                w.wrong.get_or_insert(format!("not clean after a close: {other:?}"));
            }
        }
    }
}

fn run_job(job: &mut dyn Job, w: &mut World) {
    for _ in 0..1_000_000 {
        match job.step() {
            Ok(Step::Done) => return,
            Ok(Step::More) => (0..w.queues()).for_each(|c| w.poll(c)),
            Err(e) => {
                w.wrong.get_or_insert(format!("a job failed: {e}"));
                return;
            }
        }
    }
    w.wrong.get_or_insert("a job hangs".into());
}

/// A table page that is written although its write fails: what memory and disk say differs afterwards.
fn entry_fault(kind: Kind) -> Fault {
    let place = kind.tables();
    Fault { place, ..Fault::of(&[IoKind::Write], 0, Failing::ErrorAfterEffect(libc::EIO)) }
}

/// What fails in the usual simulation.
const FAULTS: FaultMix = FaultMix {
    kinds: &[
        &[],
        &[IoKind::Write],
        &[IoKind::Write],
        &[IoKind::Read],
        &[IoKind::Allocate],
        &[IoKind::Sync],
        &[IoKind::WriteThrough],
        &[IoKind::Sync],
        &[IoKind::Punch, IoKind::ZeroRange],
        &[IoKind::Truncate],
    ],
    errnos: &[libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EOPNOTSUPP],
    how: |rng, errno| match rng.below(6) {
        0 => Failing::Short,
        1 => Failing::Interrupted,
        2 => Failing::ErrorAfterEffect(errno),
        _ => Failing::Error(errno),
    },
    sticky: 30,
    metadata: 30,
};
