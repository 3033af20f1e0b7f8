//! Looking at one image, without locks and without its parents: works while it is served.

use crate::error::{Error, Result};
use crate::format::{self, Format};
use crate::map::{FileId, ImageInfo};
use crate::vd::{ImageFiles, ImageSpec};
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
    /// Length of its files in bytes.
    pub file_size: u64,
    /// Bytes of storage they take.
    pub storage_bytes: u64,
}

/// Looks at an image. Nothing is locked and nothing written.
///
/// # Errors
/// With the file: of opening it, of its format.
pub fn inspect_image(spec: &ImageSpec) -> Result<Inspected> {
    inspect_image_with(spec, false)
}

/// The same of an image that may describe a disk of this host.
///
/// # Errors
/// As [`inspect_image`].
pub fn inspect_image_with(spec: &ImageSpec, allow_raw_device: bool) -> Result<Inspected> {
    let image = ImageFiles::open_with(&spec.path, spec.format, false, None, allow_raw_device)?;
    let how = format::OpenHow { read_only: true, info_only: true };
    let map = image.map(FileId(0), how)?;
    let (mut file_size, mut storage_bytes) = (0u64, 0u64);
    for file in image.files() {
        let size = |e| Error::io("find out its length", e).at(file.path());
        file_size = file_size.saturating_add(file.len().map_err(size)?);
        storage_bytes = storage_bytes.saturating_add(file.allocated().map_err(size)?);
    }
    Ok(Inspected {
        path: spec.path.clone(),
        format: image.format(),
        info: map.info(),
        file_size,
        storage_bytes,
    })
}
