//! Making the disk of a Parallels image longer or shorter. docs/jobs.md tells the orders; each leaves the old size or the new one.
//!
//! The header says size, entries and where the data begins in 64 bytes of one sector, which is written whole or not at all. Blocks
//! that stand where the longer table will be move behind the others before.

use super::super::FileStep;
use super::super::steps::{StepList, all_zeros};
use super::check::{Examined, examine};
use super::header::HEADER_BYTES;
use super::layout::{FIRST_ENTRY, PAGE_WORDS, idx};
use super::repair::write_of;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_TABLE_BYTES, SECTOR_BYTES};
use crate::map::{ByteSource, FileId, HostBlock, HostOffset};
use std::collections::BTreeSet;

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
    /// Pages that differ from the file.
    pages: BTreeSet<u32>,
    pub(super) list: StepList,
}

impl Work {
    /// No steps yet.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a damaged image; [`ErrorKind::Unsupported`] for one with an extension; those of reading.
    pub(super) fn on(source: &dyn ByteSource) -> Result<Self> {
        let image = match examine(source)? {
            Ok(image) => image,
            Err(report) => return Err(report.refuse_damage().expect_err("a hopeless image is damaged")),
        };
        image.report.refuse_damage()?;
        if image.header.has_extension {
            let what = "has a format extension (dirty bitmaps), which a change would make wrong";
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        if image.header.in_use {
            let what = "was not closed, or is open elsewhere";
            return Err(Error::new(ErrorKind::Corrupt, what).hint("run vdimg repair first"));
        }
        Ok(Work { image, pages: BTreeSet::new(), list: StepList::new(FileId(0)) })
    }

    pub(super) fn set(&mut self, block: u32, value: u32) {
        let word = self.image.layout.word_of(block);
        self.image.words[idx(word)] = value;
        self.pages.insert(word / PAGE_WORDS);
    }

    /// The changed pages, behind a sync of what they name.
    pub(super) fn write_pages(&mut self) {
        self.list.sync();
        for page in std::mem::take(&mut self.pages) {
            if let FileStep::Write { at, bytes, .. } = write_of(&self.image, page) {
                self.list.write(at.0, bytes);
            }
        }
        self.list.sync();
    }

    /// The places of the blocks.
    pub(super) fn placed(&self) -> Vec<(u32, HostOffset)> {
        let layout = self.image.layout;
        let at = |block: u32| layout.place_named(self.image.words[idx(layout.word_of(block))]);
        (0..layout.blocks).filter_map(|block| Some((block, at(block)?))).collect()
    }

    /// What lies behind byte `end` of the disk in the last block reads as zeros when the disk becomes longer.
    fn clear_tail(&mut self, source: &dyn ByteSource, end: u64) -> Result<()> {
        let (layout, into) = (self.image.layout, end % self.image.layout.cluster_bytes);
        let last = u32::try_from(end / layout.cluster_bytes).unwrap_or(u32::MAX);
        let Some((_, at)) = self.placed().into_iter().find(|(block, _)| *block == last) else {
            return Ok(());
        };
        let (from, to) = (at.0 + into, at.0 + layout.cluster_bytes);
        if into > 0 && !all_zeros(source, from, to)? {
            self.list.fill(from, to.min(self.image.file_bytes), 0);
        }
        Ok(())
    }

    /// The header as it is, with these fields over it: the words of file and memory stay the same.
    fn write_header(&mut self, fields: &[(u32, u32)]) {
        for (word, value) in fields {
            self.image.words[idx(*word)] = *value;
        }
        let words = &self.image.words[..HEADER_BYTES / 4];
        let bytes = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.list.sync();
        self.list.write(0, bytes);
        self.list.sync();
    }

    /// The words that say a size.
    fn size_words(&self, size: u64) -> Result<[(u32, u32); 3]> {
        let sectors = size / SECTOR_BYTES;
        let (low, high) = (sectors & u64::from(u32::MAX), sectors >> 32);
        let word = |v: u64| u32::try_from(v).unwrap_or(u32::MAX);
        if high > 0 && !self.image.header.extended {
            let what =
                format!("a disk of {size} bytes; with this image's old signature there are at most 2 TiB");
            return Err(Error::new(ErrorKind::Limit, what).hint("vdimg convert it, and resize the copy"));
        }
        Ok([(6, word(sectors / 16 / 32)), (9, word(low)), (10, word(high))])
    }

    fn grow(&mut self, source: &dyn ByteSource, size: u64) -> Result<()> {
        let layout = self.image.layout;
        let clusters = size.div_ceil(layout.cluster_bytes);
        let entries = clusters.max(u64::from(layout.words - FIRST_ENTRY));
        let table_end = HEADER_BYTES as u64 + entries * 4;
        if table_end > MAX_TABLE_BYTES {
            let what = format!("a disk of {size} bytes needs {clusters} clusters, too many for one table");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let size_words = self.size_words(size)?;
        // The last block need not be whole yet.
        if self.image.used.end.0 > self.image.file_bytes {
            self.list.set_len(self.image.used.end.0);
        }
        self.clear_tail(source, layout.disk_bytes)?;
        let data_at = self.make_room(table_end)?;
        let data_sector = u32::try_from(data_at / SECTOR_BYTES).map_err(|_| {
            Error::new(ErrorKind::Limit, "the table would reach behind what a header can say")
        })?;
        let had = HEADER_BYTES as u64 + u64::from(layout.blocks) * 4;
        self.list.fill(had, table_end, 0);
        let mut fields = size_words.to_vec();
        fields.extend([(8, u32::try_from(entries).expect("a table's bytes")), (12, data_sector)]);
        self.write_header(&fields);
        Ok(())
    }

    /// Moves the blocks away that stand before `table_end`; where the data begins then.
    fn make_room(&mut self, table_end: u64) -> Result<u64> {
        let layout = self.image.layout;
        let steps = table_end.saturating_sub(layout.data_at()).div_ceil(layout.cluster_bytes);
        let skipped = u32::try_from(steps).unwrap_or(u32::MAX);
        let data_at = layout.data_at() + steps * layout.cluster_bytes;
        let moving: Vec<_> = self.placed().into_iter().filter(|(_, at)| at.0 < data_at).collect();
        let first = self.image.used.high_water.max(skipped);
        let end = u64::from(first) + moving.len() as u64;
        if end > u64::from(layout.most_places()) {
            return Err(Error::new(ErrorKind::Limit, "no entry could name where its blocks would go"));
        }
        // The data never begins behind the file's end.
        let end = layout.end_of(u32::try_from(end).expect("places have 32-bit numbers")).0;
        if steps > 0 && end > self.image.file_bytes {
            self.list.set_len(end);
            self.list.sync();
        }
        for ((block, from), to) in moving.into_iter().zip(first..) {
            let to = layout.place_at(HostBlock(to));
            self.list.copy(from.0, to.0, layout.cluster_bytes);
            self.set(block, layout.value_for(to));
        }
        self.write_pages();
        Ok(data_at)
    }

    /// The size changes first; then what lies behind it is given up, and the file is cut behind the last block.
    fn shrink(&mut self, source: &dyn ByteSource, size: u64) -> Result<()> {
        let layout = self.image.layout;
        if size < layout.disk_bytes {
            let words = self.size_words(size)?;
            self.write_header(&words);
        }
        self.clear_tail(source, size)?;
        let last = size.div_ceil(layout.cluster_bytes);
        let entries = layout.words - FIRST_ENTRY;
        let behind = u32::try_from(last).unwrap_or(entries)..entries;
        let named = |w: &Self, b: &u32| w.image.words[idx(layout.word_of(*b))] != 0;
        let gone: Vec<u32> = behind.filter(|b| named(self, b)).collect();
        if gone.is_empty() {
            return Ok(());
        }
        gone.into_iter().for_each(|block| self.set(block, 0));
        self.write_pages();
        let ends = self.placed().into_iter().map(|(_, at)| at.0 + layout.cluster_bytes);
        let end = ends.max().unwrap_or(layout.data_at());
        if end < self.image.file_bytes {
            self.list.set_len(end);
        }
        Ok(())
    }
}
