//! Repairing one image, without its parents.

use super::{Job, LANE_BYTES, Progress, Step, Watch};
use crate::error::{Error, Result};
use crate::format::{CheckReport, Format, RepairStep};
use crate::io::HostFile;
use crate::limits::{MAX_ZEROS_BYTES, SECTOR_BYTES};
use crate::map::{FileId, HostOffset};
use crate::vd::{ImageFiles, ImageSpec};
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
    repair_image_with(spec, dry_run, wait, false, watch)
}

/// The same of an image that may describe a disk of this host.
///
/// # Errors
/// As [`repair_image`].
pub fn repair_image_with(
    spec: &ImageSpec,
    dry_run: bool,
    wait: Duration,
    allow_raw_device: bool,
    watch: &mut Watch<'_>,
) -> Result<Repaired> {
    let image = ImageFiles::open_with(&spec.path, spec.format, !dry_run, Some(wait), allow_raw_device)?;
    let Some(plan) = image.repair()? else { return Ok(Repaired::NothingToRepair(image.format())) };
    let (before, lines) = (plan.report, plan.lines);
    if dry_run {
        return Ok(Repaired::Report { before, lines, after: None });
    }
    let files: Vec<_> = image.files().iter().map(|f| &**f).collect();
    watch.run(&mut RepairJob::new(files, plan.steps))?;
    Ok(Repaired::Report { before, lines, after: image.check()? })
}

/// Carries out the steps of a repair, in order, each complete before the next.
#[derive(Debug)]
pub struct RepairJob<'a> {
    files: Vec<&'a dyn HostFile>,
    steps: Vec<RepairStep>,
    next: usize,
    /// Bytes done of a copy.
    copied: u64,
}

impl<'a> RepairJob<'a> {
    /// A repair of the image with these files by `steps`.
    pub fn new(files: Vec<&'a dyn HostFile>, steps: Vec<RepairStep>) -> Self {
        RepairJob { files, steps, next: 0, copied: 0 }
    }

    /// Sets the length; true when that is complete. A file that grows by truncation may, after a power cut, show there
    /// what it held before it was once cut, and that would be a part of a block. What is allocated reads as zeros, and so
    /// do the holes it is turned into: a block may be far larger than what is in it. Where the file system cannot allocate,
    /// zeros are written.
    fn set_len(file: &dyn HostFile, to: HostOffset) -> io::Result<bool> {
        let now = file.len()?;
        let Some(left) = to.0.checked_sub(now).filter(|left| *left > 0) else {
            return file.set_len(to.0).map(|()| true);
        };
        // a piece at a time: more space need not be free at once
        let piece = left.min(MAX_ZEROS_BYTES);
        match file.allocate(now, piece) {
            Ok(()) => {
                // where that cannot be done the space stays
                let _ = file.punch(now, piece);
                Ok(piece == left)
            }
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                if left > MAX_ZEROS_BYTES {
                    let what = "that many zeros are not written where space cannot be allocated";
                    return Err(io::Error::other(what));
                }
                let piece = left.min(LANE_BYTES);
                file.write_at(now, &vec![0; usize::try_from(piece).expect("1 MiB at most")])?;
                Ok(piece == left)
            }
            Err(e) => Err(e),
        }
    }

    /// What the present step does, behind "cannot".
    fn tried(&self) -> String {
        match self.steps.get(self.next) {
            Some(RepairStep::Write { at, bytes, .. }) => format!("repair its {} bytes at {at}", bytes.len()),
            Some(RepairStep::Copy { from, to, .. }) => {
                format!("copy its bytes at {} to {}", from.plus(self.copied), to.plus(self.copied))
            }
            Some(RepairStep::SetLen { to, .. }) => format!("set its length to {} bytes", to.0),
            Some(RepairStep::Sync { .. }) | None => "make its repair durable".to_string(),
        }
    }

    fn file(&self, id: FileId) -> &'a dyn HostFile {
        self.files[usize::from(id.0)]
    }

    /// Moves the next piece of a copy. True: that was the last. What is a hole on both sides is passed over: a block may be
    /// far larger than what a small file has of it.
    fn copy_piece(
        &mut self,
        file: &dyn HostFile,
        from: HostOffset,
        to: HostOffset,
        len: u64,
    ) -> io::Result<bool> {
        let (from, to, left) = (from.plus(self.copied).0, to.plus(self.copied).0, len - self.copied);
        let (source, target) = (hole_at(file, from)?, hole_at(file, to)?);
        let hole = source.min(target).min(left);
        if hole > 0 {
            self.copied += hole;
            return Ok(self.copied == len);
        }
        let data = if source == 0 { from } else { to };
        let run = file.next_hole(data)?.saturating_sub(data).max(SECTOR_BYTES);
        let n = left.min(run).min(LANE_BYTES);
        let mut piece = vec![0; usize::try_from(n).expect("1 MiB at most")];
        let mut got = 0;
        while got < piece.len() {
            match file.read_at(from + got as u64, &mut piece[got..])? {
                // The place is cut off in the middle: the rest of it reads as zeros.
                0 => break,
                more => got += more,
            }
        }
        file.write_at(to, &piece)?;
        self.copied += n;
        Ok(self.copied == len)
    }
}

/// Bytes of the hole at `off`, 0 where there is none; all there are where no data follow.
fn hole_at(file: &dyn HostFile, off: u64) -> io::Result<u64> {
    Ok(file.next_data(off)?.map_or(u64::MAX, |data| data.saturating_sub(off)))
}

impl Job for RepairJob<'_> {
    fn step(&mut self) -> Result<Step> {
        let Some(step) = self.steps.get(self.next).cloned() else { return Ok(Step::Done) };
        let (id, complete) = match step {
            RepairStep::Write { file, at, bytes } => {
                (file, self.file(file).write_at(at.0, &bytes).map(|()| true))
            }
            RepairStep::SetLen { file, to } => (file, Self::set_len(self.file(file), to)),
            RepairStep::Sync { file } => (file, self.file(file).sync().map(|()| true)),
            RepairStep::Copy { file, from, to, len } => {
                (file, self.copy_piece(self.file(file), from, to, len))
            }
        };
        if complete.map_err(|e| Error::io(self.tried(), e).at(self.file(id).path()))? {
            self.next += 1;
            self.copied = 0;
        }
        Ok(Step::More)
    }

    fn progress(&self) -> Progress {
        Progress { done: self.next as u64, total: self.steps.len() as u64 }
    }
}
