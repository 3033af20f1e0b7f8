//! Requests through the disk's filters: what the images hold is never in the guest's memory, and what the guest has written is
//! never changed there. A piece at a time goes through a buffer of our own; each is a request by itself for all that
//! is beneath, which knows nothing of filters: what it compares and copies is what the images hold.

use super::advance::Next;
use super::channel::Channel;
use super::own::Own;
use super::slot::{Job, Work};
use super::{Outcome, Request};
use crate::filter::Filters;
use crate::io::{AlignedBuf, BufSlice, IoKind, gather, scatter, sub_slices};
use crate::limits::{BOUNCE_BYTES, INLINE_WRITE_BYTES};
use crate::map::GuestRange;
use std::sync::Arc;

/// A request on its way through the filters.
#[derive(Debug)]
pub(crate) struct Outer {
    request: Request,
    range: GuestRange,
    bufs: Vec<BufSlice>,
    /// Those that were there when it began.
    filters: Arc<Filters>,
    /// Bytes done.
    done: u64,
    /// The present piece, or the last one's.
    buf: Option<Own>,
}

impl Outer {
    /// The present piece.
    fn piece(&self) -> GuestRange {
        self.range.skip(self.done).take(BOUNCE_BYTES as u64)
    }

    fn is_last(&self) -> bool {
        self.done + self.piece().len() == self.range.len()
    }

    /// The request's memory for the present piece.
    fn parts(&self) -> Vec<BufSlice> {
        let mut parts = Vec::new();
        sub_slices(&self.bufs, self.done, self.piece().len(), &mut parts);
        parts
    }

    /// What is in the buffer: the present piece.
    fn bytes(&mut self) -> &mut [u8] {
        let len = usize::try_from(self.piece().len()).expect("a bounce buffer's worth");
        &mut self.buf.as_mut().expect("a piece has a buffer").as_mut_slice()[..len]
    }
}

impl Channel {
    /// A small read of one extent that is there at once.
    pub(super) fn read_filtered_at_once(&mut self, r: GuestRange, bufs: &[BufSlice]) -> Option<Outcome> {
        if r.len() > INLINE_WRITE_BYTES || self.disk.cache.is_some() {
            return None;
        }
        let slice = self.scratch_for(r);
        let moved = self.move_at_once(IoKind::Read, r, &[slice])?;
        if moved.is_ok() {
            let filters = self.disk.filters();
            let bytes = self.scratch_bytes(slice.len());
            filters.on_read(r.start(), bytes);
            scatter(bytes, bufs);
        }
        Some(moved)
    }

    /// A small write to one allocated extent that ends at once.
    pub(super) fn write_filtered_at_once(&mut self, r: GuestRange, bufs: &[BufSlice]) -> Option<Outcome> {
        if r.len() > INLINE_WRITE_BYTES || !self.may_write_at_once(r) {
            return None;
        }
        // Before the bytes are worked on: the top image has a place for them.
        self.disk.chain.top().map.look(r, crate::map::Intent::Overwrite).ok()?;
        let slice = self.scratch_for(r);
        let filters = self.disk.filters();
        let bytes = self.scratch_bytes(slice.len());
        gather(bufs, bytes);
        filters.on_write(r.start(), bytes);
        self.move_at_once(IoKind::Write, r, &[slice])
    }

    /// The first bytes of the scratch memory, for an operation that has ended when the call that starts it returns.
    fn scratch_for(&mut self, r: GuestRange) -> BufSlice {
        let most = usize::try_from(INLINE_WRITE_BYTES).expect("small");
        let own = self.scratch.get_or_insert_with(|| Own::Made(AlignedBuf::new(most)));
        own.slice().part(0, usize::try_from(r.len()).expect("small"))
    }

    fn scratch_bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.scratch.as_mut().expect("asked for before").as_mut_slice()[..len]
    }

    /// A request has taken its slot: if its bytes go through filters, its pieces will.
    pub(super) fn begin_filtered(&mut self, slot: u16, request: Request) {
        let filters = self.disk.filters();
        let (moves, skips) = match request {
            Request::Read(_) | Request::Write(_) => (true, false),
            // Zeros are written as the filters make them: whoever reads the images with other tools sees zeros too.
            Request::WriteZeroes { .. } => (filters.changes_writes(), false),
            // What is given back would show noise.
            Request::Discard(_) => (false, filters.hide_zeros()),
            Request::Flush => (false, false),
        };
        let s = self.slot(slot);
        if skips {
            s.cursor = s.range.len();
        }
        if moves && !s.range.is_empty() {
            let bufs = std::mem::take(&mut s.bufs);
            let range = s.range;
            s.outer = Some(Box::new(Outer { request, range, bufs, filters, done: 0, buf: None }));
            s.work = Work::NextPiece;
        }
    }

    /// Begins with a piece once there is a buffer for it.
    pub(super) fn step_next_piece(&mut self, slot: u16) -> Next {
        let (disk, me) = (self.disk.clone(), self.me(slot));
        let s = self.slot(slot);
        let outer = s.outer.as_mut().expect("a piece of a request");
        let piece = outer.piece();
        if outer.buf.is_none() {
            let most = usize::try_from(outer.range.len()).unwrap_or(BOUNCE_BYTES).min(BOUNCE_BYTES);
            outer.buf = disk.take_filter_bounce(most, me);
        }
        if outer.buf.is_none() {
            s.pending += 1;
            return Next::Wait;
        }
        let request = match outer.request {
            Request::Read(_) => Request::Read(piece),
            Request::Write(_) => {
                let parts = outer.parts();
                gather(&parts, outer.bytes());
                Request::Write(piece)
            }
            _ => {
                outer.bytes().fill(0);
                Request::Write(piece)
            }
        };
        if matches!(request, Request::Write(_)) {
            let filters = outer.filters.clone();
            filters.on_write(piece.start(), outer.bytes());
        }
        let slice = outer.buf.as_ref().expect("taken above").slice();
        let slice = slice.part(0, usize::try_from(piece.len()).expect("a bounce buffer's worth"));
        (s.job, s.range, s.cursor, s.work) = (Job::Request(request), piece, 0, Work::Moving);
        s.extended_unclean = false;
        s.bufs.clear();
        s.bufs.push(slice);
        Next::Again
    }

    /// What ends is not the last piece of its request: writing through may wait for that one.
    pub(super) fn more_pieces(&mut self, slot: u16) -> bool {
        self.slot(slot).outer.as_ref().is_some_and(|o| !o.is_last())
    }

    /// A piece has ended, if it is one. True: the slot goes on with the next.
    pub(super) fn piece_ended(&mut self, slot: u16) -> bool {
        let s = self.slot(slot);
        let Some(mut outer) = s.outer.take() else { return false };
        if s.failure.is_none() {
            let (piece, filters) = (outer.piece(), outer.filters.clone());
            if matches!(outer.request, Request::Read(_)) {
                filters.on_read(piece.start(), outer.bytes());
                let parts = outer.parts();
                scatter(outer.bytes(), &parts);
            }
            outer.done += piece.len();
            if outer.done < outer.range.len() {
                s.outer = Some(outer);
                s.work = Work::NextPiece;
                if !self.slot(slot).pins.is_empty() {
                    self.unpin_slot(slot);
                }
                return true;
            }
        }
        if let Some(buf) = outer.buf.take()
            && let Some(next) = self.disk.give_filter_bounce(buf)
        {
            self.wake(next, Ok(()));
        }
        false
    }
}
