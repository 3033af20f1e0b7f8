//! Starting operations and hearing of their ends.

use super::Request;
use super::channel::Channel;
use super::own::Own;
use super::pages::PageId;
use super::slot::{Job, Op, Owner};
use crate::error::Failure;
use crate::io::{
    AlignedBuf, BufSlice, Completion, HostFile, IoKind, IoOp, Tag, fill_zero, scatter, sub_slices, total_len,
};
use crate::limits::{BOUNCE_BYTES, SECTOR_BYTES};
use crate::map::{FileId, HostOffset, Waiter};
use crate::probe::sabotage::{Sabotage, is_broken};

impl Channel {
    /// Moves bytes between the slot's request memory (from `at` on) and a file. Counted as pending unless it has
    /// ended at once.
    pub(super) fn issue_request_bytes(&mut self, slot: u16, io: IoOp, at: u64) {
        let i = self.ops.take(Owner::Slot(slot), io);
        sub_slices(&self.slots[usize::from(slot)].bufs, at, io.len, &mut self.ops.get(i).bufs);
        self.start_op(i);
    }

    /// Moves bytes between the slot's bounce buffer (from `at` on) and a file.
    pub(super) fn issue_buffer_bytes(&mut self, slot: u16, io: IoOp, at: u64) {
        let buf =
            self.slots[usize::from(slot)].buf.as_ref().expect("a slot that copies has a buffer").slice();
        let i = self.ops.take(Owner::Slot(slot), io);
        sub_slices(&[buf], at, io.len, &mut self.ops.get(i).bufs);
        self.start_op(i);
    }

    /// Writes zeros from memory of our own, at most a bounce buffer full.
    pub(super) fn issue_zeros(&mut self, slot: u16, io: IoOp) {
        debug_assert!(io.len <= BOUNCE_BYTES as u64, "an unbounded buffer of zeros");
        let i = self.ops.take(Owner::Slot(slot), io);
        let own = Own::Made(AlignedBuf::new(usize::try_from(io.len).expect("a bounce buffer's worth")));
        let op = self.ops.get(i);
        op.bufs.push(own.slice());
        op.own = Some(own);
        self.start_op(i);
    }

    /// An operation without memory.
    pub(super) fn issue_plain(&mut self, owner: Owner, io: IoOp) {
        let i = self.ops.take(owner, io);
        self.start_op(i);
    }

    /// Gives an operation to the engine, or does it at once.
    pub(super) fn start_op(&mut self, i: usize) {
        self.start_op_how(i, true);
    }

    fn start_op_how(&mut self, i: usize, at_once: bool) {
        if let Owner::Slot(s) = self.ops.get(i).owner {
            self.slot(s).pending += 1;
        }
        if let Err(f) = self.align(i) {
            self.op_ended(i, Err(f));
            return;
        }
        let op = self.ops.get(i);
        if at_once
            && matches!(op.io.kind, IoKind::Read | IoKind::Write)
            && let Some(result) = self.engine.try_now(&op.io, &op.bufs)
        {
            self.moved(i, result);
            return;
        }
        self.queue_op(i);
    }

    fn queue_op(&mut self, i: usize) {
        let op = self.ops.get(i);
        if !self.backlog.is_empty() || self.engine.submit(&op.io, &op.bufs, Tag(i as u64)).is_err() {
            self.backlog.push_back(i);
        }
    }

    /// Offers the engine what it had no room for.
    pub(super) fn submit_backlog(&mut self) {
        while let Some(&i) = self.backlog.front() {
            let op = self.ops.get(i);
            if self.engine.submit(&op.io, &op.bufs, Tag(i as u64)).is_err() {
                break;
            }
            self.backlog.pop_front();
        }
    }

    /// Unbuffered files take only aligned I/O: others goes through memory of our own.
    fn align(&mut self, i: usize) -> Result<(), Failure> {
        let op = self.ops.get(i);
        if !op.io.kind.moves_bytes() {
            return Ok(());
        }
        let alignment = self.disk.file(op.io.file).traits.alignment;
        if alignment.fits(op.io.off.0, &op.bufs) {
            return Ok(());
        }
        let unit = u64::from(alignment.offset);
        let skip = op.io.off.0 % unit;
        let len = (skip + op.io.len).next_multiple_of(unit);
        if op.io.kind.writes_bytes() && (skip != 0 || len != op.io.len) {
            // Writers of parts of a device sector are turned away when the disk is opened.
            return Err(Failure::Os(libc::EINVAL));
        }
        // Only pieces of copies come here; requests with memory of that kind bounce.
        debug_assert!(op.io.len <= BOUNCE_BYTES as u64, "an unbounded bounce buffer");
        let bytes = usize::try_from(len).map_err(|_| Failure::Os(libc::ENOMEM))?;
        let own = Own::Made(AlignedBuf::new(bytes));
        let slice = own.slice();
        let mut theirs = std::mem::take(&mut op.bufs);
        if op.io.kind.writes_bytes() {
            let mut at = 0;
            for b in theirs.drain(..) {
                copy_between(b, slice.part(at, b.len()));
                at += b.len();
            }
            op.bufs = theirs;
        } else {
            op.copy_out = Some((theirs, usize::try_from(skip).expect("less than an alignment unit")));
        }
        op.bufs.push(slice);
        op.own = Some(own);
        op.io = IoOp { off: HostOffset(op.io.off.0 - skip), len, ..op.io };
        Ok(())
    }

    /// The engine has finished something.
    pub(super) fn completed(&mut self, c: Completion) {
        let i = usize::try_from(c.tag.0).expect("our own tag");
        self.moved(i, c.result);
    }

    /// An operation has moved some or all of its bytes, or failed.
    fn moved(&mut self, i: usize, result: Result<u64, i32>) {
        let op = self.ops.get(i);
        if op.io.kind.changes_file() {
            self.disk.file(op.io.file).syncs.wrote();
        }
        match result {
            Err(e) if e == libc::EINTR || e == libc::EAGAIN => self.queue_op(i),
            Err(e) => self.op_failed(i, e),
            Ok(n) if op.io.kind.moves_bytes() && n < op.io.len => self.op_short(i, n),
            Ok(_) => self.op_ended(i, Ok(())),
        }
    }

    /// Fewer bytes than asked for: go on behind them. Nothing at all means the end of the file, and so does an
    /// unaligned piece of unbuffered I/O.
    fn op_short(&mut self, i: usize, n: u64) {
        let op = self.ops.get(i);
        let rest = op.io.len - n;
        let mut left = Vec::with_capacity(op.bufs.len());
        sub_slices(&op.bufs, n, rest, &mut left);
        op.bufs = left;
        op.io.off = op.io.off.plus(n);
        op.io.len = rest;
        let alignment = self.disk.file(op.io.file).traits.alignment;
        if n > 0 && alignment.fits(op.io.off.0, &op.bufs) {
            return self.queue_op(i);
        }
        // A cache image has all its bytes, or is none.
        let is_cut = self.disk.is_cache(op.io.file);
        let ended = if op.io.kind == IoKind::Read && !is_cut {
            fill_behind_end(op, u64::from(alignment.offset))
        } else {
            Err(Failure::Os(libc::EIO))
        };
        self.op_ended(i, ended);
    }

    /// Some failures only mean that the file system cannot do it this way.
    fn op_failed(&mut self, i: usize, errno: i32) {
        let op = self.ops.get(i);
        let (owner, io) = (op.owner, op.io);
        // A device takes only whole sectors of its own, which may be larger than the guest's.
        let unaligned =
            errno == libc::EINVAL && io.kind == IoKind::Punch && self.disk.file(io.file).traits.is_device;
        if errno != libc::EOPNOTSUPP && !unaligned {
            return self.op_ended(i, Err(Failure::Os(errno)));
        }
        match io.kind {
            IoKind::Punch => {
                if !unaligned {
                    self.disk.file(io.file).note_cannot_punch();
                }
                if self.needs_no_zeros(owner) {
                    return self.op_ended(i, Ok(()));
                }
                self.ops.get(i).io.kind = IoKind::ZeroRange;
                self.queue_op(i);
            }
            IoKind::Allocate => {
                if let Owner::Slot(s) = owner {
                    self.note_unclean_extension(s);
                }
                let to = io.off.plus(io.len);
                if self.disk.file(io.file).file.len().is_ok_and(|len| len >= to.0) {
                    return self.op_ended(i, Ok(()));
                }
                self.ops.get(i).io = IoOp { kind: IoKind::Truncate, off: to, len: 0, ..io };
                self.queue_op(i);
            }
            _ => self.op_ended(i, Err(Failure::Os(errno))),
        }
    }

    /// What is punched may stay as it is: a discard's range, and at the close what nothing names.
    fn needs_no_zeros(&mut self, owner: Owner) -> bool {
        let Owner::Slot(s) = owner else { return false };
        matches!(self.slot(s).job, Job::Request(Request::Discard(_)) | Job::End)
    }

    fn op_ended(&mut self, i: usize, mut result: Result<(), Failure>) {
        let op = self.ops.get(i);
        let (owner, io) = (op.owner, op.io);
        if io.kind == IoKind::WriteThrough
            && let Err(f) = result
        {
            self.through_failed(io.file, f);
            result = Err(Failure::SyncFailed);
        }
        let op = self.ops.get(i);
        if result.is_ok()
            && let (Some((theirs, skip)), Some(own)) = (op.copy_out.take(), op.own.as_ref())
        {
            let wanted: usize = theirs.iter().map(|b| b.len()).sum();
            scatter(&own.as_slice()[skip..skip + wanted], &theirs);
        }
        let own = self.ops.free(i);
        match owner {
            Owner::Slot(s) => {
                let result = result.or_else(|f| self.blame_cache(s, io.file, f));
                self.slot(s).settle_one(result);
                self.advance(s);
            }
            Owner::Sync(file) => self.sync_ended(file, result),
            Owner::Page(id) => self.page_ended(id, io.file, result),
            Owner::Load(id) => self.load_ended(id, own, result),
            Owner::Unit(packed) => self.unit_ended(packed, own, result),
        }
    }

    /// Makes `slot` wait for a sync of `file` that is submitted from now on. `even_if_clean`: see
    /// [`super::sync::SyncGroup::join`].
    pub(super) fn join_sync(&mut self, slot: u16, file: FileId, even_if_clean: bool) {
        use super::sync::Joined;
        let me = self.me(slot);
        self.slot(slot).pending += 1;
        match self.disk.file(file).syncs.join(me, even_if_clean) {
            Joined::Clean => self.slot(slot).pending -= 1,
            Joined::Failed => self.slot(slot).settle_one(Err(Failure::SyncFailed)),
            Joined::Wait => {}
            Joined::Start => self.submit_sync(file),
        }
    }

    fn submit_sync(&mut self, file: FileId) {
        let io = IoOp { kind: IoKind::Sync, file, off: HostOffset(0), len: 0 };
        self.issue_plain(Owner::Sync(file), io);
    }

    /// A write that was to be durable is not, and the kernel has told of it: like a sync (rule O4).
    fn through_failed(&mut self, file: FileId, why: Failure) {
        let mut told = Vec::new();
        self.disk.file(file).syncs.failed(&mut told);
        self.tell_sync_failure(file, why);
        for w in told {
            self.wake(w, Err(Failure::SyncFailed));
        }
    }

    /// Keeps syncs of `file` from running beside what the slot's plan does next; it waits for one that runs.
    pub(super) fn hold_syncs(&mut self, slot: u16, file: FileId) {
        let me = self.me(slot);
        self.slot(slot).pending += 1;
        match self.disk.file(file).syncs.hold(me) {
            Ok(true) => self.slot(slot).pending -= 1,
            Ok(false) => {}
            Err(f) => self.slot(slot).settle_one(Err(f)),
        }
    }

    /// The end of [`Self::hold_syncs`].
    pub(super) fn let_syncs_go(&mut self, file: FileId) {
        let mut told = Vec::new();
        let sync = self.disk.file(file).syncs.let_go(&mut told);
        for w in told {
            self.wake(w, Ok(()));
        }
        if sync {
            self.submit_sync(file);
        }
    }

    fn tell_sync_failure(&self, file: FileId, why: Failure) {
        let path = self.disk.file(file).file.path().display();
        tracing::error!("{path}: sync failed ({why}): the disk takes no more writes");
        self.disk.sync_has_failed();
    }

    fn sync_ended(&mut self, file: FileId, result: Result<(), Failure>) {
        let retried = result.is_err() && is_broken(Sabotage::RetriedSync);
        let result =
            if retried { self.disk.file(file).file.sync().map_err(|e| Failure::from_io(&e)) } else { result };
        let mut told: Vec<Waiter> = Vec::new();
        let again = self.disk.file(file).syncs.ended(result.is_ok(), &mut told);
        if let Err(f) = result {
            self.tell_sync_failure(file, f);
        }
        for w in told {
            self.wake(w, result.map_err(|_| Failure::SyncFailed));
        }
        if again {
            self.submit_sync(file);
        }
    }

    /// Submits the write of a page with everything that was released for it. `at_once`: it may be done right here.
    pub(super) fn submit_page(&mut self, id: PageId, at_once: bool) {
        let (ops, through) = self.disk.shared.pages.in_flight(id);
        let layer = self.disk.chain.layer(id.0);
        let mut bytes = Vec::new();
        let place = layer.map.compose(id.1, &ops, &mut bytes);
        let (file, off) = match place {
            Ok(p) => p,
            Err(e) => {
                tracing::error!("{e}");
                return self.page_ended(id, FileId(0), Err(Failure::Corrupt));
            }
        };
        let unit = u64::from(self.disk.file(file).traits.alignment.offset);
        let (off, bytes) = match widen(&*self.disk.file(file).file, off, bytes, unit) {
            Ok(x) => x,
            Err(f) => return self.page_ended(id, file, Err(f)),
        };
        let mut own = Own::Made(AlignedBuf::new(bytes.len()));
        own.as_mut_slice().copy_from_slice(&bytes);
        let kind = if through { IoKind::WriteThrough } else { IoKind::Write };
        let io = IoOp { kind, file, off, len: bytes.len() as u64 };
        let i = self.ops.take(Owner::Page(id), io);
        let op = self.ops.get(i);
        op.bufs.push(own.slice());
        op.own = Some(own);
        self.start_op_how(i, at_once);
    }

    fn page_ended(&mut self, id: PageId, file: FileId, result: Result<(), Failure>) {
        let disk = self.disk.clone();
        if let Err(f) = result {
            tracing::error!("{}: cannot write metadata: {f}", disk.file(file).file.path().display());
        }
        let layer = disk.chain.layer(id.0);
        let (told, again) = disk.shared.pages.ended(id, |ops| {
            if result.is_ok() {
                layer.map.publish(id.1, ops);
            }
        });
        for w in told {
            self.wake(w, result);
        }
        if again {
            // Through the engine: while others keep adding to the page, each write done here would lead to the next,
            // one inside the other, and our own guest would wait.
            self.submit_page(id, false);
        }
    }
}

/// Metadata that does not fill whole device sectors is written with what the file has around it. Nobody else writes
/// those sectors: an image whose data shares one with metadata is not opened unbuffered for writing.
fn widen(
    file: &dyn HostFile,
    off: HostOffset,
    bytes: Vec<u8>,
    unit: u64,
) -> Result<(HostOffset, Vec<u8>), Failure> {
    let skip = off.0 % unit;
    let len = (skip + bytes.len() as u64).next_multiple_of(unit);
    if skip == 0 && len == bytes.len() as u64 {
        return Ok((off, bytes));
    }
    let skip_bytes = usize::try_from(skip).expect("less than an alignment unit");
    let mut wide = vec![0; usize::try_from(len).expect("a page and its edges")];
    let start = HostOffset(off.0 - skip);
    file.read_at(start.0, &mut wide).map_err(|e| Failure::from_io(&e))?;
    wide[skip_bytes..skip_bytes + bytes.len()].copy_from_slice(&bytes);
    Ok((start, wide))
}

/// A read has met the end of the file. The last sector of a raw file may be cut short and reads as zeros from there on;
/// an aligned read may reach past what was asked for. Anything else means that the file has shrunk.
fn fill_behind_end(op: &Op, unit: u64) -> Result<(), Failure> {
    let missing = match (&op.copy_out, &op.own) {
        (Some((theirs, skip)), Some(own)) => {
            let got = own.as_slice().len() as u64 - op.io.len;
            (total_len(theirs) + *skip as u64).saturating_sub(got)
        }
        _ => op.io.len,
    };
    if missing >= SECTOR_BYTES.max(unit) {
        return Err(Failure::Os(libc::EIO));
    }
    fill_zero(&op.bufs);
    Ok(())
}

/// Copies between two pieces of foreign memory.
fn copy_between(from: BufSlice, to: BufSlice) {
    let mut chunk = [0u8; 4096];
    let mut at = 0;
    while at < from.len() {
        let n = chunk.len().min(from.len() - at);
        from.part(at, n).read(&mut chunk[..n]);
        to.part(at, n).write(&chunk[..n]);
        at += n;
    }
}
