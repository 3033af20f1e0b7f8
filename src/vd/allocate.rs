//! Changes where nothing is allocated yet: under the unit's claim, look what is there, and decide.
//!
//! What VirtualBox does, and why diffs stay small: bytes that equal what the chain shows allocate nothing, and a unit that
//! becomes all zeros is marked so (its HONOR_SAME and HONOR_ZEROES flags clear).

use super::Request;
use super::advance::Next;
use super::chain::Lack;
use super::channel::Channel;
use super::slot::{Job, Run, Work};
use crate::error::Failure;
use crate::io::{IoKind, IoOp, gather, is_zero, sub_slices};
use crate::limits::BOUNCE_BYTES;
use crate::map::{Change, ClaimKey, ExtentKind, ExtentList, GuestRange, Intent, Miss};

/// Units one request changes before others have their turn.
const UNITS_A_TURN: u32 = 128;

impl Channel {
    /// Takes the claim on the unit at the cursor, or waits until it is passed on.
    pub(super) fn take_claim(&mut self, slot: u16) -> Next {
        if self.slot(slot).pending > 0 {
            return Next::Wait; // our own operations first: then a plan has the slot to itself
        }
        let part = self.part_in_unit(slot);
        let top = self.disk.chain.top();
        let key = ClaimKey::Block(top.number, top.map.claim_of(part.start()));
        let me = self.me(slot);
        // Whether it is ours now or only when the event comes: nobody else has it when the slot moves on.
        let s = self.slot(slot);
        s.work = Work::Claimed { part };
        s.claim = Some(key);
        s.pending = 1;
        if self.disk.shared.claims.take(key, me) {
            self.slot(slot).pending = 0;
        }
        Next::Again
    }

    /// Gives the claim up and goes on behind `part` (or at its start, to look again).
    pub(super) fn part_done(&mut self, slot: u16, part: Option<GuestRange>) -> Next {
        if let Some(key) = self.slot(slot).claim.take()
            && let Some(next) = self.disk.shared.claims.release(key)
        {
            self.wake(next, Ok(()));
        }
        self.give_buffer_back(slot);
        let s = self.slot(slot);
        s.work = Work::Moving;
        s.cursor += part.map_or(0, GuestRange::len);
        s.units += 1;
        if s.units.is_multiple_of(UNITS_A_TURN) {
            // A discard of many small units must not keep the queue's other requests waiting.
            s.pending += 1;
            let me = self.me(slot);
            self.disk.shared.mailboxes.post(me, Ok(()));
        }
        Next::Again
    }

    /// Waits for what is lacking, to try the same again; or gives the part up.
    fn part_lacks(&mut self, slot: u16, lack: Lack) -> Next {
        match lack {
            Lack::Failed(f) => self.part_failed(slot, f),
            Lack::Page { layer, key } => self.want_page(slot, (layer, key)),
            Lack::Unit(packed) => self.want_unit(slot, packed),
        }
    }

    pub(super) fn part_failed(&mut self, slot: u16, f: Failure) -> Next {
        self.slot(slot).failure.get_or_insert(f);
        self.part_done(slot, None)
    }

    /// The claim is held. Another may have allocated the unit meanwhile.
    pub(super) fn step_claimed(&mut self, slot: u16) -> Next {
        let Work::Claimed { part } = self.slot(slot).work else { unreachable!() };
        if let Some(f) = self.slot(slot).failure {
            return self.part_failed(slot, f);
        }
        self.extents.clear();
        let top = self.disk.chain.top();
        match top.map.map(part, Intent::Overwrite, &mut self.extents) {
            Ok(()) => return self.part_done(slot, None),
            Err(Miss::NeedsPage(key)) => return self.want_page(slot, (top.number, key)),
            // whatever else is the matter, the decision meets it too
            Err(_) => {}
        }
        match self.decide(slot, part) {
            Ok(Some(work)) => {
                self.slot(slot).work = work;
                Next::Again
            }
            Ok(None) => self.part_done(slot, Some(part)),
            Err(lack) => self.part_lacks(slot, lack),
        }
    }

    /// What to do about `part`, whose unit is not allocated. `None`: nothing.
    fn decide(&mut self, slot: u16, part: GuestRange) -> Result<Option<Work>, Lack> {
        let unit = self.disk.chain.top().map.unit(part.start());
        let Job::Request(request) = self.slot(slot).job else { unreachable!("only requests take claims") };
        let zeros = match request {
            Request::Write(_) => self.request_bytes_are_zero(slot, part),
            _ => true,
        };
        let beneath_zero = self.reads_as_zero(unit)?;
        // After a failed metadata write the file may say something else than we do: then nothing may be left out
        // because it seems to be there already.
        let in_doubt = self.disk.options.write_same || self.disk.chain.top().map.must_write(part.start());
        let discard = matches!(request, Request::Discard(_));
        let kept = self.disk.options.store_zeros && matches!(request, Request::Write(_));
        let change = match (beneath_zero, zeros) {
            (_, true) if kept => Change::Write { part, beneath_zero },
            (true, true) if !in_doubt || discard => return Ok(None),
            (true, true) => Change::Zero { unit },
            (false, true) if part == unit => Change::Zero { unit },
            (false, _) if discard => return Ok(None),
            (false, _) if !in_doubt => return Ok(Some(Work::Comparing { part, done: 0, reading: None })),
            _ => Change::Write { part, beneath_zero },
        };
        Ok(Some(Work::Planning { part, change }))
    }

    /// Nothing but zeros shows in the range, as far as metadata can tell.
    fn reads_as_zero(&mut self, r: GuestRange) -> Result<bool, Lack> {
        let mut rest = r;
        while !rest.is_empty() {
            self.disk.chain.map(rest, &mut self.extents)?;
            if !self.extents.all_zero() {
                return Ok(false);
            }
            rest = rest.skip(self.extents.covered());
        }
        Ok(true)
    }

    fn request_bytes_are_zero(&mut self, slot: u16, part: GuestRange) -> bool {
        let mut parts = Vec::new();
        let s = self.slot(slot);
        sub_slices(&s.bufs, part.start().since(s.range.start()), part.len(), &mut parts);
        is_zero(&parts)
    }

    /// Compares old and new bytes, a piece at a time.
    pub(super) fn step_comparing(&mut self, slot: u16) -> Next {
        let Work::Comparing { part, done, reading } = self.slot(slot).work else { unreachable!() };
        if let Some(f) = self.slot(slot).failure {
            return self.part_failed(slot, f);
        }
        let rest = part.skip(done);
        match reading {
            None if rest.is_empty() => self.part_done(slot, Some(part)),
            None => {
                if !self.take_buffer(slot) {
                    return Next::Wait;
                }
                match self.read_piece(slot, rest.take(BOUNCE_BYTES as u64)) {
                    Ok(len) => {
                        self.slot(slot).work = Work::Comparing { part, done, reading: Some(len) };
                        Next::Again
                    }
                    Err(lack) => self.part_lacks(slot, lack),
                }
            }
            Some(len) if self.piece_equals_request(slot, rest.take(len)) => {
                self.slot(slot).work = Work::Comparing { part, done: done + len, reading: None };
                Next::Again
            }
            Some(_) => {
                let change = Change::Write { part, beneath_zero: false };
                self.slot(slot).work = Work::Planning { part, change };
                Next::Again
            }
        }
    }

    /// Fills the slot's buffer with what the disk reads from the start of `r` on; says how many bytes that is.
    pub(super) fn read_piece(&mut self, slot: u16, r: GuestRange) -> Result<u64, Lack> {
        let mut extents = std::mem::take(&mut self.extents);
        let mapped = self.disk.chain.map(r, &mut extents);
        let read = mapped.and_then(|()| self.extents_to_buffer(slot, &extents, 0));
        self.extents = extents;
        read
    }

    /// Reads what extents say into the slot's buffer from `start` on; says how many bytes that is.
    pub(super) fn extents_to_buffer(
        &mut self,
        slot: u16,
        extents: &ExtentList,
        start: u64,
    ) -> Result<u64, Lack> {
        let mut at = start;
        for e in extents.as_slice() {
            match e.kind {
                ExtentKind::Data { file, off } => {
                    self.issue_buffer_bytes(slot, IoOp { kind: IoKind::Read, file, off, len: e.len }, at);
                }
                ExtentKind::Packed { packed, into } => match self.unit_of(slot, packed) {
                    Some(unit) => self.unit_to_buffer(slot, &unit, at, (into, e.len)),
                    // what comes before it is a piece of its own
                    None if at > start => break,
                    None => return Err(Lack::Unit(packed)),
                },
                ExtentKind::Zero | ExtentKind::Parent => self.clear_buffer_bytes(slot, at, e.len),
            }
            at += e.len;
        }
        Ok(at - start)
    }

    pub(super) fn clear_buffer_bytes(&mut self, slot: u16, at: u64, len: u64) {
        let buf = self.slot(slot).buf.as_ref().expect("a slot that copies has a buffer").slice();
        let (at, len) = (usize::try_from(at), usize::try_from(len));
        buf.part(at.expect("inside the buffer"), len.expect("inside the buffer")).clear();
    }

    fn piece_equals_request(&mut self, slot: u16, piece: GuestRange) -> bool {
        let s = &self.slots[usize::from(slot)];
        let len = usize::try_from(piece.len()).expect("inside the buffer");
        let old = &s.buf.as_ref().expect("a slot that compares has a buffer").as_slice()[..len];
        if !matches!(s.job, Job::Request(Request::Write(_))) {
            return old.iter().all(|b| *b == 0);
        }
        let mut parts = Vec::new();
        sub_slices(&s.bufs, piece.start().since(s.range.start()), piece.len(), &mut parts);
        let mut new = vec![0; len];
        gather(&parts, &mut new);
        new == old
    }

    /// Asks the format how; waits for host blocks if there are none.
    pub(super) fn step_planning(&mut self, slot: u16) -> Next {
        let Work::Planning { part, change } = self.slot(slot).work else { unreachable!() };
        if let Some(f) = self.slot(slot).failure {
            return self.part_failed(slot, f);
        }
        match self.disk.chain.top().map.plan(change) {
            Ok(plan) => {
                self.slot(slot).work = Work::Running(Run::new(part, plan));
                Next::Again
            }
            Err(Miss::NeedsRoom) => self.wait_for_room(slot, part, change),
            Err(Miss::NeedsPage(key)) => self.want_page(slot, (self.disk.chain.top().number, key)),
            // A format that cannot mark a block as zeros gets the zeros written. A discard only asks for less space.
            Err(Miss::Fail(Failure::Unsupported)) if matches!(change, Change::Zero { .. }) => {
                if matches!(self.slot(slot).job, Job::Request(Request::Discard(_))) {
                    return self.part_done(slot, Some(part));
                }
                let change = Change::Write { part, beneath_zero: false };
                self.slot(slot).work = Work::Planning { part, change };
                Next::Again
            }
            Err(Miss::Fail(f)) => self.part_failed(slot, f),
            Err(Miss::NeedsPlan) => unreachable!("a plan asked for a plan"),
        }
    }

    /// No host block is prepared: wait for the extension that runs, or run it.
    fn wait_for_room(&mut self, slot: u16, part: GuestRange, change: Change) -> Next {
        let disk = self.disk.clone();
        let mut room = disk.room.lock().expect("room lock");
        if room.running {
            room.waiters.push(self.me(slot));
            self.slot(slot).pending += 1;
            return Next::Wait;
        }
        let map = &disk.chain.top().map;
        // An extension may have ended since the question.
        match map.plan(change) {
            Ok(plan) => {
                self.slot(slot).work = Work::Running(Run::new(part, plan));
                return Next::Again;
            }
            Err(Miss::NeedsRoom) => {}
            // asked again without the lock
            Err(_) => return Next::Again,
        }
        let Some(plan) = map.room(true) else {
            return self.part_failed(slot, Failure::Os(libc::ENOSPC));
        };
        room.running = true;
        room.waiters.push(self.me(slot));
        self.slot(slot).pending += 1;
        drop(room);
        self.run_room(plan);
        Next::Again
    }

    /// Prepares further host blocks ahead of need, unless someone does already.
    pub(super) fn top_up_room(&mut self) {
        let disk = self.disk.clone();
        let mut room = disk.room.lock().expect("room lock");
        if room.running {
            return;
        }
        if let Some(plan) = disk.chain.top().map.room(false) {
            room.running = true;
            drop(room);
            self.run_room(plan);
        }
    }

    /// A bounce buffer for the slot. False: it waits for one.
    pub(super) fn take_buffer(&mut self, slot: u16) -> bool {
        if self.slot(slot).buf.is_some() {
            return true;
        }
        let me = self.me(slot);
        match self.disk.take_bounce(me) {
            Some(buf) => {
                self.slot(slot).buf = Some(buf);
                true
            }
            None => {
                self.slot(slot).pending += 1;
                false
            }
        }
    }

    pub(super) fn give_buffer_back(&mut self, slot: u16) {
        if let Some(buf) = self.slot(slot).buf.take()
            && let Some(next) = self.disk.give_bounce(buf)
        {
            self.wake(next, Ok(()));
        }
    }
}
