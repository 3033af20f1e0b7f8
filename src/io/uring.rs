//! The engine over io_uring.

use super::aligned::zeros;
use super::attached::{Attached, Files};
use super::ring::{self, Ring};
use super::run::{check_range, needs_written_zeros, zeros_end};
use super::sys::{self, SysResult};
use super::{BufSlice, Completion, Full, HostFile, IoEngine, IoKind, IoOp, Tag};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::MAX_ENGINE_DEPTH;
use crate::map::{FileId, HostOffset};
use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{EnterFlags, opcode, squeue};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How often one operation is submitted again after EAGAIN or EINTR before the error is passed up.
const MAX_RETRIES: u8 = 64;
/// Bytes of one read or write of one buffer: the length's field has 32 bits. The rest is a short result.
const MAX_ONE_BUFFER: u32 = 1 << 30;

/// An engine over an io_uring ring. It may be made by any thread, files attached; the first that enters it is the
/// one that uses it from then on. On other threads everything but dropping it is then refused with EEXIST.
///
/// The ring is restricted to this module's operations on attached files. Every operation keeps a slot until it
/// is reaped: its iovecs stay where they are, and no slot is allocated after the first use of each.
///
/// A `ZeroRange` the file system does not know is done by writing zeros through the ring, 256 KiB at a time, so
/// that it neither blocks this thread nor fills the ring. A `Truncate` is done at once, in `submit`, on kernels
/// without the opcode (before 6.9).
pub struct UringEngine {
    ring: Ring,
    enabled: bool,
    files: Files,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots to submit again, kept to reuse its memory.
    again: Vec<u32>,
}

/// An operation in flight.
#[derive(Debug)]
struct Slot {
    op: IoOp,
    tag: Tag,
    bufs: Vec<BufSlice>,
    stage: Stage,
    retries: u8,
    /// Counted as in flight on its file; not if it names none of ours.
    counted: bool,
}

/// How far an operation is.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// The kernel has it as it is.
    Whole,
    /// Zeros are being written.
    Zeros { at: u64, end: u64 },
    /// It ended before it reached the kernel: a no-op brings the result to the completion queue, so that whoever
    /// sleeps on [`UringEngine::event_fd`] wakes.
    Ended(SysResult),
}

impl Slot {
    fn idle() -> Slot {
        let op = IoOp { kind: IoKind::Sync, file: FileId(0), off: HostOffset(0), len: 0 };
        Slot { op, tag: Tag(0), bufs: Vec::new(), stage: Stage::Whole, retries: 0, counted: false }
    }
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = f.debug_struct("UringEngine");
        s.field("slots", &self.slots.len()).field("free", &self.free.len()).finish_non_exhaustive()
    }
}

impl UringEngine {
    /// An engine that takes up to `depth` operations (between 1 and [`MAX_ENGINE_DEPTH`]) at a time.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where io_uring cannot be used, with the reason.
    pub fn new(depth: u32) -> Result<UringEngine> {
        let depth = depth.clamp(1, MAX_ENGINE_DEPTH);
        let ring = ring::make(depth).map_err(|why| Error::new(ErrorKind::Unsupported, why))?;
        let slots = std::iter::repeat_with(Slot::idle).take(depth as usize).collect();
        // the last is used first: few slots stay warm
        let free = (0..depth).rev().collect();
        let again = Vec::with_capacity(depth as usize);
        Ok(UringEngine { ring, enabled: false, files: Files::default(), slots, free, again })
    }

    /// Whether io_uring can be used here; if not, why.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn probe() -> Result<()> {
        Self::new(1).map(drop)
    }

    /// From the first call on, the calling thread is the only one to submit.
    fn enable(&mut self) -> io::Result<()> {
        if !self.enabled {
            self.ring.io.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        Ok(())
    }

    /// What is known about an operation before the kernel sees it.
    fn first_stage(&self, op: &IoOp) -> Stage {
        if let Err(e) = check_range(op) {
            return Stage::Ended(Err(e));
        }
        match self.files.get(op.file) {
            None => Stage::Ended(Err(libc::EBADF)),
            Some(f) if op.kind == IoKind::Truncate && !self.ring.can_truncate => {
                Stage::Ended(sys::ftruncate(f.fd(), op.off.0))
            }
            Some(_) => Stage::Whole,
        }
    }

    /// Puts a slot's next step into the submission queue.
    fn push(&mut self, index: u32) {
        let slot = &self.slots[index as usize];
        let entry = entry_of(slot).user_data(u64::from(index)).flags(squeue::Flags::FIXED_FILE);
        // SAFETY: what the entry points to stays valid until its completion was reaped: the iovecs are in the
        // slot, which is not reused before, and drop waits; the memory they name is promised by the maker of each
        // `BufSlice`; the zeros are static. The file is in the table: `attach` refuses to replace it meanwhile.
        let pushed = unsafe { self.ring.io.submission().push(&entry) };
        // One entry per slot at most, and as many entries as slots.
        pushed.expect("the queue has room for every slot");
    }

    /// Operations the kernel has.
    fn in_kernel(&mut self) -> usize {
        self.in_flight() - self.ring.io.submission().len()
    }

    /// Takes the completions out of the ring; `ended` sees those that are final, the others are in `again`.
    fn drain(&mut self, mut ended: impl FnMut(Completion)) {
        for cqe in self.ring.io.completion() {
            let Ok(index) = u32::try_from(cqe.user_data()) else { continue };
            let Some(slot) = self.slots.get_mut(index as usize) else { continue };
            match advance(slot, cqe.result(), &self.files) {
                None => self.again.push(index),
                Some(result) => {
                    if slot.counted {
                        self.files.ended(slot.op.file);
                    }
                    self.free.push(index);
                    ended(Completion { tag: slot.tag, result });
                }
            }
        }
    }
}

/// Buffers of a single-buffer operation as the kernel wants them.
fn one_buffer(b: BufSlice) -> (*mut u8, u32) {
    (b.as_ptr(), u32::try_from(b.len()).unwrap_or(MAX_ONE_BUFFER).min(MAX_ONE_BUFFER))
}

fn write_flags(kind: IoKind) -> i32 {
    if kind == IoKind::WriteThrough { sys::THROUGH } else { 0 }
}

/// The submission entry for a slot's next step.
fn entry_of(slot: &Slot) -> squeue::Entry {
    let op = &slot.op;
    let fd = Fixed(u32::from(op.file.0));
    let fallocate = |mode| opcode::Fallocate::new(fd, op.len).offset(op.off.0).mode(mode).build();
    match slot.stage {
        Stage::Ended(_) => return opcode::Nop::new().build(),
        Stage::Zeros { at, end } => {
            let piece = zeros().part(0, usize::try_from(end - at).unwrap_or(usize::MAX));
            let (ptr, len) = one_buffer(piece);
            return opcode::Write::new(fd, ptr, len).offset(at).build();
        }
        Stage::Whole => {}
    }
    match (op.kind, slot.bufs.as_slice()) {
        (IoKind::Read, [b]) => {
            let (ptr, len) = one_buffer(*b);
            opcode::Read::new(fd, ptr, len).offset(op.off.0).build()
        }
        (IoKind::Write | IoKind::WriteThrough, [b]) => {
            let (ptr, len) = one_buffer(*b);
            opcode::Write::new(fd, ptr, len).offset(op.off.0).rw_flags(write_flags(op.kind)).build()
        }
        (IoKind::Read, bufs) => {
            let (iov, n) = sys::iovecs(bufs);
            opcode::Readv::new(fd, iov, u32::from(n)).offset(op.off.0).build()
        }
        (IoKind::Write | IoKind::WriteThrough, bufs) => {
            let (iov, n) = sys::iovecs(bufs);
            let flags = write_flags(op.kind);
            opcode::Writev::new(fd, iov, u32::from(n)).offset(op.off.0).rw_flags(flags).build()
        }
        // fdatasync: see `sys::fdatasync`
        (IoKind::Sync, _) => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        (IoKind::Allocate, _) => fallocate(sys::ALLOCATE),
        (IoKind::Punch, _) => fallocate(sys::PUNCH),
        (IoKind::ZeroRange, _) => fallocate(sys::ZERO_RANGE),
        (IoKind::Truncate, _) => opcode::Ftruncate::new(fd, op.off.0).build(),
    }
}

/// Takes in a completion: the operation's result, or `None` if it has to be submitted again.
fn advance(slot: &mut Slot, raw: i32, files: &Files) -> Option<SysResult> {
    let result = u64::try_from(raw).map_err(|_| raw.saturating_neg());
    match (slot.stage, result) {
        (Stage::Ended(result), _) => Some(result),
        (_, Err(libc::EAGAIN | libc::EINTR)) if slot.retries < MAX_RETRIES => {
            slot.retries += 1;
            None
        }
        (Stage::Whole, Err(e)) if needs_written_zeros(&slot.op, e) => begin_zeros(slot, files),
        (Stage::Whole, Ok(n)) => match slot.op.kind {
            kind if kind.moves_bytes() => Some(Ok(n)),
            _ => Some(Ok(0)),
        },
        (Stage::Zeros { .. }, Ok(0)) => Some(Err(libc::EIO)),
        (Stage::Zeros { at, end }, Ok(n)) => {
            let at = at.saturating_add(n);
            slot.stage = Stage::Zeros { at, end };
            (at >= end).then_some(Ok(0))
        }
        (_, Err(e)) => Some(Err(e)),
    }
}

fn begin_zeros(slot: &mut Slot, files: &Files) -> Option<SysResult> {
    let end = files.get(slot.op.file).ok_or(libc::EBADF).and_then(|f| zeros_end(f.fd(), &slot.op));
    match end {
        Err(e) => Some(Err(e)),
        Ok(end) if end <= slot.op.off.0 => Some(Ok(0)),
        Ok(end) => {
            slot.stage = Stage::Zeros { at: slot.op.off.0, end };
            None
        }
    }
}

/// The kernel is short of something that ends by itself.
fn is_passing(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

impl IoEngine for UringEngine {
    fn attach(&mut self, id: FileId, file: &Arc<dyn HostFile>) -> io::Result<()> {
        self.files.check_idle(id)?;
        if u32::from(id.0) >= self.ring.files {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let file = Attached::new(file)?;
        let fd = file.fd().as_raw_fd();
        self.ring.io.submitter().register_files_update(u32::from(id.0), &[fd])?;
        self.files.set(id, file);
        Ok(())
    }

    fn try_now(&mut self, op: &IoOp, bufs: &[BufSlice]) -> Option<SysResult> {
        self.files.get_mut(op.file)?.try_now(op, bufs)
    }

    fn be_patient(&mut self, write_out: bool) {
        self.files.be_patient(write_out);
    }

    fn submit(&mut self, op: &IoOp, bufs: &[BufSlice], tag: Tag) -> std::result::Result<(), Full> {
        let index = self.free.pop().ok_or(Full)?;
        let stage = self.first_stage(op);
        let slot = &mut self.slots[index as usize];
        slot.counted = false;
        if let Some(f) = self.files.get_mut(op.file) {
            f.in_flight += 1;
            slot.counted = true;
        }
        slot.bufs.clear();
        slot.bufs.extend_from_slice(bufs);
        (slot.op, slot.tag, slot.stage, slot.retries) = (*op, tag, stage, 0);
        self.push(index);
        Ok(())
    }

    fn enter(&mut self) -> io::Result<()> {
        self.enable()?;
        let mut tries = 0;
        while !self.ring.io.submission().is_empty() {
            match self.ring.io.submit() {
                Ok(n) if n > 0 => {}
                Err(e) if !is_passing(&e) => return Err(e),
                _ if tries >= MAX_RETRIES => return Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                _ => {
                    tries += 1;
                    thread::yield_now();
                }
            }
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        if self.ring.io.submission().taskrun() {
            // Completions wait for this thread to enter the kernel. If that fails they are there next time.
            let _ = self.ring.io.submit();
        }
        self.drain(|c| out.push(c));
        if self.again.is_empty() {
            return;
        }
        let mut again = std::mem::take(&mut self.again);
        again.drain(..).for_each(|index| self.push(index));
        self.again = again;
        // What is not taken now stays queued for the next call of `enter` or `wait`.
        let _ = self.enter();
    }

    fn wait(&mut self, at_most: Duration) -> io::Result<()> {
        self.enable()?;
        let start = Instant::now();
        while self.ring.io.completion().is_empty() && self.in_flight() > 0 {
            let left = at_most.saturating_sub(start.elapsed());
            let ts = Timespec::from(left);
            match self.ring.io.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&ts)) {
                Err(e) if e.raw_os_error() == Some(libc::ETIME) => return Ok(()),
                Err(e) if !is_passing(&e) => return Err(e),
                _ if left.is_zero() => return Ok(()),
                _ => {}
            }
        }
        Ok(())
    }

    fn event_fd(&self) -> Option<RawFd> {
        // A ring is readable while completions are in its queue.
        Some(self.ring.io.as_raw_fd())
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl Drop for UringEngine {
    /// Memory belongs to the kernel until its operation has ended, so this waits. What was queued and never
    /// entered is dropped with the ring.
    fn drop(&mut self) {
        while self.in_kernel() > 0 {
            if self.ring.io.completion().is_empty() {
                self.wait_for_kernel();
            }
            self.drain(|_| {});
            // not submitted again: they have ended as far as memory goes
            self.free.append(&mut self.again);
        }
    }
}

impl UringEngine {
    fn wait_for_kernel(&self) {
        // SAFETY: no argument is passed; nothing is submitted.
        let entered = unsafe {
            self.ring.io.submitter().enter::<libc::sigset_t>(0, 1, EnterFlags::GETEVENTS.bits(), None)
        };
        if entered.is_err() {
            // A signal; or the engine is dropped by another thread than the one that used it (EEXIST). That one's
            // operations end as well, at the latest with their thread.
            // SAFETY: the ring lives as long as `self`.
            let fd = unsafe { BorrowedFd::borrow_raw(self.ring.io.as_raw_fd()) };
            let _ = sys::poll_readable(fd, Duration::from_millis(10));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::testing::scratch_dir;
    use crate::io::{OpenHow, OsFile};

    #[test]
    fn kernels_without_the_opcode_truncate_at_once() {
        let Ok(mut engine) = UringEngine::new(4) else { return eprintln!("skipped: no io_uring") };
        engine.ring.can_truncate = false;
        let dir = scratch_dir();
        let how = OpenHow { write: true, create_new: true, direct: false };
        let file: Arc<dyn HostFile> = Arc::new(OsFile::open(&dir.path().join("t"), how).expect("create"));
        engine.attach(FileId(0), &file).expect("attach");
        let op = IoOp { kind: IoKind::Truncate, file: FileId(0), off: HostOffset(5000), len: 0 };
        engine.submit(&op, &[], Tag(1)).expect("room");
        assert_eq!(file.len().expect("length"), 5000);
        engine.wait(Duration::from_secs(20)).expect("wait");
        let mut out = Vec::new();
        engine.reap(&mut out);
        assert_eq!(out, [Completion { tag: Tag(1), result: Ok(0) }]);
    }

    #[test]
    fn interrupted_operations_are_tried_again_but_not_for_ever() {
        let files = Files::default();
        let mut slot = Slot::idle();
        for _ in 0..MAX_RETRIES {
            assert_eq!(advance(&mut slot, -libc::EAGAIN, &files), None);
        }
        assert_eq!(advance(&mut slot, -libc::EAGAIN, &files), Some(Err(libc::EAGAIN)));
        assert_eq!(advance(&mut slot, -libc::EIO, &files), Some(Err(libc::EIO)));
    }

    #[test]
    fn zeros_are_written_piece_by_piece() {
        let files = Files::default();
        let mut slot = Slot { stage: Stage::Zeros { at: 10, end: 100 }, ..Slot::idle() };
        assert_eq!(advance(&mut slot, 60, &files), None);
        assert!(matches!(slot.stage, Stage::Zeros { at: 70, end: 100 }));
        assert_eq!(advance(&mut slot, -libc::EINTR, &files), None);
        assert_eq!(advance(&mut slot, 30, &files), Some(Ok(0)));
        slot.stage = Stage::Zeros { at: 10, end: 100 };
        assert_eq!(advance(&mut slot, 0, &files), Some(Err(libc::EIO)), "no progress");
    }
}
