//! Parts of a front-end's files in our address space: guest memory, the log of dirty pages, what is in flight.
//!
//! Huge pages (hugetlbfs, a memfd made with MFD_HUGETLB) are mapped, unmapped and replaced as a whole or not at all:
//! `munmap` of a part fails, and what a front-end asks for may begin and end anywhere. So whole pages are mapped around
//! it, of whatever size the file has.

use super::lost::Watched;
use super::sys::PAGE_BYTES;
use crate::io::BufSlice;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use vm_memory::{FileOffset, MmapRegion};

/// Larger "block sizes" of a file are no huge pages.
const MAX_HUGE_PAGE_BYTES: u64 = 16 << 30;

/// A mapped part of a file, readable and writable, shared with whoever else has it. The file may be shortened
/// meanwhile: see `lost.rs`.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Before the mapping: dropping it ends the watch over it.
    watched: Watched,
    pages: MmapRegion<()>,
    bytes: BufSlice,
}

impl Mapping {
    /// Maps `len` bytes from `offset` on, which is a multiple of [`PAGE_BYTES`]. The file is a regular one that has them,
    /// or a character device.
    ///
    /// # Errors
    /// What is wrong with the part, as the rest of a sentence about it: `InvalidInput` if it cannot be; otherwise it cannot
    /// be mapped here.
    pub(super) fn new(file: File, offset: u64, len: u64) -> io::Result<Self> {
        let end = offset.checked_add(len).filter(|end| len > 0 && i64::try_from(*end).is_ok());
        let end = end.ok_or_else(wraps)?;
        if !offset.is_multiple_of(PAGE_BYTES) {
            return Err(invalid(format!("starts at file offset {offset:#x}, within a page")));
        }
        let meta = file.metadata()?;
        if !meta.is_file() && !meta.file_type().is_char_device() {
            return Err(io::Error::other("comes with a descriptor that is not a file"));
        }
        // touching a mapping behind the end of its file is a SIGBUS; a device checks its bounds when it is mapped
        if meta.is_file() && end > meta.len() {
            return Err(invalid(format!("ends at {end:#x} in a file of {:#x} bytes", meta.len())));
        }
        let page = page_of(meta.blksize());
        let skew = offset % page;
        let whole = len.checked_add(skew).and_then(|n| n.checked_next_multiple_of(page));
        let size = |n: u64| usize::try_from(n).map_err(|_| wraps());
        let (whole, skew, len, page) =
            (size(whole.ok_or_else(wraps)?)?, size(skew)?, size(len)?, size(page)?);
        let pages = MmapRegion::from_file(FileOffset::new(file, offset - skew as u64), whole);
        let pages = pages.map_err(|e| io::Error::other(format!("cannot be mapped: {e}")))?;
        let watched = Watched::new(pages.as_ptr(), whole, page)?;
        // SAFETY: all of it is mapped, readable and writable, and stays so as long as this Mapping; whoever uses the slice
        // holds that. The memory is shared with others: no reference to it exists but to atomics.
        let bytes = unsafe { BufSlice::new(pages.as_ptr(), pages.size()) }.part(skew, len);
        Ok(Mapping { watched, pages, bytes })
    }

    /// The bytes asked for. They are mapped as long as `self` lives.
    pub(super) fn bytes(&self) -> BufSlice {
        self.bytes
    }

    /// How it is mapped, as `mmap` has it: protection and flags.
    pub(super) fn mode(&self) -> (i32, i32) {
        (self.pages.prot(), self.pages.flags())
    }

    /// A part of it was taken away, and is zeros now.
    pub(super) fn is_lost(&self) -> bool {
        self.watched.is_lost()
    }
}

/// The unit a file is mapped in. hugetlbfs tells its page size as that of a block; with others a larger unit does no harm.
fn page_of(block_bytes: u64) -> u64 {
    let huge = block_bytes.is_power_of_two() && (PAGE_BYTES..=MAX_HUGE_PAGE_BYTES).contains(&block_bytes);
    if huge { block_bytes } else { PAGE_BYTES }
}

fn wraps() -> io::Error {
    invalid("is empty or passes the end of every file".to_string())
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests {
    use super::super::lost::losses;
    use super::super::sys::huge_memfd;
    use super::*;

    const HUGE: usize = 2 << 20;

    #[test]
    fn parts_that_a_file_does_not_have_are_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x3000).unwrap();
        let refused = |offset, len| {
            let e = Mapping::new(file.try_clone().unwrap(), offset, len).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
            e.to_string()
        };
        assert!(refused(0, 0x3001).contains("in a file of 0x3000"));
        assert!(refused(0x3000, 1).contains("in a file of"));
        assert!(refused(0x800, 8).contains("within a page"));
        assert!(refused(0, 0).contains("is empty"));
        assert!(refused(0x1000, u64::MAX).contains("passes"));
        assert!(refused(0x1000, (i64::MAX as u64) - 0xfff).contains("passes"));
        let (_, pipe) = io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
        let e = Mapping::new(pipe, 0, 4096).unwrap_err();
        assert!(e.kind() != io::ErrorKind::InvalidInput && e.to_string().contains("not a file"));
    }

    #[test]
    fn only_sizes_of_pages_are_taken_for_such() {
        for (block, page) in [
            (4096, 4096),
            (2 << 20, 2 << 20),
            (1 << 30, 1 << 30),
            (512, 4096),
            (0, 4096),
            (12288, 4096),
            (1 << 40, 4096),
        ] {
            assert_eq!(page_of(block), page);
        }
    }

    fn mappings_at(start: usize) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|l| l.starts_with(&format!("{start:x}-"))).count()
    }

    /// Parts of huge pages, as a front-end may ask for, and what remains of them when the file is cut.
    #[test]
    fn huge_pages_are_mapped_replaced_and_unmapped_whole() {
        let Some(file) = huge_memfd(HUGE, 4) else { return };
        let (offset, len) = (HUGE as u64 + 0x3000, 2 * HUGE as u64 + 0x10);
        let mapping = Mapping::new(file.try_clone().unwrap(), offset, len).unwrap();
        let bytes = mapping.bytes();
        let start = bytes.as_ptr() as usize - 0x3000;
        assert_eq!((bytes.len(), start % HUGE, mappings_at(start)), (2 * HUGE + 0x10, 0, 1));
        for at in [0, HUGE - 0x3000, 2 * HUGE - 0x3000] {
            bytes.part(at, 8).write(&[7; 8]);
        }
        let before = losses();
        file.set_len(2 * HUGE as u64).unwrap();
        let mut got = [0; 8];
        bytes.read(&mut got);
        assert!(got == [7; 8] && !mapping.is_lost(), "the first page is still there");
        // one fault replaces all of a page, and only that
        bytes.part(HUGE + 0x2345, 8).write(&[9; 8]);
        assert!(mapping.is_lost() && losses() > before);
        bytes.part(HUGE - 0x3000, 8).read(&mut got);
        assert_eq!(got, [0; 8]);
        bytes.part(HUGE + 0x2345, 8).read(&mut got);
        assert_eq!(got, [9; 8]);
        bytes.part(2 * HUGE - 0x3000, 8).read(&mut got);
        assert_eq!(got, [0; 8]);
        bytes.read(&mut got);
        assert_eq!(got, [7; 8]);
        drop(mapping);
        assert_eq!(mappings_at(start), 0, "it is still mapped");
    }
}
