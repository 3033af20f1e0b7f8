//! Repairing one image, without its parents.

use super::{Watch, change};
use crate::error::Result;
use crate::format::{CheckReport, Format};
use crate::vd::{ImageFiles, ImageSpec};
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
    change(&image, plan.steps, watch)?;
    Ok(Repaired::Report { before, lines, after: image.check()? })
}
