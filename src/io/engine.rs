//! What an I/O engine is.

use super::{BufSlice, HostFile};
use crate::map::{FileId, HostOffset};
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoKind {
    /// Fills the buffers from the file. May end early; 0 at the end of the file.
    Read,
    /// Writes the buffers to the file. May end early.
    Write,
    /// The same, and what was written is durable when it ends, as is a length of the file that reaches there. Of nothing else it says
    /// anything; but if it fails, what the file holds is as unknown as after a failed `Sync`.
    WriteThrough,
    /// Everything written and completed before it was submitted becomes durable, sizes and extents included.
    Sync,
    /// The range is backed by space that reads as zeros where the file had none; the file grows to its end.
    Allocate,
    /// The range reads as zeros and its space goes back to the file system. The size stays.
    Punch,
    /// The range reads as zeros; its space stays.
    ZeroRange,
    /// The file ends at `off`.
    Truncate,
}

impl IoKind {
    /// It moves bytes between buffers and the file, and may move fewer than asked.
    pub fn moves_bytes(self) -> bool {
        matches!(self, IoKind::Read | IoKind::Write | IoKind::WriteThrough)
    }

    /// It moves bytes from buffers to the file.
    pub fn writes_bytes(self) -> bool {
        matches!(self, IoKind::Write | IoKind::WriteThrough)
    }
}

/// An operation on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoOp {
    /// What to do.
    pub kind: IoKind,
    /// On which file.
    pub file: FileId,
    /// From where on.
    pub off: HostOffset,
    /// Bytes; of those that move bytes the length of the buffers, of `Sync` and `Truncate` 0.
    pub len: u64,
}

/// The submitter's name for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u64);

/// The end of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Whose.
    pub tag: Tag,
    /// Bytes moved (0 for the others), or the error number.
    pub result: Result<u64, i32>,
}

/// The engine takes no more operations before some were reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Moves bytes between files and memory, asynchronously, for one thread.
///
/// Memory given to [`IoEngine::submit`] belongs to the engine until the operation's completion has been reaped;
/// [`BufSlice::new`]'s caller has promised that. Operations may complete in any order.
pub trait IoEngine: Send {
    /// Makes a file known under `id`. The engine keeps it open until it is dropped or another takes the number.
    ///
    /// # Errors
    /// From the operating system.
    fn attach(&mut self, id: FileId, file: &Arc<dyn HostFile>) -> io::Result<()>;

    /// Does a `Read` or `Write` at once if that surely takes no waiting; `None` if it has to be submitted. The
    /// result may be short, as with `submit`.
    fn try_now(&mut self, op: &IoOp, bufs: &[BufSlice]) -> Option<Result<u64, i32>>;

    /// From now on [`Self::try_now`] may do buffered writes of any size, also where that means to wait for the kernel: whoever
    /// drives this engine has nothing else to do. For jobs. `write_out`: a sync will follow, so the kernel is asked now and then to
    /// begin writing out what is dirty.
    fn be_patient(&mut self, _write_out: bool) {}

    /// Queues an operation; [`Self::enter`] hands it over.
    ///
    /// # Errors
    /// [`Full`]: enter, reap and come back.
    fn submit(&mut self, op: &IoOp, bufs: &[BufSlice], tag: Tag) -> Result<(), Full>;

    /// Hands everything queued to whoever does it. One system call for a batch.
    ///
    /// # Errors
    /// From the operating system; nothing is lost, the next call tries again.
    fn enter(&mut self) -> io::Result<()>;

    /// Takes the completions that are there.
    fn reap(&mut self, out: &mut Vec<Completion>);

    /// Waits until a completion can be reaped, at most this long. For callers without an event loop.
    ///
    /// # Errors
    /// From the operating system.
    fn wait(&mut self, at_most: Duration) -> io::Result<()>;

    /// Readable while completions are there; sits in the worker's epoll set.
    fn event_fd(&self) -> Option<RawFd>;

    /// Operations submitted and not reaped.
    fn in_flight(&self) -> usize;
}

/// Time and chance.
pub trait Host: Send + Sync {
    /// The present.
    fn now(&self) -> Instant;
    /// A new random UUID.
    fn new_uuid(&self) -> Uuid;
}

/// The machine's own clock and random numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsHost;

impl Host for OsHost {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn new_uuid(&self) -> Uuid {
        Uuid::new_v4()
    }
}
