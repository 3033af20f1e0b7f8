//! Memory for I/O that has no guest buffer of its own: copies, metadata, unaligned pieces under O_DIRECT.

use super::BufSlice;
use crate::limits::{BOUNCE_BYTES, BOUNCE_POOL_BYTES};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock};

/// Alignment of every [`AlignedBuf`], in bytes: enough for O_DIRECT on all but exotic devices.
pub const BUF_ALIGN: usize = 4096;

/// Zeroed heap memory, aligned to [`BUF_ALIGN`].
#[derive(Debug)]
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: an AlignedBuf owns its memory like a boxed slice does.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above; `&AlignedBuf` gives out shared slices only (`as_buf` is unsafe for what goes beyond that).
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes.
    ///
    /// # Panics
    /// If `len` is 0 or near the address space's size: lengths are this program's own.
    pub fn new(len: usize) -> Self {
        assert!(len > 0, "a buffer without a byte");
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not 0.
        let ptr = unsafe { alloc_zeroed(layout) };
        let ptr = NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout));
        AlignedBuf { ptr, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, BUF_ALIGN).expect("buffer lengths are bounded")
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory is ours, initialised and `len` long.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }

    /// The same memory for an engine.
    ///
    /// # Safety
    /// As [`BufSlice::new`]: the buffer must outlive every use of the slice and every operation it was given to,
    /// and no slice from [`Self::as_slice`] or [`Self::as_mut_slice`] may live meanwhile.
    pub unsafe fn as_buf(&self) -> BufSlice {
        // SAFETY: the caller promises what `BufSlice::new` asks for.
        unsafe { BufSlice::new(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) }
    }
}

/// All bounce buffers of the process: pieces of [`BOUNCE_BYTES`], [`BOUNCE_POOL_BYTES`] together. Memory is
/// allocated when first needed and kept. Nobody waits here: callers park and come back when one was returned.
#[derive(Debug)]
pub struct BouncePool {
    state: Mutex<Pieces>,
    max: usize,
}

#[derive(Debug, Default)]
struct Pieces {
    free: Vec<AlignedBuf>,
    made: usize,
}

impl Default for BouncePool {
    fn default() -> Self {
        BouncePool { state: Mutex::default(), max: BOUNCE_POOL_BYTES / BOUNCE_BYTES }
    }
}

impl BouncePool {
    /// A piece that shows `len` zero bytes, or `None` while all are in use.
    ///
    /// # Panics
    /// If `len` is more than [`BOUNCE_BYTES`].
    pub fn take(self: &Arc<Self>, len: usize) -> Option<Bounce> {
        assert!(len <= BOUNCE_BYTES, "a bounce buffer of {len} bytes");
        let mut buf = self.take_piece()?;
        // What an earlier user left must never reach a guest or a file: cleared here, as only here the length
        // that matters is known.
        buf.as_mut_slice()[..len].fill(0);
        Some(Bounce { buf: Some(buf), len, pool: Arc::clone(self) })
    }

    fn take_piece(&self) -> Option<AlignedBuf> {
        let mut s = self.state.lock().expect("bounce pool lock");
        if let Some(buf) = s.free.pop() {
            return Some(buf);
        }
        if s.made == self.max {
            return None;
        }
        s.made += 1;
        drop(s);
        Some(AlignedBuf::new(BOUNCE_BYTES))
    }

    /// Pieces in use.
    pub fn in_use(&self) -> usize {
        let s = self.state.lock().expect("bounce pool lock");
        s.made - s.free.len()
    }
}

/// A piece of the [`BouncePool`]; goes back when dropped.
#[derive(Debug)]
pub struct Bounce {
    buf: Option<AlignedBuf>,
    len: usize,
    pool: Arc<BouncePool>,
}

impl Bounce {
    fn buf(&self) -> &AlignedBuf {
        self.buf.as_ref().expect("only drop takes it")
    }

    /// Bytes, as asked for.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if none were asked for.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.buf().as_slice()[..self.len]
    }

    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let len = self.len;
        &mut self.buf.as_mut().expect("only drop takes it").as_mut_slice()[..len]
    }

    /// The same memory for an engine.
    ///
    /// # Safety
    /// As [`AlignedBuf::as_buf`].
    pub unsafe fn as_buf(&self) -> BufSlice {
        // SAFETY: the caller promises what `AlignedBuf::as_buf` asks for.
        unsafe { self.buf().as_buf() }.part(0, self.len)
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        if let Some(buf) = self.buf.take() {
            self.pool.state.lock().expect("bounce pool lock").free.push(buf);
        }
    }
}

/// [`BOUNCE_BYTES`] zeros to write from. Never given to anything that writes to it.
pub(super) fn zeros() -> BufSlice {
    static ZEROS: OnceLock<AlignedBuf> = OnceLock::new();
    // SAFETY: a static lives on; engines only read from it, and no slice of it is ever made.
    unsafe { ZEROS.get_or_init(|| AlignedBuf::new(BOUNCE_BYTES)).as_buf() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_and_zeroed() {
        for len in [1, 511, 4096, 100_000] {
            let mut b = AlignedBuf::new(len);
            assert!((b.as_slice().as_ptr() as usize).is_multiple_of(BUF_ALIGN));
            assert!(b.len() == len && b.as_slice().iter().all(|x| *x == 0));
            b.as_mut_slice().fill(7);
        }
    }

    #[test]
    fn the_pool_is_bounded_and_forgets() {
        let pool = Arc::new(BouncePool::default());
        let mut held: Vec<Bounce> = std::iter::from_fn(|| pool.take(4096)).collect();
        assert_eq!(held.len(), BOUNCE_POOL_BYTES / BOUNCE_BYTES);
        held.iter_mut().for_each(|b| b.as_mut_slice().fill(0xaa));
        assert!(pool.take(1).is_none());
        held.pop();
        let b = pool.take(4096).expect("one came back");
        assert!(b.as_slice().iter().all(|x| *x == 0), "old bytes leaked");
        drop((held, b));
        assert_eq!(pool.in_use(), 0);
    }
}
