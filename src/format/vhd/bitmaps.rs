//! Which sectors of a block are there.
//!
//! Almost always all are: one bit a page says so once it was seen, and nothing else of the bitmap is kept. Pages with
//! sectors missing lie in a cache.

use super::super::sector_bits::run;
use super::layout::{BITMAP_PAGE_BYTES, BITMAP_PAGE_SPAN, Layout};
use crate::limits::{MAX_PAGE_CACHE_BYTES, SECTOR_BYTES};
use crate::map::PageCache;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug)]
pub(super) struct Bitmaps {
    /// Pages of which every sector is there.
    whole: Box<[AtomicU64]>,
    /// Bytes of a page that speak of sectors: a small block's bitmap has more.
    used_bytes: usize,
    cache: PageCache,
}

/// A run of sectors that are all there, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) there: bool,
    /// Guest bytes of it.
    pub(super) len: u64,
}

fn at(page: u64) -> (usize, u64) {
    (usize::try_from(page / 64).unwrap_or(usize::MAX), 1 << (page % 64))
}

impl Bitmaps {
    pub(super) fn new(layout: &Layout) -> Self {
        let pages = u64::from(layout.blocks) * layout.bitmap_pages();
        let words = usize::try_from(pages.div_ceil(64)).expect("a bit for 4 KiB of the disk at most");
        let span = layout.block_bytes.min(BITMAP_PAGE_SPAN);
        Bitmaps {
            whole: (0..words).map(|_| AtomicU64::new(0)).collect(),
            used_bytes: usize::try_from(span / SECTOR_BYTES / 8).expect("at most a page"),
            cache: PageCache::new(BITMAP_PAGE_BYTES, pages, MAX_PAGE_CACHE_BYTES),
        }
    }

    /// Every sector of the page is there, as far as is known.
    pub(super) fn is_whole(&self, page: u64) -> bool {
        let (word, mask) = at(page);
        self.whole.get(word).is_some_and(|w| w.load(Ordering::Acquire) & mask != 0)
    }

    pub(super) fn set_whole(&self, page: u64) {
        let (word, mask) = at(page);
        if let Some(w) = self.whole.get(word) {
            w.fetch_or(mask, Ordering::Release);
        }
    }

    /// The page is in memory.
    pub(super) fn contains(&self, page: u64) -> bool {
        self.is_whole(page) || self.cache.contains(page)
    }

    /// The page as it is in the file.
    pub(super) fn take_in(&self, page: u64, bytes: &[u8]) {
        if bytes[..self.used_bytes].iter().all(|b| *b == 0xff) {
            self.set_whole(page);
        } else {
            self.cache.insert(page, bytes);
        }
    }

    /// What is at guest byte `into` of the page's span, `most` bytes of it at most; `None` if the page is not here.
    pub(super) fn run(&self, page: u64, into: u64, most: u64) -> Option<Run> {
        let left = most.min(BITMAP_PAGE_SPAN - into);
        if self.is_whole(page) {
            return Some(Run { there: true, len: left });
        }
        let (first, end) = (into / SECTOR_BYTES, (into + left).div_ceil(SECTOR_BYTES));
        let (there, known) = run(first, end, |word| self.word(page, word))?;
        Some(Run { there, len: (known * SECTOR_BYTES - into).min(left) })
    }

    /// 64 sectors, the first in the highest bit.
    fn word(&self, page: u64, index: u64) -> Option<u64> {
        self.cache.bytes8(page, usize::try_from(index).ok()?).map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::HostOffset;
    use proptest::prelude::*;

    fn layout(block_bytes: u64) -> Layout {
        Layout {
            disk_bytes: 4 * block_bytes,
            block_shift: block_bytes.trailing_zeros(),
            block_bytes,
            bitmap_bytes: (block_bytes / 4096).next_multiple_of(512),
            blocks: 4,
            table_at: HostOffset(1536),
            metadata: Vec::new(),
        }
    }

    #[test]
    fn a_small_blocks_bitmap_is_whole_without_the_rest_of_its_sector() {
        let b = Bitmaps::new(&layout(8192));
        let mut page = vec![0; 512];
        page[..2].fill(0xff);
        b.take_in(2, &page);
        assert!(b.is_whole(2) && !b.is_whole(1));
    }

    proptest! {
        #[test]
        fn runs_are_those_of_the_bits(
            changes in proptest::collection::vec(0usize..4096, 0..12),
            first in any::<bool>(),
            from in 0u64..4096,
            most in 1u64..4096,
        ) {
            let b = Bitmaps::new(&layout(2 << 20));
            let mut bits = vec![first; 4096];
            for c in changes {
                bits[c..].iter_mut().for_each(|b| *b = !*b);
            }
            let mut page = vec![0u8; 512];
            for (i, _) in bits.iter().enumerate().filter(|(_, b)| **b) {
                page[i / 8] |= 0x80 >> (i % 8);
            }
            prop_assert_eq!(b.run(1, 0, 512), None);
            b.take_in(1, &page);
            let end = (from + most).min(4096);
            let from_at = usize::try_from(from).unwrap();
            let same = bits[from_at..usize::try_from(end).unwrap()]
                .iter().take_while(|b| **b == bits[from_at]).count() as u64;
            let run = b.run(1, from * 512, most * 512).unwrap();
            prop_assert_eq!(run, Run { there: bits[from_at], len: same * 512 });
        }
    }
}
