//! Putting a QCOW2 right without losing anything that is still there.
//!
//! Nothing but refcounts, flags and marks is changed: every cluster reads after the repair what it read before. Clusters that
//! share a place which said it had one owner are told that they share it, and part when they are written.
//!
//! Where refcounts are lost, or lie where something else is, all of them are counted anew and written behind the file's end; then the
//! header names those. The old ones become free space.
//!
//! Otherwise refcounts that are too low are raised first, then flags are set right, and only then are those lowered that are too high:
//! at any moment a writer who believes them harms nothing.

use super::super::FileStep;
use super::super::bytes::put_be64;
use super::super::report::Repair;
use super::check::{Examined, examine};
use super::header::MAX_REFCOUNT_TABLE_BYTES;
use super::header::incompatible::{CORRUPT, DIRTY};
use super::refcounts::{get, set};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::MAX_CHECK_LINES;
use crate::map::{ByteSource, FileId, HostOffset};
use std::collections::BTreeMap;

/// Most bytes of refcounts that are made anew: they are held in memory.
const MAX_REBUILT_BYTES: u64 = 256 << 20;
/// The image's file, as the steps call it.
const FILE: FileId = FileId(0);

/// Plans the repair of an image. Nothing is written.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where something cannot be repaired, with the first reason; [`ErrorKind::Unsupported`] for images with
/// persistent bitmaps; otherwise as [`super::check()`].
pub fn repair(source: &dyn ByteSource) -> Result<Repair> {
    let hopeless = |report: &super::super::CheckReport| {
        let first = report.findings.iter().find(|f| !f.repairable).map_or("unknown", |f| &f.text);
        Error::new(ErrorKind::Corrupt, format!("cannot be repaired: {first}"))
    };
    let image = examine(source)?.map_err(|report| hopeless(&report))?;
    if image.report.unrepairable > 0 {
        return Err(hopeless(&image.report));
    }
    if image.report.is_clean() {
        return Ok(Repair { report: image.report, lines: Vec::new(), steps: Vec::new() });
    }
    if image.has_bitmaps {
        let what = "it has persistent bitmaps, whose clusters are not known here";
        return Err(Error::new(ErrorKind::Unsupported, what).hint("qemu-img check -r all knows them"));
    }
    let mut work =
        Work { source, image, lines: Vec::new(), untold: 0, steps: vec![FileStep::Sync { file: FILE }] };
    if work.image.rebuild {
        work.rebuild()?;
        work.flags();
        work.marks();
    } else {
        work.counts(true)?;
        work.flags();
        work.counts(false)?;
        work.marks();
        work.cut();
    }
    let mut lines = work.lines;
    if work.untold > 0 {
        lines.push(format!("and {} things more", work.untold));
    }
    Ok(Repair { report: work.image.report, lines, steps: work.steps })
}

struct Work<'a> {
    source: &'a dyn ByteSource,
    image: Examined,
    lines: Vec<String>,
    /// Lines for which there was no room.
    untold: u64,
    steps: Vec<FileStep>,
}

impl Work<'_> {
    fn say(&mut self, line: String) {
        if self.lines.len() < MAX_CHECK_LINES {
            self.lines.push(line);
        } else {
            self.untold += 1;
        }
    }

    fn sync(&mut self) {
        if self.steps.last() != Some(&FileStep::Sync { file: FILE }) {
            self.steps.push(FileStep::Sync { file: FILE });
        }
    }

    /// Pages of refcounts with those that are too low set right, or (`raise` is false) with all of them.
    fn counts(&mut self, raise: bool) -> Result<()> {
        let layout = self.image.layout;
        let order = layout.refcount_order;
        let per_page = (layout.page_bytes() * 8) >> order;
        let mut pages: BTreeMap<u64, Vec<(u64, u16)>> = BTreeMap::new();
        for (cluster, right) in &self.image.wrong {
            pages.entry(cluster / per_page).or_default().push((*cluster, *right));
        }
        for (page, wrong) in pages {
            let first = page * per_page;
            let block = usize::try_from(first / layout.refcounts_per_block()).expect("a block of the table");
            let at =
                HostOffset(self.image.blocks[block] + page * layout.page_bytes() % layout.cluster_bytes());
            let mut bytes = vec![0; usize::try_from(layout.page_bytes()).expect("a page")];
            self.source.read_at(at, &mut bytes)?;
            let before = bytes.clone();
            for (cluster, right) in wrong {
                let i = usize::try_from(cluster - first).expect("of this page");
                let said = get(&bytes, i, order);
                let is_low = said < u64::from(right);
                if raise && !is_low {
                    continue;
                }
                if u64::from(right) > u64::MAX >> (64 - (1u32 << order)) {
                    let what = format!(
                        "cannot be repaired: {right} references do not fit the refcount of cluster {cluster}"
                    );
                    return Err(Error::new(ErrorKind::Corrupt, what));
                }
                set(&mut bytes, i, order, u64::from(right));
                if raise || !is_low {
                    self.say(format!("cluster {cluster} of the file: refcount {said} becomes {right}"));
                }
            }
            if bytes != before {
                self.steps.push(FileStep::Write { file: FILE, at, bytes });
            }
        }
        self.sync();
        Ok(())
    }

    /// New refcounts behind the file's end, and the header that names them.
    fn rebuild(&mut self) -> Result<()> {
        let layout = self.image.layout;
        let (cluster, per_block) = (layout.cluster_bytes(), layout.refcounts_per_block());
        let first = layout.file_clusters();
        // As many as count themselves as well: blocks, and a table for them.
        let (mut blocks, mut table) = (0, 0);
        for _ in 0..16 {
            blocks = (first + blocks + table).div_ceil(per_block);
            table = (blocks * 8).div_ceil(cluster);
        }
        let bytes = blocks * cluster;
        if table * cluster > MAX_REFCOUNT_TABLE_BYTES || bytes > MAX_REBUILT_BYTES {
            let what = format!("the refcounts of its {first} clusters are too many to be made anew");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let most = self.image.counts.iter().copied().max().unwrap_or(0);
        if u64::from(most) > u64::MAX >> (64 - (1u32 << layout.refcount_order)) {
            let what = format!("cannot be repaired: {most} references to a cluster do not fit its refcount");
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        let (table_at, end) = (first * cluster, (first + table + blocks) * cluster);
        let block_at = |n: u64| (first + table + n) * cluster;
        let own = first..first + table + blocks;
        let count = |n: u64| match usize::try_from(n).ok().and_then(|i| self.image.counts.get(i)) {
            Some(count) => u64::from(*count),
            None => u64::from(own.contains(&n)),
        };
        let mut steps = vec![FileStep::SetLen { file: FILE, to: HostOffset(end) }];
        let size = usize::try_from(cluster).expect("2 MiB at most");
        let mut names = vec![0; usize::try_from(table * cluster).expect("MAX_REFCOUNT_TABLE_BYTES")];
        for n in 0..blocks {
            let mut bytes = vec![0; size];
            for i in 0..per_block {
                set(
                    &mut bytes,
                    usize::try_from(i).expect("2 MiB of bits"),
                    layout.refcount_order,
                    count(n * per_block + i),
                );
            }
            steps.push(FileStep::Write { file: FILE, at: HostOffset(block_at(n)), bytes });
            put_be64(&mut names, usize::try_from(n * 8).expect("inside the table"), block_at(n));
        }
        steps.push(FileStep::Write { file: FILE, at: HostOffset(table_at), bytes: names });
        self.steps.extend(steps);
        self.sync();
        let table = u32::try_from(table).expect("MAX_REFCOUNT_TABLE_BYTES");
        self.image.header.set_refcount_table(table_at, table);
        self.say(format!("refcounts: counted anew, in {blocks} blocks from byte {table_at} on"));
        self.header();
        Ok(())
    }

    fn header(&mut self) {
        let mut bytes = Vec::new();
        self.image.header.write_to(&mut bytes);
        self.steps.push(FileStep::Write { file: FILE, at: HostOffset(0), bytes });
        self.sync();
    }

    fn flags(&mut self) {
        for (at, entry) in std::mem::take(&mut self.image.flags) {
            self.say(format!("entry at byte {at}: becomes {entry:#018x}"));
            let bytes = entry.to_be_bytes().to_vec();
            self.steps.push(FileStep::Write { file: FILE, at: HostOffset(at), bytes });
        }
        self.sync();
    }

    /// Marks that no longer hold.
    fn marks(&mut self) {
        let header = &mut self.image.header;
        let bits = header.incompatible();
        if bits & (DIRTY | CORRUPT) == 0 {
            return;
        }
        header.set_incompatible(bits & !(DIRTY | CORRUPT));
        self.say("header: no longer marked as dirty or corrupt".into());
        self.header();
    }

    /// Clusters at the file's end that nothing names.
    fn cut(&mut self) {
        let used = self.image.counts.iter().rposition(|n| *n > 0).map_or(0, |last| last as u64 + 1);
        let to = used * self.image.layout.cluster_bytes();
        if to < self.image.layout.file_bytes {
            self.say(format!("file: cut from {} to {to} bytes", self.image.layout.file_bytes));
            self.steps.push(FileStep::SetLen { file: FILE, to: HostOffset(to) });
            self.sync();
        }
    }
}
