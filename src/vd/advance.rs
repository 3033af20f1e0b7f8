//! What a slot does next: requests of all kinds, step by step, until they wait for something.

use super::chain::Lack;
use super::channel::Channel;
use super::disk::Started;
use super::slot::{Job, Work};
use super::{Done, Request};
use crate::error::Failure;
use crate::io::{IoKind, IoOp, fill_zero};
use crate::limits::MAX_REQUEST_OPS;
use crate::map::{ExtentKind, GuestRange, Intent, Miss};

/// Whether a slot can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Something has changed: look again.
    Again,
    /// It waits for what is pending.
    Wait,
    /// It has ended.
    Finished,
}

impl Channel {
    /// Moves a slot on as far as it goes.
    pub(super) fn advance(&mut self, slot: u16) {
        if std::mem::replace(&mut self.slot(slot).advancing, true) {
            return; // what has ended is noticed by the call further up
        }
        loop {
            match self.step(slot) {
                Next::Again => {}
                Next::Wait => break,
                Next::Finished if self.piece_ended(slot) => {}
                Next::Finished => {
                    self.finish(slot);
                    break;
                }
            }
        }
        self.slot(slot).advancing = false;
    }

    fn step(&mut self, slot: u16) -> Next {
        let s = self.slot(slot);
        if s.pending > 0 && !matches!(s.work, Work::Moving) {
            return Next::Wait;
        }
        match s.work {
            Work::Moving => self.step_moving(slot),
            Work::NextPiece => self.step_next_piece(slot),
            Work::Bouncing(_) => self.step_bouncing(slot),
            Work::Claimed { .. } => self.step_claimed(slot),
            Work::Comparing { .. } => self.step_comparing(slot),
            Work::Planning { .. } => self.step_planning(slot),
            Work::Running(_) => self.step_running(slot),
            Work::Filling(_) => self.step_filling(slot),
            Work::Syncing => Next::Finished,
        }
    }

    /// Starts what can be started without a change of metadata.
    fn step_moving(&mut self, slot: u16) -> Next {
        let s = self.slot(slot);
        let Job::Request(request) = s.job else { unreachable!("the disk's own work only runs plans") };
        if s.failure.is_some() || s.cursor == s.range.len() {
            return match s.pending {
                0 if s.again => self.read_again(slot),
                0 => self.all_moved(slot, request),
                _ => Next::Wait,
            };
        }
        if s.pending >= u32::from(MAX_REQUEST_OPS) {
            return Next::Wait;
        }
        match request {
            Request::Read(_) => self.start_reads(slot),
            Request::Discard(_) if !self.disk.options.discard => self.skip_all(slot),
            Request::Flush => unreachable!("a flush has no range"),
            Request::Write(_) | Request::Discard(_) | Request::WriteZeroes { .. } => {
                self.start_changes(slot, request)
            }
        }
    }

    /// Nothing is to be done for the request.
    fn skip_all(&mut self, slot: u16) -> Next {
        let s = self.slot(slot);
        s.cursor = s.range.len();
        Next::Again
    }

    fn start_reads(&mut self, slot: u16) -> Next {
        let rest = self.slot(slot).rest();
        let mut extents = std::mem::take(&mut self.extents);
        let mut mapped = self.disk.chain.map(rest, &mut extents);
        let cached = self.disk.cache.is_some();
        if cached && mapped.is_ok() {
            let mut pins = std::mem::take(&mut self.slot(slot).pins);
            self.through_cache(rest, &mut extents, &mut pins);
            self.slot(slot).pins = pins;
        }
        match mapped {
            Ok(()) => {
                for e in extents.as_slice() {
                    let at = self.slot(slot).cursor;
                    self.slot(slot).cursor += e.len;
                    match e.kind {
                        ExtentKind::Data { file, off } => {
                            let io = IoOp { kind: IoKind::Read, file, off, len: e.len };
                            if !self.fits(slot, &io, at) {
                                self.bounce(slot, io, at);
                                break;
                            }
                            self.issue_request_bytes(slot, io, at);
                        }
                        ExtentKind::Packed { packed, into } => match self.unit_of(slot, packed) {
                            Some(unit) => self.copy_of_unit(slot, &unit, at, (into, e.len)),
                            None => {
                                self.slot(slot).cursor = at;
                                mapped = Err(Lack::Unit(packed));
                                break;
                            }
                        },
                        ExtentKind::Zero | ExtentKind::Parent => self.clear_request_bytes(slot, at, e.len),
                    }
                    if cached {
                        self.count_read(e.kind, e.len);
                    }
                }
            }
            Err(Lack::Failed(f)) => self.slot(slot).failure = Some(f),
            Err(Lack::Page { .. } | Lack::Unit(_)) => {}
        }
        self.extents = extents;
        match mapped {
            Err(Lack::Page { layer, key }) => self.want_page(slot, (layer, key)),
            Err(Lack::Unit(packed)) => self.want_unit(slot, packed),
            _ => Next::Again,
        }
    }

    fn clear_request_bytes(&mut self, slot: u16, at: u64, len: u64) {
        self.with_parts(slot, at, len, fill_zero);
    }

    /// Writes, punches or zeroes what is allocated; for the rest the claim is taken.
    fn start_changes(&mut self, slot: u16, request: Request) -> Next {
        if let Err(f) = self.disk.may_write() {
            self.slot(slot).failure = Some(f);
            return Next::Again;
        }
        if !self.disk.start.is_done() {
            return self.join_start(slot);
        }
        let rest = self.slot(slot).rest();
        let mut extents = std::mem::take(&mut self.extents);
        extents.clear();
        let mapped = self.disk.chain.top().map.map(rest, Intent::Overwrite, &mut extents);
        if mapped.is_ok() {
            for e in extents.as_slice() {
                let at = self.slot(slot).cursor;
                self.slot(slot).cursor += e.len;
                let ExtentKind::Data { file, off } = e.kind else {
                    unreachable!("only data can be overwritten")
                };
                let io = IoOp { kind: IoKind::Write, file, off, len: e.len };
                if matches!(request, Request::Write(_)) && !self.fits(slot, &io, at) {
                    self.bounce(slot, io, at);
                    break;
                }
                self.change_in_place(slot, request, io, at);
            }
        }
        self.extents = extents;
        match mapped {
            Ok(()) => Next::Again,
            Err(Miss::NeedsPlan) => self.take_claim(slot),
            Err(Miss::NeedsPage(key)) => self.want_page(slot, (self.disk.chain.top().number, key)),
            Err(Miss::Fail(f)) => {
                self.slot(slot).failure = Some(f);
                Next::Again
            }
            Err(Miss::NeedsRoom) => unreachable!("a look-up asked for room"),
        }
    }

    fn change_in_place(&mut self, slot: u16, request: Request, io: IoOp, at: u64) {
        let can_punch = self.disk.file(io.file).can_punch();
        let kind = match request {
            Request::Write(_) => return self.issue_request_bytes(slot, io, at),
            Request::Discard(_) if can_punch && self.disk.options.discard => IoKind::Punch,
            Request::Discard(_) => return,
            Request::WriteZeroes { unmap: true, .. } if can_punch => IoKind::Punch,
            _ => IoKind::ZeroRange,
        };
        self.issue_plain(super::slot::Owner::Slot(slot), IoOp { kind, ..io });
    }

    /// Waits for the work before the first change, or does it.
    fn join_start(&mut self, slot: u16) -> Next {
        let me = self.me(slot);
        self.slot(slot).pending += 1;
        match self.disk.start.join(me) {
            Started::Yes => {
                self.slot(slot).pending -= 1;
                Next::Again
            }
            Started::Wait => Next::Wait,
            Started::Begin => {
                let plan = self.disk.chain.top().map.begin(self.disk.host.new_uuid());
                self.run_internal(Job::Start, plan);
                // Without syncs it may have ended already.
                if self.slot(slot).pending > 0 { Next::Wait } else { Next::Again }
            }
        }
    }

    /// Everything is moved: sync it where the disk is written through, or where a sync is what was asked for.
    fn all_moved(&mut self, slot: u16, request: Request) -> Next {
        if self.slot(slot).failure.is_some() {
            return Next::Finished;
        }
        let sync = match request {
            Request::Read(_) => false,
            Request::Flush => true,
            _ => self.write_through && !self.more_pieces(slot),
        };
        if !sync || self.disk.options.skip_syncs || self.disk.options.read_only {
            return Next::Finished;
        }
        if let Err(Failure::SyncFailed) = self.disk.may_write() {
            self.slot(slot).failure = Some(Failure::SyncFailed);
            return Next::Finished;
        }
        self.slot(slot).work = Work::Syncing;
        let disk = self.disk.clone();
        for file in disk.image_file_ids() {
            // Parents too, once: a write that equals what they show was left out, and their bytes may still be in the
            // page cache, from whoever wrote them.
            self.join_sync(slot, file, false);
        }
        Next::Again
    }

    /// Begins a read anew: some of it came from a cache image that has failed.
    fn read_again(&mut self, slot: u16) -> Next {
        self.unpin_slot(slot);
        let s = self.slot(slot);
        (s.again, s.cursor) = (false, 0);
        Next::Again
    }

    /// The slot has ended.
    fn finish(&mut self, slot: u16) {
        let s = self.slot(slot);
        assert!(s.pending == 0 && s.claim.is_none(), "a slot ended with something pending");
        let outcome = s.failure.map_or(Ok(()), Err);
        let job = std::mem::replace(&mut s.job, Job::None);
        s.work = Work::Moving;
        s.unit = None;
        s.again = false;
        let pinned = !s.pins.is_empty();
        self.busy -= 1;
        if pinned {
            self.unpin_slot(slot);
        }
        self.give_buffer_back(slot);
        match job {
            Job::Request(_) => self.done.push(Done { slot, outcome }),
            Job::None => unreachable!("a free slot ended"),
            Job::Start | Job::Room | Job::End => self.internal_ended(job, outcome),
            Job::Fill => {} // what came of it only the cache has to know
        }
    }

    /// The part of a request that lies in one unit of the top image, from its cursor on.
    pub(super) fn part_in_unit(&mut self, slot: u16) -> GuestRange {
        let rest = self.slot(slot).rest();
        rest.intersect(self.disk.chain.top().map.unit(rest.start()))
    }
}
