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
    let image = ImageFiles::open(&spec.path, spec.format, false, Some(wait))?;
    Ok(Checked { format: image.format(), report: image.check()? })
}
