//! Lanes: pieces of memory, each with at most one request in flight, over one or more channels. What every job moves
//! bytes with.

use super::LANE_BYTES;
use crate::error::{Error, Failure, Result};
use crate::io::{AlignedBuf, BufSlice};
use crate::map::GuestRange;
use crate::vd::{BlockDevice, Channel, Done, Outcome, Own, Request};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// How long one wait lasts at most, in milliseconds: whoever steps the job looks at its signals in between.
const WAIT_MS: i32 = 100;

/// A request that has ended after [`Lanes::start`] had returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) lane: u16,
    pub(crate) outcome: Outcome,
}

/// The lanes of a job. A lane uses the slot of its own number in every channel.
pub(crate) struct Lanes {
    /// Before the memory: a channel's engine is dropped before what its operations work on.
    channels: Vec<Channel>,
    lanes: Vec<Lane>,
    epoll: Epoll,
    done: Vec<Done>,
}

struct Lane {
    memory: Own,
    busy: bool,
}

impl Lanes {
    /// `count` lanes over `channels`, each of which has at least as many slots.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub(crate) fn new(channels: Vec<Channel>, count: u16) -> Result<Self> {
        let failed = |e| Error::io("wait for I/O", e);
        let epoll = Epoll::new().map_err(failed)?;
        for fd in channels.iter().flat_map(BlockDevice::event_fds) {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, fd, event).map_err(failed)?;
        }
        let bytes = usize::try_from(LANE_BYTES).expect("a lane fits memory");
        let lane = || Lane { memory: Own::Made(AlignedBuf::new(bytes)), busy: false };
        let lanes = std::iter::repeat_with(lane).take(usize::from(count)).collect();
        Ok(Lanes { channels, lanes, epoll, done: Vec::new() })
    }

    fn lane(&self, lane: u16) -> &Lane {
        &self.lanes[usize::from(lane)]
    }

    /// The lane's memory.
    ///
    /// # Panics
    /// While a request of the lane is in flight.
    pub(crate) fn bytes(&self, lane: u16) -> &[u8] {
        assert!(!self.lane(lane).busy, "memory of a lane in flight");
        self.lane(lane).memory.as_slice()
    }

    /// The lane's memory, to fill. Panics as [`Self::bytes`].
    pub(crate) fn bytes_mut(&mut self, lane: u16) -> &mut [u8] {
        assert!(!self.lane(lane).busy, "memory of a lane in flight");
        self.lanes[usize::from(lane)].memory.as_mut_slice()
    }

    /// Reads `range` into the first bytes of the lane. `None`: the end comes out of [`Self::wait`].
    pub(crate) fn read(&mut self, lane: u16, channel: usize, range: GuestRange) -> Option<Outcome> {
        let part = self.part(lane, 0, range.len());
        self.start(lane, channel, Request::Read(range), &[part])
    }

    /// Writes the bytes of the lane from `skip` on to `range`.
    pub(crate) fn write(
        &mut self,
        lane: u16,
        channel: usize,
        skip: usize,
        range: GuestRange,
    ) -> Option<Outcome> {
        let part = self.part(lane, skip, range.len());
        self.start(lane, channel, Request::Write(range), &[part])
    }

    fn part(&self, lane: u16, skip: usize, len: u64) -> BufSlice {
        let len = usize::try_from(len).expect("inside a lane");
        self.lane(lane).memory.slice().part(skip, len)
    }

    /// Starts any request in the lane's slot; those that move bytes work on the lane's memory (`bufs`).
    ///
    /// # Panics
    /// If one is in flight there.
    pub(crate) fn start(
        &mut self,
        lane: u16,
        channel: usize,
        request: Request,
        bufs: &[BufSlice],
    ) -> Option<Outcome> {
        let busy = &mut self.lanes[usize::from(lane)].busy;
        assert!(!*busy, "two requests in one lane");
        *busy = true;
        let outcome = self.channels[channel].submit(lane, request, bufs);
        self.lanes[usize::from(lane)].busy = outcome.is_none();
        outcome
    }

    /// Waits until a request has ended, at most a moment. What has ended goes to `out`.
    ///
    /// # Errors
    /// From the operating system.
    pub(crate) fn wait(&mut self, out: &mut Vec<Ended>) -> Result<()> {
        self.poll(out)?;
        if out.is_empty() && self.lanes.iter().any(|l| l.busy) {
            self.sleep()?;
            self.poll(out)?;
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Ended>) -> Result<()> {
        for c in &mut self.channels {
            c.flush_queue().map_err(|e| Error::io("hand I/O to the kernel", e))?;
            c.poll(&mut self.done);
        }
        for d in self.done.drain(..) {
            self.lanes[usize::from(d.slot)].busy = false;
            out.push(Ended { lane: d.slot, outcome: d.outcome });
        }
        Ok(())
    }

    fn sleep(&self) -> Result<()> {
        // An engine without a descriptor (the simulator's) makes progress by being asked.
        if self.channels.iter().any(|c| c.event_fds().len() < 2) {
            return Ok(());
        }
        match self.epoll.wait(WAIT_MS, &mut [EpollEvent::default(); 4]) {
            Err(e) if e.kind() != std::io::ErrorKind::Interrupted => Err(Error::io("wait for I/O", e)),
            _ => Ok(()),
        }
    }

    /// Runs one request to its end.
    ///
    /// # Errors
    /// From the operating system; how the request ended is in the answer.
    pub(crate) fn finish(&mut self, started: Option<Outcome>) -> Result<Outcome> {
        let mut out = Vec::new();
        let mut outcome = started;
        while outcome.is_none() {
            self.wait(&mut out)?;
            outcome = out.pop().map(|e| e.outcome);
        }
        Ok(outcome.unwrap_or(Err(Failure::Os(libc::EIO))))
    }

    /// Leaves a channel's disk as a clean close does; see [`Channel::close_disk`].
    ///
    /// # Errors
    /// If that could not be written.
    pub(crate) fn close_disk(&mut self, channel: usize, sync: bool) -> Result<()> {
        self.settle()?;
        self.channels[channel].close_disk(sync)
    }

    /// Waits until nothing is in flight, whatever comes of it.
    ///
    /// # Errors
    /// From the operating system.
    pub(crate) fn settle(&mut self) -> Result<()> {
        let mut out = Vec::new();
        while !self.channels.iter().all(BlockDevice::is_idle) {
            self.poll(&mut out)?;
            if out.is_empty() && !self.channels.iter().all(BlockDevice::is_idle) {
                self.sleep()?;
            }
            out.clear();
        }
        Ok(())
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        // A channel must not be dropped with work in flight. If the kernel takes nothing more, nothing can be done.
        let _ = self.settle();
    }
}
