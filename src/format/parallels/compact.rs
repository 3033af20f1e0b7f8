//! Taking from a Parallels image what it need not keep. docs/jobs.md tells the order: at any moment the disk shows the same.

use super::super::{FileStep, Spare};
use super::resize::Work;
use crate::error::Result;
use crate::map::{ByteSource, HostBlock};
use std::collections::HashSet;

/// Plans the steps after which no block has a place that need not have one, and the file has no holes. An entry cannot say zeros, so
/// a block of zeros over other bytes of a parent keeps its place.
///
/// # Errors
/// As [`super::super::compact`].
pub(super) fn compact(source: &dyn ByteSource, spare: &Spare) -> Result<Vec<FileStep>> {
    let mut work = Work::on(source)?;
    for (block, _) in work.placed() {
        if spare.same.contains(block) {
            work.set(block, 0);
        }
    }
    work.write_pages();
    fill_holes(&mut work);
    let layout = work.image.layout;
    let ends = work.placed().into_iter().map(|(_, at)| at.0 + layout.cluster_bytes);
    let end = ends.max().unwrap_or(layout.data_at());
    if end != work.image.file_bytes {
        work.list.set_len(end);
    }
    Ok(work.list.done())
}

/// Blocks move from the end of the file into places that nothing touches; one that lies across two places stays.
fn fill_holes(work: &mut Work) {
    let layout = work.image.layout;
    let mut placed = work.placed();
    placed.sort_unstable_by_key(|(_, at)| std::cmp::Reverse(*at));
    let used: HashSet<u32> = placed.iter().flat_map(|(_, at)| layout.places_touched(*at)).collect();
    let mut holes = (0..work.image.used.high_water).filter(|p| !used.contains(p));
    for (block, from) in placed {
        if layout.places_touched(from).count() > 1 {
            continue;
        }
        let Some(to) = holes.next().map(|p| layout.place_at(HostBlock(p))).filter(|to| *to < from) else {
            break;
        };
        if from.0 + layout.cluster_bytes > work.image.file_bytes {
            work.image.file_bytes = from.0 + layout.cluster_bytes;
            work.list.set_len(work.image.file_bytes);
        }
        work.list.copy(from.0, to.0, layout.cluster_bytes);
        work.set(block, layout.value_for(to));
    }
    work.write_pages();
}
