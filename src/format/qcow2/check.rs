//! What is wrong with a QCOW2: every reference to every cluster is counted, and compared with what the refcounts and the
//! flags in the entries say.

use super::super::bytes::be64;
use super::super::report::{CheckReport, Severity};
use super::header::{Header, MAX_REFCOUNT_TABLE_BYTES, incompatible};
use super::layout::{COPIED, Cluster, Layout, OFFSET};
use super::refcounts::get;
use super::snapshots::{self, Snapshot};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::TABLE_PIECE_BYTES;
use crate::map::{ByteSource, HostOffset};
use std::collections::BTreeMap;

/// Clusters of a file that is checked: two bytes each are counted in.
const MAX_CLUSTERS: u64 = 1 << 28;

/// A QCOW2 whose references were counted.
pub(super) struct Examined {
    pub(super) header: Header,
    pub(super) layout: Layout,
    pub(super) report: CheckReport,
    /// References to each cluster of the file.
    pub(super) counts: Vec<u16>,
    /// Where refcount blocks are, those that can be used.
    pub(super) blocks: Vec<u64>,
    /// Entries whose flag says something else than the references: where each is, and what it should be.
    pub(super) flags: BTreeMap<u64, u64>,
    /// Refcounts that are too low, and too high, by cluster: what each should be.
    pub(super) wrong: BTreeMap<u64, u16>,
    /// Refcounts have no table, or lack blocks that are needed, or lie where something else is: they can be made anew elsewhere.
    pub(super) rebuild: bool,
    tables: Vec<bool>,
    /// Clusters of refcount table and blocks.
    structure: Vec<usize>,
    /// Clusters that are used by what is not looked into: nothing is called a leak then.
    pub(super) has_bitmaps: bool,
}

/// Checks an image. Nothing is written.
///
/// # Errors
/// [`ErrorKind::NotThisFormat`], [`ErrorKind::Unsupported`], [`ErrorKind::Limit`] for files too large to be counted, and errors of
/// reading. A QCOW2 that cannot be used is no error but a report with a corruption.
pub fn check(source: &dyn ByteSource) -> Result<CheckReport> {
    Ok(match examine(source)? {
        Ok(examined) => examined.report,
        Err(hopeless) => hopeless,
    })
}

/// The inner error is the report on an image whose tables cannot even be found.
pub(super) fn examine(source: &dyn ByteSource) -> Result<std::result::Result<Examined, CheckReport>> {
    let found = Header::read(source).and_then(|h| {
        let layout = h.layout(source.len())?;
        let snapshots = snapshots::read(source, &h, &layout)?;
        Ok((h, layout, snapshots))
    });
    let (header, layout, (snapshots, snapshots_end)) = match found {
        Ok(found) => found,
        Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Limit) => {
            return Ok(Err(CheckReport::hopeless(&e)));
        }
        Err(e) => return Err(e),
    };
    let clusters = layout.file_clusters();
    if clusters > MAX_CLUSTERS {
        let what = format!("the file has {clusters} clusters; {MAX_CLUSTERS} at most can be checked");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    let many = usize::try_from(clusters).expect("MAX_CLUSTERS");
    let mut e = Examined {
        report: CheckReport { blocks: layout.blocks(), ..CheckReport::default() },
        counts: vec![0; many],
        tables: vec![false; many],
        blocks: Vec::new(),
        flags: BTreeMap::new(),
        wrong: BTreeMap::new(),
        rebuild: false,
        structure: Vec::new(),
        has_bitmaps: header.autoclear() & 1 != 0,
        header,
        layout,
    };
    e.count_tables(&snapshots, snapshots_end);
    e.count_all(source, &snapshots)?;
    // Last: whatever else lies there stays there.
    e.count_refcounts(source)?;
    e.compare_counts(source)?;
    if e.rebuild {
        for i in std::mem::take(&mut e.structure) {
            e.counts[i] -= 1;
        }
    }
    e.compare_flags(source)?;
    e.judge_header();
    Ok(Ok(e))
}

impl Examined {
    fn corrupt(&mut self, repairable: bool, what: String) {
        self.report.add(Severity::Corruption, repairable, what);
    }

    /// One more reference to the clusters of a range. False if it does not lie inside the file.
    fn count(&mut self, at: u64, bytes: u64, is_table: bool) -> bool {
        let bits = self.layout.cluster_bits;
        let Some(last) = bytes.checked_sub(1).and_then(|n| at.checked_add(n)) else { return bytes == 0 };
        if last >> bits >= self.counts.len() as u64 {
            return false;
        }
        for n in at >> bits..=last >> bits {
            let i = usize::try_from(n).expect("MAX_CLUSTERS");
            if self.counts[i] > 0 && (is_table || self.tables[i]) {
                self.corrupt(false, format!("cluster {n} of the file is a table and something else as well"));
            }
            self.counts[i] = self.counts[i].saturating_add(1);
            self.tables[i] |= is_table;
        }
        true
    }

    fn count_tables(&mut self, snapshots: &[Snapshot], snapshots_end: u64) {
        self.count(0, self.layout.cluster_bytes(), true);
        self.count(self.layout.l1_at.0, u64::from(self.layout.l1_entries) * 8, true);
        if !snapshots.is_empty() {
            let at = self.header.snapshots_at();
            self.count(at, snapshots_end - at, true);
        }
        for s in snapshots {
            self.count(s.l1_at, u64::from(s.l1_entries) * 8, true);
        }
    }

    fn count_all(&mut self, source: &dyn ByteSource, snapshots: &[Snapshot]) -> Result<()> {
        // Tables that several first-level tables name are one table each.
        let mut seen = std::collections::BTreeSet::new();
        let own = (self.layout.l1_at.0, u64::from(self.layout.l1_entries));
        let saved = snapshots.iter().map(|s| (s.l1_at, u64::from(s.l1_entries)));
        for (n, (at, entries)) in std::iter::once(own).chain(saved).enumerate() {
            for (i, entry) in read_words(source, at, entries)?.into_iter().enumerate() {
                let table = entry & OFFSET;
                if entry == 0 {
                    continue;
                }
                let bytes = self.layout.cluster_bytes();
                let fits = table.checked_add(bytes).is_some_and(|end| end <= self.layout.file_bytes);
                if entry & !(OFFSET | COPIED) != 0 || !table.is_multiple_of(bytes) || table == 0 || !fits {
                    let whose = if n == 0 { "the first-level table" } else { "a snapshot's table" };
                    self.corrupt(
                        false,
                        format!("entry {i} of {whose} is {entry:#018x}, which names no table"),
                    );
                    continue;
                }
                let first = seen.insert(table);
                if first || self.tables[usize::try_from(table / bytes).expect("MAX_CLUSTERS")] {
                    self.count_table(table, first);
                }
                self.count_entries(source, table, n == 0)?;
            }
        }
        Ok(())
    }

    /// A second-level table: snapshots may share it, so that it is named again is no overlap.
    fn count_table(&mut self, at: u64, first: bool) {
        if first {
            self.count(at, self.layout.cluster_bytes(), true);
        } else {
            let i = usize::try_from(at >> self.layout.cluster_bits).expect("MAX_CLUSTERS");
            self.counts[i] = self.counts[i].saturating_add(1);
        }
    }

    fn count_entries(&mut self, source: &dyn ByteSource, table: u64, is_active: bool) -> Result<()> {
        for (at, entry, bitmap) in self.entries(source, table)? {
            let cluster = self.layout.cluster(entry, bitmap);
            let inside = match cluster {
                Ok(Cluster::Free | Cluster::Unplaced(_) | Cluster::Zero(None)) => true,
                Ok(Cluster::Data(p) | Cluster::Partly(p, _) | Cluster::Zero(Some(p))) => {
                    self.report.allocated += u64::from(is_active);
                    self.count(p.at.0, self.layout.cluster_bytes(), false)
                }
                Ok(Cluster::Packed { at, len }) => {
                    self.report.allocated += u64::from(is_active);
                    self.count(at.0, u64::from(len), false)
                }
                Err(_) => false,
            };
            if !inside {
                self.corrupt(false, format!("the entry at byte {at} is {entry:#018x}, which names no data"));
            }
        }
        Ok(())
    }

    /// Entries of a table that are not 0, each with its place in the file and its bitmap.
    fn entries(&self, source: &dyn ByteSource, table: u64) -> Result<Vec<(u64, u64, u64)>> {
        let words = read_words(source, table, self.layout.cluster_bytes() / 8)?;
        let step = if self.layout.extended { 2 } else { 1 };
        let entry = |(i, w): (usize, &[u64])| {
            (table + i as u64 * self.layout.entry_bytes(), w[0], w.get(1).copied().unwrap_or(0))
        };
        let all = words.chunks(step).enumerate().map(entry);
        Ok(all.filter(|(_, entry, bitmap)| *entry != 0 || *bitmap != 0).collect())
    }

    /// A cluster of the refcount table or a block. False if it does not lie inside the file.
    fn count_structure(&mut self, at: u64, bytes: u64, what: &str) -> bool {
        let bits = self.layout.cluster_bits;
        let fits = at.checked_add(bytes).is_some_and(|end| end <= self.layout.file_bytes);
        if !fits {
            return false;
        }
        for n in at >> bits..(at + bytes) >> bits {
            let i = usize::try_from(n).expect("MAX_CLUSTERS");
            if self.counts[i] > 0 {
                self.must_be_rebuilt(format!("cluster {n} of the file is {what} and something else as well"));
            }
            self.counts[i] = self.counts[i].saturating_add(1);
            self.tables[i] = true;
            self.structure.push(i);
        }
        true
    }

    fn must_be_rebuilt(&mut self, what: String) {
        self.rebuild = true;
        self.corrupt(true, what);
    }

    fn count_refcounts(&mut self, source: &dyn ByteSource) -> Result<()> {
        let at = self.header.refcount_table_at();
        let bytes = u64::from(self.header.refcount_table_clusters()) * self.layout.cluster_bytes();
        if bytes == 0 || bytes > MAX_REFCOUNT_TABLE_BYTES {
            self.must_be_rebuilt(format!("the refcount table has {bytes} bytes"));
            return Ok(());
        }
        if let Err(e) = self.layout.check_table("refcount table", at, bytes) {
            self.must_be_rebuilt(e.to_string());
            return Ok(());
        }
        self.count_structure(at, bytes, "the refcount table");
        for (n, block) in read_words(source, at, bytes / 8)?.into_iter().enumerate() {
            let cluster = self.layout.cluster_bytes();
            let named = block & !OFFSET == 0 && block.is_multiple_of(cluster);
            let sound = block == 0 || named && self.count_structure(block, cluster, "a refcount block");
            if !sound {
                self.must_be_rebuilt(format!("refcount block {n} at byte {block} is no cluster of the file"));
            }
            self.blocks.push(if sound { block } else { 0 });
        }
        Ok(())
    }

    /// Refcounts against references.
    fn compare_counts(&mut self, source: &dyn ByteSource) -> Result<()> {
        if self.blocks.is_empty() {
            return Ok(());
        }
        let per_block = usize::try_from(self.layout.refcounts_per_block()).expect("2 MiB of bits");
        let cluster = usize::try_from(self.layout.cluster_bytes()).expect("2 MiB at most");
        let mut bytes = vec![0; cluster];
        for n in 0..self.blocks.len().max(self.counts.len().div_ceil(per_block)) {
            let at = self.blocks.get(n).copied().unwrap_or(0);
            if at == 0 {
                let used = self.counts.iter().skip(n * per_block).take(per_block).filter(|c| **c > 0).count();
                if used > 0 {
                    self.must_be_rebuilt(format!(
                        "refcount block {n} is missing, for {used} clusters in use"
                    ));
                }
                continue;
            }
            source.read_at(HostOffset(at), &mut bytes)?;
            for i in 0..per_block {
                let (number, said) = (n * per_block + i, get(&bytes, i, self.layout.refcount_order));
                let right = self.counts.get(number).copied().unwrap_or(0);
                if said != u64::from(right) {
                    self.count_is_wrong(number as u64, said, right);
                }
            }
        }
        Ok(())
    }

    fn count_is_wrong(&mut self, cluster: u64, said: u64, right: u16) {
        let what = format!("cluster {cluster} of the file has refcount {said} and {right} references");
        if said < u64::from(right) {
            self.corrupt(true, what);
        } else if self.has_bitmaps {
            return;
        } else {
            self.report.add(Severity::Leak, true, what);
        }
        self.wrong.insert(cluster, right);
    }

    /// Flags in the entries of the disk itself against references.
    fn compare_flags(&mut self, source: &dyn ByteSource) -> Result<()> {
        let l1 = read_words(source, self.layout.l1_at.0, u64::from(self.layout.l1_entries))?;
        for (i, entry) in l1.into_iter().enumerate() {
            let table = entry & OFFSET;
            let fits =
                table.checked_add(self.layout.cluster_bytes()).is_some_and(|e| e <= self.layout.file_bytes);
            if entry == 0 || !fits || !table.is_multiple_of(self.layout.cluster_bytes()) {
                continue;
            }
            self.compare_flag(self.layout.l1_at.0 + i as u64 * 8, entry);
            for (at, entry, bitmap) in self.entries(source, table)? {
                let placed = matches!(
                    self.layout.cluster(entry, bitmap),
                    Ok(Cluster::Data(_) | Cluster::Partly(..) | Cluster::Zero(Some(_)))
                );
                if placed {
                    self.compare_flag(at, entry);
                }
            }
        }
        Ok(())
    }

    fn compare_flag(&mut self, at: u64, entry: u64) {
        let cluster = usize::try_from((entry & OFFSET) >> self.layout.cluster_bits).unwrap_or(usize::MAX);
        let Some(count) = self.counts.get(cluster).copied() else { return };
        let right = if count == 1 { entry | COPIED } else { entry & !COPIED };
        if entry != right {
            let what = format!(
                "the entry at byte {at} says that cluster {cluster} has {}; there are {count} references",
                if entry & COPIED != 0 { "one owner" } else { "several owners" }
            );
            self.flags.insert(at, right);
            self.corrupt(true, what);
        }
    }

    fn judge_header(&mut self) {
        if self.header.has(incompatible::CORRUPT) {
            self.corrupt(self.report.unrepairable == 0, "it is marked as corrupt".into());
        }
        if self.header.has(incompatible::DIRTY) {
            let what = "it is marked as not closed, so that refcounts may be wrong".to_string();
            self.report.add(Severity::Leak, true, what);
        }
    }
}

/// Big-endian words from `at` on.
pub(super) fn read_words(source: &dyn ByteSource, at: u64, count: u64) -> Result<Vec<u64>> {
    let mut words = Vec::new();
    let mut piece = vec![0; TABLE_PIECE_BYTES];
    let (mut done, end) = (0, count * 8);
    while done < end {
        let len = usize::try_from(end - done).map_or(piece.len(), |left| left.min(piece.len()));
        source.read_at(HostOffset(at + done), &mut piece[..len])?;
        words.extend((0..len / 8).map(|i| be64(&piece, i * 8).expect("inside the piece")));
        done += len as u64;
    }
    Ok(words)
}
