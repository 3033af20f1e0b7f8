//! The tables of chunks ('mish'), one for each partition: which sectors lie where in the file, and how packed.

use super::super::bytes::{be32, be64};
use super::koly::Koly;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_DISK_BYTES, MAX_PACKED_BYTES, MAX_UNIT_BYTES, SECTOR_BYTES};
use crate::map::{Codec, HostOffset};

/// Bytes in front of a table's first chunk.
const HEADER_BYTES: usize = 204;
/// Bytes of a chunk's entry.
const ENTRY_BYTES: usize = 40;

/// Where the sectors of a chunk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the file as they are.
    Raw(HostOffset),
    /// Packed as one unit.
    Packed { off: HostOffset, len: u32, codec: Codec },
    /// Nowhere: zeros.
    Zero,
}

/// Sectors that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// The first byte on the disk.
    pub(super) start: u64,
    /// Behind the last.
    pub(super) end: u64,
    pub(super) place: Place,
}

fn corrupt(what: String) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

/// Everything the tables say, in the disk's order, without the chunks of zeros; and how many bytes of the disk they speak of.
///
/// # Errors
/// [`ErrorKind::Corrupt`], [`ErrorKind::Unsupported`] and [`ErrorKind::Limit`], naming the sector.
pub(super) fn read(tables: &[Vec<u8>], koly: &Koly) -> Result<(Box<[Chunk]>, u64)> {
    let mut all = Vec::new();
    for (number, table) in tables.iter().enumerate() {
        read_table(table, koly, &mut all)
            .map_err(|e| Error::new(e.kind(), format!("table {number} of {}: {e}", tables.len())))?;
    }
    all.sort_unstable_by_key(|c| c.start);
    if let Some(two) = all.windows(2).find(|two| two[0].end > two[1].start) {
        let (at, other) = (two[1].start / SECTOR_BYTES, two[0].start / SECTOR_BYTES);
        return Err(corrupt(format!("the chunk at sector {at} overlaps the one at sector {other}")));
    }
    let end = all.last().map_or(0, |c| c.end);
    all.retain(|c| c.place != Place::Zero);
    Ok((all.into(), end))
}

fn read_table(table: &[u8], koly: &Koly, all: &mut Vec<Chunk>) -> Result<()> {
    let short = || corrupt(format!("it has {} bytes, too few for its chunks", table.len()));
    if table.get(..4) != Some(b"mish") {
        return Err(corrupt("it does not begin with 'mish'".into()));
    }
    if be32(table, 4) != Some(1) {
        return Err(Error::new(ErrorKind::Unsupported, "its version is not 1"));
    }
    let [first, data_at] = [8, 24].map(|at| be64(table, at));
    let (Some(first), Some(data_at), Some(count)) = (first, data_at, be32(table, 200)) else {
        return Err(short());
    };
    let count = usize::try_from(count).map_err(|_| short())?;
    let bytes = count.checked_mul(ENTRY_BYTES).and_then(|n| table.get(HEADER_BYTES..)?.get(..n));
    for raw in bytes.ok_or_else(short)?.as_chunks::<ENTRY_BYTES>().0 {
        let entry = Entry::parse(raw);
        if entry.kind == END {
            break;
        }
        all.extend(entry.chunk(first, data_at, koly)?);
    }
    Ok(())
}

const END: u32 = 0xffff_ffff;
const COMMENT: u32 = 0x7fff_fffe;

/// An entry as it stands in the table.
struct Entry {
    kind: u32,
    first: u64,
    sectors: u64,
    off: u64,
    len: u64,
}

impl Entry {
    fn parse(raw: &[u8; ENTRY_BYTES]) -> Self {
        let n64 = |at| be64(raw, at).expect("inside the entry");
        let kind = be32(raw, 0).expect("inside the entry");
        Entry { kind, first: n64(8), sectors: n64(16), off: n64(24), len: n64(32) }
    }

    /// The chunk of a table whose disk sectors begin at `first` and whose bytes at `data_at`; `None` if it has no sector.
    fn chunk(&self, first: u64, data_at: u64, koly: &Koly) -> Result<Option<Chunk>> {
        if self.kind == COMMENT || self.sectors == 0 {
            return Ok(None);
        }
        let bytes = |sectors: u64| sectors.checked_mul(SECTOR_BYTES).filter(|n| *n <= MAX_DISK_BYTES);
        let start = first.checked_add(self.first);
        let end = start.and_then(|s| s.checked_add(self.sectors));
        let (Some(start), Some(end)) = (start.and_then(bytes), end.and_then(bytes)) else {
            let what =
                format!("the chunk of {} sectors at {} lies outside any disk", self.sectors, self.first);
            return Err(Error::new(ErrorKind::Limit, what));
        };
        let place = self.place(start, end - start, data_at, koly)?;
        Ok(Some(Chunk { start, end, place }))
    }

    fn place(&self, start: u64, bytes: u64, data_at: u64, koly: &Koly) -> Result<Place> {
        let sector = start / SECTOR_BYTES;
        let codec = match self.kind {
            0 | 2 => return Ok(Place::Zero),
            1 => None,
            0x8000_0004 => Some(Codec::Adc),
            0x8000_0005 => Some(Codec::Zlib),
            0x8000_0006 => Some(Codec::Bzip2),
            0x8000_0007 => Some(Codec::Lzfse),
            0x8000_0008 => Some(Codec::Xz),
            kind => {
                let what = format!("the chunk at sector {sector} is of kind {kind:#x}, which is not known");
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
        };
        let off = koly.data.start.checked_add(data_at).and_then(|o| o.checked_add(self.off));
        let end = off.and_then(|o| o.checked_add(self.len)).filter(|end| *end <= koly.data.end);
        let (Some(off), Some(_)) = (off, end) else {
            let what = format!(
                "the chunk at sector {sector}, {} bytes at {}, reaches past the end of the data",
                self.len, self.off
            );
            return Err(corrupt(what));
        };
        let Some(codec) = codec else {
            return if self.len < bytes {
                Err(corrupt(format!("the chunk at sector {sector} has {} bytes for {bytes}", self.len)))
            } else {
                Ok(Place::Raw(HostOffset(off)))
            };
        };
        match u32::try_from(self.len) {
            Ok(0) => Err(corrupt(format!("the packed chunk at sector {sector} is empty"))),
            Ok(len) if len <= MAX_PACKED_BYTES && bytes <= u64::from(MAX_UNIT_BYTES) => {
                Ok(Place::Packed { off: HostOffset(off), len, codec })
            }
            _ => {
                let what = format!(
                    "the packed chunk at sector {sector} has {} bytes, {bytes} unpacked; at most {MAX_PACKED_BYTES} \
                     and {MAX_UNIT_BYTES} are read",
                    self.len
                );
                Err(Error::new(ErrorKind::Limit, what))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KOLY: Koly = Koly { data: 100..100_100, plist: (HostOffset(0), 0), sectors: 0 };

    fn table(first: u64, data_at: u64, chunks: &[(u32, u64, u64, u64, u64)]) -> Vec<u8> {
        let mut t = vec![0; HEADER_BYTES];
        t[..8].copy_from_slice(b"mish\0\0\0\x01");
        t[8..16].copy_from_slice(&first.to_be_bytes());
        t[24..32].copy_from_slice(&data_at.to_be_bytes());
        t[200..204].copy_from_slice(&(chunks.len() as u32).to_be_bytes());
        for (kind, first, sectors, off, len) in chunks {
            t.extend(kind.to_be_bytes());
            t.extend([0; 4]);
            t.extend([first, sectors, off, len].into_iter().flat_map(|n| n.to_be_bytes()));
        }
        t
    }

    fn line(chunks: &[(u32, u64, u64, u64, u64)]) -> String {
        read(&[table(0, 0, chunks)], &KOLY).unwrap_err().to_string()
    }

    #[test]
    fn tables_of_several_partitions_make_one_disk() {
        let second = table(
            10,
            7,
            &[(1, 2, 1, 3, 512), (0x8000_0005, 0, 2, 600, 9), (END, 0, 0, 0, 0), (9, 0, 1, 0, 0)],
        );
        let first = table(0, 0, &[(COMMENT, 0, 0, 0, 0), (0, 0, 4, 0, 0), (2, 4, 5, 0, 0), (1, 0, 0, 0, 0)]);
        let (chunks, end) = read(&[second, first], &KOLY).unwrap();
        let packed = Place::Packed { off: HostOffset(707), len: 9, codec: Codec::Zlib };
        assert_eq!(end, 13 * 512);
        assert_eq!(
            *chunks,
            [
                Chunk { start: 10 * 512, end: 12 * 512, place: packed },
                Chunk { start: 12 * 512, end: 13 * 512, place: Place::Raw(HostOffset(110)) },
            ]
        );
    }

    #[test]
    fn chunks_that_cannot_be_are_refused() {
        assert!(
            line(&[(0, 0, 4, 0, 0), (1, 3, 1, 0, 512)]).contains("sector 3 overlaps the one at sector 0")
        );
        assert!(line(&[(1, 0, 1, 99_600, 512)]).contains("past the end of the data"));
        assert!(line(&[(1, 0, 1, u64::MAX, 512)]).contains("past the end of the data"));
        assert!(line(&[(1, 0, 2, 0, 512)]).contains("512 bytes for 1024"));
        assert!(line(&[(0, u64::MAX, 2, 0, 0)]).contains("outside any disk"));
        assert!(line(&[(0, 0, u64::MAX / 512, 0, 0)]).contains("outside any disk"));
        assert!(line(&[(0x8000_0005, 0, 8193, 0, 9)]).contains("4194816 unpacked"));
        assert!(line(&[(0x8000_0005, 0, 1, 0, 0)]).contains("is empty"));
        assert!(line(&[(0x8000_0009, 0, 1, 0, 9)]).contains("kind 0x80000009"));
        let broken = |change: fn(&mut Vec<u8>)| {
            let mut t = table(0, 0, &[(0, 0, 1, 0, 0)]);
            change(&mut t);
            read(&[t], &KOLY).unwrap_err().to_string()
        };
        assert!(broken(|t| t[0] = 0).contains("mish"));
        assert!(broken(|t| t[7] = 2).contains("version"));
        assert!(broken(|t| t[200] = 0xff).contains("too few"));
        assert!(broken(|t| t.truncate(203)).contains("too few"));
        assert!(broken(|t| t.clear()).contains("mish"));
    }
}
