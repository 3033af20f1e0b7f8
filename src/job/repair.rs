//! Repairing one image, without its parents.

use super::check::Locked;
use super::{Job, LANE_BYTES, Progress, Step, Watch};
use crate::error::{Error, Result};
use crate::format::vdi::{CheckReport, RepairStep};
use crate::format::{Format, vdi};
use crate::io::HostFile;
use crate::limits::{MAX_ZEROS_BYTES, SECTOR_BYTES};
use crate::map::HostOffset;
use crate::vd::{FileSource, ImageSpec};
use std::io;
use std::time::Duration;

/// Outcome of a repair.
#[derive(Clone, Debug)]
pub enum Repaired {
    /// The format has nothing that could be wrong.
    NothingToRepair(Format),
    /// A report.
    Report {
        /// What was found.
        before: CheckReport,
        /// What was done about it, or would be.
        lines: Vec<String>,
        /// What a check finds afterwards; `None` after a dry run.
        after: Option<CheckReport>,
    },
}

/// Repairs an image under an exclusive lock; with `dry_run` only tells, under a shared one.
///
/// # Errors
/// [`crate::ErrorKind::Corrupt`] where nothing can be done; of opening, locking, reading, writing. Stopped in between,
/// the image has lost nothing: every step leaves it at least as good.
pub fn repair_image(
    spec: &ImageSpec,
    dry_run: bool,
    wait: Duration,
    watch: &mut Watch<'_>,
) -> Result<Repaired> {
    let image = Locked::open(spec, !dry_run, wait)?;
    match image.format {
        Format::Vdi => {}
        Format::Raw => return Ok(Repaired::NothingToRepair(Format::Raw)),
        format => {
            image.refuse_format()?;
            return Ok(Repaired::NothingToRepair(format));
        }
    }
    let plan = vdi::repair(&FileSource::new(&image.file)?).map_err(|e| image.named(e))?;
    let (before, lines) = (plan.report, plan.lines);
    if dry_run {
        return Ok(Repaired::Report { before, lines, after: None });
    }
    watch.run(&mut RepairJob::new(&image.file, plan.steps))?;
    let after = vdi::check(&FileSource::new(&image.file)?).map_err(|e| image.named(e))?;
    Ok(Repaired::Report { before, lines, after: Some(after) })
}

/// Carries out the steps of a repair, in order, each complete before the next.
#[derive(Debug)]
pub struct RepairJob<'a> {
    file: &'a dyn HostFile,
    steps: Vec<RepairStep>,
    next: usize,
    /// Bytes done of a copy.
    copied: u64,
}

impl<'a> RepairJob<'a> {
    /// A repair of `file` by `steps`.
    pub fn new(file: &'a dyn HostFile, steps: Vec<RepairStep>) -> Self {
        RepairJob { file, steps, next: 0, copied: 0 }
    }

    /// Sets the length; true when that is complete. A file that grows by truncation may, after a power cut, show there
    /// what it held before it was once cut, and that would be a part of a block. What is allocated reads as zeros, and so
    /// do the holes it is turned into: a block may be far larger than what is in it. Where the file system cannot allocate,
    /// zeros are written.
    fn set_len(&self, to: HostOffset) -> io::Result<bool> {
        let now = self.file.len()?;
        let Some(left) = to.0.checked_sub(now).filter(|left| *left > 0) else {
            return self.file.set_len(to.0).map(|()| true);
        };
        // a piece at a time: more space need not be free at once
        let piece = left.min(MAX_ZEROS_BYTES);
        match self.file.allocate(now, piece) {
            Ok(()) => {
                // where that cannot be done the space stays
                let _ = self.file.punch(now, piece);
                Ok(piece == left)
            }
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                if left > MAX_ZEROS_BYTES {
                    return Err(io::Error::other(
                        "that many zeros are not written where space cannot be allocated",
                    ));
                }
                let piece = left.min(LANE_BYTES);
                self.file.write_at(now, &vec![0; usize::try_from(piece).expect("1 MiB at most")])?;
                Ok(piece == left)
            }
            Err(e) => Err(e),
        }
    }

    /// What the present step does, behind "cannot".
    fn tried(&self) -> String {
        match self.steps.get(self.next) {
            Some(RepairStep::Write { at, bytes }) => format!("repair its {} bytes at {at}", bytes.len()),
            Some(RepairStep::Copy { from, to, .. }) => {
                format!("copy its bytes at {} to {}", from.plus(self.copied), to.plus(self.copied))
            }
            Some(RepairStep::SetLen { to }) => format!("set its length to {} bytes", to.0),
            Some(RepairStep::Sync) | None => "make its repair durable".to_string(),
        }
    }

    /// Moves the next piece of a copy. True: that was the last. What is a hole on both sides is passed over: a block may be
    /// far larger than what a small file has of it.
    fn copy_piece(&mut self, from: HostOffset, to: HostOffset, len: u64) -> io::Result<bool> {
        let (from, to, left) = (from.plus(self.copied).0, to.plus(self.copied).0, len - self.copied);
        let (source, target) = (self.hole_at(from)?, self.hole_at(to)?);
        let hole = source.min(target).min(left);
        if hole > 0 {
            self.copied += hole;
            return Ok(self.copied == len);
        }
        let data = if source == 0 { from } else { to };
        let run = self.file.next_hole(data)?.saturating_sub(data).max(SECTOR_BYTES);
        let n = left.min(run).min(LANE_BYTES);
        let mut piece = vec![0; usize::try_from(n).expect("1 MiB at most")];
        let mut got = 0;
        while got < piece.len() {
            match self.file.read_at(from + got as u64, &mut piece[got..])? {
                // The place is cut off in the middle: the rest of it reads as zeros.
                0 => break,
                more => got += more,
            }
        }
        self.file.write_at(to, &piece)?;
        self.copied += n;
        Ok(self.copied == len)
    }

    /// Bytes of the hole at `off`, 0 where there is none; all there are where no data follow.
    fn hole_at(&self, off: u64) -> io::Result<u64> {
        Ok(self.file.next_data(off)?.map_or(u64::MAX, |data| data.saturating_sub(off)))
    }
}

impl Job for RepairJob<'_> {
    fn step(&mut self) -> Result<Step> {
        let Some(step) = self.steps.get(self.next).cloned() else { return Ok(Step::Done) };
        let complete = match step {
            RepairStep::Write { at, bytes } => self.file.write_at(at.0, &bytes).map(|()| true),
            RepairStep::SetLen { to } => self.set_len(to),
            RepairStep::Sync => self.file.sync().map(|()| true),
            RepairStep::Copy { from, to, len } => self.copy_piece(from, to, len),
        };
        if complete.map_err(|e| Error::io(self.tried(), e).at(self.file.path()))? {
            self.next += 1;
            self.copied = 0;
        }
        Ok(Step::More)
    }

    fn progress(&self) -> Progress {
        Progress { done: self.next as u64, total: self.steps.len() as u64 }
    }
}
