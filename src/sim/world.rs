//! A process that serves a disk, its guest, and its jobs: all on one thread, stepped in the order of a seed.

mod rings;

pub use rings::Guest;

use super::driver::Driver;
use super::file::Landing;
use super::images::{Images, SimHost, bytes_for, engine_for};
use super::judge::Judge;
use super::life::Life;
use super::past::{Past, value_of};
use super::port::Port;
use super::ram::{DATA_BYTES, ENTRIES, Ram};
use super::{Faults, Rng, Trace};
use crate::error::Failure;
use crate::io::{AlignedBuf, Host};
use crate::job::Job;
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{BlockDevice, Channel, Disk, DiskOptions, Done, Outcome, Own, Request};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A request on its way.
#[derive(Debug)]
struct Under {
    request: Request,
    /// Further segments of a discard or of zeros.
    more: Vec<GuestRange>,
    value: u64,
    time: u64,
    /// Its bytes, if they are not in the guest's memory.
    buf: Option<Own>,
}

impl Under {
    fn ranges(&self) -> impl Iterator<Item = GuestRange> {
        std::iter::once(range_of(self.request)).chain(self.more.iter().copied())
    }
}

/// What a process leaves.
#[derive(Debug)]
pub struct Left {
    /// What the sectors may hold.
    pub past: Vec<Past>,
    /// What was answered before this is durable.
    pub flushed: u64,
    time: u64,
    /// The guest, if it goes on.
    guest: Option<Guest>,
}

impl Left {
    /// Nothing but what is known of the sectors.
    pub fn new(past: Vec<Past>) -> Left {
        let time = past.iter().map(Past::latest).max().unwrap_or(0) + 1;
        Left { past, flushed: 0, time, guest: None }
    }
}

/// How guests reach their disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// They call its channels.
    Channels,
    /// They post chains into rings, which workers serve.
    Rings,
}

/// The life of one process.
pub struct World {
    /// The images it serves.
    pub images: Images,
    /// The disk.
    pub disk: Arc<Disk>,
    ports: Vec<Port>,
    /// Queues that take nothing for the time being.
    pub(super) held: Vec<bool>,
    /// By queue, and by slot or head.
    under: Vec<Vec<Option<Under>>>,
    rings: Option<(Ram, Vec<Driver>)>,
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
    /// Chains executed that another process had begun.
    pub repeated: u64,
    /// Rings stopped in the midst of things.
    pub stops: u64,
    /// Looks at the moments at which the power could go.
    pub judge: Option<Judge>,
    /// The first read that returned what it must not, or the like.
    pub wrong: Option<String>,
    /// The guest does not flush.
    pub no_flush: bool,
    /// The moments at which the power could go are not looked at.
    pub no_look: bool,
    /// What becomes of operations under way when it is killed.
    pub landing: Landing,
    /// When it dies.
    pub life: Arc<Life>,
    jobs: Vec<Box<dyn Job>>,
    faults: Faults,
    trace: Trace,
}

/// Sectors of a read that is one of many.
const SWEEP: u64 = 64;

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
        setup: (DiskOptions, Faults, Trace),
        past: Vec<Past>,
        seed: u64,
    ) -> crate::Result<World> {
        Self::after(images, setup, Left::new(past), Through::Channels, seed)
    }

    /// The same for what another process has left.
    ///
    /// # Errors
    /// If they do not open.
    pub fn after(
        images: &Images,
        (options, faults, trace): (DiskOptions, Faults, Trace),
        left: Left,
        through: Through,
        seed: u64,
    ) -> crate::Result<World> {
        let mut rng = Rng(seed);
        let marks = Arc::default();
        let disk = images.open(options, &marks)?;
        let life = Life::new(images.written().cloned().collect());
        let guest = match through {
            Through::Channels => None,
            Through::Rings => Some(left.guest.unwrap_or_else(|| Guest::new(&mut rng))),
        };
        let (queues, slots) = match &guest {
            Some(g) => (g.drivers.len(), ENTRIES),
            None => (1 + rng.index(3), 1 + u16::try_from(rng.below(10)).expect("few")),
        };
        let host: Arc<dyn Host> = Arc::new(SimHost::of(&images.top.bytes()));
        let mut port = |queue| -> crate::Result<Port> {
            let mut e = engine_for(images, &faults, &trace, &mut rng);
            e.belong_to(&life);
            let channel = Channel::new(disk.clone(), Box::new(e), slots)?;
            Ok(match through {
                Through::Channels => Port::Direct(Box::new(channel)),
                Through::Rings => Port::ring(queue, channel, &life, host.clone()),
            })
        };
        let ports = (0u16..).take(queues).map(&mut port).collect::<crate::Result<Vec<_>>>()?;
        let (under, rings) = match guest {
            Some(g) => (g.under, Some((g.ram, g.drivers))),
            None => (ports.iter().map(|_| (0..slots).map(|_| None).collect()).collect(), None),
        };
        let mut world = World {
            images: images.clone(),
            disk,
            held: vec![false; ports.len()],
            ports,
            under,
            rings,
            past: left.past,
            rng,
            time: left.time.max(left.flushed),
            flushed: left.flushed,
            failures: Vec::new(),
            marks,
            posted: 0,
            repeated: 0,
            stops: 0,
            judge: None,
            wrong: None,
            no_flush: false,
            no_look: false,
            landing: Landing::Chance,
            life,
            jobs: Vec::new(),
            faults,
            trace,
        };
        world.take_guest_up();
        Ok(world)
    }

    /// Queues.
    pub fn queues(&self) -> usize {
        self.ports.len()
    }

    pub(super) fn port(&mut self, c: usize) -> &mut Port {
        &mut self.ports[c]
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
        e.belong_to(&self.life);
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
        // a driver's buffers have an end
        let len = if self.rings.is_some() { len.min(DATA_BYTES / 512) } else { len }.min(near);
        let mut start = self.rng.below(near - len + 1);
        if self.rng.chance(40) {
            start = start / 8 * 8;
        }
        GuestRange::new(GuestOffset(start * 512), len * 512).expect("inside the disk")
    }

    /// A request by chance, on a channel by chance.
    pub fn post_random(&mut self) {
        let c = self.rng.index(self.ports.len());
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
        let discards = matches!(request, Request::Discard(_) | Request::WriteZeroes { .. });
        let more = if self.rings.is_some() && discards && self.rng.chance(40) {
            (0..1 + self.rng.below(5)).map(|_| self.random_range()).collect()
        } else {
            Vec::new()
        };
        match self.rings.is_some() && self.rng.chance(3) {
            true => self.identify(c),
            false => drop(self.post_all(c, request, more, value)),
        }
    }

    /// Posts a request if a slot is free and nothing in flight overlaps.
    pub fn post(&mut self, c: usize, request: Request, value: u64) -> bool {
        self.post_all(c, request, Vec::new(), value)
    }

    /// The same; a discard or zeros may have more segments, of which those that overlap others are left out.
    fn post_all(&mut self, c: usize, request: Request, more: Vec<GuestRange>, value: u64) -> bool {
        let range = range_of(request);
        let forbidden = matches!(request, Request::Discard(_)) && !self.disk.options().discard;
        // a guest that calls the channel does what its worker would
        let held = self.held[c] && self.rings.is_none();
        if held || self.is_busy(range) || (forbidden && self.rings.is_some()) {
            return false;
        }
        self.past[sectors(range)].iter_mut().for_each(|s| s.busy = true);
        let mut apart = Vec::new();
        for r in more {
            if !self.is_busy(r) {
                self.past[sectors(r)].iter_mut().for_each(|s| s.busy = true);
                apart.push(r);
            }
        }
        let request = match request {
            // what a worker makes of it
            Request::WriteZeroes { range, .. } if self.rings.is_some() && !self.disk.options().discard => {
                Request::WriteZeroes { range, unmap: false }
            }
            other => other,
        };
        let mut u = Under { request, more: apart, value, time: self.tick(), buf: None };
        let Some(slot) = self.place(c, &mut u) else {
            let ranges: Vec<_> = u.ranges().collect();
            ranges.into_iter().for_each(|r| self.past[sectors(r)].iter_mut().for_each(|s| s.busy = false));
            return false;
        };
        let asked = match request {
            Request::Write(_) => Some(value),
            Request::Discard(_) | Request::WriteZeroes { .. } => Some(0),
            Request::Read(_) | Request::Flush => None,
        };
        if let Some(value) = asked {
            for r in u.ranges() {
                self.past[sectors(r)].iter_mut().for_each(|s| s.ask(u.time, value));
            }
        }
        self.posted += 1;
        self.trace.event(format_args!("{c}.{slot} {request:?} {value} {:?}", u.more));
        let done = self.hand_over(c, slot, &u);
        self.under[c][usize::from(slot)] = Some(u);
        self.look_at_cuts();
        if let Some(outcome) = done.filter(|_| !self.life.is_dead()) {
            self.ended(c, slot, outcome, &[]);
        }
        true
    }

    fn is_busy(&self, range: GuestRange) -> bool {
        self.past[sectors(range)].iter().any(|s| s.busy)
    }

    /// A slot for a request, and its bytes where the device finds them.
    fn place(&mut self, c: usize, u: &mut Under) -> Option<u16> {
        let range = range_of(u.request);
        let bytes = match u.request {
            Request::Write(_) => bytes_for(range, u.value),
            _ => Vec::new(),
        };
        if let Some((ram, drivers)) = &mut self.rings {
            return drivers[c].post(ram, u.request, &u.more, &bytes, &mut self.rng);
        }
        let slot = self.under[c].iter().position(Option::is_none)?;
        let mut buf = AlignedBuf::new(usize::try_from(range.len()).expect("small").max(512));
        buf.as_mut_slice().fill(0x5a);
        buf.as_mut_slice()[..bytes.len()].copy_from_slice(&bytes);
        u.buf = Some(Own::Made(buf));
        Some(u16::try_from(slot).expect("few"))
    }

    /// Calls the channel; where there are rings the worker will see for itself.
    fn hand_over(&mut self, c: usize, slot: u16, u: &Under) -> Option<Outcome> {
        let Port::Direct(channel) = &mut self.ports[c] else { return None };
        let len = usize::try_from(range_of(u.request).len()).expect("small");
        let whole = u.buf.as_ref().map(|b| b.slice().part(0, len));
        let moves = matches!(u.request, Request::Read(_) | Request::Write(_));
        channel.submit(slot, u.request, whole.filter(|_| moves).as_slice())
    }

    fn ended(&mut self, c: usize, slot: u16, outcome: Outcome, data: &[u8]) {
        let Some(u) = self.under[c][usize::from(slot)].take() else {
            self.wrong.get_or_insert(format!("slot {c}.{slot} was ended twice"));
            return;
        };
        self.trace.event(format_args!("{c}.{slot} ended: {outcome:?}"));
        let now = self.tick();
        for r in u.ranges() {
            self.past[sectors(r)].iter_mut().for_each(|s| s.busy = false);
        }
        if let Err(f) = outcome {
            return self.failed(&u, f);
        }
        if u.request == Request::Flush {
            self.flushed = self.flushed.max(u.time);
            return;
        }
        let data = u.buf.as_ref().map_or(data, Own::as_slice);
        for (i, sector) in u.ranges().flat_map(sectors).enumerate() {
            match u.request {
                Request::Read(_) => self.read(sector, &data[i * 512..(i + 1) * 512]),
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

    fn failed(&mut self, u: &Under, why: Failure) {
        self.failures.push((u.request, why));
        let value = if matches!(u.request, Request::Write(_)) { u.value } else { 0 };
        if !matches!(u.request, Request::Read(_) | Request::Flush) {
            for r in u.ranges() {
                self.past[sectors(r)].iter_mut().for_each(|s| s.may.push(value));
            }
        }
    }

    /// A sync has failed, whoever has heard of it.
    pub fn sync_has_failed(&self) -> bool {
        use crate::io::IoKind;
        let hit = |op: &crate::io::IoOp| matches!(op.kind, IoKind::Sync | IoKind::WriteThrough);
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

    /// Lets a queue move.
    pub fn poll(&mut self, c: usize) {
        if self.life.is_dead() {
            return;
        }
        match &mut self.ports[c] {
            Port::Direct(_) => self.poll_channel(c),
            Port::Ring(_) => self.step_worker(c),
        }
    }

    fn poll_channel(&mut self, c: usize) {
        let mut done = Vec::new();
        let channel = self.ports[c].channel();
        let failed = channel.flush_queue().err();
        channel.poll(&mut done);
        if let Some(e) = failed {
            self.wrong.get_or_insert(e.to_string());
        }
        self.look_at_cuts();
        for Done { slot, outcome } in done {
            if !self.life.is_dead() {
                self.ended(c, slot, outcome, &[]);
            }
        }
    }

    /// The guest has heard of nothing that has happened since these moments.
    pub(super) fn look_at_cuts(&mut self) {
        if self.judge.is_none() {
            return;
        }
        for cut in self.images.top.take_cuts() {
            self.look_at(&cut);
        }
    }

    fn look_at(&mut self, cut: &super::cut::Cut) {
        if self.no_look {
            return;
        }
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
                if !self.life.is_dead() && self.faults.hits().is_empty() {
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
            if self.life.is_dead() {
                break;
            }
            match self.rng.below(10) {
                0..=5 => self.post_random(),
                6 if self.has_jobs() => self.step_jobs(),
                7 if self.rings.is_some() && self.rng.chance(10) => {
                    let c = self.rng.index(self.ports.len());
                    self.stop_or_start(c);
                }
                _ => {
                    let c = self.rng.index(self.ports.len());
                    self.poll(c);
                }
            }
        }
        let flushed = self.durable_before(true);
        self.past.iter_mut().for_each(|p| p.forget_before(flushed));
    }

    /// Nothing is in flight.
    fn is_idle(&mut self) -> bool {
        let waits = self.rings.as_ref().is_some_and(|(_, d)| d.iter().any(|d| d.in_flight() > 0));
        !waits && !self.has_jobs() && self.ports.iter_mut().all(|p| p.channel().is_idle())
    }

    /// Until nothing is in flight, or the process is dead.
    pub fn drain(&mut self) {
        for _ in 0..200_000 {
            if self.life.is_dead() {
                return;
            }
            self.start_rings();
            (0..self.ports.len()).for_each(|c| self.poll(c));
            if self.has_jobs() {
                self.step_jobs();
            }
            if self.wrong.is_some() && self.rings.is_some() {
                break; // what is in flight may never end
            }
            if self.is_idle() && !self.life.is_dead() {
                let forgotten = self.under.iter().flatten().any(Option::is_some);
                if forgotten || self.disk.held() > 0 {
                    self.wrong.get_or_insert("a request, claim, buffer or waiter was forgotten".into());
                }
                return;
            }
        }
        let channels: Vec<_> = self.ports.iter_mut().map(Port::channel).collect();
        let hang = format!("requests hang: {channels:?}");
        self.wrong.get_or_insert(hang);
        self.life.die();
        self.let_go();
    }

    /// One request, from start to end.
    ///
    /// # Errors
    /// Its own.
    pub fn finish(&mut self, request: Request, value: u64) -> Result<(), Failure> {
        let before = self.failures.len();
        let posted = self.post(0, request, value);
        assert!(posted || self.life.is_dead(), "nothing else is in flight");
        self.drain();
        self.failures.get(before).map_or(Ok(()), |(_, f)| Err(*f))
    }

    /// Reads everything.
    pub fn sweep(&mut self) {
        self.drain();
        for first in (0..self.past.len() as u64).step_by(SWEEP as usize) {
            if self.life.is_dead() {
                return;
            }
            let n = SWEEP.min(self.past.len() as u64 - first);
            let r = GuestRange::new(GuestOffset(first * 512), n * 512).expect("inside the disk");
            if let Err(f) = self.finish(Request::Read(r), 0) {
                self.wrong.get_or_insert(format!("reading everything failed: {f}"));
            }
        }
    }

    /// The process is killed where it is, if it is not dead already. What it had submitted lands before another may open
    /// the image, or never.
    pub fn kill(&mut self) {
        self.trace.event("killed");
        self.life.die();
        self.let_go();
        self.life.bury();
        let Self { images, landing, rng, .. } = self;
        images.written().for_each(|f| f.kill(*landing, rng));
        if !self.images.parents_are_untouched() {
            self.wrong.get_or_insert("somebody has tried to change a parent".into());
        }
        // what it had shown before it died the guest has still to see
        for c in 0..self.ports.len() {
            self.hear(c);
        }
    }

    /// Lets the channels of a dead process hear of the ends of their operations.
    pub(super) fn poll_all(&mut self) {
        for channel in self.ports.iter_mut().map(Port::channel) {
            let _ = channel.flush_queue();
            channel.poll(&mut Vec::new());
        }
    }

    /// Ends everything of a dead process: its operations end without touching anything.
    fn let_go(&mut self) {
        let mut done = Vec::new();
        for _ in 0..10_000 {
            for channel in self.ports.iter_mut().map(Port::channel) {
                let _ = channel.flush_queue();
                channel.poll(&mut done);
            }
            self.jobs.iter_mut().for_each(|j| drop(j.step()));
            if self.ports.iter_mut().all(|p| p.channel().is_idle()) {
                break;
            }
        }
        self.jobs.clear();
    }

    /// After its end: what the sectors may hold, and what of it is durable. `power_cut`: the power went, too, and with
    /// it the guest.
    pub fn afterwards(mut self, power_cut: bool) -> Left {
        let flushed = self.durable_before(power_cut);
        let durable = self.durable_before(true).min(self.time);
        let under = std::mem::take(&mut self.under);
        let rings = self.rings.take().filter(|_| !power_cut);
        let guest = rings.map(|(ram, drivers)| Guest { ram, drivers, under });
        for p in &mut self.past {
            let possible = p.after_cut(flushed);
            if guest.is_none() {
                p.may = possible;
                p.busy = false;
            } else {
                // A write that failed may have landed all the same. While its process lived, and remembered the older
                // entry, reads showed the older bytes.
                let more: Vec<_> = possible.into_iter().filter(|v| !p.may.contains(v)).collect();
                p.may.extend(more);
            }
        }
        Left { past: std::mem::take(&mut self.past), flushed: durable, time: self.time, guest }
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
    /// What the disk says, or that it died before.
    pub fn close(&mut self) -> crate::Result<()> {
        self.drain();
        self.stop_rings();
        let killed = || crate::Error::new(crate::ErrorKind::Io, "the process was killed");
        if self.life.is_dead() {
            return Err(killed());
        }
        self.trace.event("close");
        self.ports.truncate(1);
        let closed = self.ports[0].channel().close_disk(true);
        self.look_at_cuts();
        if self.life.is_dead() {
            return Err(killed());
        }
        if !self.images.parents_are_untouched() {
            self.wrong.get_or_insert("somebody has tried to change a parent".into());
        }
        if closed.is_ok() {
            self.flushed = self.tick();
        }
        closed
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !self.life.is_dead() {
            self.life.die();
            self.images.written().for_each(|f| f.kill(Landing::None, &mut Rng(0)));
        }
        self.let_go();
    }
}
