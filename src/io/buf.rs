//! Slices of memory that others may change at the same time: guest memory and bounce buffers under I/O.
//!
//! A guest can write to its buffers whenever it likes, so no Rust reference to them is ever formed: all access
//! goes through raw copies.

use std::ptr;

/// A piece of memory for I/O, laid out like `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufSlice {
    ptr: *mut u8,
    len: usize,
}

// SAFETY: a BufSlice is an address; whoever made it promised (see `new`) that the memory stays mapped while it is
// used, from whatever thread.
unsafe impl Send for BufSlice {}
// SAFETY: as above; shared access goes through raw copies only.
unsafe impl Sync for BufSlice {}

impl BufSlice {
    /// Memory at `ptr`, `len` bytes long.
    ///
    /// # Safety
    /// The memory must be mapped, readable and writable, until the last use of the slice and until every
    /// operation it was given to has been reaped from its engine. No Rust reference to it may live meanwhile.
    pub unsafe fn new(ptr: *mut u8, len: usize) -> Self {
        BufSlice { ptr, len }
    }

    /// First byte.
    pub fn as_ptr(self) -> *mut u8 {
        self.ptr
    }

    /// Bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// True without a byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The part from `skip` on, at most `len` bytes long.
    #[must_use]
    pub fn part(self, skip: usize, len: usize) -> Self {
        let skip = skip.min(self.len);
        let len = len.min(self.len - skip);
        // SAFETY: skip <= self.len, so the address stays inside or one past the memory `new` vouched for.
        BufSlice { ptr: unsafe { self.ptr.add(skip) }, len }
    }

    /// The first `len` bytes, if there are so many.
    #[must_use]
    pub fn first(self, len: usize) -> Option<Self> {
        (len <= self.len).then_some(BufSlice { ptr: self.ptr, len })
    }

    /// The last byte.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn last_byte(self) -> Self {
        assert!(self.len > 0, "the last byte of nothing");
        // SAFETY: inside the memory `new` vouched for.
        BufSlice { ptr: unsafe { self.ptr.add(self.len - 1) }, len: 1 }
    }

    /// Copies the first bytes out.
    ///
    /// # Panics
    /// If `out` is longer than the slice.
    pub fn read(self, out: &mut [u8]) {
        assert!(out.len() <= self.len, "read past a buffer");
        // SAFETY: length checked; the memory is mapped (`new`); `out` is ours alone and cannot overlap.
        unsafe { ptr::copy_nonoverlapping(self.ptr, out.as_mut_ptr(), out.len()) }
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// If `data` is longer than the slice.
    pub fn write(self, data: &[u8]) {
        assert!(data.len() <= self.len, "write past a buffer");
        // SAFETY: length checked; the memory is mapped and writable (`new`); `data` is Rust memory elsewhere.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), self.ptr, data.len()) }
    }

    /// Clears all bytes.
    pub fn clear(self) {
        // SAFETY: the memory is mapped and writable over its whole length (`new`).
        unsafe { ptr::write_bytes(self.ptr, 0, self.len) }
    }

    /// True if every byte was zero when it was looked at.
    pub fn is_zero(self) -> bool {
        let mut chunk = [0u8; 4096];
        let mut at = 0;
        while at < self.len {
            let n = chunk.len().min(self.len - at);
            self.part(at, n).read(&mut chunk[..n]);
            if chunk[..n].iter().any(|b| *b != 0) {
                return false;
            }
            at += n;
        }
        true
    }
}

/// Bytes of all slices together.
pub fn total_len(bufs: &[BufSlice]) -> u64 {
    bufs.iter().map(|b| b.len() as u64).sum()
}

/// Clears all slices.
pub fn fill_zero(bufs: &[BufSlice]) {
    bufs.iter().for_each(|b| b.clear());
}

/// True if all bytes of all slices were zero when looked at.
pub fn is_zero(bufs: &[BufSlice]) -> bool {
    bufs.iter().all(|b| b.is_zero())
}

/// Appends to `out` the slices that hold `len` bytes from `skip` on.
///
/// # Panics
/// If `bufs` hold fewer.
pub fn sub_slices(bufs: &[BufSlice], skip: u64, len: u64, out: &mut Vec<BufSlice>) {
    let (mut skip, mut left) = (skip, len);
    for b in bufs {
        let n = b.len() as u64;
        if left == 0 {
            break;
        }
        if skip >= n {
            skip -= n;
            continue;
        }
        let take = left.min(n - skip);
        // both fit a usize: they are at most this slice's length
        out.push(b.part(skip as usize, take as usize));
        left -= take;
        skip = 0;
    }
    assert_eq!(left, 0, "the buffers are shorter than the range");
}

/// Copies `bufs` into `out`.
///
/// # Panics
/// If `bufs` hold fewer bytes than `out`.
pub fn gather(bufs: &[BufSlice], out: &mut [u8]) {
    let mut at = 0;
    for b in bufs {
        let n = b.len().min(out.len() - at);
        b.read(&mut out[at..at + n]);
        at += n;
    }
    assert_eq!(at, out.len(), "the buffers are shorter than the copy");
}

/// Copies `data` into `bufs`.
///
/// # Panics
/// If `bufs` hold fewer bytes than `data`.
pub fn scatter(data: &[u8], bufs: &[BufSlice]) {
    let mut at = 0;
    for b in bufs {
        let n = b.len().min(data.len() - at);
        b.write(&data[at..at + n]);
        at += n;
    }
    assert_eq!(at, data.len(), "the buffers are shorter than the data");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slices(v: &mut [u8], cuts: &[usize]) -> Vec<BufSlice> {
        let mut at = 0;
        let base = v.as_mut_ptr();
        cuts.iter()
            .map(|n| {
                // SAFETY: the cuts of each test stay inside `v`, which outlives the slices.
                let s = unsafe { BufSlice::new(base.add(at), *n) };
                at += n;
                s
            })
            .collect()
    }

    #[test]
    fn parts_of_scattered_memory() {
        let mut v: Vec<u8> = (0..100).collect();
        let s = slices(&mut v, &[10, 1, 39, 50]);
        let mut out = Vec::new();
        sub_slices(&s, 5, 30, &mut out);
        assert_eq!(out.iter().map(|b| b.len()).collect::<Vec<_>>(), [5, 1, 24]);
        let mut got = [0; 30];
        gather(&out, &mut got);
        assert_eq!(got.to_vec(), (5..35).collect::<Vec<u8>>());
        scatter(&[0; 30], &out);
        assert!(is_zero(&out) && !is_zero(&s) && total_len(&s) == 100);
    }
}
