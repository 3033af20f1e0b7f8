//! Checking one image, without its parents.

use crate::error::{Error, Result};
use crate::format::{self, Format, vdi};
use crate::io::{HostFile, ImageLock, LockMode, OpenHow, OsFile};
use crate::map::FileId;
use crate::vd::{FileSource, ImageSpec};
use std::time::Duration;

/// Outcome of a check.
#[derive(Clone, Debug)]
pub enum Checked {
    /// The format has nothing that could be wrong.
    NothingToCheck(Format),
    /// A report.
    Report(vdi::CheckReport),
}

/// A file that is locked and whose format is known.
pub(super) struct Locked {
    pub(super) file: OsFile,
    pub(super) format: Format,
    _lock: ImageLock,
}

impl Locked {
    /// Opens and locks a file, for writing or reading, waiting for the lock as long as `wait`.
    pub(super) fn open(spec: &ImageSpec, write: bool, wait: Duration) -> Result<Locked> {
        let file = OsFile::open(&spec.path, OpenHow { write, ..OpenHow::default() })?;
        let mode = if write { LockMode::Exclusive } else { LockMode::Shared };
        let lock = ImageLock::take(&file, mode, wait)?;
        let format = format::detect(&spec.path, &FileSource::new(&file)?, spec.format)
            .map_err(|e| e.at(&spec.path))?;
        Ok(Locked { file, format, _lock: lock })
    }

    /// The error of a format that cannot be opened.
    pub(super) fn refuse_format(&self) -> Result<()> {
        let how = format::OpenHow { read_only: true, info_only: true };
        let source = FileSource::new(&self.file)?;
        format::open(self.format, &source, FileId(0), how).map(drop).map_err(|e| self.named(e))
    }

    pub(super) fn named(&self, e: Error) -> Error {
        e.at(self.file.path())
    }
}

/// Checks an image under a shared lock. Nothing is written.
///
/// # Errors
/// Of opening, locking and reading; where the format is not supported. What is wrong with the image is in the
/// report.
pub fn check_image(spec: &ImageSpec, wait: Duration) -> Result<Checked> {
    let image = Locked::open(spec, false, wait)?;
    match image.format {
        Format::Raw => Ok(Checked::NothingToCheck(Format::Raw)),
        Format::Vdi => {
            let report = vdi::check(&FileSource::new(&image.file)?);
            report.map(Checked::Report).map_err(|e| image.named(e))
        }
        format => {
            image.refuse_format()?;
            Ok(Checked::NothingToCheck(format))
        }
    }
}
