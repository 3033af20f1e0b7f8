//! Arithmetic of a checked sparse extent, and its directories.

use super::header::SparseHeader;
use super::table::{ENTRY_BYTES, page_entries};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{SECTOR_BYTES, TABLE_PIECE_BYTES};
use crate::map::{ByteSource, HostOffset};

/// Bytes before a compressed grain: its number of the first sector, and how many bytes follow.
pub(super) const MARKER_BYTES: u64 = 12;

/// What an entry of a grain table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing.
    Free,
    /// Zeros.
    Zero,
    /// The grain begins there.
    At(HostOffset),
}

/// Tables that the first change makes where the file has none: all of them at once, as other programs do with a new image.
#[derive(Debug)]
pub(super) struct NewTables {
    /// Where they begin: at a whole grain, behind everything.
    pub(super) at: HostOffset,
    /// At a whole grain too.
    pub(super) end: HostOffset,
    /// The directory with the new tables in it.
    pub(super) directory: Box<[u32]>,
    pub(super) redundant: Option<Box<[u32]>>,
    /// The numbers of the tables in their order: those of the directory, then those of the redundant one.
    pub(super) tables: Vec<u64>,
}

/// Where everything of a sparse extent is: its header and its directories, which are kept whole.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) header: SparseHeader,
    /// Sectors at which tables begin; 0: there is none.
    pub(super) directory: Box<[u32]>,
    pub(super) redundant: Option<Box<[u32]>>,
    /// What is wrong with the second directory: then it counts as not there, and nothing is written.
    pub(super) broken_copy: Option<String>,
    /// Sector ranges of header, descriptor, directories and tables, in order, neighbours joined.
    pub(super) metadata: Vec<(u64, u64)>,
    /// The first place for grains: behind all that the header says is metadata, at a whole grain.
    pub(super) data_at: HostOffset,
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

/// Reads 32-bit words in bounded pieces.
///
/// # Errors
/// Those of reading; [`ErrorKind::Limit`] without the memory.
fn words(source: &dyn ByteSource, at: HostOffset, count: u64) -> Result<Box<[u32]>> {
    let no_memory = || Error::new(ErrorKind::Limit, format!("no memory for {count} directory entries"));
    let n = usize::try_from(count).map_err(|_| no_memory())?;
    let mut all = Vec::new();
    all.try_reserve_exact(n).map_err(|_| no_memory())?;
    read_words(source, at, count, |w| all.push(w))?;
    Ok(all.into_boxed_slice())
}

/// Hands 32-bit words to `each`, in order.
///
/// # Errors
/// Those of reading.
pub(super) fn read_words(
    source: &dyn ByteSource,
    at: HostOffset,
    count: u64,
    mut each: impl FnMut(u32),
) -> Result<()> {
    let mut left = usize::try_from(count * ENTRY_BYTES).map_err(|_| corrupt("a table that large"))?;
    let mut piece = vec![0u8; left.min(TABLE_PIECE_BYTES)];
    let mut at = at;
    while left > 0 {
        let len = left.min(piece.len());
        source.read_at(at, &mut piece[..len])?;
        piece[..len].as_chunks::<4>().0.iter().for_each(|raw| each(u32::from_le_bytes(*raw)));
        left -= len;
        at = at.plus(len as u64);
    }
    Ok(())
}

impl Layout {
    /// Reads the directories behind a checked header.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::Corrupt`] if pieces of metadata lie upon each other or behind the file's end.
    pub(super) fn read(source: &dyn ByteSource, header: SparseHeader) -> Result<Self> {
        let directory = words(source, header.directory_at, header.tables())?;
        let redundant = header.redundant_at.map(|at| words(source, at, header.tables())).transpose()?;
        let mut layout = Layout {
            header,
            directory,
            redundant,
            broken_copy: None,
            metadata: Vec::new(),
            data_at: HostOffset(0),
        };
        let own = layout.pieces(&layout.directory, "", source.len())?;
        layout.metadata = joined(own.clone())?;
        if let Some(copy) = &layout.redundant {
            let whole =
                layout.pieces(copy, "the copy of ", source.len()).and_then(|p| joined([own, p].concat()));
            match whole {
                Ok(metadata) => layout.metadata = metadata,
                Err(e) => (layout.redundant, layout.broken_copy) = (None, Some(e.to_string())),
            }
        }
        let first = layout.metadata.first().map_or(0, |(_, end)| *end * SECTOR_BYTES);
        let overhead = layout.header.overhead.0.min(source.len());
        layout.data_at = HostOffset(overhead.max(first).next_multiple_of(layout.header.grain_bytes));
        Ok(layout)
    }

    /// Where the pieces of metadata are that belong to one of the directories; the header and what it names belong to
    /// the first.
    fn pieces(&self, directory: &[u32], copy: &str, file_bytes: u64) -> Result<Vec<(u64, u64)>> {
        let h = &self.header;
        let sectors = |bytes: u64| bytes.div_ceil(SECTOR_BYTES);
        let mut pieces = Vec::new();
        if copy.is_empty() {
            let len = sectors(h.tables() * ENTRY_BYTES);
            pieces.extend([(0, 1), (sectors(h.directory_at.0), len)]);
            pieces.extend(h.descriptor.map(|(at, len)| (sectors(at.0), sectors(len))));
            pieces.extend(h.redundant_at.map(|at| (sectors(at.0), len)));
        }
        let table = sectors(self.table_bytes());
        for (i, s) in directory.iter().enumerate().filter(|(_, s)| **s != 0) {
            if (u64::from(*s) + table) * SECTOR_BYTES > file_bytes {
                let what =
                    format!("{copy}table {i} at sector {s} lies behind the file's end at {file_bytes}");
                return Err(corrupt(what));
            }
            pieces.push((u64::from(*s), table));
        }
        Ok(pieces)
    }

    /// Bytes of one table.
    pub(super) fn table_bytes(&self) -> u64 {
        u64::from(self.header.entries) * ENTRY_BYTES
    }

    /// Bytes of all tables.
    pub(super) fn tables_bytes(&self) -> u64 {
        self.header.tables() * self.table_bytes()
    }

    /// Entries of all tables, those behind the end of the extent included.
    pub(super) fn entries(&self) -> u64 {
        self.header.tables() * u64::from(self.header.entries)
    }

    /// Grains of the extent.
    pub(super) fn grains(&self) -> u64 {
        self.header.disk_bytes.div_ceil(self.header.grain_bytes)
    }

    /// Pages of all tables.
    pub(super) fn pages(&self) -> u64 {
        self.entries() / u64::from(page_entries(self.header.entries))
    }

    /// Where the entry is in the file, in one of the directories' tables; `None` if that table does not exist.
    pub(super) fn entry_at(&self, directory: &[u32], index: u64) -> Option<HostOffset> {
        let n = u64::from(self.header.entries);
        let table = usize::try_from(index / n).ok()?;
        let sector = u64::from(*directory.get(table)?);
        (sector != 0).then(|| HostOffset(sector * SECTOR_BYTES + index % n * ENTRY_BYTES))
    }

    /// A table that does not exist yet.
    pub(super) fn lacks_tables(&self) -> bool {
        self.directory.contains(&0) || self.redundant.as_ref().is_some_and(|r| r.contains(&0))
    }

    /// Places for the tables that do not exist, from `at` on; `None` if entries could not name what lies behind.
    pub(super) fn new_tables(&self, at: HostOffset) -> Option<NewTables> {
        let sectors = self.table_bytes().div_ceil(SECTOR_BYTES);
        let mut next = at.0 / SECTOR_BYTES;
        let mut tables = Vec::new();
        let mut filled = |directory: &[u32]| -> Option<Box<[u32]>> {
            let mut all: Box<[u32]> = directory.into();
            for (number, entry) in (0..).zip(all.iter_mut()).filter(|(_, e)| **e == 0) {
                *entry = u32::try_from(next).ok()?;
                next += sectors;
                tables.push(number);
            }
            Some(all)
        };
        let directory = filled(&self.directory)?;
        let redundant = match &self.redundant {
            Some(r) => Some(filled(r)?),
            None => None,
        };
        let end = HostOffset((next * SECTOR_BYTES).next_multiple_of(self.header.grain_bytes));
        (end.0 / SECTOR_BYTES <= 1 << 32).then_some(NewTables { at, end, directory, redundant, tables })
    }

    /// Bytes of the extent that a grain holds.
    pub(super) fn bytes_of(&self, grain: u64) -> u64 {
        let start = grain * self.header.grain_bytes;
        self.header.disk_bytes.saturating_sub(start).min(self.header.grain_bytes)
    }

    /// What an entry says.
    pub(super) fn entry(&self, value: u32) -> Entry {
        match value {
            0 => Entry::Free,
            1 if self.header.has_zeroed() => Entry::Zero,
            sector => Entry::At(HostOffset(u64::from(sector) * SECTOR_BYTES)),
        }
    }

    /// Bytes of the file that a grain has at least.
    fn least_bytes_of(&self, grain: u64) -> u64 {
        if self.header.is_compressed() { MARKER_BYTES + 1 } else { self.bytes_of(grain) }
    }

    /// Sectors between the beginnings of two grains at least.
    pub(super) fn least_distance(&self) -> u64 {
        if self.header.is_compressed() { 1 } else { self.header.grain_bytes / SECTOR_BYTES }
    }

    /// A grain at that place is inside the file and in no metadata.
    pub(super) fn can_hold(&self, at: HostOffset, grain: u64, file_bytes: u64) -> bool {
        let len = self.least_bytes_of(grain);
        let (from, to) = (at.0 / SECTOR_BYTES, (at.0 + len).div_ceil(SECTOR_BYTES));
        let next = self.metadata.partition_point(|(_, end)| *end <= from);
        at.0 + len <= file_bytes && self.metadata.get(next).is_none_or(|(start, _)| *start >= to)
    }
}

/// Sector ranges from pieces of metadata, in order, neighbours joined.
fn joined(mut pieces: Vec<(u64, u64)>) -> Result<Vec<(u64, u64)>> {
    pieces.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (from, len) in pieces {
        match joined.last_mut() {
            Some((_, end)) if from < *end => {
                return Err(corrupt(format!("two pieces of metadata lie upon each other at sector {from}")));
            }
            Some((_, end)) if from == *end => *end = from + len,
            _ => joined.push((from, from + len)),
        }
    }
    match joined.last() {
        Some((_, end)) if *end > 1 << 32 => {
            Err(corrupt(format!("metadata up to sector {end}, behind all grains")))
        }
        _ => Ok(joined),
    }
}
