//! What is wrong with an image of two levels, and what can be done about it.

use super::{Cluster, Geometry};
use crate::error::{Error, ErrorKind, Result};
use crate::format::report::{CheckReport, Repair, RepairStep, Severity};
use crate::limits::{MAX_CHECK_LINES, MAX_TABLE_BYTES, TABLE_PIECE_BYTES};
use crate::map::{Bitmap, ByteSource, FileId, HostOffset};

/// Entries a repair makes free; a crash leaves a handful.
const MAX_MENDS: usize = 1 << 16;
/// Clusters of a file that are told apart, a bit each.
const MAX_CLUSTERS: u64 = 1 << 28;
const FILE: FileId = FileId(0);

/// What every format of the family says to a check besides its [`Geometry`].
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Extra {
    /// Where header, first level and the parent's name end.
    pub(in super::super) metadata_end: u64,
    /// The mark of a writer that did not close the image: where it is, and the byte without it.
    pub(in super::super) mark: Option<(u64, u8)>,
}

/// Which clusters of a file are in use.
#[derive(Debug)]
pub(super) struct Places {
    /// All below this are.
    metadata: u32,
    /// None is from this on.
    pub(super) end: u32,
    used: Bitmap,
    packed: Bitmap,
}

impl Places {
    pub(super) fn is_used(&self, n: u32) -> bool {
        n < self.metadata || self.used.contains(n) || self.packed.contains(n)
    }
}

/// An image that was looked at.
pub(in super::super) struct Survey<'a> {
    source: &'a dyn ByteSource,
    geometry: Geometry,
    extra: Extra,
    pub(in super::super) report: CheckReport,
    /// Clusters of the file in use, tables included.
    used: Bitmap,
    /// Those that packed ones touch.
    packed: Bitmap,
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
    /// Those of reading; [`ErrorKind::Limit`] for tables of more than [`MAX_TABLE_BYTES`], or more than [`MAX_CLUSTERS`];
    /// [`ErrorKind::Corrupt`] for more than [`MAX_MENDS`] wrong entries.
    pub(in super::super) fn of(source: &'a dyn ByteSource, geometry: Geometry, extra: Extra) -> Result<Self> {
        let report = CheckReport { blocks: geometry.blocks(), ..CheckReport::default() };
        let (used, packed, mends) = (Bitmap::new(), Bitmap::new(), Vec::new());
        let end = extra.metadata_end;
        let mut survey = Survey { source, geometry, extra, report, used, packed, end, mends, seen: 0 };
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
            return Err(Error::new(ErrorKind::Corrupt, "more entries are wrong than any crash explains"));
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
        if !self.take(at, g.table_bytes)? {
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
                if !self.take(place.0, self.geometry.cluster_bytes)? {
                    let what = format!("cluster {block} lies at {place}, where something else lies already");
                    self.report.add(Severity::Corruption, false, what);
                }
                Ok(())
            }
            // Several lie in one cluster of the file.
            Ok(Cluster::Packed { at, len }) => {
                self.report.allocated += 1;
                self.end = self.end.max(at.0 + u64::from(len));
                let mut shared = false;
                for n in self.clusters(at.0, u64::from(len))? {
                    self.packed.insert(n);
                    shared |= self.used.contains(n);
                }
                if shared {
                    let what =
                        format!("packed cluster {block} lies at {at}, where something else lies already");
                    self.report.add(Severity::Corruption, false, what);
                }
                Ok(())
            }
            Ok(Cluster::Free | Cluster::Zero) => Ok(()),
        }
    }

    /// The clusters of the file that a part of it lies in.
    fn clusters(&self, at: u64, bytes: u64) -> Result<std::ops::Range<u32>> {
        let (first, end) =
            (at / self.geometry.cluster_bytes, (at + bytes).div_ceil(self.geometry.cluster_bytes));
        match (u32::try_from(first), u32::try_from(end)) {
            (Ok(first), Ok(end)) if u64::from(end) <= MAX_CLUSTERS => Ok(first..end),
            _ => {
                let what = format!("it has more than {MAX_CLUSTERS} clusters, too many to be told apart");
                Err(Error::new(ErrorKind::Limit, what))
            }
        }
    }

    /// False if a part of it is in use already.
    fn take(&mut self, at: u64, bytes: u64) -> Result<bool> {
        self.end = self.end.max(at + bytes);
        let mut new = true;
        for n in self.clusters(at, bytes)? {
            new &= self.used.insert(n) && !self.packed.contains(n);
        }
        Ok(new)
    }

    /// Where new clusters may go, for whoever is to write.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where something is wrong that a change could make worse.
    pub(super) fn places(self) -> Result<Places> {
        if let Some(f) = self.report.findings.iter().find(|f| f.severity == Severity::Corruption) {
            let e = Error::new(ErrorKind::Corrupt, format!("{}, so it is not written", f.text));
            return Err(e.hint("vdimg check tells everything that is wrong, vdimg repair may put it right"));
        }
        let cluster = self.geometry.cluster_bytes;
        let end = self.clusters(0, self.kept_end())?.end;
        let metadata = self.clusters(0, self.extra.metadata_end)?.end;
        debug_assert_eq!(u64::from(end) * cluster, self.kept_end());
        Ok(Places { metadata, end, used: self.used, packed: self.packed })
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
            repair.steps.push(RepairStep::Write { file: FILE, at: HostOffset(*at), bytes: vec![0; 8] });
        }
        if !self.mends.is_empty() {
            repair.steps.push(RepairStep::Sync { file: FILE });
        }
        if self.tail() > 0 {
            repair.lines.push(format!("{} bytes at the end are cut off", self.tail()));
            repair.steps.push(RepairStep::SetLen { file: FILE, to: HostOffset(self.kept_end()) });
        }
        if let Some((at, byte)) = self.extra.mark {
            repair.lines.push("the mark of a writer is taken off".into());
            repair.steps.push(RepairStep::Sync { file: FILE });
            repair.steps.push(RepairStep::Write { file: FILE, at: HostOffset(at), bytes: vec![byte] });
        }
        if !repair.steps.is_empty() {
            repair.steps.push(RepairStep::Sync { file: FILE });
        }
        Ok(repair)
    }
}
