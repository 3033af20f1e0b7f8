//! The block table: read in bounded pieces, judged as a whole.

use super::layout::{Entry, Layout, idx};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::TABLE_PIECE_BYTES;
use crate::map::{Bitmap, ByteSource, HostBlock, HostOffset};
use std::sync::atomic::{AtomicU32, Ordering};

/// Hands every entry to `each`, in order. The table was found to lie inside the file, so what is read is
/// bounded by bytes that exist.
///
/// # Errors
/// Those of reading.
pub(super) fn for_each(
    source: &dyn ByteSource,
    layout: &Layout,
    mut each: impl FnMut(u32, u32),
) -> Result<()> {
    let mut piece = vec![0u8; TABLE_PIECE_BYTES.min(idx(layout.blocks).saturating_mul(4))];
    let mut index = 0;
    while index < layout.blocks {
        let left = idx(layout.blocks - index).saturating_mul(4);
        let len = left.min(piece.len());
        source.read_at(layout.entry_at(index), &mut piece[..len])?;
        for raw in piece[..len].as_chunks::<4>().0 {
            each(index, u32::from_le_bytes(*raw));
            index += 1;
        }
    }
    Ok(())
}

/// The table in memory.
///
/// # Errors
/// Those of reading, and [`ErrorKind::Limit`] without the memory.
pub(super) fn load(source: &dyn ByteSource, layout: &Layout) -> Result<Box<[AtomicU32]>> {
    let mut table = Vec::new();
    let no_memory =
        |_| Error::new(ErrorKind::Limit, format!("no memory for {} table entries", layout.blocks));
    table.try_reserve_exact(idx(layout.blocks)).map_err(no_memory)?;
    for_each(source, layout, |_, value| table.push(AtomicU32::new(value)))?;
    Ok(table.into_boxed_slice())
}

/// The bytes of a page of the table, and where they go.
pub(super) fn page_of(table: &[u32], layout: &Layout, page: u32) -> (HostOffset, Vec<u8>) {
    let (first, end) = layout.entries_of(page);
    let bytes = table[idx(first)..idx(end)].iter().flat_map(|v| v.to_le_bytes()).collect();
    (layout.entry_at(first), bytes)
}

/// The places the entries of a sound table use.
#[derive(Debug)]
pub(super) struct Used {
    pub(super) places: Bitmap,
    /// One more than the highest place in use.
    pub(super) high_water: u32,
}

/// What is wrong with one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Names a place no image of this size can have.
    Beyond { block: u32, place: u32 },
    /// Names a place that ends behind the end of the file.
    Missing { block: u32, place: u32 },
    /// Names a place an entry before it names, too.
    Shared { block: u32, place: u32 },
}

impl Fault {
    pub(super) fn describe(self, layout: &Layout, file_bytes: u64) -> String {
        match self {
            Fault::Beyond { block, place } => {
                let places = layout.blocks;
                format!("block {block} is said to lie at place {place}; only {places} places can exist")
            }
            Fault::Missing { block, place } => {
                let end = layout.needed_for(block, HostBlock(place));
                format!(
                    "block {block} lies at place {place} up to byte {end}, behind the file's end at {file_bytes}"
                )
            }
            Fault::Shared { block, place } => {
                format!("block {block} lies at place {place}, where another block lies already")
            }
        }
    }
}

/// Collects the places in use, telling `fault` about every entry that is wrong. Wrong entries other than
/// [`Fault::Missing`] do not count as users.
pub(super) fn survey(
    entries: impl Iterator<Item = u32>,
    layout: &Layout,
    file_bytes: u64,
    mut fault: impl FnMut(Fault),
) -> Used {
    let mut used = Used { places: Bitmap::new(), high_water: 0 };
    for (block, value) in (0u32..).zip(entries) {
        let Entry::At(place) = Entry::of(value) else { continue };
        let HostBlock(n) = place;
        if n >= layout.blocks {
            fault(Fault::Beyond { block, place: n });
            continue;
        }
        if layout.needed_for(block, place) > file_bytes {
            fault(Fault::Missing { block, place: n });
        }
        if !used.places.insert(n) {
            fault(Fault::Shared { block, place: n });
        }
        used.high_water = used.high_water.max(n + 1);
    }
    used
}

/// The places in use by a table without fault.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for the first fault.
pub(super) fn used_places(table: &[AtomicU32], layout: &Layout, file_bytes: u64) -> Result<Used> {
    let mut first = None;
    let entries = table.iter().map(|e| e.load(Ordering::Relaxed));
    let used = survey(entries, layout, file_bytes, |f| {
        first.get_or_insert(f);
    });
    match first {
        None => Ok(used),
        Some(f) => Err(Error::new(ErrorKind::Corrupt, f.describe(layout, file_bytes))
            .hint("vdimg check tells everything that is wrong")),
    }
}
