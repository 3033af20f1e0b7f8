//! Taking from the sparse extents of a VMDK what they need not keep. docs/jobs.md tells the order: at any moment the disk shows the
//! same.

use super::super::{FileStep, ImageFile, Spare};
use super::check::examine;
use super::descriptor::Keep;
use super::layout::Entry;
use super::open::{find_descriptor, placed};
use super::repair::Work;
use crate::error::Result;

/// Plans the steps after which no grain has a place that need not have one, and the files have no holes. Flat extents, and those that
/// are only read, stay as they are.
///
/// # Errors
/// As [`super::super::compact`].
pub(super) fn compact(files: &[ImageFile<'_>], spare: &Spare) -> Result<Vec<FileStep>> {
    let extents = match examine(files)? {
        Ok(e) => {
            e.report.refuse_damage()?;
            e.extents
        }
        Err(report) => return report.refuse_damage().map(|()| Vec::new()),
    };
    let found = find_descriptor(files[0].source)?;
    let (mut steps, mut first, mut extents) = (Vec::new(), 0u64, extents.into_iter());
    for p in placed(&found, files)? {
        // As units are counted through the disk.
        let own = first;
        if p.line.keep != Keep::Sparse || p.file.is_none() {
            first += 1;
            continue;
        }
        let extent = extents.next().expect("every sparse extent was examined");
        first += extent.layout.grains();
        if extent.read_only {
            continue;
        }
        let is = |bits: &crate::map::Bitmap, grain: u64| {
            u32::try_from(own + grain).is_ok_and(|n| bits.contains(n))
        };
        let has_zeroed = extent.layout.header.has_zeroed();
        let mut work = Work::new(extent);
        for grain in 0..work.extent.layout.grains() {
            let i = usize::try_from(grain).expect("a table in memory");
            if !matches!(work.extent.layout.entry(work.extent.entries[i]), Entry::At(_)) {
                continue;
            }
            if is(&spare.same, grain) {
                work.set(grain, 0);
            } else if has_zeroed && is(&spare.zero, grain) {
                work.set(grain, 1);
            }
        }
        work.write_pages();
        work.make_dense();
        steps.extend(work.steps);
    }
    Ok(steps)
}
