//! The engine over threads, for where io_uring is refused.

use super::attached::{Attached, Files};
use super::run::run;
use super::{BufSlice, Completion, Full, HostFile, IoEngine, IoKind, IoOp, Tag, sys};
use crate::error::{Error, Result};
use crate::limits::{MAX_ENGINE_DEPTH, POOL_THREADS};
use crate::map::FileId;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Threads that do blocking I/O for every [`ThreadEngine`] that shares them.
///
/// Operations begin in the order they came, but at most three quarters of the threads are busy with those that
/// may take long (syncs, and what changes the file's extents): reads and writes never wait for all of those, and
/// those never wait for a queue of reads longer than the one they found.
#[derive(Debug)]
pub struct ThreadPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    quick: VecDeque<Job>,
    long: VecDeque<Job>,
    /// Number of the next job: age decides between the two.
    next: u64,
    long_running: usize,
    long_max: usize,
    stop: bool,
}

#[derive(Debug)]
struct Job {
    number: u64,
    op: IoOp,
    tag: Tag,
    bufs: Vec<BufSlice>,
    file: Arc<dyn HostFile>,
    done: Arc<Done>,
}

/// Where the jobs of one engine end.
#[derive(Debug)]
struct Done {
    list: Mutex<Vec<Finished>>,
    /// Non-zero exactly while the list is not empty; changed under its lock.
    event: EventFd,
}

#[derive(Debug)]
struct Finished {
    completion: Completion,
    /// Where it was counted as in flight.
    file: Option<FileId>,
    /// For reuse.
    bufs: Vec<BufSlice>,
}

fn may_take_long(kind: IoKind) -> bool {
    !matches!(kind, IoKind::Read | IoKind::Write)
}

impl Queue {
    fn add(&mut self, mut job: Job) {
        job.number = self.next;
        self.next += 1;
        if may_take_long(job.op.kind) { self.long.push_back(job) } else { self.quick.push_back(job) }
    }

    /// The oldest job that may begin.
    fn take(&mut self) -> Option<Job> {
        let long = match self.long_running < self.long_max {
            true => self.long.front().map(|j| j.number),
            false => None,
        };
        let quick = self.quick.front().map(|j| j.number);
        match (quick, long) {
            (None, None) => None,
            (Some(q), Some(l)) if q < l => self.quick.pop_front(),
            (Some(_), None) => self.quick.pop_front(),
            (_, Some(_)) => {
                self.long_running += 1;
                self.long.pop_front()
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("thread pool lock")
    }

    fn work(&self) {
        let mut q = self.lock();
        loop {
            if let Some(job) = q.take() {
                drop(q);
                let long = may_take_long(job.op.kind);
                job.run();
                q = self.lock();
                if long {
                    q.long_running -= 1;
                    // this thread may take an older, quick one
                    self.wake.notify_one();
                }
            } else if q.stop {
                return;
            } else {
                q = self.wake.wait(q).expect("thread pool lock");
            }
        }
    }
}

impl Job {
    fn run(self) {
        let result = match self.file.fd() {
            Some(fd) => run(fd, &self.op, &self.bufs),
            None => Err(libc::EBADF),
        };
        let completion = Completion { tag: self.tag, result };
        self.done.add(Finished { completion, file: Some(self.op.file), bufs: self.bufs });
    }
}

impl Done {
    fn lock(&self) -> MutexGuard<'_, Vec<Finished>> {
        self.list.lock().expect("completion list lock")
    }

    fn add(&self, f: Finished) {
        let mut list = self.lock();
        if list.is_empty() {
            // It can only fail at 2^64-1.
            let _ = self.event.write(1);
        }
        list.push(f);
    }

    /// Exchanges the list for an empty one.
    fn take(&self, into: &mut Vec<Finished>) {
        debug_assert!(into.is_empty(), "completions would be lost");
        let mut list = self.lock();
        if !list.is_empty() {
            let _ = self.event.read();
            std::mem::swap(&mut *list, into);
        }
    }
}

impl ThreadPool {
    /// A pool of `threads` threads, at least one. They are started now, so that a sandbox can be closed after.
    ///
    /// # Errors
    /// From the operating system.
    pub fn new(threads: usize) -> Result<Arc<ThreadPool>> {
        let n = threads.max(1);
        let queue = Queue { long_max: (n * 3 / 4).max(1), ..Queue::default() };
        let shared = Arc::new(Shared { queue: Mutex::new(queue), wake: Condvar::new() });
        let mut pool = ThreadPool { shared, threads: Vec::with_capacity(n) };
        for i in 0..n {
            let shared = Arc::clone(&pool.shared);
            let t = thread::Builder::new().name(format!("io-{i}")).spawn(move || shared.work());
            pool.threads.push(t.map_err(|e| Error::io("start an I/O thread", e))?);
        }
        Ok(Arc::new(pool))
    }

    /// The pool of the process: [`POOL_THREADS`] threads, started when first asked for.
    ///
    /// # Errors
    /// From the operating system.
    pub fn shared() -> Result<Arc<ThreadPool>> {
        static POOL: Mutex<Option<Arc<ThreadPool>>> = Mutex::new(None);
        let mut pool = POOL.lock().expect("shared pool lock");
        if let Some(p) = &*pool {
            return Ok(Arc::clone(p));
        }
        let p = Self::new(POOL_THREADS)?;
        *pool = Some(Arc::clone(&p));
        Ok(p)
    }

    fn add(&self, jobs: &mut Vec<Job>) {
        let n = jobs.len();
        let mut q = self.shared.lock();
        jobs.drain(..).for_each(|j| q.add(j));
        drop(q);
        match n {
            0 => {}
            1 => self.shared.wake.notify_one(),
            _ => self.shared.wake.notify_all(),
        }
    }
}

impl Drop for ThreadPool {
    /// Every engine holds the pool and waits for its own jobs, so none is left here.
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        for t in self.threads.drain(..) {
            let _ = t.join();
        }
    }
}

/// An engine over a [`ThreadPool`].
pub struct ThreadEngine {
    pool: Arc<ThreadPool>,
    files: Files,
    staged: Vec<Job>,
    done: Arc<Done>,
    in_flight: usize,
    depth: usize,
    /// This and the next keep memory for reuse.
    taken: Vec<Finished>,
    spare: Vec<Vec<BufSlice>>,
}

impl fmt::Debug for ThreadEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = f.debug_struct("ThreadEngine");
        s.field("depth", &self.depth).field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl ThreadEngine {
    /// An engine that takes up to `depth` operations (between 1 and [`MAX_ENGINE_DEPTH`]) at a time.
    ///
    /// # Errors
    /// From the operating system.
    pub fn new(pool: &Arc<ThreadPool>, depth: u32) -> Result<ThreadEngine> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| Error::io("make an event descriptor", e))?;
        Ok(ThreadEngine {
            pool: Arc::clone(pool),
            files: Files::default(),
            staged: Vec::new(),
            done: Arc::new(Done { list: Mutex::default(), event }),
            in_flight: 0,
            depth: depth.clamp(1, MAX_ENGINE_DEPTH) as usize,
            taken: Vec::new(),
            spare: Vec::new(),
        })
    }

    fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as `self.done`.
        unsafe { BorrowedFd::borrow_raw(self.done.event.as_raw_fd()) }
    }

    /// Ends an operation that names no file of ours, without a thread.
    fn refuse(&self, tag: Tag, bufs: Vec<BufSlice>) {
        let completion = Completion { tag, result: Err(libc::EBADF) };
        self.done.add(Finished { completion, file: None, bufs });
    }

    fn drain(&mut self, mut ended: impl FnMut(Completion)) {
        let mut taken = std::mem::take(&mut self.taken);
        self.done.take(&mut taken);
        for f in taken.drain(..) {
            self.in_flight -= 1;
            if let Some(id) = f.file {
                self.files.ended(id);
            }
            self.spare.push(f.bufs);
            ended(f.completion);
        }
        self.taken = taken;
    }
}

impl IoEngine for ThreadEngine {
    fn attach(&mut self, id: FileId, file: &Arc<dyn HostFile>) -> io::Result<()> {
        self.files.check_idle(id)?;
        self.files.set(id, Attached::new(file)?);
        Ok(())
    }

    fn try_now(&mut self, op: &IoOp, bufs: &[BufSlice]) -> Option<std::result::Result<u64, i32>> {
        self.files.get_mut(op.file)?.try_now(op, bufs)
    }

    fn be_patient(&mut self, write_out: bool) {
        self.files.be_patient(write_out);
    }

    fn submit(&mut self, op: &IoOp, bufs: &[BufSlice], tag: Tag) -> std::result::Result<(), Full> {
        if self.in_flight == self.depth {
            return Err(Full);
        }
        self.in_flight += 1;
        let mut own = self.spare.pop().unwrap_or_default();
        own.clear();
        own.extend_from_slice(bufs);
        let Some(f) = self.files.get_mut(op.file) else {
            self.refuse(tag, own);
            return Ok(());
        };
        f.in_flight += 1;
        let (file, done) = (Arc::clone(f.file()), Arc::clone(&self.done));
        self.staged.push(Job { number: 0, op: *op, tag, bufs: own, file, done });
        Ok(())
    }

    fn enter(&mut self) -> io::Result<()> {
        if !self.staged.is_empty() {
            self.pool.add(&mut self.staged);
        }
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.drain(|c| out.push(c));
    }

    fn wait(&mut self, at_most: Duration) -> io::Result<()> {
        self.enter()?;
        if self.in_flight > 0 {
            sys::poll_readable(self.event(), at_most).map_err(io::Error::from_raw_os_error)?;
        }
        Ok(())
    }

    fn event_fd(&self) -> Option<RawFd> {
        Some(self.done.event.as_raw_fd())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for ThreadEngine {
    /// Memory belongs to the threads until its operation has ended, so this waits. What was never entered is
    /// dropped.
    fn drop(&mut self) {
        self.in_flight -= self.staged.len();
        self.staged.clear();
        while self.in_flight > 0 {
            let _ = sys::poll_readable(self.event(), Duration::from_millis(100));
            self.drain(|_| {});
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::MemFile;
    use crate::map::HostOffset;

    fn job(kind: IoKind) -> Job {
        let event = EventFd::new(0).expect("eventfd");
        Job {
            number: 0,
            op: IoOp { kind, file: FileId(0), off: HostOffset(0), len: 0 },
            tag: Tag(0),
            bufs: Vec::new(),
            file: Arc::new(MemFile::default()),
            done: Arc::new(Done { list: Mutex::default(), event }),
        }
    }

    #[test]
    fn long_jobs_keep_their_turn_and_leave_threads_for_the_others() {
        let mut q = Queue { long_max: 2, ..Queue::default() };
        for kind in [IoKind::Read, IoKind::Sync, IoKind::Read, IoKind::Punch, IoKind::Sync, IoKind::Write] {
            q.add(job(kind));
        }
        let order: Vec<IoKind> = std::iter::from_fn(|| q.take()).map(|j| j.op.kind).collect();
        assert_eq!(order, [IoKind::Read, IoKind::Sync, IoKind::Read, IoKind::Punch, IoKind::Write]);
        q.long_running -= 1;
        assert_eq!(q.take().map(|j| j.op.kind), Some(IoKind::Sync));
    }
}
