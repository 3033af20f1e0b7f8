//! Taking from a VDI what it need not keep. docs/jobs.md tells the order: at any moment the disk shows the same.

use super::super::{FileStep, Spare};
use super::layout::{Entry, FREE, ZERO, idx};
use super::resize::Work;
use crate::error::Result;
use crate::map::ByteSource;

/// Plans the steps after which no block has a place that need not have one, and the file has no holes. None for a fixed image,
/// all of whose blocks keep their places.
///
/// # Errors
/// As [`super::super::compact`].
pub(super) fn compact(source: &dyn ByteSource, spare: &Spare) -> Result<Vec<FileStep>> {
    let mut work = Work::on(source)?;
    if work.image.is_fixed() {
        return Ok(Vec::new());
    }
    for block in 0..work.layout().blocks {
        if !matches!(Entry::of(work.image.table[idx(block)]), Entry::At(_)) {
            continue;
        }
        if spare.same.contains(block) {
            work.set(block, FREE);
        } else if spare.zero.contains(block) {
            work.set(block, ZERO);
        }
    }
    work.write_pages();
    work.make_dense_and_cut();
    Ok(work.list.done())
}
