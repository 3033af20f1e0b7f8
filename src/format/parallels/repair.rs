//! Putting a Parallels image right without losing anything that is still there.
//!
//! - An entry whose place lies wholly behind the end of the file, or inside the table, becomes free: there is nothing to keep.
//! - A place cut off in its midst is filled up with zeros.
//! - Of blocks that share bytes the first stays where it is; each other gets a copy behind the end.
//! - What no block names at the end is cut off, and the mark *in use* is taken off.
//!
//! Copies are durable before an entry names them, and the file is cut last.

use super::super::FileStep;
use super::super::report::{CheckReport, Repair};
use super::check::{Examined, examine};
use super::header::IN_USE_WORD;
use super::layout::{Layout, PAGE_WORDS, idx};
use super::table::Fault;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_CHECK_LINES, MAX_SEPARATED_BYTES, META_PAGE_BYTES};
use crate::map::{ByteSource, FileId, HostBlock, HostOffset};
use std::collections::BTreeSet;

const FILE: FileId = FileId(0);

/// Plans the repair of an image. Nothing is written.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where the header itself is wrong; [`ErrorKind::Limit`] where more would have to be copied than any crash
/// explains; [`ErrorKind::Unsupported`] for an image with an extension; otherwise as a check.
pub(super) fn repair(source: &dyn ByteSource) -> Result<Repair> {
    let hopeless = |report: &CheckReport| {
        let first = report.findings.first().map_or("unknown", |f| &f.text);
        Error::new(ErrorKind::Corrupt, format!("cannot be repaired: {first}"))
    };
    let mut image = examine(source)?.map_err(|report| hopeless(&report))?;
    let report = image.report.clone();
    if report.is_clean() {
        return Ok(Repair { report, ..Repair::default() });
    }
    if image.header.has_extension {
        let what = "has a format extension (dirty bitmaps), which a repair would make wrong";
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    let mut work =
        Work { lines: Vec::new(), copies: Vec::new(), pages: BTreeSet::new(), places: image.used.high_water };
    for fault in std::mem::take(&mut image.faults) {
        work.mend(&mut image, fault);
    }
    work.refuse_flood(&image)?;
    let steps = work.steps(&mut image);
    Ok(Repair { report, lines: work.lines, steps })
}

struct Work {
    lines: Vec<String>,
    /// From, to.
    copies: Vec<(HostOffset, HostOffset)>,
    /// Pages that differ from the file.
    pages: BTreeSet<u32>,
    /// Places in use, and those made for copies.
    places: u32,
}

impl Work {
    fn say(&mut self, line: String) {
        if self.lines.len() < MAX_CHECK_LINES {
            self.lines.push(line);
        }
    }

    fn mend(&mut self, image: &mut Examined, fault: Fault) {
        let layout = image.layout;
        match fault {
            Fault::Inside { block, .. } => self.free(image, block),
            Fault::Missing { block, at } if at.0 >= image.file_bytes => self.free(image, block),
            Fault::Missing { block, .. } => {
                self.say(format!("block {block}: what is cut off reads as zeros"))
            }
            Fault::Shared { block, at } => {
                let to = layout.place_at(HostBlock(self.places));
                if self.places >= layout.most_places() {
                    return self.free(image, block);
                }
                self.places += 1;
                self.copies.push((at, to));
                self.set(image, layout.word_of(block), layout.value_for(to));
                self.say(format!("block {block}: gets a copy of its own at {to}"));
            }
        }
    }

    fn free(&mut self, image: &mut Examined, block: u32) {
        self.set(image, image.layout.word_of(block), 0);
        self.say(format!("block {block}: becomes free, there is nothing at its place"));
    }

    fn set(&mut self, image: &mut Examined, word: u32, value: u32) {
        image.words[idx(word)] = value;
        self.pages.insert(word / PAGE_WORDS);
    }

    fn refuse_flood(&self, image: &Examined) -> Result<()> {
        let bytes = (self.copies.len() as u64).saturating_mul(image.layout.cluster_bytes);
        if bytes > image.file_bytes.max(MAX_SEPARATED_BYTES) {
            let what = format!("{} blocks share their places: no crash does that", self.copies.len());
            return Err(Error::new(ErrorKind::Limit, what));
        }
        Ok(())
    }

    fn steps(&mut self, image: &mut Examined) -> Vec<FileStep> {
        let (layout, sync) = (image.layout, FileStep::Sync { file: FILE });
        // What was read may only be in the page cache.
        let mut steps = vec![sync.clone()];
        let end = layout.end_of(self.places);
        if end.0 > image.file_bytes {
            steps.push(FileStep::SetLen { file: FILE, to: end });
        }
        let len = layout.cluster_bytes;
        steps.extend(self.copies.iter().map(|(from, to)| FileStep::Copy {
            file: FILE,
            from: *from,
            to: *to,
            len,
        }));
        steps.push(sync.clone());
        let first = std::mem::take(&mut self.pages);
        steps.extend(first.into_iter().map(|page| write_of(image, page)));
        steps.push(sync.clone());
        let used = image.used.end.0.max(if self.copies.is_empty() { 0 } else { end.0 });
        if image.file_bytes.max(end.0) > used {
            self.say(format!("{} bytes at the end are given up", image.file_bytes.saturating_sub(used)));
            steps.push(FileStep::SetLen { file: FILE, to: HostOffset(used) });
            steps.push(sync.clone());
        }
        if image.header.in_use {
            self.say("the mark that it is in use is taken off".into());
            self.set(image, IN_USE_WORD, 0);
            steps.push(write_of(image, IN_USE_WORD / PAGE_WORDS));
            steps.push(sync);
        }
        steps
    }
}

/// A page of header and table.
pub(super) fn write_of(image: &Examined, page: u32) -> FileStep {
    let (first, end) = Layout::words_of(&image.layout, page);
    let bytes = image.words[idx(first)..idx(end)].iter().flat_map(|w| w.to_le_bytes()).collect();
    FileStep::Write { file: FILE, at: HostOffset(u64::from(page) * META_PAGE_BYTES), bytes }
}
