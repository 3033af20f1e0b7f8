//! Memory of our own that operations work on.

use crate::io::{AlignedBuf, Bounce, BufSlice};

/// A buffer that lives in a slot or an operation until everything that uses it has been reaped.
#[derive(Debug)]
pub(crate) enum Own {
    /// Made for one operation.
    Made(AlignedBuf),
    /// From the bounded pool.
    Pooled(Bounce),
}

impl Own {
    /// The memory, for operations.
    pub(crate) fn slice(&self) -> BufSlice {
        match self {
            // SAFETY: a channel keeps the buffer in its slot or operation until that has ended, and its engine is
            // dropped (which waits for what is in flight) before its slots and operations are. A job keeps it in
            // a lane, which outlives the job's channels. Rust slices of the memory are formed only while nothing
            // is pending.
            Own::Made(b) => unsafe { b.as_buf() },
            // SAFETY: as above.
            Own::Pooled(b) => unsafe { b.as_buf() },
        }
    }

    /// The bytes; nothing may be in flight on them.
    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Own::Made(b) => b.as_slice(),
            Own::Pooled(b) => b.as_slice(),
        }
    }

    /// The bytes, to change; nothing may be in flight on them.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        match self {
            Own::Made(b) => b.as_mut_slice(),
            Own::Pooled(b) => b.as_mut_slice(),
        }
    }
}
