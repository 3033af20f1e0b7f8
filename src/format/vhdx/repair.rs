//! Putting a VHDX right without losing anything that is still there.
//!
//! - What its log says goes to its places; of tables of regions and headers the good one to the place of the other, and no header
//!   names a log. What a reader sees does not change: opening shows it already.
//! - An entry whose place lies wholly behind the end of the file, or on metadata, becomes free: there is nothing to keep. In a diff
//!   the parent's older bytes are seen again.
//! - A block cut off in the middle is filled up with zeros.
//! - Where places lie on each other the first stays, and each other gets a copy of its own: all read as before.
//! - What no block names at the end is cut off.
//!
//! The log counts until all that it says is durable, and a header is written over only when the other one is good. Copies are durable
//! before an entry names them, and the file is cut last.

use super::super::FileStep;
use super::super::report::Repair;
use super::bat::{Fault, Layout, Place};
use super::check::{Examined, examine};
use super::header::{Header, Ids};
use super::map::Parts;
use super::place::BLOCK_UNIT;
use super::region::copies;
use super::replayed::{Filling, Patch, Replayed};
use super::unsupported;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_CHECK_LINES, MAX_SEPARATED_BYTES, MAX_VHDX_LOG_BYTES, TABLE_PIECE_BYTES};
use crate::map::{ByteSource, FileId, HostOffset};
use std::collections::BTreeSet;
use uuid::Uuid;
use zerocopy::IntoBytes;

/// A VHDX has one file.
const FILE: FileId = FileId(0);

/// Plans the repair of an image. Nothing is written.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where nothing can be found any more, or nobody knows what an entry means, with the first reason;
/// [`ErrorKind::Limit`] where more would have to be copied than any crash explains; otherwise as [`super::check::check`].
pub(super) fn repair(source: &dyn ByteSource) -> Result<Repair> {
    let examined = examine(source)?;
    let report = examined.as_ref().map_or_else(|hopeless| hopeless, |image| &image.report).clone();
    if let Some(first) = report.findings.iter().find(|f| !f.repairable) {
        return Err(Error::new(ErrorKind::Corrupt, format!("cannot be repaired: {}", first.text)));
    }
    let Some(mut image) = examined.ok().filter(|_| report.unrepairable == 0 && !report.is_clean()) else {
        return Ok(Repair { report, ..Repair::default() });
    };
    let mut work = Work { lines: Vec::new(), untold: 0, steps: vec![FileStep::Sync { file: FILE }] };
    work.write_log(&image.parts, image.file_bytes)?;
    work.mend_regions(&Replayed { file: source, patches: &image.parts.patches })?;
    work.renew_headers(&image.parts);
    work.mend_table(&mut image)?;
    if work.untold > 0 {
        work.lines.push(format!("and {} things more", work.untold));
    }
    Ok(Repair { report, lines: work.lines, steps: work.steps })
}

struct Work {
    lines: Vec<String>,
    /// Lines for which there was no room.
    untold: u64,
    steps: Vec<FileStep>,
}

impl Work {
    fn say(&mut self, line: String) {
        if self.lines.len() < MAX_CHECK_LINES {
            self.lines.push(line);
        } else {
            self.untold += 1;
        }
    }

    fn sync(&mut self) {
        self.steps.push(FileStep::Sync { file: FILE });
    }

    fn write(&mut self, at: u64, bytes: Vec<u8>) {
        self.steps.push(FileStep::Write { file: FILE, at: HostOffset(at), bytes });
    }

    fn write_log(&mut self, parts: &Parts, file_bytes: u64) -> Result<()> {
        let patches = &parts.patches.0;
        if patches.is_empty() {
            return Ok(());
        }
        let bytes = patches.iter().map(Patch::len).fold(0, u64::saturating_add);
        if bytes > MAX_VHDX_LOG_BYTES {
            let what = format!("cannot be repaired: its log would write {bytes} bytes");
            return Err(Error::new(ErrorKind::Limit, what).hint("no writer's log does that"));
        }
        if let Some(p) = patches.iter().find(|p| p.at.saturating_add(p.len()) > file_bytes) {
            return Err(unsupported(format!("its log would write at byte {}, behind the file's end", p.at)));
        }
        self.say(format!(
            "log: its {} sectors or ranges of zeros are written to their places",
            patches.len()
        ));
        for p in patches {
            match &p.what {
                Filling::Bytes(b) => self.write(p.at, b.to_vec()),
                Filling::Zeros(n) => self.write_zeros(p.at, *n),
            }
        }
        self.sync();
        Ok(())
    }

    fn write_zeros(&mut self, at: u64, len: u64) {
        let step = TABLE_PIECE_BYTES as u64;
        for from in (0..len).step_by(TABLE_PIECE_BYTES) {
            let piece = usize::try_from(step.min(len - from)).expect("a piece");
            self.write(at + from, vec![0; piece]);
        }
    }

    fn mend_regions(&mut self, source: &dyn ByteSource) -> Result<()> {
        if let [(first_at, first), (second_at, second)] = copies(source)?
            && first.is_some() != second.is_some()
        {
            self.say("table of regions: the good copy is written over the other".into());
            let at = if first.is_some() { second_at } else { first_at };
            self.write(at, first.or(second).expect("one of them"));
            self.sync();
        }
        Ok(())
    }

    /// Both headers say that no log counts, the one that did not count first.
    fn renew_headers(&mut self, parts: &Parts) {
        self.say("headers: both are written again".into());
        let headers = &parts.headers;
        let file_write = Uuid::new_v4();
        for (slot, ahead) in [(1 - headers.slot, 1), (headers.slot, 2)] {
            let ids = Ids { file_write, log: [0; 16], ..headers.current.ids() };
            self.write(Header::at(slot), headers.current.renewed(ids, ahead).as_bytes().to_vec());
            self.sync();
        }
    }
    /// Frees, lengthens, copies; then the file ends where what is used does.
    fn mend_table(&mut self, image: &mut Examined) -> Result<()> {
        let (mut freed, mut displaced) = (BTreeSet::new(), Vec::new());
        for fault in std::mem::take(&mut image.faults) {
            match fault {
                Fault::Shared(p, _) => displaced.push(p),
                Fault::Missing(p) if p.at < image.file_bytes => {
                    self.say(format!("{}: what is cut off reads as zeros", p.name()));
                }
                Fault::Inside(p) | Fault::Missing(p) => {
                    self.say(format!("{}: freed, there is nothing of it at {}", p.name(), p.at));
                    freed.insert(set(image, p.index, 0));
                }
                Fault::State { .. } | Fault::NoBitmap { .. } => unreachable!("not repairable"),
            }
        }
        // Before the file grows, for what it grows by may be where they lie.
        self.write_pages(image, freed);
        let had = image.file_bytes;
        let (copies, changed) = self.separate(image, &displaced)?;
        let end = image.parts.used_end(&image.table);
        if end > had {
            self.steps.push(FileStep::SetLen { file: FILE, to: HostOffset(end) });
            self.sync();
        }
        if !copies.is_empty() {
            self.steps.extend(copies);
            self.sync();
        }
        self.write_pages(image, changed);
        if had > end {
            self.say(format!("file: cut from {had} to {end} bytes"));
            self.steps.push(FileStep::SetLen { file: FILE, to: HostOffset(end) });
            self.sync();
        }
        Ok(())
    }

    fn write_pages(&mut self, image: &Examined, pages: BTreeSet<u64>) {
        if pages.is_empty() {
            return;
        }
        for page in pages {
            let entries = Layout::entries_of(page);
            let entries = image.table[idx(entries.start)..idx(entries.end)].iter();
            let at = image.parts.layout.page_at(page);
            self.write(at.0, entries.flat_map(|e| e.to_le_bytes()).collect());
        }
        self.sync();
    }

    /// Copies behind the end for places that lie on others, and the pages of the table that name them.
    fn separate(
        &mut self,
        image: &mut Examined,
        displaced: &[Place],
    ) -> Result<(Vec<FileStep>, BTreeSet<u64>)> {
        let bytes = displaced.iter().map(|p| p.len).fold(0, u64::saturating_add);
        if bytes > MAX_SEPARATED_BYTES.max(image.file_bytes) {
            let what = format!(
                "cannot be repaired: {} blocks lie where another does, and copies for them would take {bytes} bytes",
                displaced.len()
            );
            let hint = "no crash does that: take another copy of the image";
            return Err(Error::new(ErrorKind::Limit, what).hint(hint));
        }
        let mut to = image.parts.used_end(&image.table);
        let (mut copies, mut pages) = (Vec::new(), BTreeSet::new());
        for p in displaced {
            let (from, into) = (HostOffset(p.at), HostOffset(to));
            copies.push(FileStep::Copy { file: FILE, from, to: into, len: p.len });
            let state = image.table[idx(p.index)] % BLOCK_UNIT;
            pages.insert(set(image, p.index, to | state));
            self.say(format!("{}: moved to a copy at {to}, for another lies at {}", p.name(), p.at));
            to += p.len;
        }
        Ok((copies, pages))
    }
}

/// Changes an entry; the page it is in.
fn set(image: &mut Examined, index: u64, raw: u64) -> u64 {
    image.table[idx(index)] = raw;
    Layout::page_of(index)
}

fn idx(n: u64) -> usize {
    usize::try_from(n).expect("MAX_TABLE_BYTES")
}
