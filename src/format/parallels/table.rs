//! The table: read in bounded pieces, judged as a whole.

use super::layout::{FIRST_ENTRY, Layout, idx};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::TABLE_PIECE_BYTES;
use crate::map::{ByteSource, HostOffset};
use std::collections::HashSet;

/// Header and table, as they are in the file.
///
/// # Errors
/// Those of reading, and [`ErrorKind::Limit`] without the memory.
pub(super) fn words(source: &dyn ByteSource, layout: &Layout) -> Result<Vec<u32>> {
    let mut words = Vec::new();
    let no_memory = |_| Error::new(ErrorKind::Limit, format!("no memory for {} entries", layout.words));
    words.try_reserve_exact(idx(layout.words)).map_err(no_memory)?;
    let mut piece = vec![0u8; TABLE_PIECE_BYTES.min(idx(layout.words) * 4)];
    while words.len() < idx(layout.words) {
        let len = piece.len().min((idx(layout.words) - words.len()) * 4);
        source.read_at(HostOffset(words.len() as u64 * 4), &mut piece[..len])?;
        words.extend(piece[..len].as_chunks::<4>().0.iter().map(|raw| u32::from_le_bytes(*raw)));
    }
    Ok(words)
}

/// The places the entries use.
#[derive(Debug)]
pub(super) struct Used {
    /// No more than there are entries, however far apart they are.
    pub(super) places: HashSet<u32>,
    /// One more than the highest place in use.
    pub(super) high_water: u32,
    /// Where the last block in use ends, or the data begins.
    pub(super) end: HostOffset,
    pub(super) blocks: u64,
}

/// What is wrong with one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Names a place in header or table.
    Inside { block: u32, at: HostOffset },
    /// Names a place that ends behind the end of the file.
    Missing { block: u32, at: HostOffset },
    /// Names a place that overlaps one an entry before it names.
    Shared { block: u32, at: HostOffset },
}

impl Fault {
    pub(super) fn describe(self, layout: &Layout, file_bytes: u64) -> String {
        match self {
            Fault::Inside { block, at } => {
                format!(
                    "block {block} is said to lie at {at}, inside the table: the data begins at {}",
                    layout.data_at()
                )
            }
            Fault::Missing { block, at } => {
                let end = layout.needed_for(block, at);
                format!("block {block} lies at {at} up to byte {end}, behind the file's end at {file_bytes}")
            }
            Fault::Shared { block, at } => {
                format!("block {block} lies at {at}, where another block lies already")
            }
        }
    }
}

/// Collects the places in use, telling `fault` about every entry that is wrong. Those do not count as users, except
/// for places that are cut off in their midst.
pub(super) fn survey(
    words: impl Iterator<Item = u32>,
    layout: &Layout,
    file_bytes: u64,
    mut fault: impl FnMut(Fault),
) -> Used {
    let mut used = Used { places: HashSet::new(), high_water: 0, end: layout.end_of(0), blocks: 0 };
    let entries = words.skip(idx(FIRST_ENTRY)).take(idx(layout.blocks));
    for (block, value) in (0u32..).zip(entries) {
        let Some(at) = layout.place_named(value) else { continue };
        if at.0 < layout.data_at() {
            fault(Fault::Inside { block, at });
            continue;
        }
        if at.0 >= file_bytes {
            fault(Fault::Missing { block, at });
            continue;
        }
        let touched = layout.places_touched(at);
        if touched.clone().any(|p| used.places.contains(&p)) {
            fault(Fault::Shared { block, at });
            continue;
        }
        if layout.needed_for(block, at) > file_bytes {
            fault(Fault::Missing { block, at });
        }
        used.high_water = used.high_water.max(touched.end().saturating_add(1));
        used.places.extend(touched);
        used.end = used.end.max(at.plus(layout.cluster_bytes));
        used.blocks += 1;
    }
    used
}

/// The places in use by a table without fault.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for the first fault.
pub(super) fn used_places(words: &[u32], layout: &Layout, file_bytes: u64) -> Result<Used> {
    let mut first = None;
    let used = survey(words.iter().copied(), layout, file_bytes, |f| {
        first.get_or_insert(f);
    });
    match first {
        None => Ok(used),
        Some(f) => Err(Error::new(ErrorKind::Corrupt, f.describe(layout, file_bytes))
            .hint("vdimg check tells everything that is wrong")),
    }
}
