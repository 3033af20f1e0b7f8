//! Unbuffered files take only aligned memory. A request whose memory is not goes through a bounce buffer, one piece after
//! the other: a guest cannot make us hold more than the pool.

use super::advance::Next;
use super::channel::Channel;
use super::slot::{Bounced, Work};
use crate::io::{IoKind, IoOp, gather, scatter, sub_slices};
use crate::limits::BOUNCE_BYTES;
use crate::map::HostOffset;

impl Channel {
    /// The request's memory from `at` on can go to the file as it is.
    pub(super) fn fits(&mut self, slot: u16, io: &IoOp, at: u64) -> bool {
        let alignment = self.disk.file(io.file).traits.alignment;
        if alignment == crate::io::Alignment::NONE {
            return true;
        }
        self.with_parts(slot, at, io.len, |parts| alignment.fits(io.off.0, parts))
    }

    /// Begins to move bytes in place through the bounce buffer. The slot does nothing else meanwhile.
    pub(super) fn bounce(&mut self, slot: u16, io: IoOp, at: u64) {
        self.slot(slot).work = Work::Bouncing(Bounced { io, at, done: 0, piece: None });
    }

    pub(super) fn step_bouncing(&mut self, slot: u16) -> Next {
        let Work::Bouncing(mut b) = self.slot(slot).work else { unreachable!() };
        if b.piece.is_some() && self.slot(slot).failure.is_none() {
            self.end_piece(slot, &mut b);
        }
        if b.done == b.io.len || self.slot(slot).failure.is_some() {
            self.give_buffer_back(slot);
            self.slot(slot).work = Work::Moving;
            return Next::Again;
        }
        if !self.take_buffer(slot) {
            return Next::Wait;
        }
        self.start_bounced_piece(slot, &mut b);
        self.slot(slot).work = Work::Bouncing(b);
        Next::Again
    }

    fn start_bounced_piece(&mut self, slot: u16, b: &mut Bounced) {
        let unit = u64::from(self.disk.file(b.io.file).traits.alignment.offset);
        let off = b.io.off.plus(b.done);
        let before = off.0 % unit;
        let most = BOUNCE_BYTES as u64 / unit * unit - before;
        let len = most.min(b.io.len - b.done);
        b.piece = Some((len, before));
        let whole = (before + len).next_multiple_of(unit);
        if b.io.kind == IoKind::Write {
            assert!(
                before == 0 && whole == len,
                "writers of parts of a device sector are turned away at open"
            );
            self.copy_into_buffer(slot, b.at + b.done, len);
        }
        let io = IoOp { off: HostOffset(off.0 - before), len: whole, ..b.io };
        self.issue_buffer_bytes(slot, io, 0);
    }

    fn copy_into_buffer(&mut self, slot: u16, at: u64, len: u64) {
        let s = &mut self.slots[usize::from(slot)];
        let mut parts = Vec::new();
        sub_slices(&s.bufs, at, len, &mut parts);
        let len = usize::try_from(len).expect("inside the buffer");
        gather(&parts, &mut s.buf.as_mut().expect("a slot that bounces has a buffer").as_mut_slice()[..len]);
    }

    fn end_piece(&mut self, slot: u16, b: &mut Bounced) {
        let Some((len, before)) = b.piece.take() else { return };
        if b.io.kind == IoKind::Read {
            let s = &self.slots[usize::from(slot)];
            let mut parts = Vec::new();
            sub_slices(&s.bufs, b.at + b.done, len, &mut parts);
            let from = usize::try_from(before).expect("inside the buffer");
            let to = from + usize::try_from(len).expect("inside the buffer");
            scatter(&s.buf.as_ref().expect("a slot that bounces has a buffer").as_slice()[from..to], &parts);
        }
        b.done += len;
    }
}
