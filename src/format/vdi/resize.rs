//! Making the disk of a VDI longer or shorter. docs/jobs.md tells the orders; each leaves the old size or the new one.
//!
//! The table stands before the blocks, and the header says where both begin. A table that becomes too long for its place is
//! written anew in another one, before the old one or behind it; for the latter the first blocks move to the end of the file, and
//! as places are counted from where the blocks begin, all entries of the new table are lower by so many. One sector of the header
//! then changes from the old table to the new one.

use super::super::FileStep;
use super::super::steps::{StepList, all_zeros};
use super::check::{Examined, examine};
use super::dense::relocations;
use super::layout::{Entry, FREE, Layout, PAGE_ENTRIES, idx};
use super::table::{Used, page_of, survey};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_TABLE_BYTES, SECTOR_BYTES, TABLE_PIECE_BYTES};
use crate::map::{ByteSource, FileId, HostBlock, HostOffset};
use std::collections::BTreeSet;

/// Entries of the table that one step writes.
const PIECE_ENTRIES: usize = TABLE_PIECE_BYTES / 4;

/// Plans the steps after which the disk has `size` bytes.
///
/// # Errors
/// As [`super::super::resize`].
pub(super) fn resize(source: &dyn ByteSource, size: u64) -> Result<Vec<FileStep>> {
    let mut work = Work::on(source)?;
    if size > work.image.layout.disk_bytes {
        work.grow(source, size)?;
    } else {
        work.shrink(source, size)?;
    }
    Ok(work.list.done())
}

/// Steps in the making, and what the image is like behind them.
pub(super) struct Work {
    pub(super) image: Examined,
    used: Used,
    /// Pages of the table that differ from the file.
    pages: BTreeSet<u32>,
    pub(super) list: StepList,
}

/// Where a table and the blocks behind it begin.
#[derive(Clone, Copy)]
struct Places {
    table_at: u64,
    data_at: u64,
    /// Places that are gone because the blocks begin later.
    skipped: u32,
}

impl Work {
    /// No steps yet.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a damaged image; those of reading.
    pub(super) fn on(source: &dyn ByteSource) -> Result<Self> {
        let image = match examine(source)? {
            Ok(image) => image,
            Err(report) => return Err(report.refuse_damage().expect_err("a hopeless image is damaged")),
        };
        image.report.refuse_damage()?;
        let used = survey(image.table.iter().copied(), &image.layout, u64::MAX, |_| {});
        Ok(Work { image, used, pages: BTreeSet::new(), list: StepList::new(FileId(0)) })
    }

    pub(super) fn layout(&self) -> Layout {
        self.image.layout
    }

    fn blocks_for(&self, size: u64) -> Result<u32> {
        let blocks = size.div_ceil(self.layout().block_bytes);
        let fits = blocks.checked_mul(4).is_some_and(|bytes| bytes <= MAX_TABLE_BYTES);
        u32::try_from(blocks).ok().filter(|_| fits).ok_or_else(|| {
            let what = format!("a disk of {size} bytes needs {blocks} blocks, too many for one table");
            Error::new(ErrorKind::Limit, what).hint("convert it to an image with larger blocks")
        })
    }

    fn write_header(&mut self) {
        let mut bytes = Vec::new();
        self.image.header.write_to(&mut bytes);
        debug_assert!(bytes.len() as u64 <= SECTOR_BYTES, "the header is written whole or not at all");
        self.list.write(0, bytes);
        self.list.sync();
    }

    pub(super) fn set(&mut self, block: u32, value: u32) {
        self.image.table[idx(block)] = value;
        self.pages.insert(block / PAGE_ENTRIES);
    }

    /// The changed pages, behind a sync of what they name.
    pub(super) fn write_pages(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        if pages.is_empty() {
            return;
        }
        self.list.sync();
        for page in pages {
            let (at, bytes) = page_of(&self.image.table, &self.image.layout, page);
            self.list.write(at.0, bytes);
        }
        self.list.sync();
    }

    /// Entries of blocks from `first` on are free.
    fn free_from(&mut self, first: u32) {
        for block in first..self.layout().blocks {
            if self.image.table[idx(block)] != FREE {
                self.set(block, FREE);
            }
        }
        self.write_pages();
        self.used = survey(self.image.table.iter().copied(), &self.image.layout, u64::MAX, |_| {});
    }

    /// What lies behind byte `end` of the disk in the last block reads as zeros when the disk becomes longer.
    fn clear_tail(&mut self, source: &dyn ByteSource, end: u64) -> Result<()> {
        let (layout, into) = (self.layout(), end % self.layout().block_bytes);
        let last = u32::try_from(end / layout.block_bytes).unwrap_or(u32::MAX);
        let Some(Entry::At(place)) = self.image.table.get(idx(last)).map(|v| Entry::of(*v)) else {
            return Ok(());
        };
        let (from, to) = (layout.data_of(place).0 + into, layout.end_of(place.0 + 1).0);
        if into > 0 && !all_zeros(source, from, to)? {
            self.list.fill(from, to, 0);
        }
        Ok(())
    }

    /// The size changes first; then what lies behind it is given up, blocks move into the holes, and the file is cut.
    fn shrink(&mut self, source: &dyn ByteSource, size: u64) -> Result<()> {
        let blocks = self.blocks_for(size)?;
        if size < self.layout().disk_bytes {
            self.image.header.set_disk_bytes(size);
            self.image.layout.disk_bytes = size;
            self.write_header();
        }
        self.clear_tail(source, size)?;
        if blocks == self.layout().blocks {
            return Ok(());
        }
        self.free_from(blocks);
        let count = self.make_dense();
        let layout = self.layout();
        if self.image.header.has_offsets() {
            let at = |o: HostOffset| u32::try_from(o.0).expect("as it is in the header");
            self.image.header.set_places(at(layout.table_at), at(layout.data_at), blocks);
        }
        self.image.header.set_allocated(count);
        self.write_header();
        self.list.set_len(layout.end_of(count).0);
        Ok(())
    }

    /// Blocks from behind move into holes; how many places there are then.
    fn make_dense(&mut self) -> u32 {
        let layout = self.layout();
        for m in relocations(self.image.table.iter().copied(), &self.used) {
            self.list.copy(layout.start_of(m.from.0).0, layout.start_of(m.to.0).0, layout.stride());
            self.set(m.block, m.to.0);
        }
        self.write_pages();
        u32::try_from(self.used.places.count()).expect("places are 32-bit numbers")
    }

    /// The same, and the count and the file's end follow.
    pub(super) fn make_dense_and_cut(&mut self) {
        self.used = survey(self.image.table.iter().copied(), &self.image.layout, u64::MAX, |_| {});
        let count = self.make_dense();
        if self.image.header.allocated() != count {
            self.image.header.set_allocated(count);
            self.write_header();
        }
        let end = self.layout().end_of(count);
        if end.0 != self.image.file_bytes {
            self.list.set_len(end.0);
        }
    }

    /// Everything is made ready behind what the header says; the header changes last.
    fn grow(&mut self, source: &dyn ByteSource, size: u64) -> Result<()> {
        let old = self.layout();
        let had = self.blocks_for(old.disk_bytes)?;
        let blocks = self.blocks_for(size)?.max(old.blocks);
        // The last block's place need not be whole yet.
        let end = old.end_of(self.used.high_water).0;
        if self.image.file_bytes < end {
            self.list.set_len(end);
        }
        self.clear_tail(source, old.disk_bytes)?;
        self.free_from(had);
        if self.image.is_fixed() && self.used.high_water > had {
            let what = "is a fixed image whose blocks have other places than its size allows";
            return Err(
                Error::new(ErrorKind::Unsupported, what).hint("vdimg convert it, and resize the copy")
            );
        }
        let places = self.make_room(blocks)?;
        let layout = self.layout();
        let mut table = std::mem::take(&mut self.image.table);
        for value in table.iter_mut().filter(|v| matches!(Entry::of(**v), Entry::At(_))) {
            *value -= places.skipped;
        }
        let high_water = self.used.high_water.saturating_sub(places.skipped);
        let whole = places.table_at != layout.table_at.0;
        let mut from = if whole { 0 } else { idx(had) };
        let mut count = high_water;
        if self.image.is_fixed() {
            count = self.add_fixed_places(&mut table, had, blocks, places);
            self.write_entries(&table, from, places.table_at);
            from = table.len();
        } else if whole {
            self.write_entries(&table, 0, places.table_at);
            from = table.len();
        }
        let entry_at = |n: u64| places.table_at + n * 4;
        self.list.fill(entry_at(from.max(idx(had)) as u64), entry_at(blocks.into()), 0xff);
        self.list.sync();
        self.image.header.set_allocated(count);
        self.image.header.set_disk_bytes(size);
        if self.image.header.has_offsets() {
            let at = |o: u64| u32::try_from(o).expect("checked when the places were chosen");
            self.image.header.set_places(at(places.table_at), at(places.data_at), blocks);
        }
        self.write_header();
        Ok(())
    }

    /// Each new block of a fixed image has a place of zeros behind all others; how many places there are then.
    fn add_fixed_places(&mut self, table: &mut Vec<u32>, had: u32, blocks: u32, places: Places) -> u32 {
        let layout = self.layout();
        let high_water = self.used.high_water.saturating_sub(places.skipped);
        table.truncate(idx(had));
        table.extend(high_water..high_water + (blocks - had));
        let count = high_water + (blocks - had);
        // What belongs to no block is no zeros.
        self.list.set_len(layout.end_of(self.used.high_water).0);
        self.list.sync();
        self.list.reserve(places.data_at + u64::from(count) * layout.stride());
        self.list.sync();
        count
    }

    fn write_entries(&mut self, table: &[u32], from: usize, table_at: u64) {
        for (n, piece) in table[from..].chunks(PIECE_ENTRIES).enumerate() {
            let bytes = piece.iter().flat_map(|v| v.to_le_bytes()).collect();
            self.list.write(table_at + (from + n * PIECE_ENTRIES) as u64 * 4, bytes);
        }
    }

    /// Finds, and if need be makes, a place for a table of `blocks` entries.
    fn make_room(&mut self, blocks: u32) -> Result<Places> {
        let layout = self.layout();
        let here = Places { table_at: layout.table_at.0, data_at: layout.data_at.0, skipped: 0 };
        let bytes = u64::from(blocks) * 4;
        if here.table_at + bytes <= here.data_at {
            return Ok(here);
        }
        let no_room = |what: &str| {
            let what = format!("its block table cannot become longer: {what}");
            Error::new(ErrorKind::Unsupported, what).hint("vdimg convert it, and resize the copy")
        };
        if !self.image.header.has_offsets() {
            return Err(no_room("in this old version the blocks follow it at once"));
        }
        let mut header = Vec::new();
        self.image.header.write_to(&mut header);
        let before = (header.len() as u64).next_multiple_of(SECTOR_BYTES);
        if before + bytes <= here.table_at {
            return Ok(Places { table_at: before, ..here });
        }
        let after = |blocks: u32| (here.table_at + u64::from(blocks) * 4).next_multiple_of(SECTOR_BYTES);
        let skipped = |table_at: u64| (table_at + bytes - here.data_at).div_ceil(layout.stride());
        // As many more entries as fit here make as many more places, for the blocks that move.
        let fit = u32::try_from((here.data_at - here.table_at) / 4).unwrap_or(u32::MAX);
        let more = u32::try_from(skipped(after(fit))).unwrap_or(u32::MAX);
        let entries = fit.min(layout.blocks.saturating_add(more)).max(layout.blocks);
        let table_at = after(entries);
        let data_at = here.data_at + skipped(table_at) * layout.stride();
        let skipped = u32::try_from(skipped(table_at)).ok().filter(|_| u32::try_from(data_at).is_ok());
        let skipped = skipped.ok_or_else(|| no_room("the blocks would begin where no header can say"))?;
        self.add_entries(entries);
        self.evacuate(skipped).ok_or_else(|| no_room("all places of the file are in use"))?;
        Ok(Places { table_at, data_at, skipped })
    }

    /// The table, where it is, has `blocks` entries.
    fn add_entries(&mut self, blocks: u32) {
        let layout = self.layout();
        if blocks == layout.blocks {
            return;
        }
        let end = layout.table_at.0 + u64::from(blocks) * 4;
        self.list.fill(layout.entry_at(layout.blocks).0, end, 0xff);
        self.list.sync();
        let at = |o: HostOffset| u32::try_from(o.0).expect("as it is in the header");
        self.image.header.set_places(at(layout.table_at), at(layout.data_at), blocks);
        self.write_header();
        self.image.table.resize(idx(blocks), FREE);
        self.image.layout.blocks = blocks;
    }

    /// Moves all blocks out of the first `count` places. `None` if there are too few others.
    fn evacuate(&mut self, count: u32) -> Option<()> {
        let layout = self.layout();
        let moving: Vec<u32> = (0u32..)
            .zip(&self.image.table)
            .filter(|(_, v)| matches!(Entry::of(**v), Entry::At(HostBlock(p)) if p < count))
            .map(|(block, _)| block)
            .collect();
        let free = (count..layout.blocks).filter(|p| !self.used.places.contains(*p));
        let to: Vec<u32> = free.take(moving.len()).collect();
        if to.len() < moving.len() {
            return None;
        }
        let high_water = to.iter().map(|p| p + 1).max().unwrap_or(0).max(self.used.high_water).max(count);
        self.list.set_len(layout.end_of(high_water).0.max(self.image.file_bytes));
        // Nobody else would add a block where the copies go.
        self.image.header.set_allocated(self.image.header.allocated().max(high_water));
        self.write_header();
        for (block, to) in moving.into_iter().zip(to) {
            let Entry::At(from) = Entry::of(self.image.table[idx(block)]) else { unreachable!("a place") };
            self.list.copy(layout.start_of(from.0).0, layout.start_of(to).0, layout.stride());
            self.set(block, to);
        }
        self.write_pages();
        self.used = survey(self.image.table.iter().copied(), &layout, u64::MAX, |_| {});
        Some(())
    }
}
