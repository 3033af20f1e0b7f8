//! The metadata: what the disk is like, by GUIDs.

use super::locator;
use super::place::{BLOCK_UNIT, Region};
use super::{corrupt, unsupported};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_BLOCK_BYTES, MAX_DISK_BYTES};
use crate::map::{ByteSource, HostOffset};
use uuid::{Uuid, uuid};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const SIGNATURE: &[u8; 8] = b"metadata";
const TABLE_BYTES: usize = 64 << 10;
const ENTRY_BYTES: usize = 32;
const MAX_ITEMS: usize = 2047;
/// Longest item that is read.
const MAX_ITEM_BYTES: u32 = 64 << 10;
const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const LOGICAL_SECTOR: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
const PHYSICAL_SECTOR: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");

/// Flags of an item: a user's own; it concerns the disk, not the file; it has to be understood.
const USER: u32 = 1;
const OF_DISK: u32 = 2;
const REQUIRED: u32 = 4;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Item {
    id: [u8; 16],
    at: U32,
    bytes: U32,
    flags: U32,
    reserved: U32,
}

/// What the disk is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    pub(super) disk_bytes: u64,
    pub(super) block_bytes: u64,
    /// Sectors of the guest, which the bitmaps count.
    pub(super) sector_bytes: u64,
    /// Blocks are there from the start.
    pub(super) is_fixed: bool,
    pub(super) is_diff: bool,
    pub(super) parent: Option<Uuid>,
    pub(super) parent_names: Vec<String>,
}

struct Items<'a> {
    source: &'a dyn ByteSource,
    region: Region,
    items: Vec<Item>,
}

impl Items<'_> {
    fn get(&self, id: Uuid) -> Result<Option<Vec<u8>>> {
        let Some(item) = self.items.iter().find(|i| Uuid::from_bytes_le(i.id) == id) else { return Ok(None) };
        let (at, bytes) = (u64::from(item.at.get()), item.bytes.get());
        let inside = at >= TABLE_BYTES as u64 && at + u64::from(bytes) <= self.region.len;
        if !inside || bytes > MAX_ITEM_BYTES {
            return Err(corrupt(format!("metadata item {id} is said to have {bytes} bytes at {at}")));
        }
        let mut value = vec![0; usize::try_from(bytes).expect("MAX_ITEM_BYTES")];
        self.source.read_at(HostOffset(self.region.at + at), &mut value)?;
        Ok(Some(value))
    }

    fn fixed<const N: usize>(&self, id: Uuid, what: &str) -> Result<[u8; N]> {
        let value =
            self.get(id)?.ok_or_else(|| corrupt(format!("the metadata say nothing of the {what}")))?;
        let first = value.get(..N).and_then(|v| v.try_into().ok());
        first.ok_or_else(|| corrupt(format!("the metadata of the {what} have only {} bytes", value.len())))
    }

    fn sector_size(&self, id: Uuid, what: &str) -> Result<u64> {
        let bytes = u32::from_le_bytes(self.fixed(id, what)?);
        if ![512, 4096].contains(&bytes) {
            return Err(corrupt(format!("the {what} is {bytes}; 512 and 4096 are possible")));
        }
        Ok(bytes.into())
    }
}

impl Metadata {
    /// # Errors
    /// [`ErrorKind::Corrupt`], [`ErrorKind::Limit`], and [`ErrorKind::Unsupported`] for items that have to be understood and
    /// are not; those of reading.
    pub(super) fn read(source: &dyn ByteSource, region: Region) -> Result<Self> {
        let items = Items { source, region, items: table(source, region)? };
        let parameters: [u8; 8] = items.fixed(FILE_PARAMETERS, "file")?;
        let [a, b, c, d, flags, ..] = parameters;
        let block_bytes = u64::from(u32::from_le_bytes([a, b, c, d]));
        if !block_bytes.is_power_of_two() || !(BLOCK_UNIT..=MAX_BLOCK_BYTES).contains(&block_bytes) {
            let what =
                format!("the block size {block_bytes} is no power of two from 1 MiB to {MAX_BLOCK_BYTES}");
            return Err(corrupt(what));
        }
        let sector_bytes = items.sector_size(LOGICAL_SECTOR, "logical sector size")?;
        items.sector_size(PHYSICAL_SECTOR, "physical sector size")?;
        let disk_bytes = u64::from_le_bytes(items.fixed(DISK_SIZE, "disk size")?);
        if disk_bytes == 0 || !disk_bytes.is_multiple_of(sector_bytes) {
            return Err(corrupt(format!(
                "the disk size {disk_bytes} is no multiple of {sector_bytes} above 0"
            )));
        }
        if disk_bytes > MAX_DISK_BYTES {
            let what = format!("the disk size is {disk_bytes} bytes; {MAX_DISK_BYTES} are the limit");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let (is_fixed, is_diff) = (flags & 1 == 1, flags & 2 == 2);
        let (parent, parent_names) = match items.get(PARENT_LOCATOR)? {
            Some(raw) if is_diff => locator::read(&raw)?,
            None if is_diff => return Err(corrupt("a differencing image without a parent locator")),
            _ => (None, Vec::new()),
        };
        Ok(Metadata { disk_bytes, block_bytes, sector_bytes, is_fixed, is_diff, parent, parent_names })
    }
}

/// What a new image says besides [`Metadata`].
#[derive(Debug)]
pub(super) struct NewItems {
    pub(super) disk_id: Uuid,
    pub(super) physical: u64,
    pub(super) locator: Option<Vec<u8>>,
}

impl Metadata {
    /// The region of a new image: the table of items, and the items.
    pub(super) fn bytes(&self, more: &NewItems) -> Vec<u8> {
        let small = |n: u64| u32::try_from(n).expect("at most MAX_BLOCK_BYTES").to_le_bytes().to_vec();
        let flags = u32::from(self.is_fixed) | u32::from(self.is_diff) << 1;
        let parameters = [small(self.block_bytes), flags.to_le_bytes().to_vec()].concat();
        let mut values = vec![
            (FILE_PARAMETERS, parameters, REQUIRED),
            (DISK_SIZE, self.disk_bytes.to_le_bytes().to_vec(), REQUIRED | OF_DISK),
            (DISK_ID, more.disk_id.to_bytes_le().to_vec(), REQUIRED | OF_DISK),
            (LOGICAL_SECTOR, small(self.sector_bytes), REQUIRED | OF_DISK),
            (PHYSICAL_SECTOR, small(more.physical), REQUIRED | OF_DISK),
        ];
        values.extend(more.locator.clone().map(|raw| (PARENT_LOCATOR, raw, REQUIRED)));
        let mut raw = vec![0; TABLE_BYTES];
        raw[..8].copy_from_slice(SIGNATURE);
        raw[10..12].copy_from_slice(&u16::try_from(values.len()).expect("a few items").to_le_bytes());
        for (i, (id, value, flags)) in values.into_iter().enumerate() {
            let number = |n: usize| U32::new(u32::try_from(n).expect("a few items"));
            let item = Item {
                id: id.to_bytes_le(),
                at: number(raw.len()),
                bytes: number(value.len()),
                flags: flags.into(),
                reserved: 0.into(),
            };
            let at = (i + 1) * ENTRY_BYTES;
            raw[at..at + ENTRY_BYTES].copy_from_slice(item.as_bytes());
            raw.extend(value);
            raw.resize(raw.len().next_multiple_of(8), 0);
        }
        raw
    }
}

fn table(source: &dyn ByteSource, region: Region) -> Result<Vec<Item>> {
    let mut raw = vec![0; TABLE_BYTES];
    source.read_at(HostOffset(region.at), &mut raw)?;
    if !raw.starts_with(SIGNATURE) {
        return Err(corrupt("the signature of the metadata is wrong"));
    }
    let count = usize::from(u16::from_le_bytes([raw[10], raw[11]]));
    if count > MAX_ITEMS {
        return Err(corrupt(format!("the metadata have {count} items; {MAX_ITEMS} fit")));
    }
    let read = |raw: &[u8]| Item::read_from_bytes(raw).expect("the length of an item");
    let items: Vec<_> = raw[ENTRY_BYTES..].chunks_exact(ENTRY_BYTES).take(count).map(read).collect();
    let known = [FILE_PARAMETERS, DISK_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR];
    let strange = items.iter().find(|i| {
        i.flags.get() & REQUIRED != 0
            && (i.flags.get() & USER != 0 || !known.contains(&Uuid::from_bytes_le(i.id)))
    });
    match strange {
        None => Ok(items),
        Some(i) => {
            let id = Uuid::from_bytes_le(i.id);
            Err(unsupported(format!("it has a metadata item {id} without which it cannot be understood")))
        }
    }
}
