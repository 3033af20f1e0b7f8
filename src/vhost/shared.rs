//! Files that a front-end and we have mapped, apart from guest memory: what is in flight, and the log of dirty pages.
//!
//! Whoever else has the file may write to it at any time, so all access is by atomics, and whatever is read is
//! validated by its reader like a guest's input.

use super::lost::Watched;
use super::sys;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::slice;
use std::sync::atomic::{AtomicU8, AtomicU64};
use vm_memory::{FileOffset, MmapRegion};

/// The smallest unit the kernel maps in.
const PAGE_BYTES: u64 = 4096;
const WORD_BYTES: usize = size_of::<u64>();

/// A mapped part of a file.
#[derive(Debug)]
pub(super) struct SharedFile {
    /// Before the mapping: dropping it ends the watch over it.
    _watched: Watched,
    mapping: MmapRegion<()>,
}

impl SharedFile {
    /// A new file in memory, all zeros, whose length nobody can change any more.
    pub(super) fn create(name: &CStr, len: u64) -> io::Result<File> {
        sys::sealed_memfd(name, len)
    }

    /// Maps `len` bytes from `offset` on.
    pub(super) fn map(file: File, offset: u64, len: u64) -> io::Result<Self> {
        let end = offset.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or_else(|| invalid("is empty or passes the end of every file".to_string()))?;
        if !offset.is_multiple_of(PAGE_BYTES) {
            return Err(invalid(format!("starts at file offset {offset:#x}, within a page")));
        }
        let meta = file.metadata()?;
        // Touching a mapping behind the end of its file is a SIGBUS. Ours are sealed; one that a front-end brings and
        // shortens reads as zeros there, which is checked like all it may write there: see `lost.rs`.
        if !meta.is_file() || end > meta.len() {
            return Err(invalid(format!("ends at {end:#x} in a file of {:#x} bytes", meta.len())));
        }
        let len = usize::try_from(len).map_err(|_| invalid("is too large".to_string()))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), len);
        let mapping = mapping.map_err(|e| io::Error::other(format!("cannot be mapped: {e}")))?;
        let page = usize::try_from(PAGE_BYTES).map_err(io::Error::other)?;
        let watched = Watched::new(mapping.as_ptr(), len, page)?;
        Ok(SharedFile { _watched: watched, mapping })
    }

    /// All of it as words; a last part of one is left out.
    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is readable and writable over its size, starts at a page, and lives as long as `self`.
        // Others write to it: atomics are the access for that, and every bit pattern is a value of theirs.
        unsafe { slice::from_raw_parts(self.mapping.as_ptr().cast(), self.mapping.size() / WORD_BYTES) }
    }

    /// All of it as bytes.
    pub(super) fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: as in `words`. No mapping of ours is used both ways.
        unsafe { slice::from_raw_parts(self.mapping.as_ptr().cast(), self.mapping.size()) }
    }
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("the shared file {what}"))
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
}
