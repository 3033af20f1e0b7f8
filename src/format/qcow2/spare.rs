//! Clusters inside the file that nothing names: they are used again once they have a refcount.
//!
//! Refcounts alone are not believed: where they are too low, something that reads right would be written over. So all tables are
//! looked through, if they are small enough for that at every open, and where anything is wrong nothing is used again.

use super::check::examine;
use super::header::{Header, incompatible};
use super::layout::{Layout, OFFSET};
use crate::map::ByteSource;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

/// Most bytes of second-level tables that are looked through: those of a disk of 32 GiB.
const MAX_TABLES_BYTES: u64 = 4 << 20;
/// Most clusters of a file of which that is done.
const MAX_CLUSTERS: u64 = 1 << 20;
/// Clusters used again in a session.
const MAX_SPARE: usize = 4096;

/// The first ones; none where it is not certain.
pub(super) fn spare_clusters(
    source: &dyn ByteSource,
    header: &Header,
    layout: &Layout,
    l1: &[AtomicU64],
) -> BTreeSet<u32> {
    let tables = l1.iter().filter(|e| e.load(Ordering::Relaxed) & OFFSET != 0).count() as u64;
    let tables = tables.saturating_mul(1 + u64::from(header.snapshots()));
    let first = l1.len() as u64 * 8;
    let is_small = first.saturating_add(tables.saturating_mul(layout.cluster_bytes())) <= MAX_TABLES_BYTES
        && layout.file_clusters() <= MAX_CLUSTERS;
    if !is_small || header.has(incompatible::DIRTY | incompatible::CORRUPT) {
        return BTreeSet::new();
    }
    let Ok(Ok(image)) = examine(source) else { return BTreeSet::new() };
    if image.report.corruptions > 0 || image.has_bitmaps {
        return BTreeSet::new();
    }
    let whole = layout.file_bytes / layout.cluster_bytes();
    let free = (0u32..).zip(&image.counts).filter(|(n, count)| **count == 0 && u64::from(*n) < whole);
    free.map(|(n, _)| n).take(MAX_SPARE).collect()
}
