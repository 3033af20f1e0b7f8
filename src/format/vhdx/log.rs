//! The log: sectors of metadata that are not certain to be in their places yet.
//!
//! Entries lie one behind the other in a ring. The newest run of them counts whose numbers follow each other, and whose last entry
//! says where it begins; everything else is what was there before.

use super::replayed::{Filling, Patch, Patches};
use super::{corrupt, unsupported};
use crate::error::{Error, ErrorKind, Result};
use crate::format::crc32c::checksum;
use crate::limits::MAX_VHDX_LOG_BYTES;
use crate::map::{ByteSource, HostOffset};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const SECTOR: usize = 4096;
const ENTRY_BYTES: usize = 64;
const DESCRIPTOR_BYTES: usize = 32;
/// Times that a ring's bytes are summed at most: as entries of the newest run, and as remains of older ones.
const MOST_LAYERS: usize = 8;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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
    let run = newest_run(&ring, id)?;
    if let Some(last) = run.last()
        && last.flushed_file_bytes > source.len()
    {
        let what =
            format!("the log is of a file of {} bytes, but it has {}", last.flushed_file_bytes, source.len());
        return Err(corrupt(what));
    }
    let patches: Vec<_> = run.into_iter().flat_map(|e| e.patches).collect();
    let says = patches.iter().map(Patch::len).fold(0, u64::saturating_add);
    if says > MAX_VHDX_LOG_BYTES {
        let what = format!("its log would write {says} bytes; {MAX_VHDX_LOG_BYTES} are the limit");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    if let Some(p) = patches.iter().find(|p| p.at < 256 << 10 || p.at.checked_add(p.len()).is_none()) {
        return Err(unsupported(format!("the log would write over byte {}, where the headers are", p.at)));
    }
    Ok(Patches(patches))
}

/// The entries that count, oldest first.
///
/// # Errors
/// [`ErrorKind::Limit`] where too many bytes would have to be summed: what was once written lies there at most in a few layers.
fn newest_run(ring: &[u8], id: [u8; 16]) -> Result<Vec<Entry>> {
    let (mut best, mut from): (Vec<Entry>, usize) = (Vec::new(), 0);
    let mut effort = MOST_LAYERS * ring.len();
    while from < ring.len() {
        let mut run = Vec::new();
        let (mut at, mut seen) = (from, 0);
        while let Some(entry) = entry(ring, at, id, &mut effort)? {
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
        let wraps = !run.is_empty() && at <= from;
        let next = if run.is_empty() { from + SECTOR } else { at };
        let newest = run.last().map_or(0, |e| e.sequence);
        let begin = run.last().and_then(|last| run.iter().position(|e| e.at == last.tail));
        if let Some(begin) = begin
            && newest > best.last().map_or(0, |e| e.sequence)
        {
            best = run.split_off(begin);
        }
        if wraps {
            break;
        }
        from = next;
    }
    Ok(best)
}

/// `len` bytes of the ring from `at` on.
fn cut(ring: &[u8], at: usize, len: usize) -> Vec<u8> {
    let first = len.min(ring.len() - at);
    [&ring[at..at + first], &ring[..len - first]].concat()
}

/// The entry at `at`, if all of it is as it was written. Its bytes are taken off `effort`.
fn entry(ring: &[u8], at: usize, id: [u8; 16], effort: &mut usize) -> Result<Option<Entry>> {
    let Some((head, bytes, tail)) = head_of(ring, at, id) else { return Ok(None) };
    *effort = effort
        .checked_sub(bytes)
        .ok_or_else(|| Error::new(ErrorKind::Limit, "its log is made so that it would take long to read"))?;
    let whole = cut(ring, at, bytes);
    if checksum(&whole, 4) != head.checksum.get() {
        return Ok(None);
    }
    let Some(patches) = patches(&whole, &head) else { return Ok(None) };
    let (sequence, flushed_file_bytes) = (head.sequence.get(), head.flushed_file_bytes.get());
    Ok(Some(Entry { at, bytes, tail, sequence, flushed_file_bytes, patches }))
}

/// The head of the entry at `at`, its length and its tail, if they can be right.
fn head_of(ring: &[u8], at: usize, id: [u8; 16]) -> Option<(EntryHeader, usize, usize)> {
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
    possible.then_some((head, bytes, tail))
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
            b"zero" => Filling::Zeros(zeros(u64::from_le_bytes(d.leading))?),
            b"desc" => Filling::Bytes(sector(sectors.next()?, &d, head.sequence.get())?),
            _ => return None,
        };
        all.push(Patch { at: d.at.get(), what });
    }
    Some(all)
}

/// Zeros come in whole sectors, too.
fn zeros(bytes: u64) -> Option<u64> {
    (bytes > 0 && bytes.is_multiple_of(SECTOR as u64)).then_some(bytes)
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

/// An entry to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewEntry<'a> {
    pub(super) id: [u8; 16],
    pub(super) sequence: u64,
    /// Where the run begins that it is the last of, in bytes of the ring.
    pub(super) tail: u64,
    /// Bytes that the file is durably long.
    pub(super) file_bytes: u64,
    /// Sectors and where they go.
    pub(super) sectors: &'a [(HostOffset, Vec<u8>)],
}

impl NewEntry<'_> {
    /// Sectors of the log that an entry with so many descriptors takes before those it describes.
    fn described(count: usize) -> usize {
        (ENTRY_BYTES + DESCRIPTOR_BYTES * count).div_ceil(SECTOR)
    }

    /// Its bytes, whole sectors.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let described = Self::described(self.sectors.len()) * SECTOR;
        let mut raw = vec![0; described + self.sectors.len() * SECTOR];
        let mut head = EntryHeader::new_zeroed();
        head.signature = *b"loge";
        head.bytes = u32::try_from(raw.len()).expect("an entry is shorter than the log").into();
        head.tail = u32::try_from(self.tail).expect("MAX_VHDX_LOG_BYTES").into();
        head.sequence = self.sequence.into();
        head.descriptors = u32::try_from(self.sectors.len()).expect("few").into();
        head.log = self.id;
        head.flushed_file_bytes = self.file_bytes.into();
        head.last_file_bytes = self.file_bytes.into();
        let [a, b, c, d, high @ ..] = self.sequence.to_le_bytes();
        let low = [a, b, c, d];
        for (i, (to, bytes)) in self.sectors.iter().enumerate() {
            let mut d = Descriptor::new_zeroed();
            d.signature = *b"desc";
            d.leading.copy_from_slice(&bytes[..8]);
            d.trailing.copy_from_slice(&bytes[SECTOR - 4..]);
            (d.at, d.sequence) = (to.0.into(), self.sequence.into());
            let at = ENTRY_BYTES + i * DESCRIPTOR_BYTES;
            raw[at..at + DESCRIPTOR_BYTES].copy_from_slice(d.as_bytes());
            let sector = &mut raw[described + i * SECTOR..][..SECTOR];
            sector.copy_from_slice(bytes);
            sector[..4].copy_from_slice(b"data");
            sector[4..8].copy_from_slice(&high);
            sector[SECTOR - 4..].copy_from_slice(&low);
        }
        raw[..ENTRY_BYTES].copy_from_slice(head.as_bytes());
        let sum = checksum(&raw, 4);
        raw[4..8].copy_from_slice(&sum.to_le_bytes());
        raw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let id = [7; 16];
        let page = |n: u8| (HostOffset(3 << 20 | u64::from(n) << 12), vec![n; SECTOR]);
        // more descriptors than fit into the first sector
        let many: Vec<_> = (1..=130).map(page).collect();
        let new = NewEntry { id, sequence: 1 << 33 | 5, tail: 4096, file_bytes: 9 << 20, sectors: &many };
        let mut ring = vec![0; 1 << 20];
        let bytes = new.bytes();
        assert_eq!(bytes.len(), 132 * SECTOR);
        ring[4096..4096 + bytes.len()].copy_from_slice(&bytes);
        let run = newest_run(&ring, id).expect("a short log");
        assert_eq!((run.len(), run[0].sequence, run[0].flushed_file_bytes), (1, 1 << 33 | 5, 9 << 20));
        for ((at, bytes), patch) in many.iter().zip(&run[0].patches) {
            assert!(matches!(&patch.what, Filling::Bytes(b) if **b == **bytes) && patch.at == at.0);
        }
        let empty = NewEntry { sectors: &[], ..new };
        assert_eq!(empty.bytes().len(), SECTOR);
        let other = newest_run(&[empty.bytes(), vec![0; SECTOR]].concat(), [8; 16]);
        assert!(other.expect("a short log").is_empty());
    }

    /// Each sector says that it is the head of an entry as long as the log.
    #[test]
    fn a_log_made_to_be_slow_is_refused() {
        let id = [7; 16];
        let new = NewEntry { id, sequence: 1, tail: 0, file_bytes: 0, sectors: &[] };
        let mut ring = new.bytes().repeat(4096);
        let len = u32::try_from(ring.len()).expect("16 MiB");
        ring.chunks_exact_mut(SECTOR).for_each(|s| s[8..12].copy_from_slice(&len.to_le_bytes()));
        let begun = std::time::Instant::now();
        assert_eq!(newest_run(&ring, id).err().map(|e| e.kind()), Some(ErrorKind::Limit));
        assert!(begun.elapsed() < std::time::Duration::from_secs(5));
    }
}
