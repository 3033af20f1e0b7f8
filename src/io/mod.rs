//! The one seam for I/O. Everything above runs over [`IoEngine`] and [`HostFile`]; io_uring, a thread pool and
//! the simulator implement them. Time and randomness come through here too ([`Host`]).

mod aligned;
mod attached;
mod buf;
mod choose;
mod engine;
mod file;
mod held;
mod lock;
mod locked;
mod os_file;
mod ring;
mod run;
mod sys;
mod threads;
mod uring;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use aligned::{AlignedBuf, BUF_ALIGN, Bounce, BouncePool};
pub use buf::{BufSlice, fill_zero, gather, is_zero, scatter, sub_slices, total_len};
pub use choose::{ChosenEngine, EngineKind, make_engine};
pub use engine::{Completion, Full, Host, IoEngine, IoKind, IoOp, OsHost, Tag};
pub use file::{Alignment, FileTraits, HostFile, MemFile};
pub use held::{FileUse, HeldByte, use_by_others};
pub use lock::{ImageLock, LockMode};
pub use locked::LockedBuf;
pub use os_file::{OpenHow, OsFile, sync_dir};
pub use threads::{ThreadEngine, ThreadPool};
pub use uring::UringEngine;
