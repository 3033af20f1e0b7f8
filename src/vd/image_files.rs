//! The files an image consists of: the one that was named, and those it names itself.

use super::chain::{Chain, Layer};
use super::disk::{Disk, DiskOptions};
use super::marker::SyncFailureMarker;
use super::open::refuse_parent_of_another;
use super::references::{device_path, extent_path};
use super::source::FileSource;
use super::unfinished::refuse_if_unfinished;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    self, CheckReport, FileStep, Format, ImageFile, NewParent, Properties, Reference, Repair, Spare,
};
use crate::io::{HostFile, ImageLock, LockMode, OpenHow, OsFile, OsHost};
use crate::limits::MAX_FILES;
use crate::map::{FileId, ImageInfo, ImageMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// An image's files, open, its own first.
#[derive(Debug)]
pub struct ImageFiles {
    path: PathBuf,
    format: Format,
    files: Vec<Arc<dyn HostFile>>,
    locks: Vec<ImageLock>,
}

/// How further files are opened and locked; as the first one was.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Further {
    pub(crate) how: OpenHow,
    /// `None`: no locks (looking only). Else how long to wait for one.
    pub(crate) lock_wait: Option<Duration>,
    /// Disks of the host may be among them.
    pub(crate) allow_raw_device: bool,
    /// Others may write them as well.
    pub(crate) shareable: bool,
}

impl ImageFiles {
    /// Opens and locks an image's files, for writing or reading, waiting for each lock as long as `lock_wait` says.
    ///
    /// # Errors
    /// Of opening, locking and reading; where the format is not clear.
    pub fn open(
        path: &Path,
        stated: Option<Format>,
        write: bool,
        lock_wait: Option<Duration>,
    ) -> Result<Self> {
        Self::open_with(path, stated, write, lock_wait, false)
    }

    /// The same, with disks of the host among the files if `allow_raw_device` says so.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(
        path: &Path,
        stated: Option<Format>,
        write: bool,
        lock_wait: Option<Duration>,
        allow_raw_device: bool,
    ) -> Result<Self> {
        if lock_wait.is_some() {
            refuse_if_unfinished(path)?;
        }
        Self::open_any(path, stated, write, lock_wait, allow_raw_device)
    }

    /// The same for whoever completes a change of its key.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn open_any(
        path: &Path,
        stated: Option<Format>,
        write: bool,
        lock_wait: Option<Duration>,
        allow_raw_device: bool,
    ) -> Result<Self> {
        let how = OpenHow { write, ..OpenHow::default() };
        let first: Arc<dyn HostFile> = Arc::new(OsFile::open(path, how)?);
        let further = Further { how, lock_wait, allow_raw_device, shareable: false };
        let lock = further.lock(&*first)?;
        let mut files = Self::around(path, first, stated, further)?;
        files.locks.extend(lock);
        Ok(files)
    }

    /// Finds out the format of `first`, which is open and locked, and opens the files it names.
    pub(crate) fn around(
        path: &Path,
        first: Arc<dyn HostFile>,
        stated: Option<Format>,
        further: Further,
    ) -> Result<Self> {
        let source = FileSource::new(&*first)?;
        let format = format::detect(path, &source, stated).map_err(|e| e.at(path))?;
        let references = format::references(format, &source).map_err(|e| e.at(path))?;
        if references.len() >= MAX_FILES {
            let what = format!("names {} files; {MAX_FILES} are the limit", references.len());
            return Err(Error::new(ErrorKind::Limit, what).at(path));
        }
        let mut image =
            ImageFiles { path: path.to_path_buf(), format, files: vec![first], locks: Vec::new() };
        for r in references {
            let write = further.how.write && r.writable;
            let further = Further { how: OpenHow { write, ..further.how }, ..further };
            image.add(&r, further)?;
        }
        Ok(image)
    }

    fn add(&mut self, reference: &Reference, further: Further) -> Result<()> {
        let name = &reference.name;
        let path = if reference.is_device {
            device_path(&self.path, name, further.allow_raw_device)?
        } else {
            extent_path(&self.path, name)?
        };
        let file: Arc<dyn HostFile> = Arc::new(OsFile::open(&path, further.how)?);
        let identity = file.traits().identity;
        if self.files.iter().any(|f| f.traits().identity == identity) {
            let what = format!("names {} more than once, or itself", path.display());
            return Err(Error::new(ErrorKind::Corrupt, what).at(&self.path));
        }
        self.locks.extend(further.lock(&*file)?);
        self.files.push(file);
        Ok(())
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The files, the image's own first.
    pub fn files(&self) -> &[Arc<dyn HostFile>] {
        &self.files
    }

    /// The locks that were taken; they belong to the caller from here on.
    pub(crate) fn take_locks(&mut self) -> Vec<ImageLock> {
        std::mem::take(&mut self.locks)
    }

    /// Opens the image; its files will be called `first` and the numbers behind.
    ///
    /// # Errors
    /// As [`format::open`], with the file.
    pub fn map(&self, first: FileId, how: format::OpenHow) -> Result<Box<dyn ImageMap>> {
        self.with(first, |files| format::open(self.format, files, how))
    }

    /// Opens what the image was at an internal snapshot, by its name or its number.
    ///
    /// # Errors
    /// As [`format::open_snapshot`], with the file.
    pub(crate) fn snapshot(&self, first: FileId, name: &str) -> Result<Box<dyn ImageMap>> {
        self.with(first, |files| format::open_snapshot(self.format, files, name))
    }

    /// Opens the image for reading without verifying what only matters for writing.
    ///
    /// # Errors
    /// As [`format::open_unchecked`], with the file.
    pub(crate) fn unchecked(&self, first: FileId) -> Result<Box<dyn ImageMap>> {
        self.with(first, |files| format::open_unchecked(self.format, files))
    }

    /// What is wrong with the image; `None` where nothing can be.
    ///
    /// # Errors
    /// As [`format::check`], with the file.
    pub fn check(&self) -> Result<Option<CheckReport>> {
        self.with(FileId(0), |files| format::check(self.format, files))
    }

    /// Plans its repair; `None` where nothing can be wrong.
    ///
    /// # Errors
    /// As [`format::repair`], with the file.
    pub fn repair(&self) -> Result<Option<Repair>> {
        self.with(FileId(0), |files| format::repair(self.format, files))
    }

    /// Plans the change of its disk's size.
    ///
    /// # Errors
    /// As [`format::resize`], with the file.
    pub fn resize(&self, size_bytes: u64) -> Result<Vec<FileStep>> {
        self.with(FileId(0), |files| format::resize(self.format, files, size_bytes))
    }

    /// Plans to take from it what it need not keep.
    ///
    /// # Errors
    /// As [`format::compact`], with the file.
    pub fn compact(&self, spare: &Spare) -> Result<Vec<FileStep>> {
        self.with(FileId(0), |files| format::compact(self.format, files, spare))
    }

    /// Plans to give it another parent, or none.
    ///
    /// # Errors
    /// As [`format::relink`], with the file.
    pub fn relink(&self, parent: Option<&NewParent>) -> Result<Vec<FileStep>> {
        self.with(FileId(0), |files| format::relink(self.format, files, parent))
    }

    /// Plans to set what it says of itself.
    ///
    /// # Errors
    /// As [`format::set_properties`], with the file.
    pub fn set_properties(&self, new: &Properties) -> Result<Vec<FileStep>> {
        self.with(FileId(0), |files| format::set_properties(self.format, files, new))
    }

    /// What holds for every writer: nobody's parent is changed, nor an image of which a sync has failed since the machine was
    /// started.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] or [`ErrorKind::SyncFailed`].
    pub(crate) fn refuse_to_write(&self, info: &ImageInfo, allow_write_to_parent: bool) -> Result<()> {
        if !allow_write_to_parent {
            refuse_parent_of_another(&self.path, info.uuid)?;
        }
        self.refuse_after_failed_sync()
    }

    /// A sync of it has failed since the machine was started: what the disk holds is not known.
    ///
    /// # Errors
    /// [`ErrorKind::SyncFailed`].
    pub(crate) fn refuse_after_failed_sync(&self) -> Result<()> {
        self.marker().refuse_if_set().map_err(|e| e.at(&self.path))
    }

    /// A sync of one of its files has failed: nobody writes to it until the machine was started again.
    pub(crate) fn mark_failed_sync(&self) {
        self.marker().set();
    }

    fn marker(&self) -> SyncFailureMarker {
        SyncFailureMarker::of(self.files[0].traits().identity, &self.path)
    }

    /// The image by itself as a disk that is only read.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub(crate) fn alone(&self) -> Result<Arc<Disk>> {
        let map = self.map(FileId(0), format::OpenHow { read_only: true, info_only: false })?;
        let chain = Chain::new(vec![Layer { number: 0, map: map.into() }]);
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        Ok(Disk::new(chain, self.files.clone(), options, Arc::new(OsHost), Box::new(|| ())))
    }

    fn with<T>(&self, first: FileId, f: impl FnOnce(&[ImageFile<'_>]) -> Result<T>) -> Result<T> {
        let sources = self.files.iter().map(|f| FileSource::new(&**f)).collect::<Result<Vec<_>>>()?;
        let files: Vec<_> =
            (first.0..).zip(&sources).map(|(id, source)| ImageFile { id: FileId(id), source }).collect();
        f(&files).map_err(|e| e.at(&self.path))
    }
}

impl Further {
    pub(crate) fn lock(self, file: &dyn HostFile) -> Result<Option<ImageLock>> {
        let mode = match (self.how.write, self.shareable) {
            (false, _) => LockMode::Shared,
            (true, false) => LockMode::Exclusive,
            (true, true) => LockMode::Sharing,
        };
        self.lock_wait.map(|wait| ImageLock::take(file, mode, wait)).transpose()
    }
}
