//! Checking one image, without its parents.

use crate::error::Result;
use crate::format::{CheckReport, Format};
use crate::vd::{ImageFiles, ImageSpec};
use std::time::Duration;

/// Outcome of a check.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The image's format.
    pub format: Format,
    /// What was found; `None`: the format has nothing that could be wrong.
    pub report: Option<CheckReport>,
}

/// Checks an image under a shared lock. Nothing is written.
///
/// # Errors
/// Of opening, locking and reading; where the format is not supported. What is wrong with the image is in the
/// report.
pub fn check_image(spec: &ImageSpec, wait: Duration) -> Result<Checked> {
    check_image_with(spec, wait, false)
}

/// The same of an image that may describe a disk of this host.
///
/// # Errors
/// As [`check_image`].
pub fn check_image_with(spec: &ImageSpec, wait: Duration, allow_raw_device: bool) -> Result<Checked> {
    let image = ImageFiles::open_with(&spec.path, spec.format, false, Some(wait), allow_raw_device)?;
    Ok(Checked { format: image.format(), report: image.check()? })
}
