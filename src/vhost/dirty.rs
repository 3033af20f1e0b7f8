//! The log of pages we have written to, for a guest that is migrated while it runs (VHOST_USER_PROTOCOL_F_LOG_SHMFD).
//!
//! One bit for each 4 KiB of guest memory, in a file the front-end shares. A bit is set after the write it tells of: the
//! front-end clears bits as it copies pages, and one set before would be cleared too early. A write that cannot be noted
//! would be missing on the other host: its ring stops before the driver is told of it.

use super::shared::SharedFile;
use crate::limits;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What one bit stands for (VHOST_LOG_PAGE).
const PAGE_BYTES: u64 = 4096;

/// The log of one guest.
#[derive(Debug)]
pub struct DirtyLog {
    shared: SharedFile,
}

impl DirtyLog {
    /// Takes up a log of `bytes` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// If the file is shorter, or the log longer than any guest's memory needs.
    pub fn open(file: File, offset: u64, bytes: u64) -> io::Result<Self> {
        if bytes > limits::MAX_LOG_BYTES {
            let what = format!("a log of {bytes} bytes; {} are enough for any guest", limits::MAX_LOG_BYTES);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Ok(DirtyLog { shared: SharedFile::map(file, offset, bytes)? })
    }

    /// Says that `len` bytes from guest address `gpa` on were written. False if the log does not reach that far, or a part
    /// of it was taken away.
    pub fn mark(&self, gpa: u64, len: u64) -> bool {
        let Some(last) = len.checked_sub(1) else { return true };
        let Some(end) = gpa.checked_add(last) else { return false };
        // whether it is lost is known after it was touched
        (gpa / PAGE_BYTES..=end / PAGE_BYTES).all(|page| self.mark_page(page)) && !self.shared.is_lost()
    }

    fn mark_page(&self, page: u64) -> bool {
        let byte = usize::try_from(page / 8).ok().and_then(|at| self.shared.bytes().get(at));
        let Some(byte) = byte else { return false };
        let bit = 1u8 << (page % 8);
        // most pages are written again and again: a line that is only read stays with all who read it
        if byte.load(Ordering::SeqCst) & bit == 0 {
            byte.fetch_or(bit, Ordering::SeqCst);
        }
        true
    }
}

/// A ring's share of a log.
#[derive(Debug)]
pub struct RingLog {
    /// The guest's log.
    pub log: Arc<DirtyLog>,
    /// Guest address under which the used ring is logged, if it is to be.
    pub used: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(bytes: u64) -> DirtyLog {
        DirtyLog::open(SharedFile::create(c"log", bytes).unwrap(), 0, bytes).unwrap()
    }

    fn bytes(l: &DirtyLog) -> Vec<u8> {
        l.shared.bytes().iter().map(|b| b.load(Ordering::SeqCst)).collect()
    }

    #[test]
    fn every_page_touched_gets_its_bit() {
        let l = log(4);
        assert!(l.mark(0, 0) && bytes(&l) == [0; 4]);
        assert!(l.mark(4095, 2));
        assert_eq!(bytes(&l), [3, 0, 0, 0]);
        assert!(l.mark(7 * 4096, 4097) && l.mark(4095, 2));
        assert_eq!(bytes(&l), [0x83, 1, 0, 0]);
        assert!(l.mark(31 * 4096, 4096) && !l.mark(31 * 4096, 4097));
        assert_eq!(bytes(&l)[3], 0x80);
        assert!(!l.mark(u64::MAX, 2) && !l.mark(u64::MAX, 1));
    }

    #[test]
    fn a_mark_in_a_page_that_was_taken_away_is_none() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let l = DirtyLog::open(file.try_clone().unwrap(), 0, 8192).unwrap();
        let far = 4096 * 8 * PAGE_BYTES;
        assert!(l.mark(0, 1) && l.mark(far, 1));
        file.set_len(4096).unwrap();
        assert!(l.mark(0, 1), "nobody has touched what has gone");
        assert!(!l.mark(far, 1) && !l.mark(0, 1));
    }

    #[test]
    fn logs_that_cannot_be_are_refused() {
        let file = SharedFile::create(c"log", 4096).unwrap();
        let open = |offset, bytes| DirtyLog::open(file.try_clone().unwrap(), offset, bytes);
        assert!(open(0, 4096).is_ok());
        assert!(
            open(0, 4097).is_err()
                && open(0, u64::MAX).is_err()
                && open(7, 8).is_err()
                && open(0, 0).is_err()
        );
    }
}
