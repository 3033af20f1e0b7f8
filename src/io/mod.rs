//! The one seam for I/O. Everything above runs over [`IoEngine`] and [`HostFile`]; io_uring, a thread pool and
//! the simulator implement them. Time and randomness come through here too ([`Host`]).

mod aligned;
mod buf;
mod engine;
mod file;
mod lock;
mod os_file;
mod sys;

#[cfg(test)]
mod testing;

pub use aligned::{AlignedBuf, BUF_ALIGN, Bounce, BouncePool};
pub use buf::{BufSlice, fill_zero, gather, is_zero, scatter, sub_slices, total_len};
pub use engine::{Completion, Full, Host, IoEngine, IoKind, IoOp, OsHost, Tag};
pub use file::{Alignment, FileTraits, HostFile, MemFile};
pub use lock::{ImageLock, LockMode};
pub use os_file::{OpenHow, OsFile, sync_dir};
