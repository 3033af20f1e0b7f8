//! One virtqueue's work, step by step: pop chains, judge them, give requests to the device, answer what has ended. No
//! thread and no waiting in here; `thread.rs` drives it.
//!
//! A chain's head is its slot. A head that is announced again while its request is in flight is answered with length
//! 0: the slot belongs to the first one, and the driver has broken its own rule only towards itself.
//!
//! Where the front-end keeps an inflight region, every chain is marked there from before it is started until its answer
//! is visible. What a former process left behind is executed again when the ring starts, in the order in which it was
//! taken, and has ended before a new chain is taken: so it is also before any FLUSH the driver posts from then on. (A
//! FLUSH promises only what was acknowledged before it was posted, so those among the repeated ones keep their place.)
//!
//! Answers are shown to the driver, and a signal is considered, when nothing more is announced, and before that when they are half of what
//! was outstanding (within [`limits::PUBLISH_COMPLETIONS`]) or after [`limits::PUBLISH_MICROS`].

use super::dirty::RingLog;
use super::inflight::{Contradiction, GONE, Tracker};
use super::lost::losses;
use super::memory::{Memory, MemoryView};
use super::ring::{Ring, RingError};
use crate::error::Failure;
use crate::io::{BufSlice, Host, OsHost, scatter};
use crate::limits;
use crate::probe::moment::moment;
use crate::probe::sabotage::{Sabotage, is_broken};
use crate::vd::{BlockDevice, Done, Outcome, Request};
use crate::virtio::{Action, ChainParser, Rules, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP, Segment, Verdict};
use std::fs::File;
use std::io::Write;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::event::EventNotifier;

/// Bytes of a serial number on the wire.
const SERIAL_BYTES: usize = virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES as usize;
/// A request of this length is slow enough to look at the clock after it.
const LONG_REQUEST_BYTES: u32 = 64 << 10;

/// What a worker needs to know about its device.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Number of its queue.
    pub queue: u16,
    /// Entries of the largest ring it serves.
    pub slots: u16,
    /// What requests are allowed.
    pub rules: Rules,
    /// The answer to GET_ID; the first 20 bytes count.
    pub serial: String,
}

/// A request in flight.
#[derive(Debug, Default)]
struct Slot {
    /// Where its status goes; `None`: the slot is free.
    status: Option<BufSlice>,
    /// Bytes written if it succeeds, the status included.
    written: u32,
    /// What is to be done after the request at the device, last first.
    rest: Vec<Request>,
    /// Buffers to log when it has ended; empty unless that is asked for.
    dirty: Vec<BufSlice>,
}

/// What a ring may have beside itself.
#[derive(Debug, Default)]
pub struct RingExtras {
    /// For signals.
    pub call: Option<EventNotifier>,
    /// Tells of a broken ring.
    pub err: Option<File>,
    /// Where the front-end keeps what is in flight.
    pub inflight: Option<Tracker>,
    /// Where what we write to guest memory is logged.
    pub log: Option<RingLog>,
}

/// The ring being served.
#[derive(Debug)]
struct Active {
    ring: Ring,
    call: Option<EventNotifier>,
    err: Option<File>,
    /// False while the ring is being stopped, and after it broke.
    popping: bool,
    inflight: Option<Tracker>,
    log: Option<RingLog>,
    /// Something was written that could not be logged: nothing more is answered, for on another host it would be missing.
    unlogged: bool,
    /// Heads that a former process had in flight, last first.
    again: Vec<u16>,
    /// Some of those have not ended: nothing new is taken.
    repeating: bool,
    /// Answers the driver cannot see yet, and since when.
    unpublished: u16,
    /// How many of those there may be.
    publish_at: u16,
    since: Option<Instant>,
}

/// When a chain was taken from the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Now,
    /// By a former process.
    Before,
}

/// What happened on a queue that is worth knowing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Chains answered.
    pub answered: u64,
    /// Of them, malformed or not allowed.
    pub refused: u64,
    /// Of them, failed at the device.
    pub failed: u64,
    /// Signals sent.
    pub signals: u64,
}

/// Serves one virtqueue from one [`BlockDevice`].
pub struct QueueWorker<D> {
    queue: u16,
    device: D,
    rules: Rules,
    serial: [u8; SERIAL_BYTES],
    host: Arc<dyn Host>,
    memory: MemoryView,
    active: Option<Active>,
    slots: Vec<Slot>,
    in_flight: u16,
    parser: ChainParser,
    done: Vec<Done>,
    /// The device could not take its queue; it is asked again.
    retry: bool,
    /// Losses of memory when ours was last looked at.
    losses: u64,
    /// A part of ours is lost, or of what the ring has beside it.
    lost: bool,
    /// How many want nothing to be taken.
    holds: u32,
    counters: QueueCounters,
}

impl<D: BlockDevice> QueueWorker<D> {
    /// A worker without memory and ring.
    pub fn new(device: D, options: &WorkerOptions) -> Self {
        let mut serial = [0; SERIAL_BYTES];
        serial.iter_mut().zip(options.serial.as_bytes()).for_each(|(to, from)| *to = *from);
        QueueWorker {
            queue: options.queue,
            device,
            rules: options.rules,
            serial,
            host: Arc::new(OsHost),
            memory: MemoryView::new(Arc::new(Memory::empty())),
            active: None,
            slots: (0..options.slots).map(|_| Slot::default()).collect(),
            in_flight: 0,
            parser: ChainParser::new(),
            done: Vec::with_capacity(usize::from(options.slots)),
            retry: false,
            losses: 0,
            lost: false,
            holds: 0,
            counters: QueueCounters::default(),
        }
    }

    /// The same with another clock.
    #[must_use]
    pub fn with_host(mut self, host: Arc<dyn Host>) -> Self {
        self.host = host;
        self
    }

    /// The device.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// What has happened so far.
    pub fn counters(&self) -> QueueCounters {
        self.counters
    }

    /// Requests at the device.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Descriptors that become readable when [`Self::step`] has something to do for the device.
    pub fn event_fds(&self) -> Vec<RawFd> {
        self.device.event_fds()
    }

    /// The size of the disk, which may have grown.
    pub fn set_size(&mut self, size_bytes: u64) {
        self.rules.size_bytes = size_bytes;
    }

    /// The memory the driver's addresses mean from now on. It must contain all of the former while a ring runs.
    pub fn set_memory(&mut self, memory: Arc<Memory>) {
        self.memory = MemoryView::new(memory);
        self.forget_losses();
    }

    fn forget_losses(&mut self) {
        (self.losses, self.lost) = (0, false);
    }

    /// False once a part of the memory has been taken away, or of the region of what is in flight; the ring is stopped then:
    /// what it says is not the driver's word any more. To be called after looking at memory and before acting on what was
    /// seen.
    fn memory_is_there(&mut self) -> bool {
        let now = losses();
        if now != self.losses {
            self.losses = now;
            let why = self.what_is_lost();
            self.lost = why.is_some();
            if let Some(why) = why.filter(|_| self.active.as_ref().is_some_and(|a| a.popping)) {
                self.broken(why);
            }
        }
        !self.lost
    }

    fn what_is_lost(&self) -> Option<RingError> {
        let tracker = self.active.as_ref().and_then(|a| a.inflight.as_ref());
        if self.memory.memory().is_lost() {
            return Some(RingError::MemoryLost);
        }
        tracker.is_some_and(Tracker::is_lost).then_some(RingError::InFlight(GONE))
    }

    /// The memory in use.
    pub fn memory(&self) -> &Arc<Memory> {
        self.memory.memory()
    }

    /// Begins to serve a ring. What is announced there already, or was in flight when another process ended, is served
    /// by the next step.
    ///
    /// # Errors
    /// If the ring has more entries than the worker has slots, or contradicts what is said to be in flight on it.
    pub fn start(&mut self, mut ring: Ring, extras: RingExtras) -> Result<(), RingError> {
        use crate::virtio::DescriptorTable;
        if usize::from(ring.size()) > self.slots.len() {
            return Err(RingError::Size(ring.size()));
        }
        let RingExtras { call, err, mut inflight, log } = extras;
        self.forget_losses();
        let again = inflight.as_mut().map_or(Ok(None), |t| t.resume(ring.size(), ring.next_used()));
        let mut again = again.map_err(|Contradiction(why)| RingError::InFlight(why))?;
        if let Some(heads) = &mut again {
            ring.resume(u16::try_from(heads.len()).unwrap_or(u16::MAX));
            heads.reverse();
            if !heads.is_empty() {
                tracing::info!("queue {}: {} requests in flight are repeated", self.queue, heads.len());
            }
        }
        let again = again.unwrap_or_default();
        let was_used = ring.next_used() != 0;
        let (repeating, popping) = (!again.is_empty(), true);
        let (unpublished, since) = (0, None);
        self.active = Some(Active {
            ring,
            call,
            err,
            popping,
            inflight,
            log,
            unlogged: false,
            again,
            repeating,
            unpublished,
            publish_at: limits::PUBLISH_COMPLETIONS[0],
            since,
        });
        if was_used {
            // who served it before may have ended between an answer and its signal
            self.signal();
        }
        Ok(())
    }

    /// Takes no more chains. What was taken goes on; [`Self::stopped`] tells when it has ended.
    pub fn stop(&mut self) {
        if let Some(a) = &mut self.active {
            a.popping = false;
        }
    }

    /// Once nothing is in flight any more after [`Self::stop`]: lets the ring go and returns the index of the next
    /// chain to take. `None` as long as that is not so, or if no ring was started.
    pub fn stopped(&mut self) -> Option<u16> {
        let a = self.active.as_ref()?;
        if self.in_flight > 0 || a.popping || !a.again.is_empty() {
            return None;
        }
        self.release();
        self.active.take().map(|a| a.ring.next_avail())
    }

    /// Takes nothing from the ring until as many [`Self::release_hold`]; [`Self::is_held`] tells when what was taken has ended. Neither
    /// the driver nor the record of what is in flight notices.
    pub fn hold(&mut self) {
        self.holds += 1;
    }

    /// Undoes a [`Self::hold`].
    pub fn release_hold(&mut self) {
        self.holds = self.holds.saturating_sub(1);
    }

    /// Nothing is taken, and nothing that was is in flight, nor any work of the device's own.
    pub fn is_held(&self) -> bool {
        self.holds > 0 && self.in_flight == 0 && self.device.is_idle()
    }

    /// Replaces the descriptor for signals. It gets one at once: what was answered while there was none is seen.
    pub fn set_call(&mut self, call: Option<EventNotifier>) {
        if let Some(a) = &mut self.active {
            a.call = call;
            self.signal();
        }
    }

    /// Replaces the descriptor that tells of a broken ring.
    pub fn set_err(&mut self, err: Option<File>) {
        if let Some(a) = &mut self.active {
            a.err = err;
        }
    }

    /// Does all that can be done now; true if that was something. `device_ready`: one of [`Self::event_fds`] was
    /// readable.
    pub fn step(&mut self, device_ready: bool) -> bool {
        let mut moved = false;
        if device_ready || self.in_flight > 0 || !self.device.is_idle() {
            moved |= self.reap();
        }
        let repeated = self.repeat() && !is_broken(Sabotage::RepeatedBesideNew);
        let popped = repeated || self.pop_batch();
        if popped || moved || self.retry {
            self.hand_over();
        }
        // While more is announced the answers go on gathering.
        if !self.has_work() {
            self.release();
        }
        moved || popped
    }

    /// True if chains wait in the ring.
    pub fn has_work(&self) -> bool {
        self.active.as_ref().is_some_and(|a| match a.repeating {
            true => self.holds == 0 && !a.again.is_empty(),
            false => a.popping && self.holds == 0 && a.ring.available() != Ok(0),
        })
    }

    /// To be called before waiting for a kick: asks the driver for it. False if there is something to do at once.
    pub fn arm(&mut self) -> bool {
        match &mut self.active {
            Some(a) if a.repeating => self.holds > 0 || a.again.is_empty(),
            Some(a) if a.popping && self.holds == 0 => {
                let nothing = !a.ring.enable_kicks();
                self.log_ring();
                nothing
            }
            _ => true,
        }
    }

    /// Where it is asked for, logs a change of the used ring; after the change.
    fn log_ring(&mut self) {
        let Some(a) = &self.active else { return };
        let Some(RingLog { log, used: Some(gpa) }) = &a.log else { return };
        let logged = log.mark(*gpa, a.ring.used_bytes());
        self.check_logged(logged);
    }

    /// Where it is asked for, logs buffers; after they were written.
    fn log_written(&mut self, bufs: &[BufSlice]) {
        let logged = self.mark(bufs);
        self.check_logged(logged);
    }

    /// False if there is a log and buffers cannot be noted in it.
    fn mark(&self, bufs: &[BufSlice]) -> bool {
        let Some(log) = self.active.as_ref().and_then(|a| a.log.as_ref()) else { return true };
        let memory = self.memory.memory();
        let marked =
            |b: &BufSlice| memory.guest_addr_of(*b).is_some_and(|gpa| log.log.mark(gpa, b.len() as u64));
        bufs.iter().all(marked)
    }

    fn check_logged(&mut self, logged: bool) {
        if let Some(a) = self.active.as_mut().filter(|a| !logged && !a.unlogged) {
            a.unlogged = true;
            self.broken(RingError::Unlogged);
        }
    }

    /// The step has to be repeated soon though no descriptor will become readable.
    pub fn wants_retry(&self) -> bool {
        self.retry
    }

    fn hand_over(&mut self) {
        let failed = self.device.flush_queue();
        if let (Err(e), false) = (&failed, self.retry) {
            tracing::warn!("queue {}: cannot hand requests over: {e}; trying again", self.queue);
        }
        self.retry = failed.is_err();
    }

    /// Takes what the device has ended.
    fn reap(&mut self) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.device.poll(&mut done);
        let moved = !done.is_empty();
        for d in done.drain(..) {
            self.end(d.slot, d.outcome);
        }
        self.done = done;
        moved
    }

    /// Executes again what a former process had in flight; false once all of that has ended. A ring that is stopped
    /// meanwhile ends it first: whoever goes on with the ring need not know of it.
    fn repeat(&mut self) -> bool {
        let Some(a) = self.active.as_mut().filter(|a| a.repeating && self.holds == 0) else { return false };
        a.repeating = !a.again.is_empty() || self.in_flight > 0;
        let mut moved = false;
        for _ in 0..limits::BATCH_CHAINS {
            let Some(head) = self.active.as_mut().and_then(|a| a.again.pop()) else { break };
            // marked already, and its place in the order stays: we may be killed before all of them have been started
            self.admit(head, Seen::Before);
            moved = true;
        }
        moved
    }

    /// Takes chains that are announced by now: those that come meanwhile are the next batch.
    fn pop_batch(&mut self) -> bool {
        let Some(a) = self.active.as_mut().filter(|a| a.popping && self.holds == 0) else { return false };
        if a.repeating && !is_broken(Sabotage::RepeatedBesideNew) {
            return false;
        }
        let available = a.ring.available();
        if !self.memory_is_there() {
            return true;
        }
        let announced = match available {
            Ok(0) => return false,
            Ok(n) => n,
            Err(e) => {
                self.broken(e);
                return true;
            }
        };
        let in_flight = self.in_flight;
        if let Some(a) = &mut self.active {
            a.publish_at = publish_at(announced.saturating_add(in_flight));
            a.ring.disable_kicks();
        }
        self.log_ring();
        // the rest in the next step: what the device has ended must not wait for all of a large ring
        for _ in 0..announced.min(limits::BATCH_CHAINS) {
            let Some(a) = self.active.as_mut().filter(|a| a.popping) else { break };
            match a.ring.pop() {
                Ok(head) => self.admit(head, Seen::Now),
                Err(e) => {
                    self.broken(e);
                    break;
                }
            }
        }
        true
    }

    /// The ring's indices contradict themselves: nothing more is taken from it until it is set up again.
    fn broken(&mut self, why: RingError) {
        tracing::warn!("queue {}: {why}; the queue is stopped until it is set up again", self.queue);
        let Some(a) = &mut self.active else { return };
        a.popping = false;
        // what was in flight stays marked for the next who takes the region up
        a.again.clear();
        if let Some(err) = &mut a.err {
            // best effort: the front-end may not listen
            let _ = err.write(&1u64.to_ne_bytes());
        }
    }

    fn admit(&mut self, head: u16, seen: Seen) {
        let Some(a) = &mut self.active else { return };
        if self.slots[usize::from(head)].status.is_some() {
            self.counters.refused += 1;
            tracing::debug!("queue {}: head {head} announced again while in flight", self.queue);
            return self.push_answer(head, 0);
        }
        if let Some(t) = a.inflight.as_mut().filter(|_| seen == Seen::Now) {
            t.begin(head);
        }
        let Verdict { status, action } = self.parser.parse(head, &a.ring, &self.memory, &self.rules);
        if !self.memory_is_there() {
            return;
        }
        match (status, action) {
            (Some(status), Ok(action)) => self.begin(head, status, action),
            (status, Err(why)) => {
                self.counters.refused += 1;
                tracing::debug!("queue {}: chain {head} refused: {why:?}", self.queue);
                let written = status.map_or(0, |s| self.put_status(s, why.status()));
                self.answer(head, written);
            }
            (None, Ok(_)) => self.answer(head, 0),
        }
    }

    fn begin(&mut self, head: u16, status: BufSlice, action: Action) {
        let request = match action {
            Action::Read(range) => Request::Read(range),
            Action::Write(range) => Request::Write(range),
            Action::Flush => Request::Flush,
            Action::Identify => return self.identify(head, status),
            Action::Discard | Action::WriteZeroes => match self.queue_segments(head, action) {
                Some(first) => first,
                None => return self.answer_without_disk(head, status, 0),
            },
        };
        let (bufs, data) = match request {
            Request::Read(range) => (self.parser.writable(), range.len()),
            Request::Write(_) => (self.parser.readable(), 0),
            _ => (&[][..], 0),
        };
        let slot = &mut self.slots[usize::from(head)];
        slot.status = Some(status);
        if self.active.as_ref().is_some_and(|a| a.log.is_some()) && matches!(request, Request::Read(_)) {
            slot.dirty.extend_from_slice(bufs);
        }
        // at most MAX_REQUEST_BYTES + 1
        slot.written = u32::try_from(data + 1).unwrap_or(u32::MAX);
        self.in_flight += 1;
        if let Some(outcome) = self.device.submit(head, request, bufs) {
            self.end(head, outcome);
        }
    }

    /// Puts the segments' requests into the slot, and returns the one to begin with.
    fn queue_segments(&mut self, head: u16, action: Action) -> Option<Request> {
        let rest = &mut self.slots[usize::from(head)].rest;
        let segments = self.parser.segments().iter().rev().filter(|s| !s.range.is_empty());
        rest.extend(segments.map(|&Segment { range, unmap }| match action {
            Action::Discard => Request::Discard(range),
            _ => Request::WriteZeroes { range, unmap },
        }));
        rest.pop()
    }

    fn identify(&mut self, head: u16, status: BufSlice) {
        let place = self.parser.writable();
        let mut left = &self.serial[..];
        for b in place {
            let (now, later) = left.split_at(left.len().min(b.len()));
            scatter(now, &[*b]);
            left = later;
        }
        let logged = self.mark(place);
        let written = SERIAL_BYTES - left.len();
        self.check_logged(logged);
        self.answer_without_disk(head, status, u32::try_from(written).unwrap_or(0));
    }

    /// Answers a request that asks nothing of the disk, after `data` bytes were written for it.
    fn answer_without_disk(&mut self, head: u16, status: BufSlice, data: u32) {
        let written = if self.memory_is_there() {
            data + self.put_status(status, STATUS_OK)
        } else {
            self.note_failure(Failure::Os(libc::EFAULT));
            self.put_status(status, STATUS_IOERR)
        };
        self.answer(head, written);
    }

    /// A request at the device has ended: goes on with the slot's next one, or answers the chain.
    fn end(&mut self, head: u16, mut outcome: Outcome) {
        let there = self.memory_is_there();
        let Some(slot) = self.slots.get_mut(usize::from(head)).filter(|s| s.status.is_some()) else {
            tracing::error!("queue {}: the device ended request {head}, which it does not have", self.queue);
            return;
        };
        if !there {
            outcome = Err(Failure::Os(libc::EFAULT));
        }
        while outcome.is_ok()
            && let Some(next) = slot.rest.pop()
        {
            match self.device.submit(head, next, &[]) {
                Some(o) => outcome = o,
                None => return,
            }
        }
        slot.rest.clear();
        let Some(status) = slot.status.take() else { return };
        let (all, mut dirty) = (slot.written, std::mem::take(&mut slot.dirty));
        self.in_flight -= 1;
        let written = match outcome {
            Ok(()) => {
                self.put_status(status, STATUS_OK);
                all
            }
            // what the buffers hold is not defined, so nothing but the status counts as written
            Err(Failure::Unsupported) => self.put_status(status, STATUS_UNSUPP),
            Err(_) => self.put_status(status, STATUS_IOERR),
        };
        self.log_written(&dirty);
        dirty.clear();
        self.slots[usize::from(head)].dirty = dirty;
        if let Err(why) = outcome {
            self.note_failure(why);
        }
        self.answer(head, written);
    }

    /// Writes the status; returns the bytes written.
    fn put_status(&mut self, place: BufSlice, status: u8) -> u32 {
        place.write(&[status]);
        self.log_written(&[place]);
        1
    }

    /// Tells of failures ever more rarely: a guest can produce them by the million.
    fn note_failure(&mut self, why: Failure) {
        self.counters.failed += 1;
        let n = self.counters.failed;
        if n.is_power_of_two() {
            tracing::warn!("queue {}: a request failed: {why} (failure {n} of this queue)", self.queue);
        }
    }

    /// Answers a chain that was begun.
    fn answer(&mut self, head: u16, written: u32) {
        if let Some(t) = self.active.as_mut().and_then(|a| a.inflight.as_mut()) {
            t.answered(head);
        }
        self.push_answer(head, written);
    }

    /// Puts a chain into the used ring.
    fn push_answer(&mut self, head: u16, written: u32) {
        let Some(a) = &mut self.active else { return };
        self.counters.answered += 1;
        a.ring.push_used(head, written);
        a.unpublished += 1;
        // the clock is not looked at for every short request: four of them are far below the limit
        let late = match a.since {
            None => {
                a.since = Some(self.host.now());
                false
            }
            Some(t) if a.unpublished.is_multiple_of(4) || written > LONG_REQUEST_BYTES => {
                self.host.now().duration_since(t) >= Duration::from_micros(limits::PUBLISH_MICROS)
            }
            Some(_) => false,
        };
        if late || a.unpublished >= a.publish_at {
            self.release();
        }
    }

    /// Shows the driver what was answered, and signals if it wants that.
    fn release(&mut self) {
        let Some(a) = self.active.as_mut().filter(|a| a.unpublished > 0 && !a.unlogged) else { return };
        if let Some(t) = &mut a.inflight {
            t.before_publish();
        }
        moment();
        a.ring.publish();
        moment();
        if let Some(t) = &mut a.inflight {
            t.after_publish(a.ring.next_used());
        }
        moment();
        a.unpublished = 0;
        a.since = None;
        let signal = a.ring.should_signal();
        self.log_ring();
        if signal {
            self.signal();
        }
    }

    fn signal(&mut self) {
        let Some(call) = self.active.as_ref().and_then(|a| a.call.as_ref()) else { return };
        self.counters.signals += 1;
        // A full counter is a signal nobody has taken yet. Other failures are the front-end's business: the answer
        // is in the ring all the same.
        let _ = call.notify();
    }
}

/// After how many answers the driver sees them, when the device has, or is to take, so many requests: half of them. While the driver
/// wakes up and asks anew, the other half is dealt with; were it all of them, each side would wait for the other.
fn publish_at(outstanding: u16) -> u16 {
    let [least, most] = limits::PUBLISH_COMPLETIONS;
    (outstanding / 2).clamp(least, most)
}
