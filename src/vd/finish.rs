//! The end of writing to an image that others go on reading: it has become a parent.

use super::channel::Channel;
use super::slot::{Job, Run};
use super::{BlockDevice, Request};
use crate::error::{Error, Failure, Result};
use crate::map::Step as PlanStep;
use std::time::Duration;

/// How long a step waits for I/O at most.
const WAIT: Duration = Duration::from_millis(20);

/// Leaves the top image of a disk as a clean close does, and durable, while another disk has it as a parent: spare space given back,
/// counters exact, no mark of a writer. To be begun once no other channel of the disk has anything in flight.
#[derive(Debug)]
pub(crate) struct Finish {
    channel: Channel,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ending,
    Syncing,
    Done,
}

/// What has to happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FinishStep {
    /// Another step.
    More,
    /// Another step when something has had time to happen elsewhere.
    Later,
    /// Every request that was under way anywhere when this was said has to end; then [`Finish::pass`].
    Fence,
    /// Nothing.
    Done,
}

/// Where a plan that takes space away from the file stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fence {
    /// Nobody else reads the image.
    #[default]
    None,
    /// Whoever looked a block up before it was moved may still be reading it where it was.
    Wanted,
    /// This slot waits for them.
    At(u16),
    /// They have ended.
    Passed,
}

impl Finish {
    /// Over a channel with a slot to its disk.
    pub(crate) fn new(mut channel: Channel) -> Finish {
        channel.fence = Fence::Wanted;
        Finish { channel, state: State::Ending }
    }

    /// Does a little.
    ///
    /// # Errors
    /// If it could not be written: the image is as safe as after a crash, and others go on reading it. If a sync has failed: no disk
    /// over it takes changes any more (rule O4).
    pub(crate) fn step(&mut self) -> Result<FinishStep> {
        if let Fence::At(_) = self.channel.fence {
            return Ok(FinishStep::Fence);
        }
        if !self.channel.is_idle() {
            return self.drive();
        }
        let path = self.channel.disk().top_path().to_path_buf();
        if let Some(Err(f)) = self.channel.end_outcome.take() {
            return Err(Error::from(f)
                .at(&path)
                .hint("it can be read; vdimg check tells what state it is in"));
        }
        match self.state {
            State::Ending if self.channel.disk().may_write() == Err(Failure::SyncFailed) => {
                Err(Error::from(Failure::SyncFailed).at(&path))
            }
            State::Ending => self.begin_next(),
            State::Syncing | State::Done => Ok(FinishStep::Done),
        }
    }

    /// After [`FinishStep::Fence`].
    pub(crate) fn pass(&mut self) {
        if let Fence::At(slot) = std::mem::replace(&mut self.channel.fence, Fence::Passed) {
            self.channel.slot(slot).settle_one(Ok(()));
            self.channel.advance(slot);
        }
    }

    /// What was begun and waits for others is given up as if it had failed; [`Self::is_idle`] once what is with the kernel has ended.
    pub(crate) fn give_up(&mut self) {
        if let Fence::At(slot) = std::mem::take(&mut self.channel.fence) {
            self.channel.slot(slot).settle_one(Err(Failure::Os(libc::ECANCELED)));
            self.channel.advance(slot);
        }
    }

    /// Nothing of it is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.channel.is_idle()
    }

    fn drive(&mut self) -> Result<FinishStep> {
        let mut done = Vec::new();
        let waits_here = self.channel.engine.in_flight() > 0;
        self.channel.drive(WAIT, &mut done).map_err(|e| Error::io("finish what is in flight", e))?;
        match done.pop() {
            Some(d) => self.synced(d.outcome),
            None if waits_here => Ok(FinishStep::More),
            None => Ok(FinishStep::Later),
        }
    }

    fn synced(&mut self, outcome: super::Outcome) -> Result<FinishStep> {
        outcome.map_err(|f| Error::from(f).at(self.channel.disk().top_path()))?;
        self.state = State::Done;
        Ok(FinishStep::Done)
    }

    /// The next plan, and behind the last a flush: syncs are shared with those who are served.
    fn begin_next(&mut self) -> Result<FinishStep> {
        let disk = self.channel.disk().clone();
        let top = disk.chain().top();
        if disk.start.is_done() {
            while let Some(key) = top.map.end_needs() {
                disk.load_page(top.number, key)?;
            }
            let plan = top.map.end();
            if !plan.steps.is_empty() {
                self.channel.fence = Fence::Wanted;
                self.channel.run_internal(Job::End, plan);
                return Ok(FinishStep::More);
            }
        }
        self.state = State::Syncing;
        match self.channel.submit(0, Request::Flush, &[]) {
            Some(outcome) => self.synced(outcome),
            None => Ok(FinishStep::More),
        }
    }
}

impl Channel {
    /// Space is about to be taken away from a file, behind blocks that were moved out of it: those who read there have to end first.
    pub(super) fn must_fence(&self, run: &Run) -> bool {
        let moved = || run.plan.steps[..run.next].iter().any(|s| matches!(s, PlanStep::Move { .. }));
        self.fence == Fence::Wanted && moved()
    }
}

impl Drop for Finish {
    /// What it waits for ends in other threads.
    fn drop(&mut self) {
        self.give_up();
        while !self.is_idle() {
            match self.drive() {
                Ok(FinishStep::Later) => std::thread::sleep(Duration::from_millis(1)),
                Ok(_) => {}
                Err(_) if self.is_idle() => {}
                Err(_) => std::thread::sleep(WAIT),
            }
        }
    }
}
