//! The grain tables of a sparse extent: whole in memory where they are small, page by page where they are not.

use crate::limits::META_PAGE_BYTES;
use crate::map::PageCache;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of an entry.
pub(super) const ENTRY_BYTES: u64 = 4;

/// Entries of all tables of an extent, one table behind the other.
#[derive(Debug)]
pub(super) enum Entries {
    /// Every entry, as the kernel has accepted it.
    Whole(Box<[AtomicU32]>),
    /// Pages that were looked at.
    Pages(PageCache),
}

/// The tables and how they are cut into pages.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) entries: Entries,
    /// Entries of a page: a whole table, or 4096 bytes of one.
    page_entries: u32,
}

/// Entries of a page if a table has so many.
pub(super) fn page_entries(table_entries: u32) -> u32 {
    let most = u32::try_from(META_PAGE_BYTES / ENTRY_BYTES).expect("a small constant");
    table_entries.min(most)
}

impl Table {
    pub(super) fn new(entries: Entries, table_entries: u32) -> Self {
        Table { entries, page_entries: page_entries(table_entries) }
    }

    pub(super) fn is_whole(&self) -> bool {
        matches!(self.entries, Entries::Whole(_))
    }

    /// The page an entry is in, and its number there.
    pub(super) fn place(&self, index: u64) -> (u64, usize) {
        let n = u64::from(self.page_entries);
        (index / n, usize::try_from(index % n).expect("less than a page"))
    }

    /// The first entry of a page.
    pub(super) fn first_of(&self, page: u64) -> u64 {
        page * u64::from(self.page_entries)
    }

    /// Bytes of a page.
    pub(super) fn page_bytes(&self) -> usize {
        usize::try_from(u64::from(self.page_entries) * ENTRY_BYTES).expect("at most META_PAGE_BYTES")
    }

    /// An entry; `None` if its page is not in memory.
    pub(super) fn get(&self, index: u64) -> Option<u32> {
        match &self.entries {
            Entries::Whole(all) => {
                let i = usize::try_from(index).ok()?;
                all.get(i).map(|e| e.load(Ordering::Acquire))
            }
            Entries::Pages(cache) => {
                let (page, at) = self.place(index);
                cache.bytes4(page, at).map(u32::from_le_bytes)
            }
        }
    }

    /// Changes an entry; its page is pinned.
    pub(super) fn set(&self, index: u64, value: u32) {
        match &self.entries {
            Entries::Whole(all) => {
                if let Some(e) = usize::try_from(index).ok().and_then(|i| all.get(i)) {
                    e.store(value, Ordering::Release);
                }
            }
            Entries::Pages(cache) => {
                let (page, at) = self.place(index);
                cache.set4(page, at, value.to_le_bytes());
            }
        }
    }

    /// Keeps an entry's page in memory until [`Self::unpin`]. False if it is not there.
    pub(super) fn pin(&self, index: u64) -> bool {
        match &self.entries {
            Entries::Whole(_) => true,
            Entries::Pages(cache) => cache.pin(self.place(index).0),
        }
    }

    pub(super) fn unpin(&self, index: u64) {
        if let Entries::Pages(cache) = &self.entries {
            cache.unpin(self.place(index).0);
        }
    }

    /// The page is in memory.
    pub(super) fn contains(&self, page: u64) -> bool {
        match &self.entries {
            Entries::Whole(_) => true,
            Entries::Pages(cache) => cache.contains(page),
        }
    }

    /// Takes a page in that was read.
    pub(super) fn insert(&self, page: u64, bytes: &[u8]) {
        if let Entries::Pages(cache) = &self.entries {
            cache.insert(page, bytes);
        }
    }

    /// Appends a page's bytes. False if it is not in memory.
    pub(super) fn copy_page(&self, page: u64, out: &mut Vec<u8>) -> bool {
        match &self.entries {
            Entries::Whole(all) => {
                let from = usize::try_from(self.first_of(page)).unwrap_or(usize::MAX);
                let len = usize::try_from(self.page_entries).expect("at most a page");
                let Some(part) = from.checked_add(len).and_then(|end| all.get(from..end)) else {
                    return false;
                };
                out.extend(part.iter().flat_map(|e| e.load(Ordering::Acquire).to_le_bytes()));
                true
            }
            Entries::Pages(cache) => cache.copy_to(page, out),
        }
    }
}
