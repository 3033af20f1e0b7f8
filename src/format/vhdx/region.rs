//! The table of regions, of which there are two copies.

use super::place::{MIB, Region};
use super::{corrupt, unsupported};
use crate::error::Result;
use crate::format::crc32c::checksum;
use crate::map::{ByteSource, HostOffset};
use crate::probe::small::unit;
use uuid::{Uuid, uuid};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const COPIES_AT: [u64; 2] = [192 << 10, 256 << 10];
const TABLE_BYTES: usize = unit(64 << 10) as usize;
const SIGNATURE: &[u8; 4] = b"regi";
const ENTRY_BYTES: usize = 32;
const ENTRIES_AT: usize = 16;
/// Most entries there can be: 2047.
const MAX_ENTRIES: usize = (TABLE_BYTES - ENTRIES_AT) / ENTRY_BYTES;
const BLOCK_TABLE: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Entry {
    id: [u8; 16],
    at: U64,
    bytes: U32,
    required: U32,
}

#[derive(Clone, Debug)]
pub(super) struct Regions {
    pub(super) table: Region,
    pub(super) metadata: Region,
    /// Of others, that may be left alone.
    pub(super) others: Vec<Region>,
    pub(super) both_are_good: bool,
}

fn copy(source: &dyn ByteSource, at: u64) -> Result<Option<Vec<u8>>> {
    if source.len() < at + TABLE_BYTES as u64 {
        return Ok(None);
    }
    let mut bytes = vec![0; TABLE_BYTES];
    source.read_at(HostOffset(at), &mut bytes)?;
    let stated = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    Ok((bytes.starts_with(SIGNATURE) && stated == checksum(&bytes, 4)).then_some(bytes))
}

/// Both copies, where they are and what they are; `None` for one that is not good.
///
/// # Errors
/// Those of reading.
pub(super) fn copies(source: &dyn ByteSource) -> Result<[(u64, Option<Vec<u8>>); 2]> {
    let [first, second] = COPIES_AT;
    Ok([(first, copy(source, first)?), (second, copy(source, second)?)])
}

impl Regions {
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] and [`crate::ErrorKind::Unsupported`], naming what is wrong; those of reading.
    pub(super) fn read(source: &dyn ByteSource) -> Result<Self> {
        let [(_, first), (_, second)] = copies(source)?;
        let both_are_good = first.is_some() && second.is_some();
        let bytes = first
            .or(second)
            .ok_or_else(|| corrupt("neither of the two tables of regions has a right checksum"))?;
        Self::parse(&bytes, source.len(), both_are_good)
    }

    /// The two copies of a new image, and where they go. Both regions have to be understood: VirtualBox refuses images that do
    /// not say so.
    pub(super) fn copies_of(table: Region, metadata: Region) -> [(u64, Vec<u8>); 2] {
        let mut raw = vec![0; TABLE_BYTES];
        raw[..4].copy_from_slice(SIGNATURE);
        raw[8..12].copy_from_slice(&2u32.to_le_bytes());
        let entries = [(BLOCK_TABLE, table), (METADATA, metadata)];
        for (chunk, (id, r)) in raw[ENTRIES_AT..].chunks_exact_mut(ENTRY_BYTES).zip(entries) {
            let bytes = u32::try_from(r.len).expect("a region that was checked").into();
            let entry = Entry { id: id.to_bytes_le(), at: r.at.into(), bytes, required: 1.into() };
            chunk.copy_from_slice(entry.as_bytes());
        }
        let sum = checksum(&raw, 4);
        raw[4..8].copy_from_slice(&sum.to_le_bytes());
        COPIES_AT.map(|at| (at, raw.clone()))
    }

    fn parse(bytes: &[u8], file_bytes: u64, both_are_good: bool) -> Result<Self> {
        let count = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        let count = usize::try_from(count).ok().filter(|n| *n <= MAX_ENTRIES);
        let count = count.ok_or_else(|| corrupt("the table of regions has more entries than fit"))?;
        let (mut table, mut metadata, mut others) = (None, None, Vec::new());
        for raw in bytes[ENTRIES_AT..].chunks_exact(ENTRY_BYTES).take(count) {
            let entry = Entry::read_from_bytes(raw).expect("the length of an entry");
            let id = Uuid::from_bytes_le(entry.id);
            let region = Region { at: entry.at.get(), len: entry.bytes.get().into() };
            let possible =
                region.at >= MIB && region.at.is_multiple_of(MIB) && region.len.is_multiple_of(MIB);
            if !possible
                || region.len == 0
                || region.at.checked_add(region.len).is_none_or(|e| e > file_bytes)
            {
                let what = format!("region {id} is said to have {} bytes at {}", region.len, region.at);
                return Err(corrupt(format!("{what}, where no region can be")));
            }
            let slot = match id {
                BLOCK_TABLE => &mut table,
                METADATA => &mut metadata,
                _ if entry.required.get() & 1 == 1 => {
                    let what = format!("it has a region {id} without which it cannot be understood");
                    return Err(unsupported(what));
                }
                _ => {
                    others.push(region);
                    continue;
                }
            };
            if slot.replace(region).is_some() {
                return Err(corrupt(format!("region {id} is there twice")));
            }
        }
        let missing = |what: &str| corrupt(format!("the table of regions names no {what}"));
        let regions = Regions {
            table: table.ok_or_else(|| missing("block table"))?,
            metadata: metadata.ok_or_else(|| missing("metadata"))?,
            others,
            both_are_good,
        };
        regions.must_be_apart()?;
        Ok(regions)
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<Region> {
        let mut all = vec![self.table, self.metadata];
        all.extend(&self.others);
        all.sort_unstable();
        all
    }

    fn must_be_apart(&self) -> Result<()> {
        match self.all().windows(2).find(|w| w[0].end() > w[1].at) {
            Some(w) => Err(corrupt(format!("two regions overlap at byte {}", w[1].at))),
            None => Ok(()),
        }
    }
}
