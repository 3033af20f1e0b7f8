//! The block table: read in bounded pieces, judged as a whole.

use super::footer::corrupt;
use super::layout::{FREE, Layout, idx};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{SECTOR_BYTES, TABLE_PIECE_BYTES};
use crate::map::ByteSource;

/// Hands every entry to `each`, in order.
///
/// # Errors
/// Those of reading.
pub(super) fn for_each(source: &dyn ByteSource, layout: &Layout, mut each: impl FnMut(u32)) -> Result<()> {
    let mut piece = vec![0u8; TABLE_PIECE_BYTES.min(idx(layout.blocks).saturating_mul(4))];
    let mut index = 0;
    while index < layout.blocks {
        let len = idx(layout.blocks - index).saturating_mul(4).min(piece.len());
        source.read_at(layout.entry_at(index), &mut piece[..len])?;
        for raw in piece[..len].as_chunks::<4>().0 {
            each(u32::from_be_bytes(*raw));
            index += 1;
        }
    }
    Ok(())
}

/// The whole table.
///
/// # Errors
/// Those of reading, and [`ErrorKind::Limit`] without the memory.
pub(super) fn load(source: &dyn ByteSource, layout: &Layout) -> Result<Vec<u32>> {
    let mut table = Vec::new();
    let no_memory =
        |_| Error::new(ErrorKind::Limit, format!("no memory for {} table entries", layout.blocks));
    table.try_reserve_exact(idx(layout.blocks)).map_err(no_memory)?;
    for_each(source, layout, |entry| table.push(entry))?;
    Ok(table)
}

/// What is wrong with one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The block would lie on metadata.
    OnMetadata { block: u32, start: u64, metadata: (u64, u64) },
    /// The block ends behind the end of the file.
    Missing { block: u32, start: u64, end: u64 },
    /// The block lies where another begins before it.
    Shared { block: u32, start: u64, other: u32 },
}

impl Fault {
    pub(super) fn describe(self, file_bytes: u64) -> String {
        match self {
            Fault::OnMetadata { block, start, metadata: (from, to) } => format!(
                "block {block} is said to lie at byte {start}, where bytes {from} to {to} are no block's"
            ),
            Fault::Missing { block, start, end } => {
                format!(
                    "block {block} lies at byte {start} up to {end}, behind the file's end at {file_bytes}"
                )
            }
            Fault::Shared { block, start, other } => {
                format!("block {block} lies at byte {start}, where block {other} lies already")
            }
        }
    }
}

/// A block and where it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) block: u32,
    pub(super) start: u64,
}

/// The blocks that have a place, in the order of the file; of those that begin at the same byte the first on the disk
/// first.
pub(super) fn placed(table: &[u32]) -> Vec<Placed> {
    let used = (0u32..).zip(table).filter(|(_, e)| **e != FREE);
    let mut all: Vec<_> = used.map(|(block, e)| Placed { block, start: Layout::start_of(*e) }).collect();
    all.sort_unstable_by_key(|p| (p.start, p.block));
    all
}

/// Ranges that a block would fit into, and that a block lies behind.
pub(super) fn holes(table: &[u32], layout: &Layout) -> Vec<(u64, u64)> {
    let (mut holes, stride) = (Vec::new(), layout.stride());
    let blocks = placed(table);
    let last = blocks.last().map_or(0, |p| p.start);
    let blocks = blocks.into_iter().map(|p| (p.start, p.start + stride));
    let mut taken: Vec<_> = blocks.chain(layout.metadata.iter().copied()).collect();
    taken.sort_unstable();
    let mut end = 0;
    for (from, to) in taken {
        if from.saturating_sub(end) >= stride && end < last {
            holes.push((end, from));
        }
        end = end.max(to.next_multiple_of(SECTOR_BYTES));
    }
    holes
}

/// The moves that fill all holes, from the end of the file. A place that is left lies above all that are entered.
pub(super) fn fillings(table: &[u32], layout: &Layout) -> Vec<(Placed, u64)> {
    let stride = layout.stride();
    let holes = holes(table, layout);
    let rooms = holes.iter().flat_map(|(from, to)| (0..(to - from) / stride).map(move |n| from + n * stride));
    let last_first = placed(table).into_iter().rev();
    last_first.zip(rooms).take_while(|(p, to)| *to < p.start).collect()
}

/// End of everything but the footer.
pub(super) fn end(table: &[u32], layout: &Layout) -> u64 {
    let last = placed(table).last().map_or(0, |p| p.start + layout.stride());
    last.max(layout.metadata_end()).next_multiple_of(SECTOR_BYTES)
}

/// The entry for a block that begins there.
pub(super) fn entry_of(start: u64) -> u32 {
    u32::try_from(start / SECTOR_BYTES).expect("blocks end where entries do")
}

/// Tells `fault` about every entry that is wrong. Returns the end of the last block that is where it may be.
pub(super) fn survey(table: &[u32], layout: &Layout, file_bytes: u64, mut fault: impl FnMut(Fault)) -> u64 {
    let (mut end, mut last) = (0, 0);
    for Placed { block, start } in placed(table) {
        if let Some(metadata) = layout.metadata_in(start) {
            fault(Fault::OnMetadata { block, start, metadata });
            continue;
        }
        let needed = layout.needed_for(block, start);
        if needed > file_bytes {
            fault(Fault::Missing { block, start, end: needed });
        }
        if start < end {
            fault(Fault::Shared { block, start, other: last });
        } else {
            last = block;
        }
        end = end.max(start + layout.stride());
    }
    end
}

/// The end of everything in a table without fault.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for the first fault.
pub(super) fn used_end(table: &[u32], layout: &Layout, file_bytes: u64) -> Result<u64> {
    let mut first = None;
    let end = survey(table, layout, file_bytes, |f| {
        first.get_or_insert(f);
    });
    match first {
        None => Ok(end.max(layout.metadata_end())),
        Some(f) => Err(corrupt(f.describe(file_bytes)).hint("vdimg check tells everything that is wrong")),
    }
}
