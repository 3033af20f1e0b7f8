//! Making the disk of a QCOW2 longer. docs/jobs.md tells the orders; each leaves the old size or the new one.
//!
//! A first-level table that is too short is written anew behind the end of the file, and the first sector of the header changes to it
//! and to the new size at once. Refcounts are raised before that and lowered behind it, so that they are never too low.

use super::super::FileStep;
use super::super::steps::{StepList, all_zeros};
use super::check::{Examined, examine, read_words};
use super::header::{MAX_L1_BYTES, incompatible};
use super::layout::{Cluster, OFFSET};
use super::refcounts::set;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_DISK_BYTES, META_PAGE_BYTES, TABLE_PIECE_BYTES};
use crate::map::{ByteSource, FileId, HostOffset};
use std::collections::BTreeMap;

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what).hint("vdimg convert it, and resize the copy")
}

/// Plans the steps after which the disk has `size` bytes.
///
/// # Errors
/// As [`super::super::resize`].
pub(super) fn resize(source: &dyn ByteSource, size: u64) -> Result<Vec<FileStep>> {
    let mut image = match examine(source)? {
        Ok(image) => image,
        Err(report) => return report.refuse_damage().map(|()| Vec::new()),
    };
    image.report.refuse_damage()?;
    let header = &image.header;
    if size == image.layout.disk_bytes {
        return Ok(Vec::new());
    }
    if size < image.layout.disk_bytes {
        return Err(unsupported("making QCOW2 images smaller is not supported"));
    }
    if size > MAX_DISK_BYTES {
        return Err(Error::new(
            ErrorKind::Limit,
            format!("a disk of {size} bytes; {MAX_DISK_BYTES} are the limit"),
        ));
    }
    if header.has(incompatible::DIRTY) {
        let what = "was not closed, so that its refcounts may be wrong";
        return Err(Error::new(ErrorKind::Corrupt, what).hint("run vdimg repair first"));
    }
    if image.has_bitmaps {
        return Err(unsupported("has persistent bitmaps, which another size would make wrong"));
    }
    if header.snapshots() > 0 && header.version() < 3 {
        return Err(unsupported("has snapshots, which in version 2 have no size of their own"));
    }
    let mut list = StepList::new(FileId(0));
    clear_behind(&mut list, source, &image)?;
    let needed = size.div_ceil(image.layout.l1_span());
    let mut counts = Counts { source, pages: BTreeMap::new(), dirty: Vec::new() };
    let longer = needed > u64::from(image.layout.l1_entries);
    if longer {
        move_table(&mut list, &mut counts, &mut image, needed)?;
    }
    image.header.set_disk_bytes(size);
    image.header.clear_autoclear();
    let mut bytes = Vec::new();
    image.header.write_to(&mut bytes);
    list.sync();
    list.write(0, bytes);
    list.sync();
    if longer {
        let layout = image.layout;
        let clusters = (u64::from(layout.l1_entries) * 8).div_ceil(layout.cluster_bytes());
        let first = layout.l1_at.0 >> layout.cluster_bits;
        (first..first + clusters).try_for_each(|c| counts.set(&image, c, 0))?;
        counts.write(&mut list);
    }
    Ok(list.done())
}

/// What lies behind the end of the disk, in the last cluster and in the tables, reads as zeros when the disk becomes longer.
fn clear_behind(list: &mut StepList, source: &dyn ByteSource, image: &Examined) -> Result<()> {
    let layout = &image.layout;
    let (end, behind) = (layout.disk_bytes, || unsupported("has something behind the end of its disk"));
    let l1 = read_words(source, layout.l1_at.0, u64::from(layout.l1_entries))?;
    let last = usize::try_from(end / layout.l1_span()).expect("a first-level table");
    let whole = end.is_multiple_of(layout.l1_span());
    if l1.iter().skip(last + usize::from(!whole)).any(|e| *e != 0) {
        return Err(behind());
    }
    let table = l1.get(last).map_or(0, |e| e & OFFSET);
    if whole || table == 0 {
        return Ok(());
    }
    let words = read_words(source, table, layout.cluster_bytes() / 8)?;
    let step = if layout.extended { 2 } else { 1 };
    let first =
        usize::try_from(end % layout.l1_span() / layout.cluster_bytes()).expect("a second-level table");
    let into = end % layout.cluster_bytes();
    let mut entries = words.chunks(step).skip(first);
    if into > 0 {
        let entry = entries.next().unwrap_or_default();
        let cluster = layout.cluster(entry[0], entry.get(1).copied().unwrap_or(0));
        match cluster.map_err(|_| behind())? {
            Cluster::Free | Cluster::Zero(_) | Cluster::Unplaced(_) => {}
            Cluster::Data(place) | Cluster::Partly(place, _) => {
                let (from, to) = (place.at.0 + into, place.at.0 + layout.cluster_bytes());
                let clean = all_zeros(source, from, to)?;
                if !clean && !place.own {
                    return Err(behind());
                }
                let len = source.len();
                if !clean {
                    list.fill(from, to.min(len), 0);
                }
            }
            Cluster::Packed { .. } => return Err(behind()),
        }
    }
    if entries.flatten().any(|w| *w != 0) {
        return Err(behind());
    }
    list.sync();
    Ok(())
}

/// Writes the first-level table anew behind the file, with refcounts that cover it; the header is to name it.
fn move_table(list: &mut StepList, counts: &mut Counts<'_>, image: &mut Examined, needed: u64) -> Result<()> {
    let layout = image.layout;
    let bytes = needed * 8;
    if bytes > MAX_L1_BYTES {
        let what = format!("a first-level table of {needed} entries; {} are the limit", MAX_L1_BYTES / 8);
        return Err(Error::new(ErrorKind::Limit, what).hint("vdimg convert it to larger clusters"));
    }
    let first = image.counts.len() as u64;
    let table_clusters = bytes.div_ceil(layout.cluster_bytes());
    let mut end = first + table_clusters;
    let mut new_blocks = BTreeMap::new();
    let per_block = layout.refcounts_per_block();
    // Refcount blocks for the new clusters, and for themselves.
    let mut cluster = first;
    while cluster < end {
        let n = usize::try_from(cluster / per_block).expect("clusters of a file");
        let Some(at) = image.blocks.get_mut(n) else {
            return Err(unsupported("its refcount table has no room for a longer first-level table"));
        };
        if *at == 0 {
            *at = end << layout.cluster_bits;
            new_blocks.insert(n, *at);
            end += 1;
        }
        cluster += 1;
    }
    list.set_len(end << layout.cluster_bits);
    let old = read_words(counts.source, layout.l1_at.0, u64::from(layout.l1_entries))?;
    let at = first << layout.cluster_bits;
    for (n, piece) in (0u64..).zip(old.chunks(TABLE_PIECE_BYTES / 8)) {
        let bytes = piece.iter().flat_map(|w| w.to_be_bytes()).collect();
        list.write(at + n * TABLE_PIECE_BYTES as u64, bytes);
    }
    list.sync();
    (first..end).try_for_each(|c| counts.set(image, c, 1))?;
    counts.write(list);
    for (n, block) in new_blocks {
        let entry = image.header.refcount_table_at() + n as u64 * 8;
        list.write(entry, block.to_be_bytes().to_vec());
    }
    let entries = u32::try_from(needed).expect("MAX_L1_BYTES");
    image.header.set_l1(at, entries);
    Ok(())
}

/// Refcounts that change, by pages of the file.
struct Counts<'a> {
    source: &'a dyn ByteSource,
    /// As they will be, by where they are.
    pages: BTreeMap<u64, Vec<u8>>,
    /// Those that are not written yet.
    dirty: Vec<u64>,
}

impl Counts<'_> {
    fn set(&mut self, image: &Examined, cluster: u64, value: u64) -> Result<()> {
        let layout = &image.layout;
        let page_bytes = layout.cluster_bytes().min(META_PAGE_BYTES);
        let per_page = (page_bytes * 8) >> layout.refcount_order;
        let (block, into) = (cluster / layout.refcounts_per_block(), cluster % layout.refcounts_per_block());
        let block = image.blocks[usize::try_from(block).expect("clusters of a file")];
        let at = block + into / per_page * page_bytes;
        if !self.pages.contains_key(&at) {
            let mut bytes = vec![0; usize::try_from(page_bytes).expect("a page")];
            // A new block is zeros.
            if block >> layout.cluster_bits < image.counts.len() as u64 {
                self.source.read_at(HostOffset(at), &mut bytes)?;
            }
            self.pages.insert(at, bytes);
        }
        let page = self.pages.get_mut(&at).expect("it is there");
        set(page, usize::try_from(into % per_page).expect("a page"), layout.refcount_order, value);
        if !self.dirty.contains(&at) {
            self.dirty.push(at);
        }
        Ok(())
    }

    fn write(&mut self, list: &mut StepList) {
        for at in std::mem::take(&mut self.dirty) {
            list.write(at, self.pages[&at].clone());
        }
        list.sync();
    }
}
