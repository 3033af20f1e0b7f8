//! A sparse extent that is open: look-ups in its grain tables.

use super::header::SparseHeader;
use super::layout::{Entry, Layout, MARKER_BYTES, read_words};
use super::table::{Entries, Table, page_entries};
use super::writer::Writer;
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::{MAX_UNIT_BYTES, SECTOR_BYTES};
use crate::map::{
    ByteSource, Codec, FileId, GuestOffset, GuestRange, HostOffset, MetaKey, MetaOp, Miss, Packed, PageCache,
    PagePlace,
};
use crate::probe::paging::are_all_paged;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Tables of an image up to this size together are kept whole and verified when it is opened.
const WHOLE_BYTES: u64 = 16 << 20;
/// Bytes of tables that are kept whole.
pub(super) fn whole_bytes() -> u64 {
    if are_all_paged() { 0 } else { WHOLE_BYTES }
}

/// Pages kept of all other tables of an image.
pub(super) const CACHE_BYTES: u64 = 16 << 20;

/// Kinds of metadata pages of an extent, as [`MetaKey::Page`] counts tables.
pub(super) const MAIN: u8 = 0;
pub(super) const COPY: u8 = 1;
pub(super) const MARK: u8 = 2;

/// Extents are told apart by the upper half of a page's number.
const EXTENT_SHIFT: u32 = 40;

/// The key of a page of an extent.
pub(super) fn key_of(extent: u16, table: u8, page: u64) -> MetaKey {
    MetaKey::Page { table, number: u64::from(extent) << EXTENT_SHIFT | page }
}

/// The extent and the page that a number made by [`key_of`] means.
pub(super) fn of_key(number: u64) -> (usize, u64) {
    let extent = usize::try_from(number >> EXTENT_SHIFT).expect("24 bits");
    (extent, number & ((1 << EXTENT_SHIFT) - 1))
}

/// A sparse extent that is open.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) file: FileId,
    /// Its number among the extents.
    pub(super) extent: u16,
    /// The part of the disk it holds; what its header says may be more.
    pub(super) range: GuestRange,
    pub(super) layout: Layout,
    pub(super) table: Table,
    /// Bytes the file had when it was opened.
    pub(super) opened_bytes: u64,
    /// Where the last grain ends that is named, as far as is known.
    pub(super) named_end: AtomicU64,
    /// A disk without a parent: what is not there reads as zeros.
    pub(super) is_base: bool,
    /// The first sector of the file, for changes of the mark in it.
    pub(super) head: [u8; SECTOR_BYTES as usize],
    /// `None` if opened for reading only.
    pub(super) writer: Option<Writer>,
}

/// What opening an extent has to know.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub(super) file: FileId,
    pub(super) extent: u16,
    pub(super) range: GuestRange,
    pub(super) is_base: bool,
    pub(super) write: bool,
    /// The tables are kept whole; otherwise so many bytes of pages.
    pub(super) cache: Option<u64>,
}

impl Sparse {
    /// Opens an extent whose header and directories were read.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub(super) fn open(source: &dyn ByteSource, layout: Layout, w: &Wanted) -> Result<Self> {
        if layout.header.disk_bytes < w.range.len() {
            let what = format!(
                "an extent of {} bytes, where the descriptor lists {}",
                layout.header.disk_bytes,
                w.range.len()
            );
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        let mut head = [0; SECTOR_BYTES as usize];
        source.read_at(HostOffset(0), &mut head)?;
        let entries = match w.cache {
            None => Entries::Whole(whole(source, &layout)?.into_iter().map(AtomicU32::new).collect()),
            Some(most) => {
                let bytes = u64::from(page_entries(layout.header.entries)) * super::table::ENTRY_BYTES;
                Entries::Pages(PageCache::new(bytes, layout.pages(), most))
            }
        };
        let table = Table::new(entries, layout.header.entries);
        let mut sparse = Sparse {
            file: w.file,
            extent: w.extent,
            range: w.range,
            layout,
            table,
            opened_bytes: source.len(),
            named_end: AtomicU64::new(source.len()),
            is_base: w.is_base,
            head,
            writer: None,
        };
        sparse.verify()?;
        if w.write {
            sparse.refuse_writing()?;
            sparse.writer = Some(Writer::new(&sparse, source)?);
        }
        Ok(sparse)
    }

    /// Looks at every entry that is in memory: no two grains at one place, none outside the file or in metadata.
    fn verify(&self) -> Result<()> {
        let Entries::Whole(all) = &self.table.entries else { return Ok(()) };
        let per_grain = self.layout.least_distance();
        let mut named = Vec::new();
        for (grain, value) in (0..self.layout.grains()).zip(all.iter()) {
            let Entry::At(at) = self.layout.entry(value.load(Ordering::Relaxed)) else { continue };
            if !self.layout.can_hold(at, grain, self.opened_bytes) {
                return Err(misplaced(grain, at, self.opened_bytes));
            }
            named.push(at.0 / SECTOR_BYTES);
        }
        named.sort_unstable();
        match named.windows(2).find(|w| w[1] - w[0] < per_grain) {
            None => Ok(()),
            Some(w) => {
                let what = format!("two grains lie upon each other at sector {}", w[1]);
                Err(Error::new(ErrorKind::Corrupt, what).hint("vdimg check tells everything that is wrong"))
            }
        }
    }

    /// Kinds of extents that are only read.
    fn refuse_writing(&self) -> Result<()> {
        if let Some(what) = &self.layout.broken_copy {
            let what = format!("the redundant directory is damaged: {what}");
            return Err(Error::new(ErrorKind::Corrupt, what).hint("pass --read-only, or convert it"));
        }
        let what = match (self.layout.header.kdmv_version, self.layout.lacks_tables()) {
            _ if self.layout.header.is_compressed() => {
                "streamOptimized VMDKs (compressed grains) are only read"
            }
            (None, _) => "VMDK extents of ESX (COWD) are only read",
            (_, true) => "this VMDK has grain tables that were never made, and is only read",
            _ => return Ok(()),
        };
        Err(Error::new(ErrorKind::Unsupported, what).hint("pass --read-only, or convert it"))
    }

    /// The number of the grain around `at`, which is inside the extent.
    pub(super) fn grain_at(&self, at: GuestOffset) -> u64 {
        at.since(self.range.start()) / self.layout.header.grain_bytes
    }

    /// The part of the disk a grain holds.
    pub(super) fn unit_of(&self, grain: u64) -> GuestRange {
        self.range.skip(grain * self.layout.header.grain_bytes).take(self.layout.header.grain_bytes)
    }

    /// What the table says of a grain.
    ///
    /// # Errors
    /// [`Miss::NeedsPage`]; [`Failure::Corrupt`] for a place that cannot be.
    pub(super) fn entry(&self, grain: u64) -> std::result::Result<Entry, Miss> {
        let Some(value) = self.table.get(grain) else {
            let (page, _) = self.table.place(grain);
            if self.layout.entry_at(&self.layout.directory, grain).is_none() {
                return Ok(Entry::Free); // there is no table
            }
            return Err(Miss::NeedsPage(key_of(self.extent, MAIN, page)));
        };
        let entry = self.layout.entry(value);
        if let (Entry::At(at), false) = (entry, self.table.is_whole())
            && !self.layout.can_hold(at, grain, self.named_end.load(Ordering::Acquire))
        {
            return Err(Miss::Fail(Failure::Corrupt));
        }
        Ok(entry)
    }

    /// The compressed grain behind the marker at a place. The table does not say where it ends: so many bytes as no
    /// compression makes more of it, if the file has them.
    pub(super) fn packed(&self, grain: u64, at: HostOffset) -> Packed {
        let off = at.plus(MARKER_BYTES);
        let (unit, whole) = (self.layout.bytes_of(grain), self.layout.header.grain_bytes);
        let most = whole + whole / 64 + SECTOR_BYTES;
        let len = (self.opened_bytes - off.0).min(most);
        let small = |n: u64| u32::try_from(n).expect("at most MAX_UNIT_BYTES and a bit");
        // The disk's last grain is whole in VirtualBox's streams and ours, cut in QEMU's.
        let codec = if unit < whole { Codec::ZlibPadded } else { Codec::Zlib };
        Packed { off, len: small(len), unit: small(unit), file: self.file, codec }
    }

    /// Where a page of the tables lies.
    ///
    /// # Errors
    /// [`Failure::Corrupt`] if its table does not exist.
    pub(super) fn page_place(&self, page: u64) -> std::result::Result<PagePlace, Failure> {
        let first = self.table.first_of(page);
        let off = self.layout.entry_at(&self.layout.directory, first).ok_or(Failure::Corrupt)?;
        Ok(PagePlace { file: self.file, off, len: self.table.page_bytes() })
    }

    /// The kernel has accepted a change of an entry.
    pub(super) fn publish(&self, op: &MetaOp) {
        let MetaOp::Entry { index, value, .. } = *op else { return };
        let value = u32::try_from(value).expect("entries have 32 bits");
        if let Entry::At(at) = self.layout.entry(value) {
            // before the entry can be seen
            self.named_end.fetch_max(at.0 + self.layout.header.grain_bytes, Ordering::AcqRel);
        }
        self.table.set(index, value);
    }

    /// Grains that have a place; `None` where the tables are too large to be counted.
    pub(super) fn allocated(&self) -> Option<u64> {
        let Entries::Whole(all) = &self.table.entries else { return None };
        let named = (0..self.layout.grains())
            .zip(all.iter())
            .filter(|(_, e)| matches!(self.layout.entry(e.load(Ordering::Relaxed)), Entry::At(_)));
        u64::try_from(named.count()).ok()
    }
}

/// All entries of the tables; those of tables that do not exist are 0.
///
/// # Errors
/// Those of reading.
pub(super) fn whole(source: &dyn ByteSource, layout: &Layout) -> Result<Vec<u32>> {
    tables_of(source, layout, &layout.directory)
}

/// The same by one of the directories.
///
/// # Errors
/// Those of reading.
pub(super) fn tables_of(source: &dyn ByteSource, layout: &Layout, directory: &[u32]) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    let n = usize::try_from(layout.entries()).ok().filter(|n| all.try_reserve_exact(*n).is_ok());
    if n.is_none() {
        return Err(Error::new(ErrorKind::Limit, format!("no memory for {} entries", layout.entries())));
    }
    let entries = u64::from(layout.header.entries);
    for sector in directory {
        if *sector == 0 {
            all.extend((0..entries).map(|_| 0));
        } else {
            let at = HostOffset(u64::from(*sector) * SECTOR_BYTES);
            read_words(source, at, entries, |w| all.push(w))?;
        }
    }
    Ok(all)
}

/// The error for a grain that cannot be where its entry says.
pub(super) fn misplaced(grain: u64, at: HostOffset, file_bytes: u64) -> Error {
    let what = if at.0 >= file_bytes {
        format!("grain {grain} lies at byte {}, behind the file's end at {file_bytes}", at.0)
    } else {
        format!("grain {grain} lies at byte {}, upon metadata or across the file's end at {file_bytes}", at.0)
    };
    Error::new(ErrorKind::Corrupt, what).hint("vdimg check tells everything that is wrong")
}

/// The header and the directories of a sparse extent.
///
/// # Errors
/// As [`super::super::open`].
pub(super) fn layout_of(source: &dyn ByteSource) -> Result<Layout> {
    let header = SparseHeader::read(source)?;
    if header.is_compressed() && header.grain_bytes > u64::from(MAX_UNIT_BYTES) {
        let what = format!("compressed grains of {} bytes are not supported", header.grain_bytes);
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    Layout::read(source, header)
}
