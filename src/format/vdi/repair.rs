//! Putting a VDI right without losing anything that is still there.
//!
//! - An entry whose place lies wholly behind the end of the file becomes free: there is nothing to keep. In a
//!   differencing image the parent's older bytes are seen again, as VirtualBox does it.
//! - A block at a place that may not exist, but does (VirtualBox and QEMU append there once the count has reached
//!   the number of blocks), moves to one that may.
//! - A place cut off in the middle is filled up with zeros.
//! - A place that several entries name stays with the first; each other gets a copy of its own. VirtualBox frees
//!   them all; here every block reads after the repair what it read before.
//! - The count is set anew, holes are filled from the end, the file is cut. Bytes that belong to no block go that way:
//!   each such range is named, and whether it is zeros.
//!
//! Every step order survives a power cut: copies are durable before an entry names them, and nothing is written
//! over a place before the entry that named it is durably gone.

use super::super::FileStep;
use super::super::report::{CheckReport, Repair};
use super::super::steps::all_zeros;
use super::check::{Examined, examine};
use super::dense::relocations;
use super::layout::{Entry, FREE, PAGE_ENTRIES, idx};
use super::table::{page_of, survey};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_CHECK_LINES, MAX_ORPHAN_LOOK_BYTES, MAX_SEPARATED_BYTES, META_PAGE_BYTES};
use crate::map::{Bitmap, ByteSource, FileId, HostBlock, HostOffset};
use std::collections::BTreeSet;

/// A VDI has one file.
const FILE: FileId = FileId(0);

/// Plans the repair of an image. Nothing is written.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where the header itself is wrong, with the first reason; [`ErrorKind::Limit`] where more would
/// have to be copied than any crash explains; otherwise as [`super::check()`].
pub fn repair(source: &dyn ByteSource) -> Result<Repair> {
    let hopeless = |report: &CheckReport| {
        let first = report.findings.iter().find(|f| !f.repairable).map_or("unknown", |f| &f.text);
        Error::new(ErrorKind::Corrupt, format!("cannot be repaired: {first}"))
    };
    let examined = examine(source)?.map_err(|report| hopeless(&report))?;
    let report = examined.report.clone();
    if report.unrepairable > 0 {
        return Err(hopeless(&report));
    }
    if report.is_clean() {
        return Ok(Repair { report, lines: Vec::new(), steps: Vec::new() });
    }
    let mut work = Work::new(examined);
    work.free_what_is_gone();
    work.refuse_flood()?;
    if !work.image.is_fixed() {
        work.name_orphans(source)?;
    }
    work.write_pages();
    work.separate();
    work.raise();
    work.write_copies();
    if !work.image.is_fixed() {
        work.make_dense();
    }
    Ok(Repair { report, lines: work.told(), steps: work.steps })
}

struct Work {
    image: Examined,
    used: Bitmap,
    high_water: u32,
    no_hole_below: u32,
    /// Entries that need another place: theirs belongs to one before them, or may not exist.
    displaced: Vec<(u32, HostBlock)>,
    copies: Vec<FileStep>,
    /// Where the last place ends that is copied from.
    needed: HostOffset,
    /// Pages of the table that differ from the file.
    pages: BTreeSet<u32>,
    file_bytes: u64,
    lines: Vec<String>,
    /// Lines for which there was no room.
    untold: u64,
    /// Bytes that are given up and not known to be zeros.
    given_up: u64,
    steps: Vec<FileStep>,
}

impl Work {
    fn new(image: Examined) -> Self {
        let file_bytes = image.file_bytes;
        Work {
            image,
            used: Bitmap::new(),
            high_water: 0,
            no_hole_below: 0,
            displaced: Vec::new(),
            copies: Vec::new(),
            needed: HostOffset(0),
            pages: BTreeSet::new(),
            file_bytes,
            lines: Vec::new(),
            untold: 0,
            given_up: 0,
            steps: vec![FileStep::Sync { file: FILE }],
        }
    }

    fn say(&mut self, line: String) {
        if self.lines.len() < MAX_CHECK_LINES {
            self.lines.push(line);
        } else {
            self.untold += 1;
        }
    }

    fn told(&mut self) -> Vec<String> {
        let mut lines = std::mem::take(&mut self.lines);
        if self.untold > 0 {
            lines.push(format!("and {} things more", self.untold));
        }
        if self.given_up > 0 {
            lines.push(format!(
                "in all {} bytes of the file that belong to no block are given up; a copy of the file made before keeps \
                 them",
                self.given_up
            ));
        }
        lines
    }

    /// Ranges of the file behind the table that no entry names, in order.
    fn orphans(&self) -> Vec<(u64, u64)> {
        let layout = self.image.layout;
        let far: BTreeSet<u32> =
            self.displaced.iter().map(|(_, p)| p.0).filter(|p| *p >= self.high_water).collect();
        let near = (0..self.high_water).filter(|p| self.used.contains(*p));
        let (mut found, mut from) = (Vec::new(), layout.start_of(0).0);
        for place in near.chain(far) {
            let start = layout.start_of(place).0;
            if start > from {
                found.push((from, start));
            }
            from = layout.end_of(place + 1).0;
        }
        if self.file_bytes > from {
            found.push((from, self.file_bytes));
        }
        found
    }

    /// What belongs to no block is written over or cut off below: here it is said.
    fn name_orphans(&mut self, source: &dyn ByteSource) -> Result<()> {
        let mut looks = MAX_ORPHAN_LOOK_BYTES;
        for (from, to) in self.orphans() {
            let len = to - from;
            let look = len <= looks;
            looks -= if look { len } else { 0 };
            let what = match look {
                true if all_zeros(source, from, to)? => "zeros",
                true => "data",
                false => "not looked at",
            };
            self.given_up += if what == "zeros" { 0 } else { len };
            self.say(format!(
                "bytes {from} to {to} of the file: given up, {len} bytes that belong to no block ({what})"
            ));
        }
        Ok(())
    }

    fn set(&mut self, block: u32, value: u32) {
        self.image.table[idx(block)] = value;
        self.pages.insert(block / PAGE_ENTRIES);
    }

    fn take(&mut self, place: u32) -> bool {
        self.high_water = self.high_water.max(place + 1);
        self.used.insert(place)
    }

    fn free_what_is_gone(&mut self) {
        let layout = self.image.layout;
        for block in 0..layout.blocks {
            let Entry::At(place) = Entry::of(self.image.table[idx(block)]) else { continue };
            if layout.data_of(place).0 >= self.image.file_bytes {
                self.set(block, FREE);
                let unit = layout.unit(block);
                let (from, to) = (unit.start().0, unit.end().0);
                self.say(format!(
                    "block {block} (bytes {from} to {to} of the disk): freed, its place {} lies behind the file's end",
                    place.0
                ));
            } else if place.0 >= layout.blocks || !self.take(place.0) {
                self.displaced.push((block, place));
            }
        }
    }

    /// A small file can ask for copies without end.
    fn refuse_flood(&self) -> Result<()> {
        let layout = self.image.layout;
        let there = |from: HostBlock| self.file_bytes.saturating_sub(layout.start_of(from.0).0);
        let cost = |from| there(from).min(layout.stride()).max(META_PAGE_BYTES);
        let bytes = self.displaced.iter().map(|(_, from)| cost(*from)).fold(0, u64::saturating_add);
        if bytes <= MAX_SEPARATED_BYTES.max(self.file_bytes) {
            return Ok(());
        }
        let what = format!(
            "cannot be repaired: {} blocks lie where another does, and copies for them would take {bytes} bytes",
            self.displaced.len()
        );
        Err(Error::new(ErrorKind::Limit, what).hint("no crash does that: take another copy of the image"))
    }

    /// A place behind all others, or a hole.
    fn new_place(&mut self) -> u32 {
        let mut to = self.high_water;
        if to >= self.image.layout.blocks {
            while self.used.contains(self.no_hole_below) {
                self.no_hole_below += 1;
            }
            to = self.no_hole_below;
        }
        assert!(to < self.image.layout.blocks, "there are as many places as blocks");
        self.take(to);
        to
    }

    fn separate(&mut self) {
        let layout = self.image.layout;
        for (block, from) in std::mem::take(&mut self.displaced) {
            let to = self.new_place();
            self.set(block, to);
            self.copies.push(FileStep::Copy {
                file: FILE,
                from: layout.start_of(from.0),
                to: layout.start_of(to),
                len: layout.stride(),
            });
            self.needed = self.needed.max(layout.end_of(from.0 + 1));
            // Of other images all that belongs to no block was named before.
            let over = if self.image.is_fixed() { ", over bytes that belonged to no block" } else { "" };
            self.say(if from.0 < layout.blocks {
                format!("block {block}: moved to a copy of place {}, which another block has{over}", from.0)
            } else {
                format!("block {block}: moved to place {to} from {}, which may not exist{over}", from.0)
            });
        }
    }

    /// Length and count, before anything is copied: nobody else would add a block where the copies go.
    fn raise(&mut self) {
        let layout = self.image.layout;
        let end = layout.end_of(self.high_water).max(self.needed);
        if end.0 > self.file_bytes {
            self.say(format!("file: filled up with {} bytes of zeros", end.0 - self.file_bytes));
            self.set_len(end);
        }
        let said = self.image.header.allocated();
        let least = if self.image.is_fixed() { layout.blocks } else { self.high_water };
        let safe = if said > layout.blocks { least } else { said.max(least) };
        self.set_count(safe);
        self.steps.push(FileStep::Sync { file: FILE });
    }

    fn write_copies(&mut self) {
        self.steps.append(&mut self.copies);
        self.write_pages();
    }

    fn set_len(&mut self, to: HostOffset) {
        self.steps.push(FileStep::SetLen { file: FILE, to });
        self.file_bytes = to.0;
    }

    fn set_count(&mut self, count: u32) {
        let said = self.image.header.allocated();
        if said == count {
            return;
        }
        self.say(format!("count of allocated blocks: {said} becomes {count}"));
        self.image.header.set_allocated(count);
        let mut bytes = Vec::new();
        self.image.header.write_to(&mut bytes);
        self.steps.push(FileStep::Write { file: FILE, at: HostOffset(0), bytes });
    }

    fn write_pages(&mut self) {
        if self.pages.is_empty() {
            return;
        }
        self.steps.push(FileStep::Sync { file: FILE });
        for page in std::mem::take(&mut self.pages) {
            let (at, bytes) = page_of(&self.image.table, &self.image.layout, page);
            self.steps.push(FileStep::Write { file: FILE, at, bytes });
        }
        self.steps.push(FileStep::Sync { file: FILE });
    }

    fn make_dense(&mut self) {
        let layout = self.image.layout;
        let used = survey(self.image.table.iter().copied(), &layout, u64::MAX, |_| {});
        let count = u32::try_from(used.places.count()).expect("places are 32-bit numbers");
        let moves = relocations(self.image.table.iter().copied(), &used);
        for m in &moves {
            let (from, to) = (layout.start_of(m.from.0), layout.start_of(m.to.0));
            self.steps.push(FileStep::Copy { file: FILE, from, to, len: layout.stride() });
            self.set(m.block, m.to.0);
        }
        if !moves.is_empty() {
            self.say(format!("{} blocks: moved into holes", moves.len()));
        }
        self.write_pages();
        self.set_count(count);
        self.steps.push(FileStep::Sync { file: FILE });
        let end = layout.end_of(count);
        if self.file_bytes > end.0 {
            self.say(format!("file: cut from {} to {} bytes", self.file_bytes, end.0));
            self.set_len(end);
            self.steps.push(FileStep::Sync { file: FILE });
        }
    }
}
