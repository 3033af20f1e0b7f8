//! The table of blocks: payload blocks, and after every so many of them the block with the bitmap of their sectors.

use super::corrupt;
use super::metadata::Metadata;
use super::place::{BLOCK_UNIT, MIB, Region};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_TABLE_BYTES, META_PAGE_BYTES, TABLE_PIECE_BYTES};
use crate::map::{ByteSource, GuestOffset, GuestRange, HostOffset};

/// Sectors that one bitmap block speaks of.
pub(super) const CHUNK_SECTORS: u64 = BLOCK_UNIT * 8;

/// Entries of a page.
const PAGE_ENTRIES: u64 = META_PAGE_BYTES / 8;

/// The place in an entry: whole units of the file.
const fn place_in(raw: u64) -> u64 {
    raw & !(BLOCK_UNIT - 1)
}

/// What an entry says of a payload block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing: the parent shows.
    Free,
    /// Zeros, or what nobody needs any more.
    Zero,
    At(u64),
    /// The sectors whose bits are set; the others are the parent's.
    Partly(u64),
}

/// Arithmetic of checked metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) disk_bytes: u64,
    pub(super) block_bytes: u64,
    pub(super) block_shift: u32,
    pub(super) sector_bytes: u64,
    /// Payload blocks of a chunk, as a shift.
    chunk_shift: u32,
    pub(super) blocks: u64,
    /// Entries of the table that mean something.
    pub(super) entries: u64,
    pub(super) is_diff: bool,
    table: Region,
}

impl Layout {
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the table is too short, [`ErrorKind::Limit`] if it is too long.
    pub(super) fn new(m: &Metadata, table: Region) -> Result<Self> {
        let ratio = Self::ratio(m);
        let blocks = m.disk_bytes.div_ceil(m.block_bytes);
        let entries = Self::table_bytes(m) / 8;
        if entries * 8 > table.len {
            let what = format!("the block table has {} bytes; the disk needs {}", table.len, entries * 8);
            return Err(corrupt(what));
        }
        if entries * 8 > MAX_TABLE_BYTES {
            let what = format!("the block table has {} bytes; {MAX_TABLE_BYTES} are the limit", entries * 8);
            return Err(Error::new(ErrorKind::Limit, what));
        }
        Ok(Layout {
            disk_bytes: m.disk_bytes,
            block_bytes: m.block_bytes,
            block_shift: m.block_bytes.trailing_zeros(),
            sector_bytes: m.sector_bytes,
            chunk_shift: ratio.trailing_zeros(),
            blocks,
            entries,
            is_diff: m.is_diff,
            table,
        })
    }

    /// Payload blocks of a chunk.
    fn ratio(m: &Metadata) -> u64 {
        (CHUNK_SECTORS * m.sector_bytes / m.block_bytes).max(1)
    }

    /// Bytes of the table's entries that mean something.
    pub(super) fn table_bytes(m: &Metadata) -> u64 {
        let (ratio, blocks) = (Self::ratio(m), m.disk_bytes.div_ceil(m.block_bytes));
        let entries =
            if m.is_diff { blocks.div_ceil(ratio) * (ratio + 1) } else { blocks + (blocks - 1) / ratio };
        entries * 8
    }

    pub(super) fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.disk_bytes))
    }

    /// Where a payload block's entry is in the table.
    pub(super) fn index_of(&self, block: u64) -> u64 {
        block + (block >> self.chunk_shift)
    }

    /// The page of the table that an entry is in.
    pub(super) fn page_of(index: u64) -> u64 {
        index / PAGE_ENTRIES
    }

    /// The entries of a page, whether they mean something or not.
    pub(super) fn entries_of(page: u64) -> std::ops::Range<u64> {
        page * PAGE_ENTRIES..(page + 1) * PAGE_ENTRIES
    }

    /// Where a page of the table is.
    pub(super) fn page_at(&self, page: u64) -> HostOffset {
        HostOffset(self.table.at).plus(page * PAGE_ENTRIES * 8)
    }

    /// The block around an offset; `None` behind the disk.
    pub(super) fn block_of_offset(&self, at: GuestOffset) -> Option<u64> {
        (at.0 < self.disk_bytes).then_some(at.0 >> self.block_shift)
    }

    /// The guest range of a block, clipped to the disk.
    pub(super) fn unit(&self, block: u64) -> GuestRange {
        let start = block.saturating_mul(self.block_bytes).min(self.disk_bytes);
        let end = start.saturating_add(self.block_bytes).min(self.disk_bytes);
        GuestRange::between(GuestOffset(start), GuestOffset(end))
    }

    /// The chunk a block is in.
    pub(super) fn chunk_of(&self, block: u64) -> u64 {
        block >> self.chunk_shift
    }

    /// Entries of a chunk: its blocks, and their bitmap.
    fn chunk_entries(&self) -> u64 {
        (1 << self.chunk_shift) + 1
    }

    /// Where the entry of a chunk's bitmap is in the table.
    pub(super) fn bitmap_index(&self, chunk: u64) -> u64 {
        (chunk << self.chunk_shift) + (1 << self.chunk_shift) + chunk
    }

    /// The bit of a guest offset in its chunk's bitmap.
    pub(super) fn bit_of(&self, at: GuestOffset) -> u64 {
        at.0 / self.sector_bytes % CHUNK_SECTORS
    }

    /// The payload block of an entry; `None` for a bitmap's.
    pub(super) fn block_of(&self, index: u64) -> Option<u64> {
        let (chunk, into) = (index / self.chunk_entries(), index % self.chunk_entries());
        let block = (chunk << self.chunk_shift) + into;
        (into + 1 < self.chunk_entries() && block < self.blocks).then_some(block)
    }

    /// The whole table, in whole pages.
    ///
    /// # Errors
    /// Those of reading, and [`ErrorKind::Limit`] without the memory.
    pub(super) fn load(&self, source: &dyn ByteSource) -> Result<Vec<u64>> {
        let mut entries = Vec::new();
        let count = self.entries.next_multiple_of(PAGE_ENTRIES);
        let count = usize::try_from(count).expect("MAX_TABLE_BYTES");
        let no_memory = |_| Error::new(ErrorKind::Limit, format!("no memory for {count} table entries"));
        entries.try_reserve_exact(count).map_err(no_memory)?;
        let mut piece = vec![0u8; TABLE_PIECE_BYTES.min(count * 8)];
        while entries.len() < count {
            let len = piece.len().min((count - entries.len()) * 8);
            let at = HostOffset(self.table.at + entries.len() as u64 * 8);
            source.read_at(at, &mut piece[..len])?;
            entries.extend(piece[..len].as_chunks::<8>().0.iter().map(|raw| u64::from_le_bytes(*raw)));
        }
        Ok(entries)
    }

    /// What a payload block's entry says; `None` where it says nothing known.
    pub(super) fn entry(&self, raw: u64) -> Option<Entry> {
        let at = place_in(raw);
        match raw & 7 {
            0 => Some(Entry::Free),
            1..=3 => Some(Entry::Zero),
            6 => Some(Entry::At(at)),
            7 if self.is_diff => Some(Entry::Partly(at)),
            _ => None,
        }
    }

    /// The entry of a payload block that says so.
    pub(super) fn raw_of(entry: Entry) -> u64 {
        match entry {
            Entry::Free => 0,
            Entry::Zero => 2,
            Entry::At(at) => at | 6,
            Entry::Partly(at) => at | 7,
        }
    }

    /// Where the bitmap of a chunk is, if it has one.
    pub(super) fn bitmap(&self, raw: u64) -> Option<u64> {
        (self.is_diff && raw & 7 == 6).then_some(place_in(raw))
    }

    /// Some block of the chunk is there in parts, so it needs its bitmap.
    fn needs_bitmap(&self, chunk: u64, table: &[u64]) -> bool {
        let first = self.bitmap_index(chunk) - (1 << self.chunk_shift);
        let entries = (first..self.bitmap_index(chunk)).map_while(|i| table.get(usize::try_from(i).ok()?));
        entries.into_iter().any(|raw| matches!(self.entry(*raw), Some(Entry::Partly(_))))
    }

    /// What an entry of the table names; `None` for nothing, an error for what it cannot say.
    fn place(&self, index: u64, raw: u64, table: &[u64]) -> std::result::Result<Option<Place>, Fault> {
        let Some(block) = self.block_of(index) else {
            return Ok(self.bitmap(raw).map(|at| {
                let is_needed = self.needs_bitmap(index / self.chunk_entries(), table);
                Place { index, at, len: BLOCK_UNIT, needed: BLOCK_UNIT, what: Named::Bitmap { is_needed } }
            }));
        };
        let at = match self.entry(raw) {
            None => return Err(Fault::State { block, state: raw & 7 }),
            Some(Entry::Free | Entry::Zero) => return Ok(None),
            Some(Entry::At(at) | Entry::Partly(at)) => at,
        };
        let bitmap = usize::try_from(self.bitmap_index(self.chunk_of(block))).ok().and_then(|i| table.get(i));
        if raw & 7 == 7 && bitmap.and_then(|b| self.bitmap(*b)).is_none() {
            return Err(Fault::NoBitmap { block });
        }
        let left = self.disk_bytes - (block << self.block_shift);
        let (len, needed) = (self.block_bytes, self.block_bytes.min(left));
        Ok(Some(Place { index, at, len, needed, what: Named::Block(block) }))
    }

    /// The places that the table names, in its order; of entries that cannot be there is none.
    pub(super) fn places(&self, table: &[u64]) -> impl Iterator<Item = Place> {
        (0..self.entries).zip(table).filter_map(|(index, raw)| self.place(index, *raw, table).ok().flatten())
    }

    /// True if [`Self::survey`] has nothing to tell. It looks at a bit for each unit of the file instead of making a list of all places.
    pub(super) fn is_sound(&self, table: &[u64], taken: &[Region], file_bytes: u64) -> bool {
        let units = file_bytes.div_ceil(BLOCK_UNIT);
        if units / 64 > self.entries {
            return false; // a list is shorter
        }
        let mut used = vec![0u64; usize::try_from(units / 64 + 1).expect("no more than a table")];
        let mut take = |unit: u64| {
            let (word, bit) = (usize::try_from(unit / 64).unwrap_or(usize::MAX), 1 << (unit % 64));
            used.get_mut(word).is_some_and(|w| std::mem::replace(w, *w | bit) & bit == 0)
        };
        (0..self.entries).zip(table).all(|(index, raw)| match self.place(index, *raw, table) {
            Err(_) => false,
            Ok(None) => true,
            Ok(Some(p)) => {
                let lies_well = p.at >= MIB
                    && p.at.is_multiple_of(BLOCK_UNIT)
                    && p.at.saturating_add(p.needed) <= file_bytes
                    && !taken.iter().any(|r| r.overlaps(p.at, p.len));
                // the last block may end behind the file
                let last = p.end().min(file_bytes).div_ceil(BLOCK_UNIT);
                lies_well && (p.at / BLOCK_UNIT..last).all(&mut take)
            }
        })
    }

    /// Tells each fault, of places in the order of the file. Of those that overlap the first is right.
    pub(super) fn survey(
        &self,
        table: &[u64],
        taken: &[Region],
        file_bytes: u64,
        mut fault: impl FnMut(Fault),
    ) {
        let mut places = Vec::new();
        for (index, raw) in (0..self.entries).zip(table) {
            match self.place(index, *raw, table) {
                Ok(place) => places.extend(place),
                Err(what) => fault(what),
            }
        }
        places.sort_unstable_by_key(|p| (p.at, p.index));
        let mut before: Option<Place> = None;
        for p in &places {
            if p.at < MIB || taken.iter().any(|r| r.overlaps(p.at, p.len)) {
                fault(Fault::Inside(*p));
                continue;
            }
            if p.at.saturating_add(p.needed) > file_bytes {
                fault(Fault::Missing(*p));
            }
            if p.at >= file_bytes {
                continue;
            }
            if let Some(first) = before.filter(|b| b.end() > p.at) {
                fault(Fault::Shared(*p, first));
            } else {
                before = Some(*p);
            }
        }
    }
}

/// What lies at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Named {
    Block(u64),
    Bitmap {
        /// Some of its blocks are there in parts.
        is_needed: bool,
    },
}

/// A range of the file that the table names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Of the entry.
    pub(super) index: u64,
    pub(super) at: u64,
    pub(super) len: u64,
    /// Bytes of it that have to be in the file.
    pub(super) needed: u64,
    pub(super) what: Named,
}

impl Place {
    pub(super) fn end(&self) -> u64 {
        self.at.saturating_add(self.len)
    }

    pub(super) fn is_block(&self) -> bool {
        matches!(self.what, Named::Block(_))
    }

    pub(super) fn name(&self) -> String {
        match self.what {
            Named::Block(block) => format!("block {block}"),
            Named::Bitmap { .. } => "a bitmap".into(),
        }
    }
}

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    State {
        block: u64,
        state: u64,
    },
    NoBitmap {
        block: u64,
    },
    /// Where something else is for certain.
    Inside(Place),
    /// Not all of it is in the file.
    Missing(Place),
    /// The second lies there already.
    Shared(Place, Place),
}

impl Fault {
    pub(super) fn describe(&self, file_bytes: u64) -> String {
        match self {
            Fault::State { block, state } => {
                format!("block {block} is in state {state}, in which a block of this image cannot be")
            }
            Fault::NoBitmap { block } => {
                format!("block {block} is there in parts, but nothing says in which")
            }
            Fault::Inside(p) => {
                format!("{} is said to lie at byte {}, where no block can be", p.name(), p.at)
            }
            Fault::Missing(p) => {
                format!("{} lies at byte {}, behind the file's end at {file_bytes}", p.name(), p.at)
            }
            Fault::Shared(p, first) => {
                format!("{} lies at byte {}, where {} lies already", p.name(), p.at, first.name())
            }
        }
    }

    /// What there was to be read is still there. Which parts of its blocks are there only a bitmap says, and what an unknown state
    /// means nobody does.
    pub(super) fn is_repairable(&self) -> bool {
        match self {
            Fault::State { .. } | Fault::NoBitmap { .. } => false,
            Fault::Inside(p) | Fault::Missing(p) => p.what != Named::Bitmap { is_needed: true },
            Fault::Shared(..) => true,
        }
    }
}
