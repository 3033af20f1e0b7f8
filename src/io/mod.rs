//! The one seam for I/O. Everything above runs over [`IoEngine`] and [`HostFile`]; io_uring, a thread pool and
//! the simulator implement them. Time and randomness come through here too ([`Host`]).

mod buf;
mod engine;
mod file;

pub use buf::{BufSlice, fill_zero, gather, is_zero, scatter, sub_slices, total_len};
pub use engine::{Completion, Full, Host, IoEngine, IoKind, IoOp, OsHost, Tag};
pub use file::{Alignment, FileTraits, HostFile, MemFile};
