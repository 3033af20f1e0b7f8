//! A process that serves a disk, its guest, and its jobs: all on one thread, stepped in the order of a seed.

use super::images::{Images, bytes_for, engine_for};
use super::judge::Judge;
use super::past::{Past, value_of};
use super::{Faults, Rng, Trace};
use crate::error::Failure;
use crate::io::AlignedBuf;
use crate::job::Job;
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{BlockDevice, Channel, Disk, DiskOptions, Done, Own, Request};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// A request on its way.
struct Under {
    request: Request,
    value: u64,
    time: u64,
    buf: Own,
}

/// The life of one process.
pub struct World {
    /// The images it serves.
    pub images: Images,
    /// The disk.
    pub disk: Arc<Disk>,
    /// Its channels, one for each queue.
    pub channels: Vec<Channel>,
    under: Vec<Vec<Option<Under>>>,
    /// What the guest knows.
    pub past: Vec<Past>,
    /// Chance.
    pub rng: Rng,
    time: u64,
    /// Everything answered before this is durable.
    pub flushed: u64,
    /// Requests that failed.
    pub failures: Vec<(Request, Failure)>,
    /// Syncs that failed for good.
    pub marks: Arc<AtomicU32>,
    /// Requests posted.
    pub posted: u64,
    /// Looks at the moments at which the power could go.
    pub judge: Option<Judge>,
    /// The first read that returned what it must not, or the like.
    pub wrong: Option<String>,
    /// The guest does not flush.
    pub no_flush: bool,
    jobs: Vec<Box<dyn Job>>,
    faults: Faults,
    trace: Trace,
    dead: Arc<AtomicBool>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("time", &self.time).finish_non_exhaustive()
    }
}

fn sectors(r: GuestRange) -> std::ops::Range<usize> {
    let sector = |off: GuestOffset| usize::try_from(off.0 / 512).expect("a small disk");
    sector(r.start())..sector(r.end())
}

fn range_of(request: Request) -> GuestRange {
    match request {
        Request::Flush => GuestRange::EMPTY,
        Request::Read(r) | Request::Write(r) | Request::Discard(r) => r,
        Request::WriteZeroes { range, .. } => range,
    }
}

impl World {
    /// A process that opens `images`, with one to three channels.
    ///
    /// # Errors
    /// If they do not open.
    pub fn new(
        images: &Images,
        (options, faults, trace): (DiskOptions, Faults, Trace),
        past: Vec<Past>,
        seed: u64,
    ) -> crate::Result<World> {
        let mut rng = Rng(seed);
        let marks = Arc::default();
        let disk = images.open(options, &marks)?;
        let (channels, slots) = (1 + rng.below(3), 1 + rng.index(10));
        let dead = Arc::new(AtomicBool::new(false));
        let mut open = || {
            let mut e = engine_for(images, &faults, &trace, &mut rng);
            e.die_with(&dead);
            Channel::new(disk.clone(), Box::new(e), u16::try_from(slots).expect("few"))
        };
        let channels = (0..channels).map(|_| open()).collect::<crate::Result<Vec<_>>>()?;
        let under = channels.iter().map(|_| (0..slots).map(|_| None).collect()).collect();
        let time = past.iter().map(Past::latest).max().unwrap_or(0) + 1;
        Ok(World {
            images: images.clone(),
            disk,
            channels,
            under,
            past,
            rng,
            time,
            flushed: 0,
            failures: Vec::new(),
            marks,
            posted: 0,
            judge: None,
            wrong: None,
            no_flush: false,
            jobs: Vec::new(),
            faults,
            trace,
            dead,
        })
    }

    /// What was answered before `flushed`, by an earlier process, is durable.
    pub fn inherit(&mut self, flushed: u64) {
        self.flushed = flushed;
        self.time = self.time.max(flushed);
    }

    fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    /// Looks at the moments before each end of a sync from now on.
    pub fn judge_with(&mut self, judge: Judge) {
        self.images.top.keep_cuts();
        self.judge = Some(judge);
    }

    /// A channel more, for a job.
    pub(super) fn job_channel(&mut self, slots: u16) -> Channel {
        let mut e = engine_for(&self.images, &self.faults, &self.trace, &mut self.rng);
        e.die_with(&self.dead);
        Channel::new(self.disk.clone(), Box::new(e), slots).expect("a descriptor is left")
    }

    /// A job that is stepped with everything else until it is done.
    pub(super) fn add_job(&mut self, job: Box<dyn Job>) {
        self.jobs.push(job);
    }

    pub(super) fn has_jobs(&self) -> bool {
        !self.jobs.is_empty()
    }

    fn random_range(&mut self) -> GuestRange {
        let all = self.past.len() as u64;
        // Often the same few blocks, so that things meet.
        let near = if self.rng.chance(50) { all.min(64) } else { all };
        let len = 1 + match self.rng.below(4) {
            0 => self.rng.below(8),
            1 => self.rng.below(32),
            2 => self.rng.below(200),
            _ => self.rng.below(16),
        };
        let len = len.min(near);
        let mut start = self.rng.below(near - len + 1);
        if self.rng.chance(40) {
            start = start / 8 * 8;
        }
        GuestRange::new(GuestOffset(start * 512), len * 512).expect("inside the disk")
    }

    /// A request by chance, on a channel by chance.
    pub fn post_random(&mut self) {
        let c = self.rng.index(self.channels.len());
        let range = self.random_range();
        let request = match self.rng.below(20) {
            0 | 1 if !self.no_flush => Request::Flush,
            2..=5 => Request::Read(range),
            16 => Request::Discard(range),
            17 | 18 => Request::WriteZeroes { range, unmap: self.rng.chance(50) },
            _ => Request::Write(range),
        };
        let value = match self.rng.below(20) {
            0..=2 => 0,
            // What is there already, as far as one value says it.
            3 | 4 => self.past[sectors(range).start].may[0],
            _ => self.time + 1,
        };
        self.post(c, request, value);
    }

    /// Posts a request if a slot is free and nothing in flight overlaps.
    pub fn post(&mut self, c: usize, request: Request, value: u64) -> bool {
        let Some(slot) = self.under[c].iter().position(Option::is_none) else { return false };
        let range = range_of(request);
        if self.past[sectors(range)].iter().any(|s| s.busy) {
            return false;
        }
        let time = self.tick();
        let mut buf = Own::Made(AlignedBuf::new(usize::try_from(range.len()).expect("small").max(512)));
        match request {
            Request::Write(_) => {
                let bytes = bytes_for(range, value);
                buf.as_mut_slice()[..bytes.len()].copy_from_slice(&bytes);
            }
            _ => buf.as_mut_slice().fill(0x5a),
        }
        for s in &mut self.past[sectors(range)] {
            match request {
                Request::Write(_) => s.ask(time, value),
                Request::Discard(_) | Request::WriteZeroes { .. } => s.ask(time, 0),
                Request::Read(_) | Request::Flush => s.busy = true,
            }
        }
        self.posted += 1;
        self.trace.event(format_args!("{c}.{slot} {request:?} {value}"));
        let whole = [buf.slice().part(0, usize::try_from(range.len()).expect("small"))];
        let bufs = if matches!(request, Request::Read(_) | Request::Write(_)) { &whole[..] } else { &[] };
        let slot_number = u16::try_from(slot).expect("few");
        let outcome = self.channels[c].submit(slot_number, request, bufs);
        self.under[c][slot] = Some(Under { request, value, time, buf });
        self.look_at_cuts();
        if let Some(outcome) = outcome {
            self.ended(c, Done { slot: slot_number, outcome });
        }
        true
    }

    fn ended(&mut self, c: usize, done: Done) {
        let Some(u) = self.under[c][usize::from(done.slot)].take() else {
            self.wrong.get_or_insert(format!("slot {c}.{} was ended twice", done.slot));
            return;
        };
        self.trace.event(format_args!("{c}.{} ended: {:?}", done.slot, done.outcome));
        let now = self.tick();
        let range = range_of(u.request);
        self.past[sectors(range)].iter_mut().for_each(|s| s.busy = false);
        if let Err(f) = done.outcome {
            return self.failed(u.request, u.value, f);
        }
        if u.request == Request::Flush {
            self.flushed = self.flushed.max(u.time);
            return;
        }
        for (i, sector) in sectors(range).enumerate() {
            match u.request {
                Request::Read(_) => self.read(sector, &u.buf.as_slice()[i * 512..(i + 1) * 512]),
                Request::Discard(_) => self.past[sector].may.push(0),
                Request::Write(_) => self.past[sector].wrote(u.value, u.time, now),
                _ => self.past[sector].wrote(0, u.time, now),
            }
            let changes = matches!(u.request, Request::Write(_) | Request::WriteZeroes { .. });
            if changes && self.disk.options().write_through {
                self.past[sector].wrote_through(u.time);
            }
        }
    }

    fn failed(&mut self, request: Request, value: u64, why: Failure) {
        self.failures.push((request, why));
        let value = if matches!(request, Request::Write(_)) { value } else { 0 };
        if !matches!(request, Request::Read(_) | Request::Flush) {
            self.past[sectors(range_of(request))].iter_mut().for_each(|s| s.may.push(value));
        }
    }

    /// A sync has failed, whoever has heard of it.
    pub fn sync_has_failed(&self) -> bool {
        let hit = |op: &crate::io::IoOp| op.kind == crate::io::IoKind::Sync;
        self.marks.load(Ordering::SeqCst) > 0 || self.faults.hits().iter().any(hit)
    }

    fn read(&mut self, sector: usize, got: &[u8]) {
        if self.sync_has_failed() {
            // The page cache may show old bytes again.
            let flushed = self.durable_before(true);
            let p = &mut self.past[sector];
            p.may = p.after_cut(flushed);
        }
        let may = &mut self.past[sector].may;
        match value_of(sector as u64, got) {
            Some(value) if may.contains(&value) => *may = vec![value],
            value => {
                let what = format!("sector {sector} reads {value:?} ({:x?}), may be {may:?}", &got[..16]);
                self.wrong.get_or_insert(what);
            }
        }
    }

    /// Lets a channel move.
    pub fn poll(&mut self, c: usize) {
        let mut done = Vec::new();
        if let Err(e) = self.channels[c].flush_queue() {
            self.wrong.get_or_insert(e.to_string());
        }
        self.channels[c].poll(&mut done);
        self.look_at_cuts();
        for d in done {
            self.ended(c, d);
        }
    }

    /// The guest has heard of nothing that has happened since these moments.
    fn look_at_cuts(&mut self) {
        if self.judge.is_none() {
            return;
        }
        for cut in self.images.top.take_cuts() {
            self.look_at(&cut);
        }
    }

    fn look_at(&mut self, cut: &super::cut::Cut) {
        let flushed = self.durable_before(true);
        if let Some(judge) = &mut self.judge {
            judge.cut(&self.images, cut, &self.past, flushed);
        }
    }

    /// The power could go right now.
    pub fn look_now(&mut self) {
        let cut = self.images.top.cut_now();
        self.look_at(&cut);
    }

    /// What was answered before this time survives a power cut, or just the end of the process.
    fn durable_before(&self, power_cut: bool) -> u64 {
        if power_cut { self.flushed } else { u64::MAX }
    }

    fn step_jobs(&mut self) {
        let mut jobs = std::mem::take(&mut self.jobs);
        jobs.retain_mut(|job| match job.step() {
            Ok(step) => step == crate::job::Step::More,
            Err(e) => {
                if !self.dead.load(Ordering::SeqCst) && self.faults.hits().is_empty() {
                    self.wrong.get_or_insert(format!("a job failed: {e}"));
                }
                false
            }
        });
        self.jobs = jobs;
        self.look_at_cuts();
    }

    /// Whatever the seed says, so many times.
    pub fn steps(&mut self, n: u64) {
        for _ in 0..n {
            match self.rng.below(10) {
                0..=5 => self.post_random(),
                6 if self.has_jobs() => self.step_jobs(),
                _ => {
                    let c = self.rng.index(self.channels.len());
                    self.poll(c);
                }
            }
        }
        let flushed = self.durable_before(true);
        self.past.iter_mut().for_each(|p| p.forget_before(flushed));
    }

    /// Until nothing is in flight.
    pub fn drain(&mut self) {
        for _ in 0..200_000 {
            (0..self.channels.len()).for_each(|c| self.poll(c));
            if self.has_jobs() {
                self.step_jobs();
            }
            if self.channels.iter().all(BlockDevice::is_idle) && !self.has_jobs() {
                let forgotten = self.under.iter().flatten().any(Option::is_some);
                if forgotten || self.disk.held() > 0 {
                    self.wrong.get_or_insert("a request, claim, buffer or waiter was forgotten".into());
                }
                return;
            }
        }
        self.wrong.get_or_insert(format!("requests hang: {:?}", self.channels));
        self.dead.store(true, Ordering::SeqCst);
        self.bury();
    }

    /// One request, from start to end.
    ///
    /// # Errors
    /// Its own.
    pub fn finish(&mut self, request: Request, value: u64) -> Result<(), Failure> {
        let before = self.failures.len();
        let posted = self.post(0, request, value);
        assert!(posted, "nothing else is in flight");
        self.drain();
        self.failures.get(before).map_or(Ok(()), |(_, f)| Err(*f))
    }

    /// Reads everything.
    pub fn sweep(&mut self) {
        self.drain();
        for first in (0..self.past.len() as u64).step_by(256) {
            let n = 256.min(self.past.len() as u64 - first);
            let r = GuestRange::new(GuestOffset(first * 512), n * 512).expect("inside the disk");
            if let Err(f) = self.finish(Request::Read(r), 0) {
                self.wrong.get_or_insert(format!("reading everything failed: {f}"));
            }
        }
    }

    /// The process is killed where it is; what it had submitted lands before another may open the image, or never.
    pub fn kill(&mut self) {
        self.trace.event("killed");
        self.dead.store(true, Ordering::SeqCst);
        self.images.top.kill(&mut self.rng);
        self.bury();
    }

    /// Ends everything of a dead process: its operations end without touching anything.
    fn bury(&mut self) {
        let mut done = Vec::new();
        for _ in 0..10_000 {
            for c in &mut self.channels {
                let _ = c.flush_queue();
                c.poll(&mut done);
            }
            self.jobs.iter_mut().for_each(|j| drop(j.step()));
            if self.channels.iter().all(BlockDevice::is_idle) {
                break;
            }
        }
        self.jobs.clear();
    }

    /// After its end: what the sectors may hold, and what of it is durable. `power_cut`: the power went, too.
    pub fn afterwards(mut self, power_cut: bool) -> (Vec<Past>, u64) {
        let flushed = self.durable_before(power_cut);
        let durable = self.durable_before(true).min(self.time);
        for p in &mut self.past {
            p.may = p.after_cut(flushed);
            p.busy = false;
        }
        (std::mem::take(&mut self.past), durable)
    }

    /// After a new start: reads everything and takes it as it is. `power_cut`: all of it is durable.
    pub fn look_again(&mut self, power_cut: bool) {
        self.sweep();
        let time = self.tick();
        for p in &mut self.past {
            let value = p.may[0];
            if power_cut {
                *p = Past::known(value);
            } else {
                p.seen(value, time);
            }
        }
    }

    /// A clean end.
    ///
    /// # Errors
    /// What the disk says.
    pub fn close(&mut self) -> crate::Result<()> {
        self.drain();
        self.trace.event("close");
        while self.channels.len() > 1 {
            self.channels.pop();
            self.under.pop();
        }
        let closed = self.channels[0].close_disk(true);
        self.look_at_cuts();
        if closed.is_ok() {
            self.flushed = self.tick();
        }
        closed
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.dead.store(true, Ordering::SeqCst);
        self.images.top.kill(&mut Rng(0));
        self.bury();
    }
}
