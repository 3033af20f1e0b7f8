//! Putting a VHD right without losing anything that is still there.
//!
//! - The footer is written again at whichever end it is missing.
//! - An entry whose block lies wholly behind the end of the file, or on metadata, becomes free: there is nothing to keep. In a
//!   differencing image the parent's older bytes are seen again.
//! - A block cut off in the middle is filled up with zeros.
//! - Where blocks lie on each other the first stays, and each other gets a copy of its own: all read as before.
//! - Holes are filled from the end, and the file is cut behind the last block.
//!
//! Every step order survives a power cut: copies are durable before an entry names them, and nothing is written
//! over a block before the entry that named it is durably gone.

use super::super::FileStep;
use super::super::report::{CheckReport, Repair};
use super::check::{Examined, examine};
use super::footer::FOOTER_BYTES;
use super::layout::{END_OF_SECTORS, FREE, idx};
use super::table::{end, entry_of, fillings, placed};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_CHECK_LINES, MAX_SEPARATED_BYTES, META_PAGE_BYTES};
use crate::map::{ByteSource, FileId, HostOffset, MetaKey};
use std::collections::BTreeSet;
use zerocopy::IntoBytes;

/// A VHD has one file.
const FILE: FileId = FileId(0);

/// Plans the repair of an image. Nothing is written.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where nothing can be found any more, with the reason; [`ErrorKind::Limit`] where more would have
/// to be copied than any crash explains; otherwise as [`super::check::check`].
pub(super) fn repair(source: &dyn ByteSource) -> Result<Repair> {
    let found = examine(source)?;
    let report = found.report;
    if report.unrepairable > 0 {
        let first = report.findings.iter().find(|f| !f.repairable).map_or("unknown", |f| &f.text);
        return Err(Error::new(ErrorKind::Corrupt, format!("cannot be repaired: {first}")));
    }
    let Some(image) = found.image.filter(|_| !report.is_clean()) else {
        return Ok(Repair { report, ..Repair::default() });
    };
    let mut work = Work::new(image);
    work.mend_copy();
    work.free_what_is_gone();
    work.lengthen();
    work.separate()?;
    work.fill_holes();
    work.end_file();
    Ok(work.done(report))
}

/// Steps in the making, and what the image is like behind them.
pub(super) struct Work {
    pub(super) image: Examined,
    /// Pages of the table that differ from the file.
    pages: BTreeSet<u32>,
    lines: Vec<String>,
    /// Lines for which there was no room.
    untold: u64,
    pub(super) steps: Vec<FileStep>,
}

impl Work {
    pub(super) fn new(image: Examined) -> Self {
        let steps = vec![FileStep::Sync { file: FILE }];
        Work { image, pages: BTreeSet::new(), lines: Vec::new(), untold: 0, steps }
    }

    fn done(mut self, report: CheckReport) -> Repair {
        if self.untold > 0 {
            self.lines.push(format!("and {} things more", self.untold));
        }
        Repair { report, lines: self.lines, steps: self.steps }
    }

    fn say(&mut self, line: String) {
        if self.lines.len() < MAX_CHECK_LINES {
            self.lines.push(line);
        } else {
            self.untold += 1;
        }
    }

    pub(super) fn sync(&mut self) {
        self.steps.push(FileStep::Sync { file: FILE });
    }

    pub(super) fn write(&mut self, at: u64, bytes: Vec<u8>) {
        self.steps.push(FileStep::Write { file: FILE, at: HostOffset(at), bytes });
    }

    pub(super) fn copy(&mut self, from: u64, to: u64) {
        let len = self.image.layout.stride();
        self.steps.push(FileStep::Copy { file: FILE, from: HostOffset(from), to: HostOffset(to), len });
    }

    pub(super) fn set_len(&mut self, to: u64) {
        self.steps.push(FileStep::SetLen { file: FILE, to: HostOffset(to) });
        self.image.file_bytes = to;
    }

    pub(super) fn footer(&self) -> Vec<u8> {
        self.image.footers.best.as_bytes().to_vec()
    }

    /// Before anything else: what follows moves the other footer.
    pub(super) fn mend_copy(&mut self) {
        if !self.image.footers.copy_is_good {
            self.say("footer: copied from the end of the file to its beginning".into());
            self.write(0, self.footer());
            self.sync();
        }
    }

    pub(super) fn set(&mut self, block: u32, entry: u32) {
        self.image.table[idx(block)] = entry;
        if let MetaKey::Page { number, .. } = self.image.layout.page_of(block) {
            self.pages.insert(u32::try_from(number).expect("a page of the table"));
        }
    }

    /// The changed pages, behind a sync of what they name.
    pub(super) fn write_pages(&mut self) {
        if self.pages.is_empty() {
            return;
        }
        self.sync();
        for page in std::mem::take(&mut self.pages) {
            let (first, end) = self.image.layout.entries_of(page);
            let entries = &self.image.table[idx(first)..idx(end)];
            let bytes = entries.iter().flat_map(|v| v.to_be_bytes()).collect();
            self.write(self.image.layout.entry_at(first).0, bytes);
        }
        self.sync();
    }

    fn free_what_is_gone(&mut self) {
        for p in placed(&self.image.table) {
            let layout = &self.image.layout;
            let lost = p.start + layout.bitmap_bytes >= self.image.file_bytes;
            let why = match (layout.metadata_in(p.start), lost) {
                (Some(_), _) => "no block can lie there",
                (None, true) => "that is behind the file's end",
                (None, false) => continue,
            };
            let (unit, at) = (layout.unit(p.block), p.start);
            let (from, to) = (unit.start().0, unit.end().0);
            self.say(format!(
                "block {} (bytes {from} to {to} of the disk): freed, it lay at {at}, {why}",
                p.block
            ));
            self.set(p.block, FREE);
        }
        self.write_pages();
    }

    pub(super) fn end(&self) -> u64 {
        end(&self.image.table, &self.image.layout)
    }

    /// A block cut off gets the rest of its bytes.
    pub(super) fn lengthen(&mut self) {
        let end = self.end();
        if end > self.image.file_bytes {
            self.say(format!("file: filled up with {} bytes of zeros", end - self.image.file_bytes));
            self.set_len(end);
            self.sync();
        }
    }

    /// Copies for blocks that lie on others.
    fn separate(&mut self) -> Result<()> {
        let stride = self.image.layout.stride();
        let (mut taken, mut displaced) = (0, Vec::new());
        for p in placed(&self.image.table) {
            if p.start < taken {
                displaced.push(p);
            } else {
                taken = p.start + stride;
            }
        }
        let mut to = self.end();
        let bytes = stride.max(META_PAGE_BYTES).saturating_mul(displaced.len() as u64);
        if bytes > MAX_SEPARATED_BYTES.max(self.image.file_bytes) || to.saturating_add(bytes) > END_OF_SECTORS
        {
            let what = format!(
                "cannot be repaired: {} blocks lie where another does, and copies for them would take {bytes} bytes",
                displaced.len()
            );
            let hint = "no crash does that: take another copy of the image";
            return Err(Error::new(ErrorKind::Limit, what).hint(hint));
        }
        for p in displaced {
            self.copy(p.start, to);
            self.set(p.block, entry_of(to));
            self.say(format!("block {}: moved to a copy at {to}, for another lies at {}", p.block, p.start));
            to += stride;
        }
        self.image.file_bytes = self.image.file_bytes.max(to);
        self.write_pages();
        Ok(())
    }

    pub(super) fn fill_holes(&mut self) {
        let moves = fillings(&self.image.table, &self.image.layout);
        for (p, to) in &moves {
            self.copy(p.start, *to);
            self.set(p.block, entry_of(*to));
        }
        let moved = moves.len();
        if moved > 0 {
            self.say(format!("{moved} blocks: moved into holes"));
        }
        self.write_pages();
    }

    /// The footer behind the last block, and nothing behind the footer.
    pub(super) fn end_file(&mut self) {
        let (end, had) = (self.end(), self.image.file_bytes);
        self.say(format!("footer: written at {end}"));
        self.sync();
        self.write(end, self.footer());
        self.sync();
        if had > end + FOOTER_BYTES {
            self.say(format!("file: cut from {had} to {} bytes", end + FOOTER_BYTES));
        }
        self.set_len(end + FOOTER_BYTES);
        self.sync();
    }
}
