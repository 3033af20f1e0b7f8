//! A request on its way, and the operations it has started.

use super::Request;
use super::fills::Fill;
use super::filtering::Outer;
use super::own::Own;
use super::pages::PageId;
use crate::error::Failure;
use crate::io::{BufSlice, IoKind, IoOp};
use crate::map::{Change, ClaimKey, FileId, GuestRange, HostOffset, Packed, Plan};
use crate::probe::sabotage::{Sabotage, is_broken};
use std::sync::Arc;

/// What occupies a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Nothing: the slot is free.
    None,
    /// A request.
    Request(Request),
    /// The plan before the first change; the whole disk waits for it.
    Start,
    /// The plan that prepares host blocks.
    Room,
    /// The plan at a clean close.
    End,
    /// A copy of a block into the cache image.
    Fill,
}

/// The state of a slot. It lives until everything it started has ended: nothing is ever cancelled, and no memory is
/// given back under the kernel's feet.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) job: Job,
    /// The request's range.
    pub(crate) range: GuestRange,
    /// Bytes of it that have been dealt with or handed to operations.
    pub(crate) cursor: u64,
    /// Operations and events still to come.
    pub(crate) pending: u32,
    /// The first thing that went wrong.
    pub(crate) failure: Option<Failure>,
    /// The request's memory. Keeps its capacity between requests.
    pub(crate) bufs: Vec<BufSlice>,
    pub(crate) work: Work,
    /// A bounce buffer while `work` needs one.
    pub(crate) buf: Option<Own>,
    /// The request whose pieces go through the filters; range and memory are those of a piece then.
    pub(crate) outer: Option<Box<Outer>>,
    /// A packed unit it has waited for.
    pub(crate) unit: Option<(Packed, Arc<[u8]>)>,
    /// Places of the cache image that it reads from.
    pub(crate) pins: Vec<u64>,
    /// A read from the cache image has failed: it is to be done again, without.
    pub(crate) again: bool,
    /// The claim that is held (or passed on to us by the event we wait for).
    pub(crate) claim: Option<ClaimKey>,
    /// Units it has changed.
    pub(crate) units: u32,
    /// Its plan could extend a file only in a way that may leave garbage after a crash.
    pub(crate) extended_unclean: bool,
    /// [`super::Channel::advance`] is at work on it: what ends meanwhile is noticed there.
    pub(crate) advancing: bool,
}

impl Slot {
    pub(crate) fn new() -> Self {
        Slot {
            job: Job::None,
            range: GuestRange::EMPTY,
            cursor: 0,
            pending: 0,
            failure: None,
            bufs: Vec::new(),
            work: Work::Moving,
            buf: None,
            outer: None,
            unit: None,
            pins: Vec::new(),
            again: false,
            claim: None,
            units: 0,
            extended_unclean: false,
            advancing: false,
        }
    }

    /// Occupies the slot.
    pub(crate) fn begin(&mut self, job: Job, range: GuestRange, bufs: &[BufSlice]) {
        assert!(self.job == Job::None && self.pending == 0, "slot in use");
        debug_assert!(self.claim.is_none() && self.buf.is_none() && self.pins.is_empty() && !self.again);
        debug_assert!(self.outer.is_none());
        self.job = job;
        self.range = range;
        self.cursor = 0;
        self.failure = None;
        self.work = Work::Moving;
        self.extended_unclean = false;
        self.units = 0;
        self.bufs.clear();
        self.bufs.extend_from_slice(bufs);
    }

    /// Something it waited for has ended.
    pub(crate) fn settle_one(&mut self, result: Result<(), Failure>) {
        assert!(self.pending > 0, "an end for a slot that waits for none");
        self.pending -= 1;
        if let Err(f) = result {
            self.failure.get_or_insert(f);
        }
    }

    /// What of the range is left.
    pub(crate) fn rest(&self) -> GuestRange {
        self.range.skip(self.cursor)
    }
}

/// What a slot does at the moment. Every state but `Moving` waits until nothing is pending before it goes on.
#[derive(Debug)]
pub(crate) enum Work {
    /// Ranges are mapped and operations started, as far as nothing has to be changed for it.
    Moving,
    /// The next piece of a request goes through the filters.
    NextPiece,
    /// Bytes in place go through the bounce buffer: the file takes only aligned memory, and the request's is not.
    Bouncing(Bounced),
    /// The claim on the unit around `part` is held: look again, then decide.
    Claimed { part: GuestRange },
    /// The old bytes of `part` are compared with the new ones, from `done` on. `reading`: how many of them the
    /// buffer is being filled with.
    Comparing { part: GuestRange, done: u64, reading: Option<u64> },
    /// A plan is wanted.
    Planning { part: GuestRange, change: Change },
    /// A plan runs.
    Running(Box<Run>),
    /// A block is copied into the cache image.
    Filling(Fill),
    /// Everything is written; a sync has been joined because the disk is written through.
    Syncing,
}

/// Bytes of a request on their way through the bounce buffer, a piece at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounced {
    /// What is to be read or written in all.
    pub(crate) io: IoOp,
    /// Where its bytes begin in the request's memory.
    pub(crate) at: u64,
    /// Bytes done.
    pub(crate) done: u64,
    /// The piece in the buffer: its length, and how many bytes of the buffer lie before it.
    pub(crate) piece: Option<(u64, u64)>,
}

/// A plan being carried out.
#[derive(Debug)]
pub(crate) struct Run {
    /// The guest bytes the plan writes.
    pub(crate) part: GuestRange,
    pub(crate) plan: Plan,
    /// The next step.
    pub(crate) next: usize,
    /// A copy that takes several rounds.
    pub(crate) copy: Option<Copy>,
    /// A pointer was handed to the kernel.
    pub(crate) entry_submitted: bool,
    /// No sync of this file runs until the end.
    pub(crate) holds: Option<FileId>,
}

impl Run {
    pub(crate) fn new(part: GuestRange, plan: Plan) -> Box<Run> {
        plan.assert_ordered();
        let plan = if is_broken(Sabotage::EntryBeforeData) { plan.entries_first() } else { plan };
        Box::new(Run { part, plan, next: 0, copy: None, entry_submitted: false, holds: None })
    }
}

/// A copy through the slot's bounce buffer, a piece at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copy {
    pub(crate) from: CopyFrom,
    pub(crate) file: FileId,
    pub(crate) to: HostOffset,
    pub(crate) len: u64,
    /// Bytes done.
    pub(crate) done: u64,
    /// The piece in the buffer: its length and whether it is being read or written.
    pub(crate) piece: Option<(u64, CopyPhase)>,
}

/// Where a copy takes its bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CopyFrom {
    /// What the disk reads at a unit, with the request's bytes for the run's part over it.
    Disk { unit: GuestRange, skip_zeros: bool },
    /// Another place of the same file.
    File { off: HostOffset },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyPhase {
    Reading,
    Writing,
}

/// Who hears of an operation's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A slot of this channel.
    Slot(u16),
    /// Everyone who joined a sync.
    Sync(FileId),
    /// Everyone whose change rides in a page.
    Page(PageId),
    /// Everyone who waits for a page to be in memory.
    Load(PageId),
    /// Everyone who waits for a packed unit.
    Unit(Packed),
}

/// An operation in flight (or queued for the engine).
#[derive(Debug)]
pub(crate) struct Op {
    pub(crate) owner: Owner,
    pub(crate) io: IoOp,
    /// Its memory, less what has been moved already.
    pub(crate) bufs: Vec<BufSlice>,
    /// Memory of our own under `bufs`.
    pub(crate) own: Option<Own>,
    /// After a read into `own`: where the bytes go, and how many of `own`'s first bytes to leave out.
    pub(crate) copy_out: Option<(Vec<BufSlice>, usize)>,
}

/// Operations by number. Freed ones keep their memory for the next.
#[derive(Debug, Default)]
pub(crate) struct Ops {
    list: Vec<Op>,
    free: Vec<usize>,
}

impl Ops {
    /// A fresh operation without buffers.
    pub(crate) fn take(&mut self, owner: Owner, io: IoOp) -> usize {
        if let Some(i) = self.free.pop() {
            let op = &mut self.list[i];
            debug_assert!(op.bufs.is_empty() && op.own.is_none() && op.copy_out.is_none());
            op.owner = owner;
            op.io = io;
            return i;
        }
        self.list.push(Op { owner, io, bufs: Vec::new(), own: None, copy_out: None });
        self.list.len() - 1
    }

    pub(crate) fn get(&mut self, i: usize) -> &mut Op {
        &mut self.list[i]
    }

    /// The operation has ended: its number is free, its own memory comes back.
    pub(crate) fn free(&mut self, i: usize) -> Option<Own> {
        let op = &mut self.list[i];
        op.bufs.clear();
        op.copy_out = None;
        self.free.push(i);
        op.own.take()
    }

    pub(crate) fn in_use(&self) -> usize {
        self.list.len() - self.free.len()
    }
}

impl IoKind {
    /// The operation changes the file.
    pub(crate) fn changes_file(self) -> bool {
        !matches!(self, IoKind::Read | IoKind::Sync)
    }
}
