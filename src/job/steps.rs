//! Steps that a format has planned, carried out.

use super::{Job, LANE_BYTES, Progress, Step, Watch};
use crate::error::{Error, Result};
use crate::format::FileStep;
use crate::io::HostFile;
use crate::limits::{MAX_ZEROS_BYTES, SECTOR_BYTES};
use crate::map::{FileId, HostOffset};
use crate::vd::ImageFiles;
use std::io;

/// Carries out steps on the files of an image, in order, each complete before the next. Ended at any moment, the image has lost
/// nothing, if the steps were planned by [`crate::format`].
#[derive(Debug)]
pub struct StepsJob<'a> {
    files: Vec<&'a dyn HostFile>,
    steps: Vec<FileStep>,
    next: usize,
    /// Bytes done of the present step.
    copied: u64,
    /// Of all steps.
    progress: Progress,
    /// What is on disk is not known any more.
    pub(super) sync_failed: bool,
}

/// Carries out steps on an image that is locked. Where a sync fails the image is marked: what its disk holds is unknown.
///
/// # Errors
/// Of writing; [`crate::ErrorKind::Cancelled`].
pub(crate) fn change(image: &ImageFiles, steps: Vec<FileStep>, watch: &mut Watch<'_>) -> Result<()> {
    let files = image.files().iter().map(|f| &**f).collect();
    let mut job = StepsJob::new(files, steps);
    let done = watch.run(&mut job);
    if job.sync_failed {
        image.mark_failed_sync();
    }
    done
}

impl<'a> StepsJob<'a> {
    /// `steps` on the image with these files.
    pub fn new(files: Vec<&'a dyn HostFile>, steps: Vec<FileStep>) -> Self {
        let total = steps.iter().map(cost).fold(1, u64::saturating_add);
        StepsJob {
            files,
            steps,
            next: 0,
            copied: 0,
            progress: Progress { done: 0, total },
            sync_failed: false,
        }
    }

    /// Sets the length; true when that is complete. A file that grows by truncation may, after a power cut, show there
    /// what it held before it was once cut, and that would be a part of a block. What is allocated reads as zeros, and so
    /// do the holes it is turned into: a block may be far larger than what is in it. Where the file system cannot allocate,
    /// zeros are written.
    fn set_len(file: &dyn HostFile, to: HostOffset, reserve: bool) -> io::Result<bool> {
        let now = file.len()?;
        let Some(left) = to.0.checked_sub(now).filter(|left| *left > 0) else {
            return file.set_len(to.0).map(|()| true);
        };
        // a piece at a time: more space need not be free at once
        let piece = left.min(MAX_ZEROS_BYTES);
        match file.allocate(now, piece) {
            Ok(()) => {
                if !reserve {
                    // where that cannot be done the space stays
                    let _ = file.punch(now, piece);
                }
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
            Some(FileStep::Write { at, bytes, .. }) => format!("change its {} bytes at {at}", bytes.len()),
            Some(FileStep::Fill { at, len, .. }) => format!("fill its {len} bytes at {at}"),
            Some(FileStep::Copy { from, to, .. }) => {
                format!("copy its bytes at {} to {}", from.plus(self.copied), to.plus(self.copied))
            }
            Some(FileStep::SetLen { to, .. } | FileStep::Reserve { to, .. }) => {
                format!("set its length to {} bytes", to.0)
            }
            Some(FileStep::Sync { .. }) | None => "make its changes durable".to_string(),
        }
    }

    fn file(&self, id: FileId) -> &'a dyn HostFile {
        self.files[usize::from(id.0)]
    }

    /// Writes the next piece of one byte over and over. True: that was the last.
    fn fill_piece(&mut self, file: &dyn HostFile, at: HostOffset, len: u64, byte: u8) -> io::Result<bool> {
        let (from, left) = (at.plus(self.copied).0, len - self.copied);
        // A hole reads as zeros: there is nothing to write.
        let hole = if byte == 0 { hole_at(file, from)?.min(left) } else { 0 };
        let n = if hole > 0 { hole } else { left.min(LANE_BYTES) };
        if hole == 0 {
            file.write_at(from, &vec![byte; usize::try_from(n).expect("1 MiB at most")])?;
        }
        self.copied += n;
        Ok(self.copied == len)
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

/// Bytes a step moves, as progress counts them.
fn cost(step: &FileStep) -> u64 {
    match step {
        FileStep::Copy { len, .. } | FileStep::Fill { len, .. } => *len,
        FileStep::Write { bytes, .. } => bytes.len() as u64,
        FileStep::SetLen { .. } | FileStep::Reserve { .. } | FileStep::Sync { .. } => 0,
    }
}

/// Bytes of the hole at `off`, 0 where there is none; all there are where no data follow.
fn hole_at(file: &dyn HostFile, off: u64) -> io::Result<u64> {
    Ok(file.next_data(off)?.map_or(u64::MAX, |data| data.saturating_sub(off)))
}

impl Job for StepsJob<'_> {
    fn step(&mut self) -> Result<Step> {
        let Some(step) = self.steps.get(self.next).cloned() else { return Ok(Step::Done) };
        let (id, complete) = match step {
            FileStep::Write { file, at, bytes } => {
                (file, self.file(file).write_at(at.0, &bytes).map(|()| true))
            }
            FileStep::Fill { file, at, len, byte } => (file, self.fill_piece(self.file(file), at, len, byte)),
            FileStep::SetLen { file, to } => (file, Self::set_len(self.file(file), to, false)),
            FileStep::Reserve { file, to } => (file, Self::set_len(self.file(file), to, true)),
            FileStep::Sync { file } => {
                let synced = self.file(file).sync();
                self.sync_failed |= synced.is_err();
                (file, synced.map(|()| true))
            }
            FileStep::Copy { file, from, to, len } => (file, self.copy_piece(self.file(file), from, to, len)),
        };
        if complete.map_err(|e| Error::io(self.tried(), e).at(self.file(id).path()))? {
            self.progress.done += cost(&self.steps[self.next]);
            self.next += 1;
            self.copied = 0;
        }
        Ok(Step::More)
    }

    fn progress(&self) -> Progress {
        let Progress { done, total } = self.progress;
        let done =
            if self.next == self.steps.len() { total } else { done.saturating_add(self.copied).min(total) };
        Progress { done, total }
    }
}
