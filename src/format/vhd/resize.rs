//! Making the disk of a VHD longer or shorter. docs/jobs.md tells the orders; each leaves the old size or the new one.
//!
//! The copy of the footer at the beginning decides, a sector that is written whole or not at all. Blocks that stand where the
//! longer table will be move behind the others before.

use super::super::FileStep;
use super::super::steps::all_zeros;
use super::check::examine;
use super::create::checked_size;
use super::footer::FOOTER_BYTES;
use super::header::Header;
use super::layout::{END_OF_SECTORS, FREE, Layout, idx};
use super::repair::Work;
use super::table::{entry_of, placed};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, FileId, HostOffset};
use zerocopy::IntoBytes;

/// Plans the steps after which the disk has `size` bytes.
///
/// # Errors
/// As [`super::super::resize`].
pub(super) fn resize(source: &dyn ByteSource, size: u64) -> Result<Vec<FileStep>> {
    let found = examine(source)?;
    found.report.refuse_damage()?;
    let Some(image) = found.image else {
        // Its only footer stands behind the disk: while it moves there would be none.
        let what = "changing the size of fixed VHD images is not supported";
        return Err(Error::new(ErrorKind::Unsupported, what).hint("vdimg convert it to a dynamic one first"));
    };
    let old = image.layout.disk_bytes;
    let blocks = checked_size(size, image.layout.block_bytes)?;
    let mut work = Work::new(image);
    work.mend_copy();
    clear_tail(&mut work, source, old.min(size))?;
    if size > old {
        grow(&mut work, source, blocks)?;
        switch(&mut work, size);
    } else {
        if size < old {
            switch(&mut work, size);
        }
        shrink(&mut work, blocks);
    }
    Ok(work.steps)
}

/// What lies behind byte `end` of the disk in the last block reads as zeros when the disk becomes longer.
fn clear_tail(work: &mut Work, source: &dyn ByteSource, end: u64) -> Result<()> {
    let layout = &work.image.layout;
    // A smaller end is no end yet.
    let (into, last) = (end % layout.block_bytes, end >> layout.block_shift);
    let entry = usize::try_from(last).ok().and_then(|i| work.image.table.get(i)).copied().unwrap_or(FREE);
    if end < layout.disk_bytes || into == 0 || entry == FREE {
        return Ok(());
    }
    let data = Layout::start_of(entry) + layout.bitmap_bytes;
    let (from, to) = (data + into, data + layout.block_bytes);
    if !all_zeros(source, from, to)? {
        let len = to.min(work.image.file_bytes) - from;
        work.steps.push(FileStep::Fill { file: FileId(0), at: HostOffset(from), len, byte: 0 });
    }
    Ok(())
}

/// The footers say the new size, the one that decides first.
fn switch(work: &mut Work, size: u64) {
    work.image.footers.best.set_size(size);
    work.sync();
    work.write(0, work.footer());
    work.sync();
    work.end_file();
}

/// The table gets entries, behind blocks that move out of its way.
fn grow(work: &mut Work, source: &dyn ByteSource, blocks: u32) -> Result<()> {
    let header_at = work.image.footers.best.header_at();
    let mut header = Header::read(source, header_at)?;
    let had = header.entries();
    let entries = blocks.max(had);
    let layout = &work.image.layout;
    let (table_at, stride) = (layout.table_at.0, layout.stride());
    let table_end = table_at + (u64::from(entries) * 4).next_multiple_of(SECTOR_BYTES);
    if layout.metadata.iter().any(|(from, _)| (table_at + 1..table_end).contains(from)) {
        let what = "its block table cannot become longer: names of its parent follow it";
        return Err(Error::new(ErrorKind::Unsupported, what).hint("vdimg convert it, and resize the copy"));
    }
    let moving: Vec<_> = placed(&work.image.table).into_iter().filter(|p| p.start < table_end).collect();
    let mut to = work.end().max(table_end);
    let end = to + stride * moving.len() as u64;
    if end > END_OF_SECTORS {
        return Err(Error::new(ErrorKind::Limit, "no entry of a VHD could name where its blocks would go"));
    }
    // From here on the copy at the beginning is the one good footer, until the other stands behind all.
    if end + FOOTER_BYTES > work.image.file_bytes {
        work.set_len(end + FOOTER_BYTES);
    }
    work.write(work.image.file_bytes - FOOTER_BYTES, work.footer());
    work.sync();
    for p in &moving {
        work.copy(p.start, to);
        work.set(p.block, entry_of(to));
        to += stride;
    }
    work.write_pages();
    let from = work.image.layout.entry_at(work.image.layout.blocks);
    work.steps.push(FileStep::Fill { file: FileId(0), at: from, len: table_end - from.0, byte: 0xff });
    work.sync();
    header.set_entries(entries);
    work.write(header_at, header.as_bytes()[..SECTOR_BYTES as usize].to_vec());
    work.image.table.resize(idx(blocks), FREE);
    for range in work.image.layout.metadata.iter_mut().filter(|m| m.0 == table_at) {
        range.1 = table_end;
    }
    Ok(())
}

/// Blocks behind the end are given up, others move into the holes, and the file is cut.
fn shrink(work: &mut Work, blocks: u32) {
    let behind = blocks..work.image.layout.blocks;
    if behind.clone().all(|b| work.image.table[idx(b)] == FREE) {
        return;
    }
    behind.for_each(|block| work.set(block, FREE));
    work.write_pages();
    work.fill_holes();
    work.end_file();
}
