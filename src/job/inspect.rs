//! Looking at one image, without locks and without its parents: works while it is served.

use crate::error::{Error, Result};
use crate::format::{self, Format};
use crate::io::{HostFile, OpenHow, OsFile};
use crate::map::{FileId, ImageInfo};
use crate::vd::{FileSource, ImageSpec};
use std::path::PathBuf;

/// What is known of one image.
#[derive(Clone, Debug)]
pub struct Inspected {
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// What it says of itself.
    pub info: ImageInfo,
    /// Length of the file in bytes.
    pub file_size: u64,
    /// Bytes of storage the file takes.
    pub storage_bytes: u64,
}

/// Looks at an image. Nothing is locked and nothing written.
///
/// # Errors
/// With the file: of opening it, of its format.
pub fn inspect_image(spec: &ImageSpec) -> Result<Inspected> {
    let file = OsFile::open(&spec.path, OpenHow::default())?;
    let named = |e: Error| e.at(&spec.path);
    let source = FileSource::new(&file)?;
    let format = format::detect(&spec.path, &source, spec.format).map_err(named)?;
    let how = format::OpenHow { read_only: true, info_only: true };
    let map = format::open(format, &source, FileId(0), how).map_err(named)?;
    let size = |e| Error::io("find out its length", e).at(&spec.path);
    Ok(Inspected {
        path: spec.path.clone(),
        format,
        info: map.info(),
        file_size: file.len().map_err(size)?,
        storage_bytes: file.allocated().map_err(size)?,
    })
}
