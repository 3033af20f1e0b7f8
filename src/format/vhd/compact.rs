//! Taking from a VHD what it need not keep. docs/jobs.md tells the order: at any moment the disk shows the same.

use super::super::{FileStep, Spare};
use super::check::examine;
use super::layout::FREE;
use super::repair::Work;
use super::table::placed;
use crate::error::Result;
use crate::map::ByteSource;

/// Plans the steps after which no block has a place that need not have one, and the file has no holes. None for a fixed image. An
/// entry cannot say zeros, so a block of zeros over other bytes of a parent keeps its place.
///
/// # Errors
/// As [`super::super::compact`].
pub(super) fn compact(source: &dyn ByteSource, spare: &Spare) -> Result<Vec<FileStep>> {
    let found = examine(source)?;
    found.report.refuse_damage()?;
    let Some(image) = found.image else { return Ok(Vec::new()) };
    let mut work = Work::new(image);
    work.mend_copy();
    for p in placed(&work.image.table) {
        if spare.same.contains(p.block) {
            work.set(p.block, FREE);
        }
    }
    work.write_pages();
    work.lengthen();
    work.fill_holes();
    work.end_file();
    Ok(work.steps)
}
