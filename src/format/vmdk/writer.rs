//! What changes a sparse extent, beyond what all formats with blocks have in common: its entries and their copies, and
//! the steps at both ends of a session, whose orders docs/formats/vmdk.md explains.
//!
//! A grain keeps its place once it has one: a discard punches the file there. So nothing is ever dropped, and places become
//! free only where a process was killed before their entries were written.

use super::super::blocks::{Block, BlockFormat, BlockWriter, Steps};
use super::layout::{Entry, NewTables};
use super::places::{Dense, end_of_used, sector_of, used_places};
use super::sparse::{COPY, DIRECTORY, DIRECTORY_COPY, MAIN, MARK, NEW_TABLE, Sparse, key_of, tables_of};
use super::table::{ENTRY_BYTES, Entries};
use crate::error::{Failure, Result};
use crate::limits::{META_PAGE_BYTES, POOL_STEP_BYTES, SECTOR_BYTES};
use crate::map::{ByteSource, FileId, GuestRange, HostBlock, HostBlocks, HostOffset, MetaOp, Miss, Step};
use smallvec::smallvec;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// Holes a clean close fills by moving grains into them: more than that is no trace of a killed process.
const MAX_MOVES_BYTES: u64 = POOL_STEP_BYTES;
/// Places more than grains without one that a file may get: for those that failed writes keep.
const SPARE_PLACES: u64 = 16;

/// The part of an open extent that is there only if it may be written.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) blocks: BlockWriter,
    /// A plan found no place: whoever asks for room is to ask here.
    pub(super) wants_room: AtomicBool,
    /// Where places are counted from.
    grid: HostOffset,
    /// Pages of which the redundant copy differed when the image was opened.
    stale: BTreeSet<u64>,
}

impl Writer {
    pub(super) fn new(s: &Sparse, source: &dyn ByteSource) -> Result<Self> {
        let size = s.layout.header.grain_bytes;
        let most = |grid: HostOffset| ((1u64 << 32) * SECTOR_BYTES).saturating_sub(grid.0) / size;
        let step =
            u32::try_from((POOL_STEP_BYTES / size).max(1)).expect("64 MiB have fewer grains than 2^32");
        let places = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let (grid, pool, stale) = match &s.table.entries {
            Entries::Whole(all) => {
                let grid = s.layout.data_at;
                let entries = || all.iter().map(|e| e.load(Ordering::Relaxed));
                let named = s.allocated().unwrap_or_default();
                let used = used_places(&s.layout, grid, entries());
                let end = end_of_used(&used);
                let need = u64::from(end) + s.layout.grains().saturating_sub(named) + SPARE_PLACES;
                let max = places(need.min(most(grid))).max(end);
                let pool = HostBlocks::new(end, max, step, |p| used.contains(p));
                (grid, pool, stale_pages(s, source)?)
            }
            // Nobody knows which places are free but those behind the end.
            Entries::Pages(_) => {
                let grid = HostOffset(s.opened_bytes.next_multiple_of(size));
                let grid = s.new_tables.as_ref().map_or(grid, |new| new.end);
                let max = places(most(grid).min(s.layout.grains() + SPARE_PLACES));
                (grid, HostBlocks::new(0, max, step, |_| true), BTreeSet::new())
            }
        };
        Ok(Writer {
            // Every grain that has a place keeps it.
            blocks: BlockWriter::new(pool, true),
            wants_room: AtomicBool::new(false),
            grid,
            stale,
        })
    }

    /// Once, before the first change: what has to be on disk, up to a sync that the image adds.
    pub(super) fn before(&self, s: &Sparse, steps: &mut Steps) {
        steps.extend(s.mark(true));
        let has_copy = |page: &u64| {
            let first = s.table.first_of(*page);
            s.layout.redundant.as_ref().is_some_and(|r| s.layout.entry_at(r, first).is_some())
        };
        // a copy that is still to be made will not be an old one
        steps.extend(self.stale.iter().filter(|p| has_copy(p)).map(|page| s.rewrite_copy(*page)));
    }

    /// Behind that sync: what nobody names is cut off, so that an extension finds nothing there.
    pub(super) fn behind(&self, s: &Sparse, steps: &mut Steps) {
        // New tables are below that end: when a session begins once more they may have been named already.
        let (file, have, end) = (s.file, HostOffset(s.opened_bytes), s.end_of(self.blocks.places_end()));
        if have > end {
            steps.push(Step::Truncate { file, to: end });
        } else if have < end {
            steps.push(Step::Extend { file, from: have, to: end });
        }
        if let Some(new) = &s.new_tables {
            self.make_tables(s, new, steps);
        }
    }

    /// The tables that were never made: written and durable before a directory names them, which is durable before an entry is
    /// written into them.
    fn make_tables(&self, s: &Sparse, new: &NewTables, steps: &mut Steps) {
        let file = s.file;
        steps.push(Step::Barrier);
        // The pages are composed from memory whatever the operation says.
        let write = |table, page| {
            let op = MetaOp::Entry { index: page, value: 0, pointer: false };
            Step::Meta { key: key_of(s.extent, table, page), op }
        };
        let pages = s.layout.table_bytes() / s.table.page_bytes() as u64;
        steps.extend((0..new.tables.len() as u64 * pages).map(|page| write(NEW_TABLE, page)));
        steps.push(Step::Sync { file });
        let pages = (s.layout.header.tables() * ENTRY_BYTES).div_ceil(META_PAGE_BYTES);
        steps.extend((0..pages).map(|page| write(DIRECTORY, page)));
        if s.has_copy() {
            steps.extend((0..pages).map(|page| write(DIRECTORY_COPY, page)));
        }
        steps.push(Step::Sync { file });
    }

    /// At a clean close. Empty where nothing was changed.
    pub(super) fn end(&self, s: &Sparse) -> Steps {
        let Some(rest) = self.blocks.finish() else { return Steps::new() };
        let file = s.file;
        let mut steps = Steps::new();
        for block in rest.doubtful {
            let value = s.table.get(block).unwrap_or(0);
            steps.extend(s.set_entry(block, value));
        }
        steps.push(Step::Sync { file });
        let end = match &s.table.entries {
            Entries::Whole(_) => self.fill_holes(s, &mut steps),
            Entries::Pages(_) => HostOffset(s.named_end.load(Ordering::Acquire)).max(self.grid),
        };
        steps.push(Step::Truncate { file, to: end });
        steps.push(Step::Barrier);
        steps.extend(s.mark(false));
        steps
    }

    /// Moves grains from the end of the file into its holes. Returns where the file ends then.
    fn fill_holes(&self, s: &Sparse, steps: &mut Steps) -> HostOffset {
        let Entries::Whole(all) = &s.table.entries else { return s.end_of(self.blocks.places_end()) };
        let entries = || all.iter().map(|e| e.load(Ordering::Acquire));
        let most = MAX_MOVES_BYTES / s.layout.header.grain_bytes;
        let dense = Dense::plan(&s.layout, self.grid, &entries, most.max(1));
        if !dense.moves.is_empty() {
            let (file, len) = (s.file, s.layout.header.grain_bytes);
            steps.extend(dense.moves.iter().map(|m| Step::Move { file, from: m.from, to: m.to, len }));
            steps.push(Step::Sync { file });
            dense.moves.iter().for_each(|m| steps.extend(s.set_entry(m.grain, sector_of(m.to))));
            steps.push(Step::Sync { file });
        }
        dense.end
    }
}

/// Pages of the tables that their redundant copies do not equal.
fn stale_pages(s: &Sparse, source: &dyn ByteSource) -> Result<BTreeSet<u64>> {
    let mut stale = BTreeSet::new();
    if let Some(directory) = &s.layout.redundant {
        let copy = tables_of(source, &s.layout, directory)?;
        for (index, value) in (0..).zip(copy) {
            if s.table.get(index) != Some(value) {
                stale.insert(s.table.place(index).0);
            }
        }
    }
    Ok(stale)
}

impl Sparse {
    pub(super) fn has_copy(&self) -> bool {
        self.layout.redundant.is_some()
    }

    /// The mark of an image that is being written: other programs look at it, we do not need it.
    fn mark(&self, in_use: bool) -> Option<Step> {
        let key = key_of(self.extent, MARK, 0);
        self.layout.header.kdmv_version.map(|_| Step::Meta { key, op: MetaOp::InUse(in_use) })
    }

    /// Writes a page of the copy as the table is; the entry in it is the one it has.
    fn rewrite_copy(&self, page: u64) -> Step {
        let index = self.table.first_of(page);
        let value = u64::from(self.table.get(index).unwrap_or(0));
        let op = MetaOp::Entry { index, value, pointer: false };
        Step::Meta { key: key_of(self.extent, COPY, page), op }
    }

    /// The entry, then its copy: the copy is composed from the table, so the table comes first.
    fn set_entry(&self, grain: u64, value: u32) -> Steps {
        let pointer = matches!(self.layout.entry(value), Entry::At(_));
        let op = MetaOp::Entry { index: grain, value: u64::from(value), pointer };
        let (page, _) = self.table.place(grain);
        let main = Step::Meta { key: key_of(self.extent, MAIN, page), op };
        let copy = Step::Meta { key: key_of(self.extent, COPY, page), op };
        if self.has_copy() { smallvec![main, Step::Barrier, copy] } else { smallvec![main] }
    }
}

impl BlockFormat for Sparse {
    fn file(&self) -> FileId {
        self.file
    }

    fn block_bytes(&self) -> u64 {
        self.layout.header.grain_bytes
    }

    fn unit(&self, block: u64) -> GuestRange {
        self.unit_of(block)
    }

    fn block(&self, block: u64) -> std::result::Result<Block, Miss> {
        Ok(match self.entry(block)? {
            Entry::Free => Block::Free,
            Entry::Zero => Block::Zero,
            Entry::At(at) => Block::At(at),
        })
    }

    fn data_of(&self, place: HostBlock) -> HostOffset {
        self.end_of(place.0)
    }

    fn end_of(&self, places: u32) -> HostOffset {
        let grid = self.writer.as_ref().map_or_else(|| self.layout.data_at, |w| w.grid);
        grid.plus(u64::from(places) * self.layout.header.grain_bytes)
    }

    fn change(&self, block: u64, now: Block) -> std::result::Result<Steps, Miss> {
        let value = match now {
            Block::Free => 0,
            Block::Zero if self.layout.header.has_zeroed() => 1,
            Block::Zero if self.is_base => 0,
            Block::Zero => return Err(Miss::Fail(Failure::Unsupported)),
            Block::At(at) => sector_of(at),
        };
        if !self.table.pin(block) {
            return Err(Miss::NeedsPage(key_of(self.extent, MAIN, self.table.place(block).0)));
        }
        Ok(self.set_entry(block, value))
    }

    fn settled(&self, block: u64) {
        self.table.unpin(block);
    }

    fn announce(&self, _places: u32) -> Steps {
        Steps::new()
    }
}
