//! The I/O buffer manager: memory for requests, bounded, and if asked never in swap.
//!
//! A buffer is memory the caller lays out itself (a list of pieces), or the manager's. In the latter case the caller's data is somewhere else, behind
//! callbacks: where those can tell an address, requests work there directly; else the manager has memory for the buffer, and bytes are copied, to
//! it before a write and from it after a read. VirtualBox never made these; what its header leaves open is said here.

use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuf, BufSlice, LockedBuf, gather, scatter, total_len};
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::flags::BufferFlags;

/// Why a callback could not copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyError {
    /// There is not enough room for the data (`VERR_PDM_MEDIAEX_IOBUF_OVERFLOW`).
    Overflow,
    /// There is not enough data (`VERR_PDM_MEDIAEX_IOBUF_UNDERRUN`).
    Underrun,
}

impl fmt::Display for CopyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CopyError::Overflow => "the buffer has not enough room for the data (overflow)",
            CopyError::Underrun => "the buffer has not enough data (underrun)",
        })
    }
}

impl std::error::Error for CopyError {}

impl From<CopyError> for Error {
    fn from(e: CopyError) -> Self {
        Error::new(ErrorKind::OutOfRange, e.to_string())
    }
}

/// Where the data of buffers is, if they are made without memory (`VDIOBUFCALLBACKS`). Called by whoever submits a request, and by the thread
/// that ends it.
pub trait BufferCallbacks: Send + Sync {
    /// Takes what was read, for the place `off` bytes into the buffer's data (`pfnIoBufCopyFromBuf`).
    ///
    /// # Errors
    /// [`CopyError::Overflow`].
    fn take(&self, buffer: &IoBuffer, off: usize, data: &[u8]) -> std::result::Result<(), CopyError>;

    /// Gives what is to be written, from `off` bytes into the buffer's data on (`pfnIoBufCopyToBuf`).
    ///
    /// # Errors
    /// [`CopyError::Underrun`].
    fn give(&self, buffer: &IoBuffer, off: usize, data: &mut [u8]) -> std::result::Result<(), CopyError>;

    /// Memory in which the first `len` bytes of the data are, all of it (`pfnIoBufQueryBuf`). `None`: there is none, and bytes are copied.
    fn memory(&self, _len: usize) -> Option<Vec<BufSlice>> {
        None
    }
}

/// An I/O buffer manager (`VDIOBUFMGR`).
pub struct IoBufferManager {
    shared: Arc<Shared>,
    private_bytes: usize,
}

struct Shared {
    max_bytes: u64,
    used: AtomicU64,
    live: AtomicUsize,
    flags: BufferFlags,
    callbacks: Option<Box<dyn BufferCallbacks>>,
}

impl fmt::Debug for IoBufferManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = f.debug_struct("IoBufferManager");
        s.field("used", &self.used_bytes()).field("live", &self.live_buffers()).finish_non_exhaustive()
    }
}

impl IoBufferManager {
    /// A manager of at most `max_bytes` of memory, 0 for as much as there is, whose buffers have `private_bytes` for their users
    /// (`VDIoBufMgrCreate`). Without callbacks every buffer has to be given its memory.
    pub fn new(
        max_bytes: u64,
        flags: BufferFlags,
        callbacks: Option<Box<dyn BufferCallbacks>>,
        private_bytes: usize,
    ) -> IoBufferManager {
        let max_bytes = if max_bytes == 0 { u64::MAX } else { max_bytes };
        let (used, live) = (AtomicU64::new(0), AtomicUsize::new(0));
        IoBufferManager {
            shared: Arc::new(Shared { max_bytes, used, live, flags, callbacks }),
            private_bytes,
        }
    }

    /// Bytes of memory that its buffers take. What they were given does not count.
    pub fn used_bytes(&self) -> u64 {
        self.shared.used.load(Ordering::Acquire)
    }

    /// Buffers there are.
    pub fn live_buffers(&self) -> usize {
        self.shared.live.load(Ordering::Acquire)
    }

    /// Ends the manager (`VDIoBufMgrDestroy`).
    ///
    /// # Errors
    /// [`ErrorKind::State`] while there are buffers; it goes on with them then.
    pub fn destroy(self) -> std::result::Result<(), (Self, Error)> {
        match self.live_buffers() {
            0 => Ok(()),
            n => {
                let e = Error::new(ErrorKind::State, format!("{n} buffers of the manager are in use"));
                Err((self, e))
            }
        }
    }

    /// A buffer for `len` bytes (`VDIoBufMgrAllocBuf`): in this memory, or, without, where the callbacks say.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] without memory and callbacks, or with too little memory; [`ErrorKind::Limit`] beyond the manager's bound,
    /// or what may be locked.
    pub fn alloc(&self, memory: Option<&[BufSlice]>, len: usize) -> Result<IoBuffer> {
        let invalid = |what: String| Err(Error::new(ErrorKind::InvalidArgument, what));
        if len == 0 {
            return invalid("a buffer without a byte".into());
        }
        let lies = match (memory, &self.shared.callbacks) {
            (Some(memory), _) => Lies::Elsewhere(super::asynchronous::part_of(memory, len as u64)?),
            (None, None) => {
                return invalid("the manager has no callbacks, and the buffer was given no memory".into());
            }
            (None, Some(callbacks)) => match callbacks.memory(len) {
                Some(memory) => Lies::Elsewhere(super::asynchronous::part_of(&memory, len as u64)?),
                None => self.own_memory(len)?,
            },
        };
        self.shared.live.fetch_add(1, Ordering::AcqRel);
        let inner = Inner {
            len,
            lies,
            private: Mutex::new(vec![0; self.private_bytes]),
            manager: self.shared.clone(),
        };
        Ok(IoBuffer(Arc::new(inner)))
    }

    fn own_memory(&self, len: usize) -> Result<Lies> {
        let bytes = len as u64;
        let room = |used: u64| used.checked_add(bytes).filter(|n| *n <= self.shared.max_bytes);
        if self.shared.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).is_err() {
            let what = format!("{len} bytes more than {} are beyond the manager's bound", self.used_bytes());
            return Err(Error::new(ErrorKind::Limit, what));
        }
        if !self.shared.flags.contains(BufferFlags::REQUIRE_NOT_PAGEABLE) {
            return Ok(Lies::Copied(Memory::Plain(AlignedBuf::new(len))));
        }
        LockedBuf::new(len).map(|b| Lies::Copied(Memory::Locked(b))).map_err(|e| {
            self.shared.used.fetch_sub(bytes, Ordering::AcqRel);
            Error::new(ErrorKind::Limit, format!("cannot lock {len} bytes of memory: {e}"))
                .hint("raise the limit of locked memory (ulimit -l)")
        })
    }
}

/// A buffer (`VDIOBUF`). Its clones are the same one: VirtualBox's retain and release.
#[derive(Clone)]
pub struct IoBuffer(Arc<Inner>);

struct Inner {
    len: usize,
    lies: Lies,
    private: Mutex<Vec<u8>>,
    manager: Arc<Shared>,
}

/// Where the bytes of a buffer are.
enum Lies {
    /// In memory that is not the manager's.
    Elsewhere(Vec<BufSlice>),
    /// Behind callbacks; requests work on a copy.
    Copied(Memory),
}

enum Memory {
    Plain(AlignedBuf),
    Locked(LockedBuf),
}

impl Memory {
    fn slice(&self) -> BufSlice {
        match self {
            // SAFETY: the buffer belongs to the requests it was given to, which hold it until they have ended; the memory is touched through such
            // slices only.
            Memory::Plain(b) => unsafe { b.as_buf() },
            // SAFETY: as above.
            Memory::Locked(b) => unsafe { b.as_buf() },
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Lies::Copied(_) = self.lies {
            self.manager.used.fetch_sub(self.len as u64, Ordering::AcqRel);
        }
        self.manager.live.fetch_sub(1, Ordering::AcqRel);
    }
}

impl fmt::Debug for IoBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = f.debug_struct("IoBuffer");
        s.field("len", &self.len()).field("copied", &self.is_copied()).finish_non_exhaustive()
    }
}

impl IoBuffer {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// How many clones there are, this one and those that requests hold among them.
    pub fn references(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// Bytes are copied by callbacks; otherwise requests work where the data is.
    pub fn is_copied(&self) -> bool {
        matches!(self.0.lies, Lies::Copied(_))
    }

    /// Lets `look` at the buffer's private bytes.
    pub fn with_private<T>(&self, look: impl FnOnce(&mut [u8]) -> T) -> T {
        look(&mut self.0.private.lock().expect("private bytes"))
    }

    /// The memory that requests work on.
    pub(super) fn slices(&self) -> Vec<BufSlice> {
        match &self.0.lies {
            Lies::Elsewhere(slices) => slices.clone(),
            Lies::Copied(memory) => vec![memory.slice()],
        }
    }

    /// Before a write: what is written has to be in the memory.
    pub(super) fn fill(&self, len: usize) -> Result<()> {
        let (Lies::Copied(_), Some(callbacks)) = (&self.0.lies, &self.0.manager.callbacks) else {
            return Ok(());
        };
        let mut data = vec![0; len];
        callbacks.give(self, 0, &mut data)?;
        scatter(&data, &self.slices());
        Ok(())
    }

    /// After a read: what was read goes to where it belongs.
    pub(super) fn empty(&self, len: usize) -> Result<()> {
        let (Lies::Copied(_), Some(callbacks)) = (&self.0.lies, &self.0.manager.callbacks) else {
            return Ok(());
        };
        let mut data = vec![0; len];
        let slices = self.slices();
        debug_assert!(total_len(&slices) >= len as u64, "a read has no more bytes than its buffer");
        gather(&slices, &mut data);
        Ok(callbacks.take(self, 0, &data)?)
    }
}
