//! A queue's way to the disk: a channel that the guest calls itself, or a real queue worker behind a virtqueue in guest
//! memory.

use super::driver::{Driver, SERIAL, Seen};
use super::life::Life;
use super::ram::{ENTRIES, Ram};
use crate::io::{BufSlice, Host};
use crate::vd::{BlockDevice, Channel, Disk, Done, Outcome, Request};
use crate::vhost::{QueueWorker, Ring, RingExtras, WorkerOptions};
use crate::virtio::Rules;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

/// A channel, and what it is asked and answers as long as its process lives.
pub(super) struct Spy {
    pub(super) channel: Channel,
    life: Arc<Life>,
    seen: Vec<Seen>,
}

impl Spy {
    fn saw(&mut self, what: Seen) {
        if !self.life.is_dead() {
            self.seen.push(what);
        }
    }
}

impl BlockDevice for Spy {
    fn submit(&mut self, slot: u16, request: Request, bufs: &[BufSlice]) -> Option<Outcome> {
        self.saw(Seen::Begun(slot, request));
        let outcome = self.channel.submit(slot, request, bufs);
        if let Some(outcome) = outcome {
            self.saw(Seen::Ended(slot, outcome));
        }
        outcome
    }

    fn flush_queue(&mut self) -> io::Result<()> {
        self.channel.flush_queue()
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        let before = done.len();
        self.channel.poll(done);
        for d in &done[before..] {
            self.saw(Seen::Ended(d.slot, d.outcome));
        }
    }

    fn prepare(&mut self, disk: &Arc<Disk>) -> crate::Result<()> {
        self.channel.prepare(disk)
    }

    fn move_to(&mut self, disk: &Arc<Disk>) {
        self.channel.move_to(disk);
    }

    fn set_write_through(&mut self, on: bool) {
        self.channel.set_write_through(on);
    }

    fn is_idle(&self) -> bool {
        self.channel.is_idle()
    }

    fn event_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }
}

/// What a worker does with its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Serving {
    Runs,
    /// It was told to stop.
    Ends,
    /// It has none.
    Rests,
}

/// A worker and its ring.
pub(super) struct RingPort {
    worker: QueueWorker<Spy>,
    held: bool,
    serving: Serving,
}

/// A queue's way to the disk.
pub(super) enum Port {
    Direct(Box<Channel>),
    Ring(Box<RingPort>),
}

impl Port {
    /// A worker that serves no ring yet.
    pub(super) fn ring(queue: u16, channel: Channel, life: &Arc<Life>, host: Arc<dyn Host>) -> Port {
        let disk = channel.disk();
        let options = disk.options();
        let rules =
            Rules { size_bytes: disk.size_bytes(), read_only: options.read_only, discard: options.discard };
        let spy = Spy { channel, life: life.clone(), seen: Vec::new() };
        let options = WorkerOptions { queue, slots: ENTRIES, rules, serial: SERIAL.into() };
        let worker = QueueWorker::new(spy, &options).with_host(host);
        Port::Ring(Box::new(RingPort { worker, held: false, serving: Serving::Rests }))
    }

    pub(super) fn channel(&mut self) -> &mut Channel {
        match self {
            Port::Direct(c) => c,
            Port::Ring(r) => &mut r.worker.device().channel,
        }
    }
}

impl RingPort {
    /// Begins to serve the ring, or goes on, if it rests.
    pub(super) fn start(&mut self, queue: u16, driver: &Driver, ram: &Ram) -> Result<(), String> {
        if self.serving != Serving::Rests {
            return Ok(());
        }
        let region = ram.inflight().map_err(|e| e.to_string())?;
        let ring = Ring::new(&driver.setup(), &ram.memory).map_err(|e| e.to_string())?;
        self.worker.set_memory(ram.memory.clone());
        let extras = RingExtras { inflight: region.tracker(queue), ..RingExtras::default() };
        self.worker.start(ring, extras).map_err(|e| format!("queue {queue} does not start: {e}"))?;
        self.serving = Serving::Runs;
        Ok(())
    }

    /// No more chains are taken; [`Self::step`] tells when those taken have ended.
    pub(super) fn stop(&mut self) {
        if self.serving == Serving::Runs {
            self.worker.stop();
            self.serving = Serving::Ends;
        }
    }

    /// Nothing is taken from the ring, whether it is served or not, or again.
    pub(super) fn hold(&mut self, on: bool) {
        match (std::mem::replace(&mut self.held, on), on) {
            (false, true) => self.worker.hold(),
            (true, false) => self.worker.release_hold(),
            _ => {}
        }
    }

    pub(super) fn is_held(&self) -> bool {
        self.worker.is_held()
    }

    pub(super) fn rests(&self) -> bool {
        self.serving == Serving::Rests
    }

    /// Lets the worker do what it can, and returns what happened at the device.
    pub(super) fn step(&mut self, driver: &mut Driver) -> Result<Vec<Seen>, String> {
        if self.serving == Serving::Rests {
            self.worker.device().channel.poll(&mut Vec::new());
            return Ok(Vec::new());
        }
        self.worker.step(true);
        let spy = self.worker.device();
        let (seen, dead) = (std::mem::take(&mut spy.seen), spy.life.is_dead());
        if self.serving == Serving::Ends
            && !dead
            && let Some(base) = self.worker.stopped()
        {
            self.serving = Serving::Rests;
            driver.base = base;
        }
        Ok(seen)
    }
}
