//! What is wrong with a VMDK. Unlike opening, checking goes on behind the first finding, and reads all tables and their
//! copies.

use super::super::ImageFile;
use super::super::report::{CheckReport, Severity};
use super::descriptor::{Access, Keep};
use super::layout::{Entry, Layout, MARKER_BYTES};
use super::open::{Placed, find_descriptor, of_extent, placed};
use super::places::Dense;
use super::sesparse::SeSparse;
use super::sparse::{layout_of, tables_of, whole};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{META_PAGE_BYTES, SECTOR_BYTES};
use crate::map::HostOffset;

/// Tables of one extent that a check holds: those of 4 TiB, more than entries can name places.
const MAX_CHECKED_BYTES: u64 = 256 << 20;

/// A sparse extent with all its tables.
pub(super) struct Extent<'a> {
    pub(super) file: ImageFile<'a>,
    pub(super) layout: Layout,
    /// Every entry, those of tables that do not exist as 0.
    pub(super) entries: Vec<u32>,
    pub(super) copy: Option<Vec<u32>>,
    /// The grain lies where nothing is: wholly behind the end of the file.
    pub(super) gone: Vec<u64>,
    /// Where the file has to end so that every grain is whole.
    pub(super) needed: HostOffset,
    /// It is never written, so what it leaves unused is no fault.
    pub(super) read_only: bool,
}

/// An image of which the tables were found.
pub(super) struct Examined<'a> {
    pub(super) extents: Vec<Extent<'a>>,
    pub(super) report: CheckReport,
}

/// Checks an image. Nothing is written.
///
/// # Errors
/// As [`super::super::check`].
pub(super) fn check(files: &[ImageFile<'_>]) -> Result<CheckReport> {
    examine(files).map(|e| e.map_or_else(|hopeless| hopeless, |e| e.report))
}

/// The inner error is the report on an image whose tables cannot even be found.
pub(super) fn examine<'a>(files: &[ImageFile<'a>]) -> Result<std::result::Result<Examined<'a>, CheckReport>> {
    let hopeless = |e: Error| match e.kind() {
        ErrorKind::Corrupt | ErrorKind::Limit => Ok(Err(CheckReport::hopeless(&e))),
        _ => Err(e),
    };
    let found = match find_descriptor(files[0].source).and_then(|f| Ok((placed(&f, files)?, f))) {
        Ok((placed, _)) => placed,
        Err(e) => return hopeless(e),
    };
    let mut examined = Examined { extents: Vec::new(), report: CheckReport::default() };
    for p in &found {
        if let Err(e) = examined.add(p) {
            return hopeless(of_extent(e, p));
        }
    }
    Ok(Ok(examined))
}

impl<'a> Examined<'a> {
    fn add(&mut self, p: &Placed<'a>) -> Result<()> {
        match (p.line.keep, p.file) {
            (Keep::Sparse, Some(file)) => {
                let extent = Extent::read(file, p)?;
                extent.judge(&mut self.report);
                self.extents.push(extent);
            }
            (Keep::SeSparse, Some(file)) => {
                let (id, report) = (file.id, &mut self.report);
                let extent = SeSparse::open(file.source, id, 0, p.range, META_PAGE_BYTES)?;
                let mut wrong = |what| report.add(Severity::Corruption, false, what);
                let (blocks, allocated) = extent.check(file.source, &mut wrong)?;
                report.blocks += blocks;
                report.allocated += allocated;
            }
            (Keep::Flat, Some(file)) => {
                let end = HostOffset(p.line.offset * SECTOR_BYTES).checked_add(p.range.len());
                if end.is_none_or(|end| end.0 > file.source.len()) {
                    let what = format!("the file has {} bytes, too few for its extent", file.source.len());
                    return Err(Error::new(ErrorKind::Corrupt, what));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl<'a> Extent<'a> {
    fn read(file: ImageFile<'a>, p: &Placed<'a>) -> Result<Self> {
        let layout = layout_of(file.source)?;
        if layout.header.disk_bytes < p.range.len() {
            let what =
                format!("an extent of {} bytes, where the descriptor lists more", layout.header.disk_bytes);
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        if layout.tables_bytes() > MAX_CHECKED_BYTES {
            let what = format!("grain tables of {} bytes", layout.tables_bytes());
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let entries = whole(file.source, &layout)?;
        let copy = layout.redundant.as_ref().map(|d| tables_of(file.source, &layout, d)).transpose()?;
        let h = &layout.header;
        let read_only = p.line.access != Access::ReadWrite || h.kdmv_version.is_none() || h.is_compressed();
        let extent =
            Extent { file, layout, entries, copy, gone: Vec::new(), needed: HostOffset(0), read_only };
        Ok(extent.with_bounds())
    }

    fn with_bounds(mut self) -> Self {
        let end = self.file.source.len();
        for (grain, value) in (0..self.layout.grains()).zip(&self.entries) {
            let Entry::At(at) = self.layout.entry(*value) else { continue };
            if at.0 >= end {
                self.gone.push(grain);
            } else if !self.layout.header.is_compressed() {
                self.needed = self.needed.max(at.plus(self.layout.bytes_of(grain)));
            }
        }
        self
    }

    fn judge(&self, report: &mut CheckReport) {
        let h = &self.layout.header;
        let end = self.file.source.len();
        report.blocks += self.layout.grains();
        if let Some(what) = &self.layout.broken_copy {
            report.add(Severity::Corruption, false, format!("the redundant directory is damaged: {what}"));
        }
        for grain in &self.gone {
            let what = format!("grain {grain} lies behind the file's end at {end}");
            report.add(Severity::Corruption, !self.read_only, what);
        }
        if self.needed.0 > end {
            let what = format!("the last grain ends at byte {}, the file at {end}", self.needed.0);
            report.add(Severity::Corruption, !self.read_only, what);
        }
        let mut named = Vec::new();
        // what is cut off a compressed grain cannot be filled up
        let most = if h.is_compressed() { end } else { u64::MAX };
        for (grain, value) in (0..self.layout.grains()).zip(&self.entries) {
            let Entry::At(at) = self.layout.entry(*value) else { continue };
            report.allocated += 1;
            if at.0 < end && !self.layout.can_hold(at, grain, most) {
                let what = format!("grain {grain} lies at byte {}, upon metadata", at.0);
                report.add(Severity::Corruption, false, what);
            } else if at.0 < end {
                named.push((at.0, grain));
                if let Some(what) = self.wrong_marker(grain, at) {
                    report.add(Severity::Corruption, false, what);
                }
            }
        }
        named.sort_unstable();
        let least = self.layout.least_distance() * SECTOR_BYTES;
        for w in named.windows(2).filter(|w| w[1].0 - w[0].0 < least) {
            let what = format!("grains {} and {} lie upon each other at byte {}", w[0].1, w[1].1, w[1].0);
            report.add(Severity::Corruption, false, what);
        }
        if !self.read_only {
            self.judge_copy(report);
        }
        if h.unclean && !self.read_only {
            report.add(Severity::Leak, true, "the mark that somebody writes to it is set".into());
        }
        if !self.read_only && report.unrepairable == 0 {
            self.judge_slack(report);
        }
    }

    /// What is wrong with the marker of a compressed grain.
    fn wrong_marker(&self, grain: u64, at: HostOffset) -> Option<String> {
        if !self.layout.header.is_compressed() {
            return None;
        }
        let mut marker = [0; MARKER_BYTES as usize];
        self.file.source.read_at(at, &mut marker).err().map(|e| e.to_string()).or_else(|| {
            let [a, b, c, d, e, f, g, h, i, j, k, l] = marker;
            let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let len = u64::from(u32::from_le_bytes([i, j, k, l]));
            if sector != grain * self.layout.header.grain_bytes / SECTOR_BYTES {
                return Some(format!("the marker of grain {grain} says it is that of sector {sector}"));
            }
            let cut = at.0 + MARKER_BYTES + len > self.file.source.len();
            cut.then(|| format!("grain {grain} of {len} bytes reaches behind the file's end"))
        })
    }

    /// VirtualBox refuses an image whose copies differ; we write both, one behind the other.
    fn judge_copy(&self, report: &mut CheckReport) {
        let Some(copy) = &self.copy else { return };
        let differ = self.entries.iter().zip(copy).filter(|(a, b)| a != b).count();
        if differ > 0 {
            let what = format!("{differ} entries of the redundant tables differ");
            report.add(Severity::Leak, true, what);
        }
    }

    fn judge_slack(&self, report: &mut CheckReport) {
        let grid = self.layout.data_at;
        let there = || self.entries.iter().copied().filter(|e| self.is_there(*e));
        let dense = Dense::plan(&self.layout, grid, &there, 0);
        if dense.holes > 0 {
            let what = format!("{} places of the file belong to no grain", dense.holes);
            report.add(Severity::Leak, true, what);
        }
        let (end, file) = (dense.end.0.max(grid.0), self.file.source.len());
        if file > end {
            let what = format!("{} bytes at the end of the file belong to no grain", file - end);
            report.add(Severity::Leak, true, what);
        }
    }

    /// The entry names a place inside the file.
    fn is_there(&self, value: u32) -> bool {
        matches!(self.layout.entry(value), Entry::At(at) if at.0 < self.file.source.len())
    }
}
