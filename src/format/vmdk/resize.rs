//! Making the disk of a VMDK longer. docs/jobs.md tells the orders; each leaves the old size or the new one.
//!
//! The extent's line in the descriptor decides: what header or file have beyond it is not seen. Its sector is written last. VirtualBox
//! changes the header alone, and reports success.

use super::super::steps::{StepList, all_zeros};
use super::super::{FileStep, ImageFile};
use super::check::{Extent, examine};
use super::descriptor::{Access, Keep, with_sectors};
use super::header::{KDMV_BYTES, RawKdmv, SparseHeader};
use super::layout::Entry;
use super::open::{Found, Placed, find_descriptor, placed};
use super::table::ENTRY_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_DISK_BYTES, SECTOR_BYTES, TABLE_PIECE_BYTES};
use crate::map::HostOffset;
use zerocopy::{FromBytes, IntoBytes};

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what).hint("vdimg convert it, and resize the copy")
}

/// Plans the steps after which the disk has `size` bytes.
///
/// # Errors
/// As [`super::super::resize`].
pub(super) fn resize(files: &[ImageFile<'_>], size: u64) -> Result<Vec<FileStep>> {
    let mut extents = match examine(files)? {
        Ok(e) => {
            e.report.refuse_damage()?;
            e.extents
        }
        Err(report) => return report.refuse_damage().map(|()| Vec::new()),
    };
    let found = find_descriptor(files[0].source)?;
    let mut placed = placed(&found, files)?;
    let (Some(p), true) = (placed.pop(), placed.is_empty()) else {
        return Err(unsupported("changing the size of VMDKs of several extents is not supported"));
    };
    let kind = found.descriptor.get("createType").unwrap_or_default();
    if kind.to_ascii_lowercase().starts_with("twogb") {
        return Err(unsupported("changing the size of VMDKs in pieces of 2 GB is not supported"));
    }
    if p.line.access != Access::ReadWrite {
        return Err(unsupported("all extents of this VMDK are only to be read"));
    }
    if size > MAX_DISK_BYTES {
        return Err(Error::new(ErrorKind::Limit, format!("a disk of {size} bytes")));
    }
    match (size.cmp(&p.range.len()), p.line.keep, p.file) {
        (std::cmp::Ordering::Equal, ..) => Ok(Vec::new()),
        (order, Keep::Flat, Some(file)) => flat(&found, &p, files[0], file, size, order.is_gt()),
        (std::cmp::Ordering::Greater, Keep::Sparse, Some(_)) => {
            let extent = extents.pop().expect("the one extent is sparse");
            if extent.read_only {
                return Err(unsupported(
                    "changing the size of compressed VMDKs, and of ESX's sparse ones, is not supported",
                ));
            }
            sparse(&found, &p, files[0], &extent, size)
        }
        (std::cmp::Ordering::Less, Keep::Sparse, _) => {
            Err(unsupported("making sparse VMDKs smaller is not supported"))
        }
        _ => Err(unsupported("changing the size of this kind of VMDK is not supported")),
    }
}

/// The write of the descriptor that makes the new size count.
fn switch(found: &Found, file: ImageFile<'_>, size: u64) -> Result<[FileStep; 2]> {
    let (sector, bytes) = with_sectors(&found.bytes, size / SECTOR_BYTES)
        .ok_or_else(|| unsupported("its descriptor leaves no room for the new size"))?;
    let from = sector * SECTOR_BYTES as usize;
    let part = bytes[from..bytes.len().min(from + SECTOR_BYTES as usize)].to_vec();
    let at = found.at.plus(from as u64);
    Ok([FileStep::Write { file: file.id, at, bytes: part }, FileStep::Sync { file: file.id }])
}

/// A flat extent: the file first when it becomes longer, the descriptor first when it becomes shorter.
fn flat(
    found: &Found,
    p: &Placed<'_>,
    text: ImageFile<'_>,
    file: ImageFile<'_>,
    size: u64,
    longer: bool,
) -> Result<Vec<FileStep>> {
    let start = p.line.offset * SECTOR_BYTES;
    let (old, new) = (start + p.range.len(), start + size);
    let switch = switch(found, text, size)?;
    let mut list = StepList::new(file.id);
    if longer {
        // What stands behind the disk is no zeros.
        list.set_len(old);
        list.sync();
        list.reserve(new);
        return Ok([list.done(), switch.to_vec()].concat());
    }
    list.set_len(new);
    Ok([switch.to_vec(), list.done()].concat())
}

fn sparse(
    found: &Found,
    p: &Placed<'_>,
    text: ImageFile<'_>,
    extent: &Extent<'_>,
    size: u64,
) -> Result<Vec<FileStep>> {
    let switch = switch(found, text, size)?;
    let mut list = StepList::new(extent.file.id);
    let header = &extent.layout.header;
    let end = whole_end(extent);
    if end > extent.file.source.len() {
        list.set_len(end);
    }
    clear_behind(&mut list, extent, p.range.len())?;
    let mut raw = [0; KDMV_BYTES];
    extent.file.source.read_at(HostOffset(0), &mut raw)?;
    let mut raw = RawKdmv::read_from_bytes(&raw).expect("a header's bytes");
    let capacity = size.max(header.disk_bytes);
    raw.capacity = (capacity / SECTOR_BYTES).into();
    let tables = capacity.div_ceil(header.table_span());
    if tables > header.tables() {
        add_tables(&mut list, extent, &mut raw, tables, end)?;
    }
    if capacity > header.disk_bytes {
        list.sync();
        list.write(0, raw.as_bytes().to_vec());
    }
    Ok([list.done(), switch.to_vec()].concat())
}

/// Where all grains are whole and all metadata ends: a place for grains begins there, and what stands behind is nobody's.
pub(super) fn whole_end(extent: &Extent<'_>) -> u64 {
    let (layout, size) = (&extent.layout, extent.layout.header.grain_bytes);
    let ends = extent.entries.iter().zip(0..layout.grains()).filter_map(|(e, _)| match layout.entry(*e) {
        Entry::At(at) => Some(at.0 + size),
        Entry::Free | Entry::Zero => None,
    });
    let metadata = layout.metadata.last().map_or(0, |(_, end)| *end * SECTOR_BYTES);
    ends.max().unwrap_or(0).max(metadata).max(layout.data_at.0).next_multiple_of(size)
}

/// What lies behind byte `end` of the disk, in the last grain and in the tables, reads as zeros when the disk becomes longer.
fn clear_behind(list: &mut StepList, extent: &Extent<'_>, end: u64) -> Result<()> {
    let (layout, source) = (&extent.layout, extent.file.source);
    let size = layout.header.grain_bytes;
    let (last, into) = (end / size, end % size);
    let entry = usize::try_from(last).ok().and_then(|i| extent.entries.get(i)).copied().unwrap_or(0);
    if let (Entry::At(at), true) = (layout.entry(entry), into > 0)
        && !all_zeros(source, at.0 + into, at.0 + size)?
    {
        list.fill(at.0 + into, at.0 + size, 0);
    }
    let first = end.div_ceil(size);
    let both =
        [(Some(&layout.directory), Some(&extent.entries)), (layout.redundant.as_ref(), extent.copy.as_ref())];
    for (directory, entries) in both {
        let (Some(directory), Some(entries)) = (directory, entries) else { continue };
        for index in (first..)
            .zip(entries.iter().skip(usize::try_from(first).unwrap_or(usize::MAX)))
            .filter(|(_, e)| **e != 0)
            .map(|(i, _)| i)
        {
            let at = layout.entry_at(directory, index).expect("an entry that is not 0 is in the file");
            list.fill(at.0, at.0 + ENTRY_BYTES, 0);
        }
    }
    list.sync();
    Ok(())
}

/// Directories for `tables` tables, and the tables they lack, behind everything that is there; the header in `raw` names them.
fn add_tables(
    list: &mut StepList,
    extent: &Extent<'_>,
    raw: &mut RawKdmv,
    tables: u64,
    end: u64,
) -> Result<()> {
    let layout = &extent.layout;
    SparseHeader::refuse_directory(tables)?;
    let directory_bytes = (tables * ENTRY_BYTES).next_multiple_of(SECTOR_BYTES);
    let added = tables - layout.header.tables();
    let table_bytes = layout.table_bytes().next_multiple_of(SECTOR_BYTES);
    let copies = 1 + u64::from(layout.redundant.is_some());
    let to = end + copies * (directory_bytes + added * table_bytes);
    if to / SECTOR_BYTES >= u64::from(u32::MAX) {
        return Err(Error::new(ErrorKind::Limit, "its tables would lie where no entry can say"));
    }
    // What stands behind is no zeros.
    list.set_len(end);
    list.sync();
    list.set_len(to.next_multiple_of(layout.header.grain_bytes));
    let mut at = end;
    for (number, directory) in
        [Some(&layout.directory), layout.redundant.as_ref()].into_iter().flatten().enumerate()
    {
        let sector = |n: u64| u32::try_from(n / SECTOR_BYTES).expect("checked above");
        let first = at + directory_bytes;
        let words: Vec<u32> =
            directory.iter().copied().chain((0..added).map(|n| sector(first + n * table_bytes))).collect();
        for (n, piece) in (0u64..).zip(words.chunks(TABLE_PIECE_BYTES / 4)) {
            let bytes = piece.iter().flat_map(|w| w.to_le_bytes()).collect();
            list.write(at + n * TABLE_PIECE_BYTES as u64, bytes);
        }
        let place = u64::from(sector(at));
        if number == 0 {
            raw.directory_at = place.into();
        } else {
            raw.redundant_at = place.into();
        }
        at = first + added * table_bytes;
    }
    Ok(())
}
