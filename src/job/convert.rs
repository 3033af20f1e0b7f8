//! Converting: a new image with everything a chain shows.

use super::copy::CopyJob;
use super::create::{begin_sequential, create_files, folder_of, remove_files};
use super::pack::PackJob;
use super::{CreateImage, Watch, open_channel};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::Filters;
use crate::format::{Format, Sequential};
use crate::io::{HostFile, ImageLock, LockMode, OsFile, sync_dir};
use crate::vd::{CacheMode, Disk, DiskOptions, ImageSpec, OpenDisk, open_disk};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A conversion.
#[derive(Clone, Debug)]
pub struct Convert {
    /// What is read, parents and all. Opened read-only.
    pub source: OpenDisk,
    /// The new file; nothing may be there yet.
    pub target: PathBuf,
    /// Its format.
    pub format: Format,
    /// One of the format's variants; `None`: the format's default.
    pub variant: Option<String>,
    /// `KEY=VALUE` options of the format.
    pub options: Vec<(String, String)>,
    /// Between what the new image's disk shows and what it holds: it is encrypted. Not for an image that is written from its beginning to its end.
    pub filters: Filters,
    /// How the new image is written: past the page cache, or through it; `Unsafe`: it is not made durable. An image that is written from its
    /// beginning to its end (a VMDK stream) goes through the page cache, and is always made durable.
    pub cache: CacheMode,
}

/// Converts. The new image is a base image; it is complete when this returns, and durable unless the caller wants it otherwise; it keeps comment and geometry
/// where its format has a place for them. After an error, or when cancelled, no file is left.
///
/// # Errors
/// Of opening, creating, reading and writing, with the file; [`crate::ErrorKind::Cancelled`].
pub fn convert(how: &Convert, watch: &mut Watch<'_>) -> Result<()> {
    let source = open_disk(&how.source)?;
    watch.stop_if_cancelled()?;
    let top = &source.images[0].info;
    let new = CreateImage {
        variant: how.variant.clone(),
        options: how.options.clone(),
        comment: top.comment.clone().filter(|_| how.format.keeps_comment()),
        geometry: how.format.geometry_from(top.geometry),
        ..CreateImage::new(&how.target, how.format, top.virtual_size)
    };
    if let Some((image, file)) = begin_sequential(&new)? {
        let unfinished = Unfinished(vec![how.target.clone()]);
        if !how.filters.is_empty() {
            let what = "an image that is written once cannot be encrypted";
            return Err(Error::new(ErrorKind::Unsupported, what).at(&how.target));
        }
        pack(image, file, &source.disk, watch).map_err(|e| e.at(&how.target))?;
        unfinished.keep();
        return Ok(());
    }
    let unfinished = Unfinished(create_files(&new)?);
    copy(how, &source.disk, watch).map_err(|e| e.at(&how.target))?;
    unfinished.keep();
    Ok(())
}

/// Into an image that is written once.
fn pack(image: Box<dyn Sequential>, file: OsFile, source: &Arc<Disk>, watch: &mut Watch<'_>) -> Result<()> {
    let file: Arc<dyn HostFile> = Arc::new(file);
    // Nobody shall take it for an image before it is one.
    let _lock = ImageLock::take(&*file, LockMode::Exclusive, Duration::ZERO)?;
    let mut job = PackJob::new(open_channel(source, CopyJob::slots())?, image, file.clone())?;
    watch.run(&mut job)?;
    sync_dir(folder_of(file.path()))?;
    watch.stop_if_cancelled()
}

fn copy(how: &Convert, source: &Arc<Disk>, watch: &mut Watch<'_>) -> Result<()> {
    let target = open_disk(&OpenDisk {
        image: ImageSpec { path: how.target.clone(), format: Some(how.format) },
        lock_wait: Some(Duration::ZERO),
        // It is new: nobody has it as a parent, and a look for children could take long.
        allow_write_to_parent: true,
        write_optical: true,
        direct: how.cache == CacheMode::None,
        filters: how.filters.clone(),
        // One sync at the end is enough: until then the file is removed when anything goes wrong.
        options: DiskOptions { read_only: false, skip_syncs: true, ..DiskOptions::default() },
        ..OpenDisk::new(&how.target)
    })?;
    let slots = CopyJob::slots();
    let durable = how.cache != CacheMode::Unsafe;
    let mut written = open_channel(&target.disk, slots)?;
    written.be_patient(durable);
    let mut job = CopyJob::new(open_channel(source, slots)?, written)?;
    watch.run(&mut job)?;
    if durable {
        job.close_target()?
    } else {
        job.leave_target()?
    }
    watch.stop_if_cancelled()
}

/// Files that go away again unless they are kept.
pub(super) struct Unfinished(pub(super) Vec<PathBuf>);

impl Unfinished {
    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        remove_files(&self.0);
    }
}
