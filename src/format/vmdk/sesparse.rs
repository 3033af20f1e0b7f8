//! Extents of ESX's newest sparse kind, seSparse, which are only read. What is known of them comes from those who read them (QEMU
//! above all): little endian, sizes and places in sectors, grains of 4 KiB, tables of 4096 entries of 8 bytes.

use super::layout::Entry;
use super::sparse::{MAIN, key_of};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::{MAX_DISK_BYTES, META_PAGE_BYTES, SECTOR_BYTES, TABLE_PIECE_BYTES};
use crate::map::{ByteSource, FileId, GuestOffset, GuestRange, HostOffset, Miss, PageCache, PagePlace};
use std::collections::HashSet;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// The first word of such a file. Only its lower half can be told from other formats, the upper is zero.
const MAGIC: u64 = 0xcafe_babe;
/// The first word of the header that changes.
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
/// Version 2.1.
const VERSION: u64 = 0x2_0000_0001;
const GRAIN_SECTORS: u64 = 8;
pub(super) const GRAIN_BYTES: u64 = GRAIN_SECTORS * SECTOR_BYTES;
const TABLE_SECTORS: u64 = 64;
const ENTRY_BYTES: u64 = 8;
const TABLE_ENTRIES: u64 = TABLE_SECTORS * SECTOR_BYTES / ENTRY_BYTES;
const PAGE_ENTRIES: u64 = META_PAGE_BYTES / ENTRY_BYTES;
/// Most tables: those of 64 TiB, more than ESX makes.
const MAX_TABLES: u64 = 4 << 20;
/// Tables of one extent that a check looks at: those of 2 TiB.
const MAX_CHECKED_TABLES: u64 = 128 << 10;
/// The number of no table.
const NO_TABLE: u32 = u32::MAX;

/// Where something is and how long, in sectors.
#[derive(Clone, Copy, Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Area {
    at: U64,
    len: U64,
}

/// The header that never changes: 512 bytes.
#[derive(Clone, Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawConst {
    magic: U64,
    version: U64,
    capacity: U64,
    grain: U64,
    table: U64,
    flags: U64,
    reserved: [U64; 4],
    volatile: Area,
    journal_header: Area,
    journal: Area,
    directory: Area,
    tables: Area,
    free_bitmap: Area,
    backmap: Area,
    grains: Area,
    rest: [u8; 304],
}

/// The header that changes: 512 bytes.
#[derive(Clone, Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawVolatile {
    magic: U64,
    free_table: U64,
    next_transaction: U64,
    replay_journal: U64,
    rest: [u8; 480],
}

/// A seSparse extent that is open.
#[derive(Debug)]
pub(super) struct SeSparse {
    file: FileId,
    extent: u16,
    range: GuestRange,
    /// Where tables begin, all of one length; entries of the directory count them.
    tables_at: HostOffset,
    grains_at: HostOffset,
    file_bytes: u64,
    directory: Box<[u32]>,
    cache: PageCache,
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn unsupported<T>(what: String) -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, what))
}

/// A place that is given in sectors, inside a file of so many bytes with `len` bytes behind it.
fn place(sectors: U64, len: u64, file_bytes: u64, what: &str) -> Result<HostOffset> {
    let at = sectors.get().checked_mul(SECTOR_BYTES);
    let inside = at.filter(|at| at.checked_add(len).is_some_and(|end| end <= file_bytes));
    inside.map(HostOffset).ok_or_else(|| corrupt(format!("the {what} lies behind the end of the file")))
}

impl RawConst {
    fn read(source: &dyn ByteSource) -> Result<Self> {
        let mut bytes = [0; SECTOR_BYTES as usize];
        if source.len() < SECTOR_BYTES {
            return Err(corrupt(format!("the file has {} bytes, less than its header", source.len())));
        }
        source.read_at(HostOffset(0), &mut bytes)?;
        let raw = RawConst::read_from_bytes(&bytes).expect("a header's bytes");
        if raw.magic.get() != MAGIC {
            return Err(Error::new(
                ErrorKind::NotThisFormat,
                "the signature of a seSparse extent is missing",
            ));
        }
        raw.check()?;
        Ok(raw)
    }

    /// Nothing is known about others.
    fn check(&self) -> Result<()> {
        if self.version.get() != VERSION {
            return unsupported(format!("version {:#x} of seSparse is not known", self.version));
        }
        if (self.grain.get(), self.table.get()) != (GRAIN_SECTORS, TABLE_SECTORS) {
            let what = format!("seSparse grains of {} and tables of {} sectors", self.grain, self.table);
            return unsupported(what);
        }
        let rest = self.rest.iter().any(|b| *b != 0) || self.reserved.iter().any(|w| w.get() != 0);
        if self.flags.get() != 0 || rest {
            return unsupported(format!("unknown fields of seSparse are set (flags {:#x})", self.flags));
        }
        if self.capacity.get() == 0 || self.capacity.get() > MAX_DISK_BYTES / SECTOR_BYTES {
            return Err(corrupt(format!("an extent of {} sectors", self.capacity)));
        }
        Ok(())
    }

    fn check_volatile(&self, source: &dyn ByteSource) -> Result<()> {
        let mut bytes = [0; SECTOR_BYTES as usize];
        let at = place(self.volatile.at, SECTOR_BYTES, source.len(), "second header")?;
        source.read_at(at, &mut bytes)?;
        let raw = RawVolatile::read_from_bytes(&bytes).expect("a header's bytes");
        if raw.magic.get() != VOLATILE_MAGIC {
            return Err(corrupt("the signature of its second header is missing"));
        }
        if raw.replay_journal.get() != 0 {
            return Err(Error::new(ErrorKind::Unsupported, "its journal was not replayed")
                .hint("open it with ESX once"));
        }
        if raw.rest.iter().any(|b| *b != 0) {
            return unsupported("unknown fields of its second header are set".to_string());
        }
        Ok(())
    }
}

impl SeSparse {
    /// Opens an extent that holds `range` of the disk, with so many bytes of pages.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub(super) fn open(
        source: &dyn ByteSource,
        file: FileId,
        extent: u16,
        range: GuestRange,
        cache: u64,
    ) -> Result<Self> {
        let raw = RawConst::read(source)?;
        raw.check_volatile(source)?;
        if raw.capacity.get() * SECTOR_BYTES < range.len() {
            let what =
                format!("an extent of {} sectors, where the descriptor lists more", raw.capacity.get());
            return Err(corrupt(what));
        }
        let tables = raw.capacity.get().div_ceil(GRAIN_SECTORS * TABLE_ENTRIES);
        if tables > MAX_TABLES || raw.directory.len.get() < (tables * ENTRY_BYTES).div_ceil(SECTOR_BYTES) {
            let what = format!("a directory of {} sectors for {tables} tables", raw.directory.len);
            return Err(corrupt(what));
        }
        let file_bytes = source.len();
        let at = place(raw.directory.at, tables * ENTRY_BYTES, file_bytes, "directory")?;
        let tables_at = place(raw.tables.at, 0, file_bytes, "first table")?;
        let grains_at = place(raw.grains.at, 0, file_bytes, "first grain")?;
        let most = (raw.tables.len.get() / TABLE_SECTORS)
            .min((file_bytes - tables_at.0) / (TABLE_SECTORS * SECTOR_BYTES));
        let directory = directory(source, at, tables, most)?;
        let pages = tables * (TABLE_ENTRIES / PAGE_ENTRIES);
        let cache = PageCache::new(META_PAGE_BYTES, pages, cache);
        Ok(SeSparse { file, extent, range, tables_at, grains_at, file_bytes, directory, cache })
    }

    pub(super) fn grain_at(&self, at: GuestOffset) -> u64 {
        at.since(self.range.start()) / GRAIN_BYTES
    }

    /// The part of the disk a grain holds.
    pub(super) fn unit_of(&self, grain: u64) -> GuestRange {
        self.range.skip(grain * GRAIN_BYTES).take(GRAIN_BYTES)
    }

    fn table_of(&self, grain: u64) -> Option<u32> {
        let table = usize::try_from(grain / TABLE_ENTRIES).ok()?;
        self.directory.get(table).copied().filter(|t| *t != NO_TABLE)
    }

    /// What the table says of a grain.
    ///
    /// # Errors
    /// [`Miss::NeedsPage`]; [`Failure::Corrupt`] for what cannot be.
    pub(super) fn entry(&self, grain: u64) -> std::result::Result<Entry, Miss> {
        if self.table_of(grain).is_none() {
            return Ok(Entry::Free);
        }
        let (page, at) = (grain / PAGE_ENTRIES, usize::try_from(grain % PAGE_ENTRIES).expect("few"));
        let Some(bytes) = self.cache.bytes8(page, at) else {
            return Err(Miss::NeedsPage(key_of(self.extent, MAIN, page)));
        };
        self.meaning(u64::from_le_bytes(bytes)).ok_or(Miss::Fail(Failure::Corrupt))
    }

    /// What an entry says; `None`: nothing that can be.
    fn meaning(&self, entry: u64) -> Option<Entry> {
        match entry >> 60 {
            0 => (entry == 0).then_some(Entry::Free),
            // given back by the guest, which then reads zeros, or written as zeros
            1 | 2 => Some(Entry::Zero),
            3 => {
                // the number's lower twelve bits stand above its upper 48
                let number = (entry & 0xffff_ffff_ffff) << 12 | entry >> 48 & 0xfff;
                let at = self.grains_at.0.checked_add(number.checked_mul(GRAIN_BYTES)?)?;
                let end = at.checked_add(GRAIN_BYTES)?;
                (end <= self.file_bytes).then_some(Entry::At(HostOffset(at)))
            }
            _ => None,
        }
    }

    pub(super) fn file(&self) -> FileId {
        self.file
    }

    pub(super) fn contains(&self, page: u64) -> bool {
        self.cache.contains(page)
    }

    /// Where a page of the tables lies.
    ///
    /// # Errors
    /// [`Failure::Corrupt`] if its table does not exist.
    pub(super) fn page_place(&self, page: u64) -> std::result::Result<PagePlace, Failure> {
        let table = self.table_of(page * PAGE_ENTRIES).ok_or(Failure::Corrupt)?;
        let into = page % (TABLE_ENTRIES / PAGE_ENTRIES) * META_PAGE_BYTES;
        let off = self.tables_at.plus(u64::from(table) * TABLE_SECTORS * SECTOR_BYTES + into);
        Ok(PagePlace { file: self.file, off, len: self.cache.page_bytes() })
    }

    /// Takes a page in that was read.
    ///
    /// # Errors
    /// [`Failure::Corrupt`] for one of another length.
    pub(super) fn insert(&self, page: u64, bytes: &[u8]) -> std::result::Result<(), Failure> {
        if bytes.len() != self.cache.page_bytes() {
            return Err(Failure::Corrupt);
        }
        self.cache.insert(page, bytes);
        Ok(())
    }

    /// Looks at every entry; what is wrong is told to `wrong`. Returns the grains, and those that have a place.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::Limit`] for more tables than are looked at.
    pub(super) fn check(&self, source: &dyn ByteSource, wrong: &mut dyn FnMut(String)) -> Result<(u64, u64)> {
        let there = self.directory.iter().filter(|t| **t != NO_TABLE).count() as u64;
        if there > MAX_CHECKED_TABLES {
            return Err(Error::new(ErrorKind::Limit, format!("{there} grain tables")));
        }
        let grains = self.range.len().div_ceil(GRAIN_BYTES);
        let mut seen = HashSet::new();
        let mut table = vec![0; usize::try_from(TABLE_SECTORS * SECTOR_BYTES).expect("a small constant")];
        for (first, number) in (0..).step_by(TABLE_ENTRIES as usize).zip(&self.directory) {
            if *number == NO_TABLE {
                continue;
            }
            let at = self.tables_at.plus(u64::from(*number) * TABLE_SECTORS * SECTOR_BYTES);
            source.read_at(at, &mut table)?;
            for (grain, entry) in (first..grains).zip(table.as_chunks::<8>().0) {
                let entry = u64::from_le_bytes(*entry);
                match self.meaning(entry) {
                    None => wrong(format!("the entry of grain {grain} is {entry:#x}")),
                    Some(Entry::At(at)) if !seen.insert(at) => {
                        wrong(format!("two grains lie at byte {}", at.0));
                    }
                    Some(_) => {}
                }
            }
        }
        Ok((grains, seen.len() as u64))
    }
}

/// The numbers of the tables, of which there are at most `most`.
fn directory(source: &dyn ByteSource, at: HostOffset, tables: u64, most: u64) -> Result<Box<[u32]>> {
    let (mut all, mut seen) = (Vec::new(), HashSet::new());
    let count = usize::try_from(tables).expect("at most MAX_TABLES");
    if all.try_reserve_exact(count).is_err() {
        return Err(Error::new(ErrorKind::Limit, format!("no memory for {tables} directory entries")));
    }
    let mut piece = vec![0; TABLE_PIECE_BYTES.min(count * ENTRY_BYTES as usize)];
    let mut from = at;
    while all.len() < count {
        let len = piece.len().min((count - all.len()) * ENTRY_BYTES as usize);
        source.read_at(from, &mut piece[..len])?;
        from = from.plus(len as u64);
        for entry in piece[..len].as_chunks::<8>().0 {
            let entry = u64::from_le_bytes(*entry);
            // a nibble of 1 says that there is one
            let number = match (entry, entry >> 32) {
                (0, _) => NO_TABLE,
                (_, 0x1000_0000) => u32::try_from(entry & 0xffff_ffff).expect("32 bits"),
                _ => return Err(corrupt(format!("entry {} of the directory is {entry:#x}", all.len()))),
            };
            if number != NO_TABLE && (u64::from(number) >= most || !seen.insert(number)) {
                let what = format!("entry {} of the directory names table {number} of {most}", all.len());
                return Err(corrupt(what));
            }
            all.push(number);
        }
    }
    Ok(all.into_boxed_slice())
}
