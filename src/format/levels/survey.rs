//! What is wrong with an image of two levels, and what can be done about it.

use super::{Cluster, Geometry};
use crate::error::{Error, ErrorKind, Result};
use crate::format::FileStep;
use crate::format::report::{CheckReport, Repair, Severity};
use crate::limits::{MAX_CHECK_LINES, MAX_TABLE_BYTES, TABLE_PIECE_BYTES};
use crate::map::{ByteSource, FileId, HostOffset};
use std::collections::HashSet;

/// Entries a repair makes free; a crash leaves a handful.
const MAX_MENDS: usize = 1 << 16;
const FILE: FileId = FileId(0);

/// What every format of the family says to a check besides its [`Geometry`].
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Extra {
    /// Where header, first level and the parent's name end.
    pub(in super::super) metadata_end: u64,
    /// The mark of a writer that did not close the image: where it is, and the byte without it.
    pub(in super::super) mark: Option<(u64, u8)>,
}

/// An image that was looked at.
pub(in super::super) struct Survey<'a> {
    source: &'a dyn ByteSource,
    geometry: Geometry,
    extra: Extra,
    pub(in super::super) report: CheckReport,
    /// Beginnings of clusters in use, tables included.
    used: HashSet<u64>,
    /// Where the last of them ends.
    end: u64,
    /// Entries that name nothing that could be read: where they are, and a line about each.
    mends: Vec<(u64, String)>,
    /// Bytes of tables looked at.
    seen: u64,
}

impl<'a> Survey<'a> {
    /// Looks at everything.
    ///
    /// # Errors
    /// Those of reading, and [`ErrorKind::Limit`] for tables of more than [`MAX_TABLE_BYTES`].
    pub(in super::super) fn of(source: &'a dyn ByteSource, geometry: Geometry, extra: Extra) -> Result<Self> {
        let report = CheckReport { blocks: geometry.blocks(), ..CheckReport::default() };
        let (used, mends) = (HashSet::new(), Vec::new());
        let mut survey =
            Survey { source, geometry, extra, report, used, end: extra.metadata_end, mends, seen: 0 };
        for (index, entry) in (0u64..).zip(geometry.load_l1(source)?) {
            survey.table(index, entry)?;
        }
        if extra.mark.is_some() {
            survey.report.add(Severity::Leak, true, "it was not closed, or is open elsewhere".into());
        }
        let tail = survey.tail();
        if tail > 0 {
            let what = format!("{tail} bytes at the end of the file belong to no cluster");
            survey.report.add(Severity::Leak, true, what);
        }
        Ok(survey)
    }

    /// Where the file could end.
    fn kept_end(&self) -> u64 {
        self.end.next_multiple_of(self.geometry.cluster_bytes)
    }

    fn tail(&self) -> u64 {
        self.geometry.file_bytes.saturating_sub(self.kept_end())
    }

    /// An entry that can be made free without losing what can be read.
    fn wrong(&mut self, at: u64, what: String) -> Result<()> {
        if self.mends.len() == MAX_MENDS {
            return Err(Error::new(ErrorKind::Limit, "more entries are wrong than any crash explains"));
        }
        self.mends.push((at, what.clone()));
        self.report.add(Severity::Corruption, true, what);
        Ok(())
    }

    fn table(&mut self, index: u64, entry: u64) -> Result<()> {
        let (g, file_bytes) = (self.geometry, self.geometry.file_bytes);
        let Ok(table) = g.table_named(entry, file_bytes) else {
            let what = format!("table {index} is said to lie at {entry:#x}, where none can be");
            if entry < file_bytes {
                // What it named is in the file: somebody may know better where the table is.
                self.report.add(Severity::Corruption, false, what);
                return Ok(());
            }
            return self.wrong(g.l1_at + index * 8, what);
        };
        let Some(at) = table else { return Ok(()) };
        if !self.take(at, g.table_bytes) {
            let what = format!("table {index} lies at byte {at}, where something else lies already");
            self.report.add(Severity::Corruption, false, what);
            return Ok(());
        }
        let first = index * (g.table_bytes / 8);
        let bytes = (g.blocks() - first).min(g.table_bytes / 8) * 8;
        self.seen = self.seen.saturating_add(bytes);
        if self.seen > MAX_TABLE_BYTES {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("its tables have more than {MAX_TABLE_BYTES} bytes"),
            ));
        }
        let (mut into, mut piece) = (0, vec![0; TABLE_PIECE_BYTES]);
        while into < bytes {
            let len = usize::try_from(bytes - into).map_or(piece.len(), |left| left.min(piece.len()));
            self.source.read_at(HostOffset(at + into), &mut piece[..len])?;
            for (n, raw) in (0u64..).zip(piece[..len].as_chunks::<8>().0) {
                let entry = g.dialect.number(*raw);
                if entry != 0 {
                    self.entry(first + into / 8 + n, at + into + n * 8, entry)?;
                }
            }
            into += len as u64;
        }
        Ok(())
    }

    /// The entry of a cluster of the disk, which is at `at` in the file.
    fn entry(&mut self, block: u64, at: u64, entry: u64) -> Result<()> {
        match self.geometry.cluster(entry, self.geometry.file_bytes) {
            Err(_) => {
                self.wrong(at, format!("cluster {block} is said to lie at {entry:#x}, where none can be"))
            }
            Ok(Cluster::At(place)) => {
                self.report.allocated += 1;
                if !self.take(place.0, self.geometry.cluster_bytes) {
                    let what = format!("cluster {block} lies at {place}, where something else lies already");
                    self.report.add(Severity::Corruption, false, what);
                }
                Ok(())
            }
            // Several lie in one cluster of the file.
            Ok(Cluster::Packed { at, len }) => {
                self.report.allocated += 1;
                self.end = self.end.max(at.0 + u64::from(len));
                Ok(())
            }
            Ok(Cluster::Free | Cluster::Zero) => Ok(()),
        }
    }

    /// False if a part of it is in use already.
    fn take(&mut self, at: u64, bytes: u64) -> bool {
        self.end = self.end.max(at + bytes);
        let step = usize::try_from(self.geometry.cluster_bytes).unwrap_or(usize::MAX);
        let mut new = true;
        for cluster in (at..at + bytes).step_by(step) {
            new &= self.used.insert(cluster);
        }
        new
    }

    /// Entries that name nothing become free, the end is cut off, and the mark is taken off last.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where that is not enough: nothing is repaired then.
    pub(in super::super) fn repair(self) -> Result<Repair> {
        if let Some(f) = self.report.findings.iter().find(|f| !f.repairable) {
            return Err(Error::new(ErrorKind::Unsupported, format!("not repaired: {}", f.text))
                .hint("vdimg convert copies what can be read"));
        }
        if self.report.unrepairable > 0 {
            return Err(Error::new(ErrorKind::Unsupported, "not repaired: clusters share their places"));
        }
        let mut repair = Repair { report: self.report.clone(), ..Repair::default() };
        for (at, what) in &self.mends {
            if repair.lines.len() < MAX_CHECK_LINES {
                repair.lines.push(format!("{what}: becomes free"));
            }
            repair.steps.push(FileStep::Write { file: FILE, at: HostOffset(*at), bytes: vec![0; 8] });
        }
        if !self.mends.is_empty() {
            repair.steps.push(FileStep::Sync { file: FILE });
        }
        if self.tail() > 0 {
            repair.lines.push(format!("{} bytes at the end are cut off", self.tail()));
            repair.steps.push(FileStep::SetLen { file: FILE, to: HostOffset(self.kept_end()) });
        }
        if let Some((at, byte)) = self.extra.mark {
            repair.lines.push("the mark of a writer is taken off".into());
            repair.steps.push(FileStep::Sync { file: FILE });
            repair.steps.push(FileStep::Write { file: FILE, at: HostOffset(at), bytes: vec![byte] });
        }
        if !repair.steps.is_empty() {
            repair.steps.push(FileStep::Sync { file: FILE });
        }
        Ok(repair)
    }
}
