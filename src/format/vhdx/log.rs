//! The log: sectors of metadata that are not certain to be in their places yet.
//!
//! Entries lie one behind the other in a ring. The newest run of them counts whose numbers follow each other, and whose last entry
//! says where it begins; everything else is what was there before.

use super::crc32c::checksum;
use super::replayed::{Filling, Patch, Patches};
use super::{corrupt, unsupported};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::MAX_VHDX_LOG_BYTES;
use crate::map::{ByteSource, HostOffset};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

const SECTOR: usize = 4096;
const ENTRY_BYTES: usize = 64;
const DESCRIPTOR_BYTES: usize = 32;

#[derive(Clone, Copy, Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct EntryHeader {
    signature: [u8; 4],
    checksum: U32,
    bytes: U32,
    tail: U32,
    sequence: U64,
    descriptors: U32,
    reserved: U32,
    log: [u8; 16],
    flushed_file_bytes: U64,
    last_file_bytes: U64,
}

#[derive(Clone, Copy, Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Descriptor {
    signature: [u8; 4],
    /// Of a data sector the last four bytes.
    trailing: [u8; 4],
    /// The first eight bytes; of zeros how many.
    leading: [u8; 8],
    at: U64,
    sequence: U64,
}

/// An entry that is whole.
struct Entry {
    at: usize,
    bytes: usize,
    tail: usize,
    sequence: u64,
    flushed_file_bytes: u64,
    patches: Vec<Patch>,
}

/// The patches of the log that begins at `at` and whose entries bear `id`; none if no entry counts.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where the log speaks of more than the file has; [`ErrorKind::Limit`]; those of reading.
pub(super) fn read(source: &dyn ByteSource, id: [u8; 16], at: u64, bytes: u64) -> Result<Patches> {
    if bytes > MAX_VHDX_LOG_BYTES {
        let what = format!("the log has {bytes} bytes; {MAX_VHDX_LOG_BYTES} are the limit");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    if at.saturating_add(bytes) > source.len() {
        return Err(corrupt(format!("the log ends behind the file's end at {}", source.len())));
    }
    let mut ring = vec![0; usize::try_from(bytes).expect("MAX_VHDX_LOG_BYTES")];
    source.read_at(HostOffset(at), &mut ring)?;
    let run = newest_run(&ring, id);
    if let Some(last) = run.last()
        && last.flushed_file_bytes > source.len()
    {
        let what =
            format!("the log is of a file of {} bytes, but it has {}", last.flushed_file_bytes, source.len());
        return Err(corrupt(what));
    }
    let patches: Vec<_> = run.into_iter().flat_map(|e| e.patches).collect();
    if let Some(p) = patches.iter().find(|p| p.at < 256 << 10 || p.at.checked_add(p.len()).is_none()) {
        return Err(unsupported(format!("the log would write over byte {}, where the headers are", p.at)));
    }
    Ok(Patches(patches))
}

/// The entries that count, oldest first.
fn newest_run(ring: &[u8], id: [u8; 16]) -> Vec<Entry> {
    let (mut best, mut from): (Vec<Entry>, usize) = (Vec::new(), 0);
    while from < ring.len() {
        let mut run = Vec::new();
        let (mut at, mut seen) = (from, 0);
        while let Some(entry) = entry(ring, at, id) {
            let follows =
                run.last().is_none_or(|e: &Entry| e.sequence.checked_add(1) == Some(entry.sequence));
            seen += entry.bytes;
            if !follows || seen > ring.len() {
                break;
            }
            at = (at + entry.bytes) % ring.len();
            run.push(entry);
        }
        // a run that wraps has been looked at to its end, and one that begins further on is a part of it
        let next = if run.is_empty() || at <= from { from + SECTOR } else { at };
        let newest = run.last().map_or(0, |e| e.sequence);
        let begin = run.last().and_then(|last| run.iter().position(|e| e.at == last.tail));
        if let Some(begin) = begin
            && newest > best.last().map_or(0, |e| e.sequence)
        {
            best = run.split_off(begin);
        }
        from = next;
    }
    best
}

/// `len` bytes of the ring from `at` on.
fn cut(ring: &[u8], at: usize, len: usize) -> Vec<u8> {
    let first = len.min(ring.len() - at);
    [&ring[at..at + first], &ring[..len - first]].concat()
}

/// The entry at `at`, if all of it is as it was written.
fn entry(ring: &[u8], at: usize, id: [u8; 16]) -> Option<Entry> {
    let head = EntryHeader::read_from_bytes(&ring[at..at + ENTRY_BYTES]).ok()?;
    let bytes = usize::try_from(head.bytes.get()).ok()?;
    let tail = usize::try_from(head.tail.get()).ok()?;
    let possible = &head.signature == b"loge"
        && head.log == id
        && head.sequence.get() > 0
        && (SECTOR..=ring.len()).contains(&bytes)
        && bytes.is_multiple_of(SECTOR)
        && tail.is_multiple_of(SECTOR)
        && tail < ring.len();
    if !possible {
        return None;
    }
    let whole = cut(ring, at, bytes);
    if checksum(&whole, 4) != head.checksum.get() {
        return None;
    }
    Some(Entry {
        at,
        bytes,
        tail,
        sequence: head.sequence.get(),
        flushed_file_bytes: head.flushed_file_bytes.get(),
        patches: patches(&whole, &head)?,
    })
}

/// What an entry puts where; `None` if its parts do not belong together.
fn patches(whole: &[u8], head: &EntryHeader) -> Option<Vec<Patch>> {
    let count = usize::try_from(head.descriptors.get()).ok()?;
    let described = ENTRY_BYTES.checked_add(count.checked_mul(DESCRIPTOR_BYTES)?)?.next_multiple_of(SECTOR);
    let descriptors = whole.get(ENTRY_BYTES..described)?.chunks_exact(DESCRIPTOR_BYTES).take(count);
    let mut sectors = whole[described..].chunks_exact(SECTOR);
    let mut all = Vec::new();
    for raw in descriptors {
        let d = Descriptor::read_from_bytes(raw).ok()?;
        if d.sequence.get() != head.sequence.get() || !d.at.get().is_multiple_of(SECTOR as u64) {
            return None;
        }
        let what = match &d.signature {
            b"zero" => Filling::Zeros(u64::from_le_bytes(d.leading)),
            b"desc" => Filling::Bytes(sector(sectors.next()?, &d, head.sequence.get())?),
            _ => return None,
        };
        all.push(Patch { at: d.at.get(), what });
    }
    Some(all)
}

/// A sector as it was: its first eight and last four bytes stand in its descriptor, in their place its number.
fn sector(raw: &[u8], d: &Descriptor, sequence: u64) -> Option<Box<[u8]>> {
    let high = raw[4..8].try_into().map(u32::from_le_bytes).ok()?;
    let low = raw[SECTOR - 4..].try_into().map(u32::from_le_bytes).ok()?;
    if !raw.starts_with(b"data") || u64::from(high) << 32 | u64::from(low) != sequence {
        return None;
    }
    let mut bytes = raw.to_vec();
    bytes[..8].copy_from_slice(&d.leading);
    bytes[SECTOR - 4..].copy_from_slice(&d.trailing);
    Some(bytes.into_boxed_slice())
}
