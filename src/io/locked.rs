//! Memory that never goes to swap, for keys and for what they protect.

use super::{AlignedBuf, BUF_ALIGN, BufSlice};
use std::io;

/// Zeroed memory that stays in RAM, and is cleared before it is given back.
#[derive(Debug)]
pub struct LockedBuf {
    /// Whole pages: the lock is on pages, and nobody else's memory shall come to lie on them.
    memory: AlignedBuf,
    len: usize,
}

impl LockedBuf {
    /// `len` zero bytes.
    ///
    /// # Errors
    /// From the operating system: a process may lock only so much (RLIMIT_MEMLOCK).
    ///
    /// # Panics
    /// If `len` is 0.
    pub fn new(len: usize) -> io::Result<LockedBuf> {
        let memory = AlignedBuf::new(len.next_multiple_of(BUF_ALIGN));
        let bytes = memory.as_slice();
        // SAFETY: the range is ours, and stays mapped until `drop` has unlocked it.
        match unsafe { libc::mlock(bytes.as_ptr().cast(), bytes.len()) } {
            0 => Ok(LockedBuf { memory, len }),
            _ => Err(io::Error::last_os_error()),
        }
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
        &self.memory.as_slice()[..self.len]
    }

    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory.as_mut_slice()[..self.len]
    }

    /// The same memory for an engine.
    ///
    /// # Safety
    /// As [`AlignedBuf::as_buf`].
    pub unsafe fn as_buf(&self) -> BufSlice {
        // SAFETY: the caller promises what `AlignedBuf::as_buf` asks for.
        unsafe { self.memory.as_buf() }.part(0, self.len)
    }
}

impl Drop for LockedBuf {
    fn drop(&mut self) {
        self.memory.as_mut_slice().fill(0);
        // Somebody might look: the clearing is not left out.
        let bytes = std::hint::black_box(self.memory.as_slice());
        // SAFETY: locked in `new`, and still ours.
        unsafe { libc::munlock(bytes.as_ptr().cast(), bytes.len()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kilobytes that this process has locked, by the kernel's own count.
    fn locked_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmLck:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn memory_is_locked_in_whole_pages_of_its_own() {
        let mut b = LockedBuf::new(300 << 10).unwrap();
        assert!(locked_kib() >= 300, "{} KiB are locked", locked_kib());
        assert!(b.len() == 300 << 10 && b.as_slice().iter().all(|x| *x == 0));
        b.as_mut_slice().fill(7);
        assert!(LockedBuf::new(1).unwrap().as_slice() == [0]);
    }
}
