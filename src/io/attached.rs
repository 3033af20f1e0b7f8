//! What the engines know about a file, and what of its I/O can be done at once.

use super::sys::{self, SysResult};
use super::{BufSlice, HostFile, IoKind, IoOp};
use crate::limits::INLINE_WRITE_BYTES;
use crate::map::FileId;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A file an engine serves.
#[derive(Debug)]
pub(super) struct Attached {
    file: Arc<dyn HostFile>,
    reads: ReadsNow,
    writes: InlineWrites,
    /// Operations on it, submitted and not ended.
    pub(super) in_flight: usize,
}

/// How a read can be done without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadsNow {
    /// It cannot.
    Never,
    /// By asking for what is in the page cache.
    Cached,
    /// Always: the file is in memory.
    Always,
}

impl Attached {
    /// # Errors
    /// EBADF for a file that is not the operating system's.
    pub(super) fn new(file: &Arc<dyn HostFile>) -> io::Result<Attached> {
        let traits = file.traits();
        let fd = file.fd().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        let reads = match traits.direct {
            true => ReadsNow::Never,
            // tmpfs does not know RWF_NOWAIT, and does not need it
            false if !traits.is_device && sys::is_tmpfs(fd) => ReadsNow::Always,
            false => ReadsNow::Cached,
        };
        let writes = InlineWrites::new(traits.writable && !traits.direct && !traits.is_device);
        Ok(Attached { file: Arc::clone(file), reads, writes, in_flight: 0 })
    }

    pub(super) fn file(&self) -> &Arc<dyn HostFile> {
        &self.file
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.fd().expect("checked when attached")
    }

    /// See [`super::IoEngine::try_now`].
    pub(super) fn try_now(&mut self, op: &IoOp, bufs: &[BufSlice]) -> Option<SysResult> {
        match op.kind {
            IoKind::Read => self.read_now(op.off.0, bufs),
            IoKind::Write if self.writes.patient || op.len <= INLINE_WRITE_BYTES => {
                self.write_now(op.off.0, bufs)
            }
            _ => None,
        }
    }

    fn read_now(&mut self, off: u64, bufs: &[BufSlice]) -> Option<SysResult> {
        let done = match self.reads {
            ReadsNow::Never => return None,
            ReadsNow::Always => return Some(sys::preadv(self.fd(), bufs, off)),
            ReadsNow::Cached => sys::preadv_nowait(self.fd(), bufs, off),
        };
        match done {
            Err(libc::EAGAIN) => None,
            Err(libc::EOPNOTSUPP) => {
                self.reads = ReadsNow::Never;
                None
            }
            done => Some(done),
        }
    }

    /// Has the kernel begin to write out what is dirty, before the sync at the end: the disk is busy while we copy. A hint, whose
    /// failure that sync will tell.
    fn write_out(&mut self, written: u64) {
        self.writes.unasked += written;
        if self.writes.unasked >= WRITE_OUT_BYTES {
            self.writes.unasked = 0;
            sys::start_writeback(self.fd());
        }
    }

    /// Takes space for a large write of a job first, where that is cheaper: ext4 else reserves each of its blocks by itself (raw, 2 GiB:
    /// 0.46 s without, 0.25 with). A hint too: if there is no space the write says so.
    fn reserve(&mut self, off: u64, bufs: &[BufSlice]) {
        if !self.writes.patient {
            return;
        }
        let len = bufs.iter().map(|b| b.len() as u64).sum::<u64>();
        if len >= RESERVE_BYTES
            && *self
                .writes
                .reserves
                .get_or_insert_with(|| sys::is_ext4(self.file.fd().expect("checked when attached")))
        {
            let _ = sys::fallocate(self.fd(), sys::RESERVE, off, len);
        }
    }

    fn write_now(&mut self, off: u64, bufs: &[BufSlice]) -> Option<SysResult> {
        let start = Instant::now();
        if !self.writes.allowed(start) {
            return None;
        }
        self.reserve(off, bufs);
        let done = sys::pwritev(self.fd(), bufs, off);
        self.writes.took(start, Instant::now());
        if let (Ok(n), true) = (done, self.writes.write_out) {
            self.write_out(n);
        }
        Some(done)
    }
}

/// Bytes after which what a job has written is on its way to the disk.
const WRITE_OUT_BYTES: u64 = 8 << 20;

/// Bytes of a write that are worth a system call to take space for them.
const RESERVE_BYTES: u64 = 256 << 10;

/// When the queue's own thread writes.
///
/// A buffered write is a copy into the page cache, a microsecond or two, unless the kernel throttles writers,
/// waits for a journal commit or reads a page first; no file system common for images can say so beforehand
/// (RWF_NOWAIT). So the rule looks back: after a write that took more than 1 ms none is done inline for 10 ms.
/// If the first one after that is slow again, the pause doubles, up to 1 s; a quick one sets it back.
#[derive(Debug)]
struct InlineWrites {
    ever: bool,
    /// Nobody minds if one takes long.
    patient: bool,
    /// A sync will follow.
    write_out: bool,
    /// Space is taken before large writes; `None`: not looked up yet.
    reserves: Option<bool>,
    /// Bytes written since the kernel was last asked to write out.
    unasked: u64,
    not_before: Option<Instant>,
    pause: Duration,
}

impl InlineWrites {
    const SLOW: Duration = Duration::from_millis(1);
    const FIRST_PAUSE: Duration = Duration::from_millis(10);
    const LONGEST_PAUSE: Duration = Duration::from_secs(1);

    fn new(ever: bool) -> Self {
        InlineWrites {
            ever,
            patient: false,
            write_out: false,
            reserves: None,
            unasked: 0,
            not_before: None,
            pause: Self::FIRST_PAUSE,
        }
    }

    fn allowed(&self, now: Instant) -> bool {
        self.ever && self.not_before.is_none_or(|t| now >= t)
    }

    fn took(&mut self, start: Instant, end: Instant) {
        if self.patient || end.saturating_duration_since(start) <= Self::SLOW {
            self.not_before = None;
            self.pause = Self::FIRST_PAUSE;
            return;
        }
        self.not_before = end.checked_add(self.pause);
        self.pause = (self.pause * 2).min(Self::LONGEST_PAUSE);
    }
}

/// The files of an engine, by number.
#[derive(Debug, Default)]
pub(super) struct Files(Vec<Option<Attached>>);

impl Files {
    pub(super) fn get(&self, id: FileId) -> Option<&Attached> {
        self.0.get(usize::from(id.0))?.as_ref()
    }

    pub(super) fn get_mut(&mut self, id: FileId) -> Option<&mut Attached> {
        self.0.get_mut(usize::from(id.0))?.as_mut()
    }

    /// # Errors
    /// EBUSY while operations on the file that has the number now are in flight: some of them would take the
    /// new one (io_uring looks the number up when a worker begins).
    pub(super) fn check_idle(&self, id: FileId) -> io::Result<()> {
        match self.get(id) {
            Some(f) if f.in_flight > 0 => Err(io::Error::from_raw_os_error(libc::EBUSY)),
            _ => Ok(()),
        }
    }

    pub(super) fn set(&mut self, id: FileId, file: Attached) {
        let n = usize::from(id.0);
        if self.0.len() <= n {
            self.0.resize_with(n + 1, || None);
        }
        self.0[n] = Some(file);
    }

    /// See [`super::IoEngine::be_patient`].
    pub(super) fn be_patient(&mut self, write_out: bool) {
        for f in self.0.iter_mut().flatten() {
            (f.writes.patient, f.writes.write_out) = (true, write_out);
        }
    }

    /// Notes the end of an operation that was counted in `in_flight`.
    pub(super) fn ended(&mut self, id: FileId) {
        let f = self.get_mut(id).expect("no file is taken away under an operation");
        f.in_flight = f.in_flight.checked_sub(1).expect("counted when it was submitted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_writes_pause_inline_writing_for_ever_longer() {
        let t0 = Instant::now();
        let at = |us: u64| t0 + Duration::from_micros(us);
        let mut w = InlineWrites::new(true);
        w.took(at(0), at(900));
        assert!(w.allowed(at(901)));
        w.took(at(1000), at(2100));
        assert!(!w.allowed(at(12_000)) && w.allowed(at(12_100)));
        w.took(at(20_000), at(30_000));
        assert!(!w.allowed(at(49_999)) && w.allowed(at(50_000)));
        w.took(at(50_000), at(50_010));
        w.took(at(50_020), at(60_000));
        assert!(w.allowed(at(70_000)), "a quick one set the pause back");
        for _ in 0..20 {
            w.took(at(100_000), at(200_000));
        }
        assert!(w.allowed(at(1_200_000)));
        assert!(!InlineWrites::new(false).allowed(at(0)));
    }
}
