//! One thread's way to a disk: its slots, its engine, its event loop's hooks.

use super::disk::{Disk, Started};
use super::fills::Fills;
use super::finish::Fence;
use super::mailbox::{Event, Mailbox};
use super::own::Own;
use super::slot::{Job, Ops, Slot};
use super::{BlockDevice, Done, Outcome, Request};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::io::{BufSlice, Completion, IoEngine, IoKind, IoOp, sub_slices};
use crate::limits::{INLINE_WRITE_BYTES, MAX_CACHE_FILLS};
use crate::map::{Extent, ExtentKind, ExtentList, GuestRange, Intent, Waiter};
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

/// Rounds of [`BlockDevice::poll`] before what has ended is handed out.
const MAX_ROUNDS: usize = 8;
/// Nobody waits.
pub(super) const NOBODY: Waiter = Waiter { channel: u16::MAX, slot: 0 };
/// Slots for the disk's own work, behind those of the requests.
const INTERNAL_SLOTS: u16 = 3 + MAX_CACHE_FILLS;

/// A channel to a disk, for one thread. Requests of several channels run at the same time.
pub struct Channel {
    // First: dropping it waits for what is in flight, which works on the memory of slots and operations, under the
    // disk's locks.
    pub(super) engine: Box<dyn IoEngine>,
    pub(super) disk: Arc<Disk>,
    pub(super) id: u16,
    mailbox: Arc<Mailbox>,
    pub(super) slots: Vec<Slot>,
    pub(super) ops: Ops,
    /// Slots in use.
    pub(super) busy: u32,
    /// Operations the engine had no room for.
    pub(super) backlog: VecDeque<usize>,
    /// Events for our own slots, raised while [`Self::poll`] runs.
    events: Vec<Event>,
    pub(super) polling: bool,
    pub(super) done: Vec<Done>,
    pub(super) extents: ExtentList,
    /// For [`Self::with_parts`]; keeps its memory.
    parts: Vec<BufSlice>,
    completions: Vec<Completion>,
    pub(super) fills: Fills,
    /// Where small requests go through the filters.
    pub(super) scratch: Option<Own>,
    pub(super) write_through: bool,
    /// Longest write that is done at once.
    inline_write_bytes: u64,
    /// How the plan at the clean close has ended.
    pub(super) end_outcome: Option<Outcome>,
    pub(super) fence: Fence,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("id", &self.id)
            .field("ops", &self.ops.in_use())
            .finish_non_exhaustive()
    }
}

impl Channel {
    /// A channel with `slots` slots over `engine`.
    ///
    /// # Errors
    /// If the engine does not take the disk's files, or no descriptor is left.
    pub fn new(disk: Arc<Disk>, mut engine: Box<dyn IoEngine>, slots: u16) -> Result<Channel> {
        for id in disk.file_ids() {
            let file = &disk.file(id).file;
            engine.attach(id, file).map_err(|e| Error::io("hand it to the I/O engine", e).at(file.path()))?;
        }
        let (id, mailbox) =
            disk.shared.mailboxes.open().map_err(|e| Error::io("open a channel to the disk", e))?;
        Ok(Channel {
            engine,
            id,
            mailbox,
            slots: (0..slots + INTERNAL_SLOTS).map(|_| Slot::new()).collect(),
            ops: Ops::default(),
            busy: 0,
            backlog: VecDeque::new(),
            events: Vec::new(),
            polling: false,
            done: Vec::new(),
            extents: ExtentList::new(),
            parts: Vec::new(),
            completions: Vec::new(),
            fills: Fills::default(),
            scratch: None,
            write_through: disk.options().write_through,
            inline_write_bytes: INLINE_WRITE_BYTES,
            end_outcome: None,
            fence: Fence::None,
            disk,
        })
    }

    /// Writes may be done on this thread however long they are and take: for jobs, which have nothing else to do. `write_out`: see
    /// [`IoEngine::be_patient`].
    pub(crate) fn be_patient(&mut self, write_out: bool) {
        self.engine.be_patient(write_out);
        self.inline_write_bytes = u64::MAX;
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// The slot as others know it.
    pub(super) fn me(&self, slot: u16) -> Waiter {
        Waiter { channel: self.id, slot }
    }

    pub(super) fn slot(&mut self, slot: u16) -> &mut Slot {
        &mut self.slots[usize::from(slot)]
    }

    /// Calls `f` with `len` bytes of the slot's request memory, from `at` on.
    pub(super) fn with_parts<R>(
        &mut self,
        slot: u16,
        at: u64,
        len: u64,
        f: impl FnOnce(&[BufSlice]) -> R,
    ) -> R {
        self.parts.clear();
        sub_slices(&self.slots[usize::from(slot)].bufs, at, len, &mut self.parts);
        f(&self.parts)
    }

    /// A free slot for the disk's own work. There is one for each kind of it, and each kind runs once at a time.
    pub(super) fn internal_slot(&self) -> u16 {
        let first = self.slots.len() - usize::from(INTERNAL_SLOTS);
        let free = (first..self.slots.len()).find(|i| self.slots[*i].job == Job::None);
        u16::try_from(free.expect("an internal slot for each kind of work")).expect("slots fit 16 bits")
    }

    /// Tells a slot, ours or another channel's, that something it waits for has ended.
    pub(super) fn wake(&mut self, who: Waiter, result: std::result::Result<(), Failure>) {
        if who == NOBODY {
            return;
        }
        if who.channel == self.id && self.slot(who.slot).advancing {
            self.slot(who.slot).settle_one(result);
        } else if who.channel == self.id && self.polling {
            self.events.push(Event { slot: who.slot, result });
        } else {
            self.disk.shared.mailboxes.post(who, result);
        }
    }

    /// The common reads and writes: one extent, one operation that ends at once.
    fn try_at_once(&mut self, request: Request, bufs: &[BufSlice]) -> Option<Outcome> {
        let (kind, range) = match request {
            Request::Read(r) if self.disk.has_detours() => return self.read_by_detour(r, bufs),
            Request::Read(r) => (IoKind::Read, r),
            Request::Write(r) if self.disk.is_filtered() => return self.write_filtered_at_once(r, bufs),
            Request::Write(r) if self.may_write_at_once(r) => (IoKind::Write, r),
            _ => return None,
        };
        self.move_at_once(kind, range, bufs)
    }

    /// A read through the filters, or from the cache image.
    fn read_by_detour(&mut self, r: GuestRange, bufs: &[BufSlice]) -> Option<Outcome> {
        match self.disk.is_filtered() {
            true => self.read_filtered_at_once(r, bufs),
            false => self.read_cached_at_once(r, bufs),
        }
    }

    /// Bytes of one extent, by one operation that ends at once.
    #[inline]
    pub(super) fn move_at_once(
        &mut self,
        kind: IoKind,
        range: GuestRange,
        bufs: &[BufSlice],
    ) -> Option<Outcome> {
        if range.is_empty() {
            return None;
        }
        let extent = match kind {
            IoKind::Read => self.disk.chain.look(range).ok()?,
            _ => self.disk.chain.top().map.look(range, Intent::Overwrite).ok()?,
        };
        let extent = if extent.len == range.len() { extent } else { self.joined(kind, range)? };
        let ExtentKind::Data { file, off } = extent.kind else { return None };
        let moved = self.engine.try_now(&IoOp { kind, file, off, len: range.len() }, bufs)?;
        if kind == IoKind::Write {
            self.disk.file(file).syncs.wrote();
        }
        (moved == Ok(range.len())).then_some(Ok(()))
    }

    /// The extent of a range whose units lie side by side in a file.
    fn joined(&mut self, kind: IoKind, range: GuestRange) -> Option<Extent> {
        self.extents.clear();
        match kind {
            IoKind::Read => self.disk.chain.map(range, &mut self.extents).ok()?,
            _ => self.disk.chain.top().map.map(range, Intent::Overwrite, &mut self.extents).ok()?,
        }
        self.extents.as_slice().first().filter(|e| e.len == range.len()).copied()
    }

    pub(super) fn may_write_at_once(&self, r: GuestRange) -> bool {
        r.len() <= self.inline_write_bytes
            && !self.write_through
            && self.disk.start.is_done()
            && self.disk.may_write().is_ok()
    }

    /// Has this channel polled again soon.
    pub(super) fn come_back(&self) {
        self.mailbox.ring();
    }

    fn handle(&mut self, e: Event) {
        self.slot(e.slot).settle_one(e.result);
        self.advance(e.slot);
    }

    fn reap(&mut self) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        self.engine.reap(&mut completions);
        let any = !completions.is_empty();
        for c in completions.drain(..) {
            self.completed(c);
        }
        self.completions = completions;
        any
    }

    fn handle_events(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.events);
        self.mailbox.empty_into(&mut events);
        let any = !events.is_empty();
        for e in events.drain(..) {
            self.handle(e);
        }
        // Events raised meanwhile are in the new list; keep them, and the old one's memory if it can be had.
        if self.events.is_empty() {
            self.events = events;
        }
        any
    }

    /// Begins what has to be durable before the first change of the top image ([`crate::map::ImageMap::begin`]), unless that is done or
    /// under way. [`Disk::has_begun`] tells when it is done; a channel that is idle before that has failed.
    pub(crate) fn begin_changes(&mut self) {
        if self.disk.may_write().is_ok() && self.disk.start.join(NOBODY) == Started::Begin {
            let plan = self.disk.chain.top().map.begin(self.disk.host.new_uuid());
            self.run_internal(Job::Start, plan);
        }
    }

    /// Leaves the image as a clean close does: everything derived exact, no slack; `sync`: and durable. To be called
    /// when no channel of the disk has anything in flight; the disk takes no change afterwards.
    ///
    /// # Errors
    /// If that could not be written: the image is as safe as after a crash. If a sync has failed, now or before: what
    /// the disk holds is unknown (rule O4).
    pub fn close_disk(&mut self, sync: bool) -> Result<()> {
        self.settle_down()?;
        let closed = self.close_images(sync);
        // last: it can take long, and all that is lost with it can be read again
        self.disk.end_cache();
        closed
    }

    fn close_images(&mut self, sync: bool) -> Result<()> {
        if self.disk.may_write() == Err(Failure::SyncFailed) {
            let what = "a sync of it has failed: what was written since the last flush may be lost";
            return Err(Error::new(ErrorKind::SyncFailed, what)
                .at(self.disk.top_path())
                .hint("check the disk, restart the machine, then run vdimg check"));
        }
        if self.disk.start.is_done() && self.disk.may_write().is_ok() {
            self.run_ends()?;
        }
        if sync {
            for id in self.disk.image_file_ids() {
                let f = &self.disk.file(id).file;
                if self.disk.file(id).traits.writable {
                    f.sync().map_err(|e| {
                        self.disk.sync_has_failed();
                        Error::io("sync it", e).at(f.path())
                    })?;
                }
            }
        }
        Ok(())
    }

    /// What the top image has left to do, one plan after the other.
    fn run_ends(&mut self) -> Result<()> {
        loop {
            let top = self.disk.chain.top().clone();
            while let Some(key) = top.map.end_needs() {
                self.disk.load_page(top.number, key)?;
            }
            let plan = top.map.end();
            if plan.steps.is_empty() {
                return Ok(());
            }
            self.end_outcome = None;
            self.run_internal(Job::End, plan);
            self.settle_down()?;
            let path = self.disk.top_path();
            let ended = self.end_outcome.take().unwrap_or(Ok(()));
            ended.map_err(|f| Error::from(f).at(path).hint("vdimg check tells what state it is in"))?;
        }
    }

    /// Waits until nothing is in flight: no request may be, and what prepares blocks ahead of need ends by itself.
    fn settle_down(&mut self) -> Result<()> {
        let mut done = Vec::new();
        while !self.is_idle() {
            self.drive(Duration::from_secs(1), &mut done)
                .map_err(|e| Error::io("finish what is in flight", e))?;
            assert!(done.is_empty(), "a disk is closed under its requests");
        }
        Ok(())
    }

    /// Waits for something to happen and moves on: for callers without an event loop.
    ///
    /// # Errors
    /// From the operating system.
    pub fn drive(&mut self, at_most: Duration, done: &mut Vec<Done>) -> io::Result<()> {
        self.flush_queue()?;
        self.poll(done);
        if done.is_empty() && self.engine.in_flight() > 0 {
            self.engine.wait(at_most)?;
            self.poll(done);
        }
        Ok(())
    }
}

impl BlockDevice for Channel {
    fn submit(&mut self, slot: u16, request: Request, bufs: &[BufSlice]) -> Option<Outcome> {
        if let Some(outcome) = self.try_at_once(request, bufs) {
            return Some(outcome);
        }
        let range = match request {
            Request::Read(r) | Request::Write(r) | Request::Discard(r) => r,
            Request::WriteZeroes { range, .. } => range,
            Request::Flush => GuestRange::EMPTY,
        };
        if range.end().0 > self.disk.size_bytes() {
            return Some(Err(Failure::OutOfRange));
        }
        self.busy += 1;
        self.slot(slot).begin(Job::Request(request), range, bufs);
        if self.disk.is_filtered() {
            self.begin_filtered(slot, request);
        }
        self.advance(slot);
        self.done.pop_if(|d| d.slot == slot).map(|d| d.outcome)
    }

    fn flush_queue(&mut self) -> io::Result<()> {
        self.start_fills();
        self.engine.enter()
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        self.polling = true;
        // Other channels can keep this one busy; its own requests that have ended must not wait for that.
        for _ in 0..MAX_ROUNDS {
            let mut moved = self.reap();
            moved |= self.handle_events();
            self.submit_backlog();
            if let Err(e) = self.flush_queue() {
                // Come back soon: what is queued stays queued.
                tracing::debug!("cannot hand I/O to the kernel: {e}");
                self.mailbox.ring();
                break;
            }
            if !moved {
                break;
            }
        }
        self.polling = false;
        for e in self.events.drain(..) {
            self.mailbox.post(e);
        }
        done.append(&mut self.done);
    }

    fn is_idle(&self) -> bool {
        self.busy == 0 && self.ops.in_use() == 0 && self.events.is_empty()
    }

    fn event_fds(&self) -> Vec<RawFd> {
        self.engine.event_fd().into_iter().chain([self.mailbox.fd()]).collect()
    }

    fn prepare(&mut self, disk: &Arc<Disk>) -> Result<()> {
        assert!(Arc::ptr_eq(&self.disk.shared, &disk.shared), "a disk over other images");
        for id in disk.file_ids().filter(|id| !self.disk.file_ids().any(|known| known == *id)) {
            let file = &disk.file(id).file;
            let told = |e| Error::io("hand it to the I/O engine", e).at(file.path());
            self.engine.attach(id, file).map_err(told)?;
        }
        Ok(())
    }

    fn move_to(&mut self, disk: &Arc<Disk>) {
        assert!(self.is_idle(), "a channel changes its disk under its requests");
        assert!(Arc::ptr_eq(&self.disk.shared, &disk.shared), "a disk over other images");
        self.disk = disk.clone();
    }

    fn set_write_through(&mut self, on: bool) {
        self.write_through = on || self.disk.options().write_through;
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // A channel that is dropped with work in flight would leave others waiting for ever.
        debug_assert!(
            std::thread::panicking() || self.is_idle(),
            "a channel was dropped with work in flight"
        );
        self.disk.shared.mailboxes.close(self.id);
    }
}
