//! Putting a VMDK right without losing anything that is still there.
//!
//! - An entry whose grain lies wholly behind the end of the file becomes what its copy says, if that is there and belongs
//!   to no other grain; otherwise the grain becomes free.
//! - A grain cut off by the end of the file is filled up with zeros.
//! - The copies of the tables are written anew.
//! - Holes are filled from the end, the file is cut, and the mark that somebody writes is taken off.
//!
//! - Of grains upon each other one keeps the place: one whose copy says the same. Another becomes what its copy says, if that is
//!   there and nobody else's; otherwise it gets a copy of the bytes it shows.
//!
//! Grains upon metadata are told, and nothing is done about them.
//!
//! Every step order survives a power cut: copies are durable before an entry names them, and nothing is written over a
//! place before the entry that named it is durably gone.

use super::super::FileStep;
use super::super::ImageFile;
use super::super::report::{CheckReport, Repair};
use super::check::{Examined, Extent, examine};
use super::header::UNCLEAN_AT;
use super::layout::Entry;
use super::places::{Dense, sector_of};
use super::table::{ENTRY_BYTES, page_entries};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_CHECK_LINES, MAX_SEPARATED_BYTES, SECTOR_BYTES};
use crate::map::{FileId, HostOffset};
use std::collections::{BTreeSet, HashSet};

/// Plans the repair of an image. Nothing is written.
///
/// # Errors
/// As [`super::super::repair`].
pub(super) fn repair(files: &[ImageFile<'_>]) -> Result<Repair> {
    let hopeless = |report: &CheckReport| {
        let first = report.findings.iter().find(|f| !f.repairable).map_or("unknown", |f| &f.text);
        Error::new(ErrorKind::Corrupt, format!("cannot be repaired: {first}"))
    };
    let Examined { extents, report } = examine(files)?.map_err(|report| hopeless(&report))?;
    if report.unrepairable > 0 {
        return Err(hopeless(&report));
    }
    let mut plan = Repair { report, lines: Vec::new(), steps: Vec::new() };
    if plan.report.is_clean() {
        return Ok(plan);
    }
    let (mut lines, mut untold) = (Vec::new(), 0u64);
    for extent in extents.into_iter().filter(|e| !e.read_only) {
        let mut work = Work::new(extent);
        work.bring_back();
        work.follow_copies();
        // Before the file grows: places behind its end would seem to be there to a second repair.
        work.write_pages();
        work.fill_up();
        work.separate()?;
        work.write_pages();
        work.make_dense();
        work.take_mark_off();
        let room = MAX_CHECK_LINES.saturating_sub(lines.len());
        untold += work.lines.len().saturating_sub(room) as u64;
        lines.extend(work.lines.into_iter().take(room));
        plan.steps.extend(work.steps);
    }
    if untold > 0 {
        lines.push(format!("and {untold} things more"));
    }
    plan.lines = lines;
    Ok(plan)
}

/// Steps in the making, and what the extent is like behind them.
pub(super) struct Work<'a> {
    pub(super) extent: Extent<'a>,
    file: FileId,
    file_bytes: u64,
    /// Pages of the tables that differ from the file, and pages of their copies that do.
    pages: BTreeSet<u64>,
    copies: BTreeSet<u64>,
    lines: Vec<String>,
    pub(super) steps: Vec<FileStep>,
}

impl<'a> Work<'a> {
    pub(super) fn new(extent: Extent<'a>) -> Self {
        let file = extent.file.id;
        let n = u64::from(page_entries(extent.layout.header.entries));
        let mut work = Work {
            file,
            file_bytes: extent.file.source.len(),
            pages: BTreeSet::new(),
            copies: BTreeSet::new(),
            lines: Vec::new(),
            steps: vec![FileStep::Sync { file }],
            extent,
        };
        work.copies = work.extent.differing().map(|i| i / n).collect();
        if !work.copies.is_empty() {
            work.say(format!("{} pages of the redundant tables: written anew", work.copies.len()));
        }
        work
    }

    fn say(&mut self, line: String) {
        self.lines.push(line);
    }

    pub(super) fn set(&mut self, grain: u64, value: u32) {
        let i = usize::try_from(grain).expect("a table in memory");
        self.extent.entries[i] = value;
        let page = grain / u64::from(page_entries(self.extent.layout.header.entries));
        self.pages.insert(page);
        if self.extent.copy.is_some() {
            self.copies.insert(page);
        }
    }

    fn bring_back(&mut self) {
        let layout = &self.extent.layout;
        let size = layout.header.grain_bytes;
        let places: HashSet<u64> = self
            .extent
            .entries
            .iter()
            .zip(0..layout.grains())
            .filter_map(|(e, _)| match layout.entry(*e) {
                Entry::At(at) => Some([at.0 / size, at.0.div_ceil(size)]),
                _ => None,
            })
            .flatten()
            .collect();
        let mut taken = places;
        for grain in std::mem::take(&mut self.extent.gone) {
            let layout = &self.extent.layout;
            let i = usize::try_from(grain).expect("a table in memory");
            let other = self.extent.copy.as_ref().map_or(0, |c| c[i]);
            let found = match layout.entry(other) {
                Entry::At(at) if layout.can_hold(at, grain, self.file_bytes) => {
                    let own = [at.0 / size, at.0.div_ceil(size)];
                    let free = own.iter().all(|p| !taken.contains(p));
                    taken.extend(own);
                    free.then_some(other)
                }
                _ => None,
            };
            let line = match found {
                Some(_) => format!("grain {grain}: brought back by the redundant table"),
                None => format!("grain {grain}: freed, its place lies behind the file's end"),
            };
            self.set(grain, found.unwrap_or(0));
            self.say(line);
        }
    }

    fn fill_up(&mut self) {
        let size = self.extent.layout.header.grain_bytes;
        if self.extent.needed.0 > self.file_bytes {
            let to = HostOffset(self.extent.needed.0.next_multiple_of(size));
            self.say(format!("file: filled up with {} bytes of zeros", to.0 - self.file_bytes));
            self.set_len(to);
            self.steps.push(FileStep::Sync { file: self.file });
        }
    }

    /// Of grains that share a place, those whose copies name another one that is there get that.
    fn follow_copies(&mut self) {
        let mut taken = self.named();
        for (_, grain) in self.shared() {
            if let Some(sector) = self.other_place(grain, &taken) {
                taken.insert(sector);
                self.set(grain, sector);
                self.say(format!("grain {grain}: brought back by the redundant table"));
            }
        }
    }

    /// Every other one gets a copy of what it shows.
    fn separate(&mut self) -> Result<()> {
        let shared = self.shared();
        if shared.is_empty() {
            return Ok(());
        }
        let size = self.extent.layout.header.grain_bytes;
        let bytes = (shared.len() as u64).saturating_mul(size);
        if bytes > MAX_SEPARATED_BYTES.max(self.file_bytes) {
            let what = format!(
                "cannot be repaired: {} grains lie upon others, and copies for them would take {bytes} bytes",
                shared.len()
            );
            return Err(
                Error::new(ErrorKind::Limit, what).hint("no crash does that: take another copy of the image")
            );
        }
        let mut copies = Vec::new();
        for (from, grain) in shared {
            let to = HostOffset(self.file_bytes.next_multiple_of(size));
            if to.0 / SECTOR_BYTES + size / SECTOR_BYTES > 1 << 32 {
                return Err(Error::new(ErrorKind::Limit, "cannot be repaired: the file would exceed 2 TiB"));
            }
            self.set_len(to.plus(size));
            let len = self.extent.layout.bytes_of(grain);
            self.steps.push(FileStep::Copy { file: self.file, from, to, len });
            copies.push((grain, sector_of(to)));
        }
        if !copies.is_empty() {
            self.steps.push(FileStep::Sync { file: self.file });
        }
        for (grain, sector) in copies {
            self.set(grain, sector);
            self.say(format!("grain {grain}: lay upon another, and has a copy of what it showed"));
        }
        Ok(())
    }

    /// Grains that lie upon one that keeps its place, and where.
    fn shared(&self) -> Vec<(HostOffset, u64)> {
        let layout = &self.extent.layout;
        let agrees = |grain: u64| {
            let i = usize::try_from(grain).expect("a table in memory");
            self.extent.copy.as_ref().is_none_or(|c| c[i] == self.extent.entries[i])
        };
        let mut named: Vec<_> = (0..layout.grains())
            .zip(&self.extent.entries)
            .filter_map(|(grain, e)| match layout.entry(*e) {
                Entry::At(at) => Some((at, !agrees(grain), grain)),
                _ => None,
            })
            .collect();
        named.sort_unstable();
        let mut end = HostOffset(0);
        let mut shared = Vec::new();
        for (at, _, grain) in named {
            if at < end {
                shared.push((at, grain));
            } else {
                end = at.plus(layout.header.grain_bytes);
            }
        }
        shared
    }

    /// Sectors at which grains begin.
    fn named(&self) -> BTreeSet<u32> {
        let layout = &self.extent.layout;
        let all = (0..layout.grains()).zip(&self.extent.entries).map(|(_, e)| *e);
        all.filter(|e| matches!(layout.entry(*e), Entry::At(_))).collect()
    }

    /// What the redundant table says of a grain, if it names a place inside the file that belongs to nobody.
    fn other_place(&self, grain: u64, taken: &BTreeSet<u32>) -> Option<u32> {
        let layout = &self.extent.layout;
        let i = usize::try_from(grain).expect("a table in memory");
        let other = self.extent.copy.as_ref().map(|c| c[i])?;
        let Entry::At(at) = layout.entry(other) else { return None };
        let grain_sectors = u32::try_from(layout.least_distance()).expect("at most 256 MiB");
        let (low, high) = (other.saturating_sub(grain_sectors - 1), other.saturating_add(grain_sectors - 1));
        let is_free = taken.range(low..=high).next().is_none();
        (is_free && layout.can_hold(at, grain, self.extent.file.source.len())).then_some(other)
    }

    fn set_len(&mut self, to: HostOffset) {
        self.steps.push(FileStep::SetLen { file: self.file, to });
        self.file_bytes = to.0;
    }

    /// Tables first: a copy never names what they do not.
    pub(super) fn write_pages(&mut self) {
        let file = self.file;
        let main = std::mem::take(&mut self.pages);
        let copies = std::mem::take(&mut self.copies);
        let layout = &self.extent.layout;
        let both = [(main, Some(&layout.directory)), (copies, layout.redundant.as_ref())];
        let n = u64::from(page_entries(layout.header.entries));
        for (pages, directory) in both {
            for page in &pages {
                let Some(at) = directory.and_then(|d| layout.entry_at(d, page * n)) else { continue };
                let from = usize::try_from(page * n).expect("a table in memory");
                let len = usize::try_from(n).expect("a page");
                let entries = &self.extent.entries[from..from + len];
                let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
                debug_assert_eq!(bytes.len() as u64, n * ENTRY_BYTES);
                self.steps.push(FileStep::Write { file, at, bytes });
            }
            if !pages.is_empty() {
                self.steps.push(FileStep::Sync { file });
            }
        }
    }

    pub(super) fn make_dense(&mut self) {
        let (file, len) = (self.file, self.extent.layout.header.grain_bytes);
        let grid = self.extent.layout.data_at;
        let entries = self.extent.entries.clone();
        let dense = Dense::plan(&self.extent.layout, grid, &|| entries.iter().copied(), u64::MAX);
        for m in &dense.moves {
            // the last grain of the disk need not be whole in the file
            if m.from.0 + len > self.file_bytes {
                self.set_len(m.from.plus(len));
            }
            self.steps.push(FileStep::Copy { file, from: m.from, to: m.to, len });
        }
        if !dense.moves.is_empty() {
            self.say(format!("{} grains: moved into holes", dense.moves.len()));
            self.steps.push(FileStep::Sync { file });
            dense.moves.iter().for_each(|m| self.set(m.grain, sector_of(m.to)));
            self.write_pages();
        }
        if self.file_bytes > dense.end.0 {
            self.say(format!("file: cut from {} to {} bytes", self.file_bytes, dense.end.0));
            self.set_len(dense.end);
            self.steps.push(FileStep::Sync { file });
        }
    }

    fn take_mark_off(&mut self) {
        if !self.extent.layout.header.unclean {
            return;
        }
        // a byte: written whole, or not at all
        let at = HostOffset(UNCLEAN_AT as u64);
        debug_assert!(at.0 < SECTOR_BYTES);
        self.steps.push(FileStep::Write { file: self.file, at, bytes: vec![0] });
        self.steps.push(FileStep::Sync { file: self.file });
        self.say("the mark that somebody writes: taken off".to_string());
    }
}
