//! Files that a front-end and we have mapped, apart from guest memory: what is in flight, and the log of dirty pages.
//!
//! Whoever else has the file may write to it at any time, so all access is by atomics, and whatever is read is
//! validated by its reader like a guest's input.

use super::mapping::Mapping;
use super::sys;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::slice;
use std::sync::atomic::{AtomicU8, AtomicU64};

const WORD_BYTES: usize = size_of::<u64>();

/// A mapped part of a file.
#[derive(Debug)]
pub(super) struct SharedFile(Mapping);

impl SharedFile {
    /// A new file in memory, all zeros, whose length nobody can change any more.
    pub(super) fn create(name: &CStr, len: u64) -> io::Result<File> {
        sys::sealed_memfd(name, len)
    }

    /// Maps `len` bytes from `offset` on. Our own files are sealed; one that a front-end brings and shortens reads as
    /// zeros there, which is checked like all it may write there, and what is written there is nobody's:
    /// [`Self::is_lost`].
    pub(super) fn map(file: File, offset: u64, len: u64) -> io::Result<Self> {
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the shared file is not a file"));
        }
        let mapping = Mapping::new(file, offset, len);
        let named = |e: io::Error| io::Error::new(e.kind(), format!("the shared file {e}"));
        mapping.map(SharedFile).map_err(named)
    }

    /// A part of it was found taken away.
    pub(super) fn is_lost(&self) -> bool {
        self.0.is_lost()
    }

    /// All of it as words; a last part of one is left out.
    pub(super) fn words(&self) -> &[AtomicU64] {
        let bytes = self.0.bytes();
        // SAFETY: the bytes are readable and writable, start at a page, and stay mapped as long as `self`.
        // Others write to it: atomics are the access for that, and every bit pattern is a value of theirs.
        unsafe { slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / WORD_BYTES) }
    }

    /// All of it as bytes.
    pub(super) fn bytes(&self) -> &[AtomicU8] {
        let bytes = self.0.bytes();
        // SAFETY: as in `words`. No mapping of ours is used both ways.
        unsafe { slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    #[test]
    fn lengths_and_offsets_are_checked_against_the_file() {
        let file = SharedFile::create(c"test", 0x3000).unwrap();
        let map = |offset, len| SharedFile::map(file.try_clone().unwrap(), offset, len);
        let refused = |offset, len| map(offset, len).unwrap_err().to_string();
        assert!(refused(0, 0x3001).contains("in a file of 0x3000"));
        assert!(refused(0x3000, 1).contains("in a file of"));
        assert!(refused(0x800, 8).contains("within a page"));
        assert!(refused(0, 0).contains("is empty"));
        assert!(refused(0x1000, u64::MAX).contains("passes"));
        let (_, pipe) = io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
        assert!(SharedFile::map(pipe, 0, 4096).is_err());
        let m = map(0x1000, 0x1004).unwrap();
        assert_eq!((m.words().len(), m.bytes().len()), (0x200, 0x1004));
        m.bytes()[3].store(7, Ordering::Relaxed);
        let mut got = [0; 4];
        file.read_exact_at(&mut got, 0x1000).unwrap();
        assert_eq!(got, [0, 0, 0, 7]);
    }

    #[test]
    fn nobody_changes_the_length_of_our_own() {
        let file = SharedFile::create(c"test", 0x1000).unwrap();
        assert!(file.set_len(0).is_err() && file.set_len(0x2000).is_err());
    }

    #[test]
    fn huge_pages_that_go_read_as_zeros() {
        let Some(file) = sys::huge_memfd(2 << 20, 2) else { return };
        let shared = SharedFile::map(file.try_clone().unwrap(), 0x1000, (2 << 20) + 8).unwrap();
        shared.bytes()[0].store(7, Ordering::Relaxed);
        file.set_len(0).unwrap();
        assert!(shared.bytes().iter().all(|b| b.load(Ordering::Relaxed) == 0));
    }
}
