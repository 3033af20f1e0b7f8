//! Putting a QCOW2 right without losing anything that is still there.
//!
//! Nothing but refcounts, flags and marks is changed: every cluster reads after the repair what it read before. Clusters that
//! share a place which said it had one owner are told that they share it, and part when they are written.
//!
//! Refcounts that are too low are raised first, then flags are set right, and only then are those lowered that are too high:
//! at any moment a writer who believes them harms nothing.

use super::super::FileStep;
use super::super::report::Repair;
use super::check::{Examined, examine};
use super::header::incompatible::{CORRUPT, DIRTY};
use super::refcounts::{get, set};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::MAX_CHECK_LINES;
use crate::map::{ByteSource, FileId, HostOffset};
use std::collections::BTreeMap;

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
    work.counts(true)?;
    work.flags();
    work.counts(false)?;
    work.marks();
    work.cut();
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
        let mut bytes = Vec::new();
        header.write_to(&mut bytes);
        self.say("header: no longer marked as dirty or corrupt".into());
        self.steps.push(FileStep::Write { file: FILE, at: HostOffset(0), bytes });
        self.sync();
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
