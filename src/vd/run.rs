//! The interpreter: carries out plans, whatever format made them.

use super::Request;
use super::advance::Next;
use super::chain::Lack;
use super::channel::{Channel, NOBODY};
use super::disk::Disk;
use super::finish::Fence;
use super::pages::PageId;
use super::slot::{Copy, CopyFrom, CopyPhase, Job, Owner, Run, Work};
use crate::error::Failure;
use crate::io::{IoKind, IoOp, gather, sub_slices};
use crate::limits::{BOUNCE_BYTES, SECTOR_BYTES};
use crate::map::{FileId, GuestRange, HostOffset, MetaKey, MetaOp, Plan, Settled, Step};
use crate::probe::sabotage::{Sabotage, is_broken};

impl Channel {
    /// Starts work of the disk's own.
    pub(super) fn run_internal(&mut self, job: Job, plan: Plan) {
        let slot = self.internal_slot();
        self.busy += 1;
        self.slot(slot).begin(job, GuestRange::EMPTY, &[]);
        self.slot(slot).work = Work::Running(Run::new(GuestRange::EMPTY, plan));
        self.advance(slot);
    }

    pub(super) fn run_room(&mut self, plan: Plan) {
        self.run_internal(Job::Room, plan);
    }

    /// Work of the disk's own has ended: those who waited go on.
    pub(super) fn internal_ended(&mut self, job: Job, outcome: Result<(), Failure>) {
        let waiters = match job {
            Job::Start => self.disk.start.ended(outcome.is_ok()),
            Job::Room => {
                let mut room = self.disk.room.lock().expect("room lock");
                room.running = false;
                std::mem::take(&mut room.waiters)
            }
            Job::End => return self.end_outcome = Some(outcome),
            Job::None | Job::Request(_) | Job::Fill => unreachable!("no plan of the disk's"),
        };
        // Whether a failed extension is the last word is the format's to say: those who wait ask it again.
        let result = if job == Job::Room { Ok(()) } else { outcome };
        for w in waiters {
            self.wake(w, result);
        }
    }

    /// The slot's plan could only extend the file in a way that may leave garbage after a crash.
    pub(super) fn note_unclean_extension(&mut self, slot: u16) {
        self.slot(slot).extended_unclean = true;
    }

    /// Runs steps up to the next barrier. Called with nothing pending.
    pub(super) fn step_running(&mut self, slot: u16) -> Next {
        let Work::Running(mut run) = std::mem::replace(&mut self.slot(slot).work, Work::Moving) else {
            unreachable!()
        };
        if let Some(f) = self.slot(slot).failure {
            return self.run_ended(slot, &run, Err(f));
        }
        if run.copy.is_none() && run.next == run.plan.steps.len() {
            return self.run_ended(slot, &run, Ok(()));
        }
        let stopped = self.run_steps(slot, &mut run);
        let s = self.slot(slot);
        s.work = Work::Running(run);
        match stopped {
            Err(f) => {
                s.failure.get_or_insert(f);
                Next::Again
            }
            Ok(next) => next,
        }
    }

    fn run_steps(&mut self, slot: u16, run: &mut Run) -> Result<Next, Failure> {
        loop {
            if run.copy.is_some() {
                match self.step_copy(slot, run)? {
                    Some(next) => return Ok(next),
                    None => run.copy = None,
                }
            }
            let Some(step) = run.plan.steps.get(run.next).copied() else { return Ok(Next::Again) };
            let pending = self.slot(slot).pending > 0;
            match step {
                Step::Barrier
                | Step::Sync { .. }
                | Step::HoldSyncs { .. }
                | Step::Block { .. }
                | Step::Move { .. }
                    if pending =>
                {
                    return Ok(Next::Wait);
                }
                Step::Barrier | Step::Sync { .. } | Step::HoldSyncs { .. }
                    if self.slot(slot).failure.is_some() =>
                {
                    return Ok(Next::Again); // which ends the plan
                }
                Step::Barrier => {}
                Step::Truncate { .. } | Step::Punch { .. } if self.must_fence(run) => {
                    if !pending {
                        self.fence = Fence::At(slot);
                        self.slot(slot).pending += 1;
                    }
                    return Ok(Next::Wait);
                }
                Step::HoldSyncs { file } => {
                    run.next += 1;
                    run.holds = Some(file);
                    self.hold_syncs(slot, file);
                    return Ok(Next::Again);
                }
                Step::Sync { file } => {
                    run.next += 1;
                    if !self.leaves_syncs_out(slot) {
                        self.join_sync(slot, file, true);
                    }
                    return Ok(Next::Again);
                }
                _ => self.start_step(slot, run, step),
            }
            run.next += 1;
        }
    }

    /// Starts a step that is none of the barriers. A copy it sets up begins once nothing else of the plan is pending.
    fn start_step(&mut self, slot: u16, run: &mut Run, step: Step) {
        match step {
            Step::Guest { part, file, to } if !self.has_request_bytes(slot) => {
                let io = IoOp { kind: IoKind::ZeroRange, file, off: to, len: part.len() };
                self.issue_plain(Owner::Slot(slot), io);
            }
            Step::Guest { part, file, to } => {
                let at = part.start().since(self.slot(slot).range.start());
                let io = IoOp { kind: IoKind::Write, file, off: to, len: part.len() };
                if self.fits(slot, &io, at) {
                    self.issue_request_bytes(slot, io, at);
                } else {
                    let from = CopyFrom::Disk { unit: part, skip_zeros: false };
                    run.copy = Some(Copy { from, file, to, len: part.len(), done: 0, piece: None });
                }
            }
            Step::Block { block, file, to, len, clean } => {
                let from = CopyFrom::Disk { unit: block, skip_zeros: clean };
                run.copy = Some(Copy { from, file, to, len, done: 0, piece: None });
            }
            Step::Move { file, from, to, len } => {
                let from = CopyFrom::File { off: from };
                run.copy = Some(Copy { from, file, to, len, done: 0, piece: None });
            }
            Step::Meta { key, op } => {
                run.entry_submitted |= matches!(op, MetaOp::Entry { pointer: true, .. });
                self.stage_meta(slot, key, op, false);
            }
            Step::Through { key, op } => {
                let through = !self.leaves_syncs_out(slot);
                self.stage_meta(slot, key, op, through);
            }
            Step::SyncLength { file, from, to } => self.sync_length(slot, file, from, to),
            Step::Extend { file, from, to } => self.issue_resize(slot, IoKind::Allocate, file, from, to),
            // A device keeps its length, whatever is in use of it.
            Step::Truncate { file, .. } if self.disk.file(file).traits.is_device => {}
            Step::Truncate { file, to } => self.issue_resize(slot, IoKind::Truncate, file, to, to),
            Step::Punch { file, .. } if !self.disk.options.discard || !self.disk.file(file).can_punch() => {}
            Step::Punch { file, from, to } => self.issue_resize(slot, IoKind::Punch, file, from, to),
            Step::Barrier | Step::Sync { .. } | Step::HoldSyncs { .. } => {
                unreachable!("barriers are not started")
            }
        }
    }

    /// Hands a change of metadata over to the next write of its page.
    fn stage_meta(&mut self, slot: u16, key: MetaKey, op: MetaOp, through: bool) {
        let id = (self.disk.chain.top().number, key);
        if self.sabotaged(id, op) {
            return;
        }
        let me = self.me(slot);
        self.slot(slot).pending += 1;
        if self.disk.shared.pages.stage(id, op, me, through) {
            self.submit_page(id, !through);
        }
    }

    /// Writes the last sector through, as zeros: then the file is that long for good. A whole sync would also write back all that
    /// guests have written meanwhile, and they would wait for that.
    fn sync_length(&mut self, slot: u16, file: FileId, from: HostOffset, to: HostOffset) {
        if self.leaves_syncs_out(slot) {
            return;
        }
        let unit = u64::from(self.disk.file(file).traits.alignment.offset).max(SECTOR_BYTES);
        // Zeros are what the end of the space reads as anyway; of a place that has a sector only in part, all of its sectors.
        let off = from.0.max(to.0.saturating_sub(unit) / unit * unit);
        let io = IoOp { kind: IoKind::WriteThrough, file, off: HostOffset(off), len: to.0 - off };
        self.issue_zeros(slot, io);
    }

    /// Nobody wants syncs, or a rule is broken on purpose.
    fn leaves_syncs_out(&mut self, slot: u16) -> bool {
        self.disk.options.skip_syncs || is_left_out(self.slot(slot).job)
    }

    /// Breaks a rule about metadata, if that is asked for: true if the change is dealt with.
    fn sabotaged(&mut self, id: PageId, op: MetaOp) -> bool {
        let publish = |disk: &Disk| disk.chain.top().map.publish(id.1, &[op]);
        match op {
            MetaOp::Count(_) => is_broken(Sabotage::CountNotWritten),
            MetaOp::Entry { pointer: true, .. } if is_broken(Sabotage::AnsweredBeforeEntry) => {
                publish(&self.disk);
                if self.disk.shared.pages.stage(id, op, NOBODY, false) {
                    self.submit_page(id, false);
                }
                true
            }
            MetaOp::Entry { pointer: false, .. } if is_broken(Sabotage::ZeroInMemoryOnly) => {
                publish(&self.disk);
                true
            }
            _ => false,
        }
    }

    /// The request brings bytes; the others that change the disk mean zeros.
    fn has_request_bytes(&mut self, slot: u16) -> bool {
        matches!(self.slot(slot).job, Job::Request(Request::Write(_)))
    }

    fn issue_resize(&mut self, slot: u16, kind: IoKind, file: FileId, from: HostOffset, to: HostOffset) {
        self.issue_plain(Owner::Slot(slot), IoOp { kind, file, off: from, len: to.0 - from.0 });
    }

    /// Moves a copy on. `None`: it is complete.
    fn step_copy(&mut self, slot: u16, run: &mut Run) -> Result<Option<Next>, Failure> {
        let part = run.part;
        loop {
            let copy = run.copy.as_mut().expect("a copy under way");
            if self.slot(slot).pending > 0 {
                return Ok(Some(Next::Wait));
            }
            match copy.piece {
                None if copy.done == copy.len => {
                    self.give_buffer_back(slot);
                    return Ok(None);
                }
                None => {
                    if !self.take_buffer(slot) {
                        return Ok(Some(Next::Wait));
                    }
                    let copy = run.copy.as_mut().expect("a copy under way");
                    match self.start_piece(slot, copy, part) {
                        Ok(()) => {}
                        Err(Lack::Failed(f)) => return Err(f),
                        Err(Lack::Page { layer, key }) => drop(self.want_page(slot, (layer, key))),
                        Err(Lack::Unit(packed)) => drop(self.want_unit(slot, packed)),
                    }
                }
                Some((len, CopyPhase::Reading)) => {
                    copy.piece = Some((len, CopyPhase::Writing));
                    let (from, io) = (
                        copy.from,
                        IoOp { kind: IoKind::Write, file: copy.file, off: copy.to.plus(copy.done), len },
                    );
                    if let CopyFrom::Disk { unit, .. } = from {
                        let piece = unit.skip(copy.done).take(len);
                        self.overlay_request_bytes(slot, piece, part);
                    }
                    self.issue_buffer_bytes(slot, io, 0);
                }
                Some((len, CopyPhase::Writing)) => {
                    copy.done += len;
                    copy.piece = None;
                }
            }
            if let Some(f) = self.slot(slot).failure {
                return Err(f);
            }
        }
    }

    /// Reads the next piece of a copy into the buffer, or skips it where it is zeros on zeros.
    fn start_piece(&mut self, slot: u16, copy: &mut Copy, part: GuestRange) -> Result<(), Lack> {
        let most = (copy.len - copy.done).min(BOUNCE_BYTES as u64);
        let len = match copy.from {
            CopyFrom::File { off } => {
                let io = IoOp { kind: IoKind::Read, file: copy.file, off: off.plus(copy.done), len: most };
                self.issue_buffer_bytes(slot, io, 0);
                most
            }
            CopyFrom::Disk { unit, skip_zeros } => {
                let piece = unit.skip(copy.done).take(most);
                if piece.is_empty() {
                    // The block reaches past the end of the disk.
                    self.clear_buffer_bytes(slot, 0, most);
                    if skip_zeros {
                        copy.done += most;
                        return Ok(());
                    }
                    most
                } else {
                    let len = self.read_piece(slot, piece)?;
                    let piece = piece.take(len);
                    if skip_zeros && self.extents.all_zero() && piece.intersect(part).is_empty() {
                        copy.done += len;
                        return Ok(());
                    }
                    len
                }
            }
        };
        copy.piece = Some((len, CopyPhase::Reading));
        Ok(())
    }

    /// Puts the request's own bytes for `part` over the piece in the buffer. They are copied here once: what was
    /// compared before may have changed since, but what is written is one value.
    fn overlay_request_bytes(&mut self, slot: u16, piece: GuestRange, part: GuestRange) {
        let new = piece.intersect(part);
        if new.is_empty() {
            return;
        }
        let s = &mut self.slots[usize::from(slot)];
        let at = usize::try_from(new.start().since(piece.start())).expect("inside the buffer");
        let len = usize::try_from(new.len()).expect("inside the buffer");
        let buf = &mut s.buf.as_mut().expect("a slot that copies has a buffer").as_mut_slice()[at..at + len];
        if matches!(s.job, Job::Request(Request::Write(_))) {
            let mut parts = Vec::new();
            sub_slices(&s.bufs, new.start().since(s.range.start()), new.len(), &mut parts);
            gather(&parts, buf);
        } else {
            buf.fill(0);
        }
    }

    /// The plan has ended, well or not, with nothing of it in flight.
    fn run_ended(&mut self, slot: u16, run: &Run, result: Result<(), Failure>) -> Next {
        if let Some(file) = run.holds {
            self.let_syncs_go(file);
        }
        if let Some(token) = run.plan.token {
            let settled = match result {
                Ok(()) => Settled::Done { clean: !self.slot(slot).extended_unclean },
                Err(why) => Settled::Failed { why, entry_submitted: run.entry_submitted },
            };
            self.disk.chain.top().map.settle(token, settled);
        }
        match self.slot(slot).job {
            Job::Request(_) => {
                let next = match result {
                    Ok(()) => self.part_done(slot, Some(run.part)),
                    Err(f) => self.part_failed(slot, f),
                };
                self.top_up_room();
                next
            }
            _ => Next::Finished,
        }
    }
}

/// A rule is broken on purpose: the syncs of this sort of work are left out.
fn is_left_out(job: Job) -> bool {
    match job {
        Job::Request(_) => is_broken(Sabotage::NoSyncBeforeEntry),
        Job::Room => is_broken(Sabotage::RoomWithoutSync),
        Job::Start => is_broken(Sabotage::CutBeforeSync),
        Job::End => is_broken(Sabotage::CloseWithoutSync),
        Job::None | Job::Fill => false,
    }
}
