//! Partition tables of a disk: MBR with the chain of an extended partition, and GPT. Sectors of 512 bytes.
//!
//! Public: the UEFI specification, §5; the layout of MBR entries as everybody writes them.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, HostOffset};

/// Partitions inside of an extended one that are followed.
const MAX_LOGICAL: u32 = 256;
/// Bytes of a GPT's array of entries.
const MAX_ENTRIES_BYTES: u64 = 1 << 20;
/// Sectors before the first partition that belong to the table: boot loaders lie there.
const MAX_BOOT_SECTORS: u64 = 2048;
/// Sectors at one end of the disk that a GPT may take.
const MAX_GPT_SECTORS: u64 = 16 << 11;

type Sector = [u8; SECTOR_BYTES as usize];

/// Sectors of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sectors {
    /// The first.
    pub start: u64,
    /// How many; at least one.
    pub len: u64,
}

impl Sectors {
    /// One behind the last.
    pub fn end(self) -> u64 {
        self.start + self.len
    }
}

/// What a partition table says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartitionTable {
    /// Partitions by their numbers as Linux counts them; without extended ones.
    pub partitions: Vec<(u32, Sectors)>,
    /// Numbers of extended partitions, which are made of others.
    pub extended: Vec<u32>,
    /// Where the table itself lies, boot code and both copies of a GPT included; in order.
    pub tables: Vec<Sectors>,
}

fn damaged(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn sector(source: &dyn ByteSource, at: u64) -> Result<Sector> {
    let mut bytes = [0; SECTOR_BYTES as usize];
    let off = at.checked_mul(SECTOR_BYTES).filter(|off| off + SECTOR_BYTES <= source.len());
    let off = off.ok_or_else(|| damaged(format!("its partition table names sector {at}, behind its end")))?;
    source.read_at(HostOffset(off), &mut bytes)?;
    Ok(bytes)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// An entry of an MBR or of a link in the chain of an extended partition.
struct Entry {
    kind: u8,
    start: u64,
    len: u64,
}

impl Entry {
    /// The four entries of a sector; `None` if that is no such sector.
    fn all(sector: &Sector) -> Option<[Entry; 4]> {
        let one = |i: usize| {
            let at = 446 + 16 * i;
            let (start, len) = (le32(sector, at + 8), le32(sector, at + 12));
            Entry { kind: sector[at + 4], start: start.into(), len: len.into() }
        };
        (sector[510..] == [0x55, 0xaa]).then(|| [one(0), one(1), one(2), one(3)])
    }

    fn is_there(&self) -> bool {
        self.kind != 0 && self.len > 0
    }

    fn is_extended(&self) -> bool {
        self.is_there() && matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

impl PartitionTable {
    /// Reads the partition table of a disk.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without one; [`ErrorKind::Corrupt`] for one that contradicts itself or the disk's size;
    /// [`ErrorKind::Unsupported`] for one with other sectors.
    pub fn read(source: &dyn ByteSource) -> Result<Self> {
        let none = || Error::new(ErrorKind::NotFound, "it has no partition table");
        let entries = Entry::all(&sector(source, 0)?).ok_or_else(none)?;
        let mut table = if entries.iter().any(|e| e.kind == 0xee) {
            Self::gpt(source)?
        } else {
            Self::mbr(source, &entries)?
        };
        table.tables.sort_unstable();
        table.refuse_overlaps(source.len() / SECTOR_BYTES)?;
        Ok(table)
    }

    fn mbr(source: &dyn ByteSource, entries: &[Entry; 4]) -> Result<Self> {
        let mut table = Self::default();
        for (number, e) in (1..).zip(entries).filter(|(_, e)| e.is_there()) {
            if e.is_extended() {
                table.extended.push(number);
                if table.extended.len() == 1 {
                    table.logical(source, e.start)?;
                }
            } else {
                table.partitions.push((number, Sectors { start: e.start, len: e.len }));
            }
        }
        let links = table.tables.iter().map(|t| t.start);
        let first = table.partitions.iter().map(|(_, p)| p.start).chain(links).min();
        let len = first.unwrap_or(1).clamp(1, MAX_BOOT_SECTORS).min(source.len() / SECTOR_BYTES);
        table.tables.push(Sectors { start: 0, len });
        Ok(table)
    }

    /// Follows the chain of an extended partition: each link names a partition, counted from itself, and the next link, counted
    /// from the first.
    fn logical(&mut self, source: &dyn ByteSource, first: u64) -> Result<()> {
        let mut at = first;
        for number in 5..5 + MAX_LOGICAL {
            let link = sector(source, at)?;
            let Some([own, next, ..]) = Entry::all(&link) else {
                return Err(damaged(format!("the extended partition has no table at sector {at}")));
            };
            self.tables.push(Sectors { start: at, len: 1 });
            if own.is_there() && !own.is_extended() {
                self.partitions.push((number, Sectors { start: at + own.start, len: own.len }));
            }
            if !next.is_extended() {
                return Ok(());
            }
            if first + next.start <= at {
                return Err(damaged("the chain of the extended partition goes back"));
            }
            at = first + next.start;
        }
        Err(damaged(format!("the extended partition has more than {MAX_LOGICAL} others")))
    }

    fn gpt(source: &dyn ByteSource) -> Result<Self> {
        let disk = source.len() / SECTOR_BYTES;
        let head = sector(source, 1)?;
        if head[..8] != *b"EFI PART" {
            let mut other = [0; 8];
            if source.len() > 4104 {
                source.read_at(HostOffset(4096), &mut other)?;
            }
            if other == *b"EFI PART" {
                let what = "its GPT counts sectors of 4096 bytes, which is not supported";
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            return Err(damaged("its GPT has no header"));
        }
        let len = usize::try_from(le32(&head, 12)).unwrap_or(usize::MAX);
        let mut summed = head;
        summed[16..20].fill(0);
        if !(92..=head.len()).contains(&len) || crc(&summed[..len]) != le32(&head, 16) {
            return Err(damaged("the header of its GPT is damaged"));
        }
        let (other, first, last) = (le64(&head, 32), le64(&head, 40), le64(&head, 48));
        let (at, count, size) = (le64(&head, 72), u64::from(le32(&head, 80)), u64::from(le32(&head, 84)));
        let bytes = count * size;
        if size < 128 || !size.is_multiple_of(8) || bytes == 0 || bytes > MAX_ENTRIES_BYTES {
            return Err(damaged(format!("its GPT has {count} entries of {size} bytes")));
        }
        let entries_end = at.saturating_add(bytes.div_ceil(SECTOR_BYTES));
        let sound = at >= 2 && entries_end <= first && first <= last && last < other && other < disk;
        if !sound || first > MAX_GPT_SECTORS || disk - last - 1 > MAX_GPT_SECTORS {
            return Err(damaged("the places in its GPT contradict each other, or the disk's size"));
        }
        let mut all = vec![0; usize::try_from(bytes).expect("at most MAX_ENTRIES_BYTES")];
        source.read_at(HostOffset(at * SECTOR_BYTES), &mut all)?;
        if crc(&all) != le32(&head, 88) {
            return Err(damaged("the entries of its GPT are damaged"));
        }
        let mut table = Self::default();
        for (number, e) in (1..).zip(all.chunks(usize::try_from(size).expect("checked"))) {
            let (from, to) = (le64(e, 32), le64(e, 40));
            if e[..16].iter().all(|b| *b == 0) {
                continue;
            }
            if from < first || to < from || to > last {
                return Err(damaged(format!("partition {number} lies outside of what its GPT allows")));
            }
            table.partitions.push((number, Sectors { start: from, len: to - from + 1 }));
        }
        table.tables =
            vec![Sectors { start: 0, len: first }, Sectors { start: last + 1, len: disk - last - 1 }];
        Ok(table)
    }

    fn refuse_overlaps(&self, disk: u64) -> Result<()> {
        let mut all: Vec<_> =
            self.partitions.iter().map(|(_, p)| *p).chain(self.tables.iter().copied()).collect();
        all.sort_unstable();
        if let Some(w) = all.windows(2).find(|w| w[0].end() > w[1].start) {
            let what = format!("two of its partitions lie upon each other at sector {}", w[1].start);
            return Err(damaged(what));
        }
        match all.last() {
            Some(last) if last.end() > disk => {
                let what = format!("a partition ends at sector {}, the disk at {disk}", last.end());
                Err(damaged(what))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with these bytes at some places.
    struct Disk(u64, Vec<(u64, Vec<u8>)>);

    impl ByteSource for Disk {
        fn len(&self) -> u64 {
            self.0 * SECTOR_BYTES
        }

        fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
            buf.fill(0);
            for (at, bytes) in &self.1 {
                for (b, to) in bytes.iter().zip(*at..) {
                    if let Some(i) = to.checked_sub(off.0).filter(|i| *i < buf.len() as u64) {
                        buf[i as usize] = *b;
                    }
                }
            }
            Ok(())
        }
    }

    fn mbr(at: u64, entries: &[(u8, u32, u32)]) -> (u64, Vec<u8>) {
        let mut s = vec![0; 512];
        for (i, (kind, start, len)) in entries.iter().enumerate() {
            s[450 + 16 * i] = *kind;
            s[454 + 16 * i..458 + 16 * i].copy_from_slice(&start.to_le_bytes());
            s[458 + 16 * i..462 + 16 * i].copy_from_slice(&len.to_le_bytes());
        }
        s[510..].copy_from_slice(&[0x55, 0xaa]);
        (at * 512, s)
    }

    fn at(start: u64, len: u64) -> Sectors {
        Sectors { start, len }
    }

    #[test]
    fn primary_and_logical_partitions_are_found() {
        let chain = vec![
            mbr(0, &[(0x83, 63, 100), (0, 0, 0), (0x0f, 200, 400), (0x07, 700, 50)]),
            mbr(200, &[(0x83, 1, 99), (5, 100, 100)]),
            mbr(300, &[(0x82, 10, 90)]),
        ];
        let t = PartitionTable::read(&Disk(1000, chain.clone())).unwrap();
        let parts = [(1, at(63, 100)), (5, at(201, 99)), (6, at(310, 90)), (4, at(700, 50))];
        assert_eq!(t.partitions, parts);
        assert_eq!((t.extended, t.tables), (vec![3], vec![at(0, 63), at(200, 1), at(300, 1)]));
        let kind = |disk| PartitionTable::read(&disk).unwrap_err().kind();
        assert_eq!(kind(Disk(1000, vec![])), ErrorKind::NotFound);
        assert_eq!(kind(Disk(720, chain.clone())), ErrorKind::Corrupt, "behind the end");
        let mut looped = chain.clone();
        looped[2] = mbr(300, &[(0x82, 10, 90), (5, 100, 100)]);
        assert_eq!(kind(Disk(1000, looped)), ErrorKind::Corrupt, "a loop");
        let upon = vec![mbr(0, &[(0x83, 63, 100), (0x83, 162, 4)])];
        assert_eq!(kind(Disk(1000, upon)), ErrorKind::Corrupt, "upon each other");
        assert_eq!(kind(Disk(1000, vec![chain[0].clone()])), ErrorKind::Corrupt, "no chain");
    }

    fn gpt(disk: u64, parts: &[(u32, u64, u64)]) -> Disk {
        let mut entries = vec![0; 128 * 128];
        for (number, start, len) in parts {
            let e = &mut entries[(*number as usize - 1) * 128..][..128];
            e[..16].fill(7);
            e[32..40].copy_from_slice(&start.to_le_bytes());
            e[40..48].copy_from_slice(&(start + len - 1).to_le_bytes());
        }
        let mut h = [b"EFI PART".to_vec(), vec![0, 0, 1, 0, 92, 0, 0, 0]].concat();
        h.resize(512, 0);
        for (at, word) in [(24, 1), (32, disk - 1), (40, 34), (48, disk - 34), (72, 2)] {
            h[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        h[80..84].copy_from_slice(&128u32.to_le_bytes());
        h[84..88].copy_from_slice(&128u32.to_le_bytes());
        h[88..92].copy_from_slice(&crc(&entries).to_le_bytes());
        let sum = crc(&h[..92]);
        h[16..20].copy_from_slice(&sum.to_le_bytes());
        Disk(disk, vec![mbr(0, &[(0xee, 1, u32::MAX)]), (512, h), (1024, entries)])
    }

    #[test]
    fn a_gpt_is_read_if_its_sums_are_right() {
        let sound = gpt(4000, &[(1, 34, 100), (5, 2000, 7)]);
        let t = PartitionTable::read(&sound).unwrap();
        assert_eq!(t.partitions, [(1, at(34, 100)), (5, at(2000, 7))]);
        assert_eq!(t.tables, [at(0, 34), at(4000 - 33, 33)]);
        for (piece, byte) in [(1, 8), (1, 40), (1, 88), (2, 0), (2, 127)] {
            let mut d = gpt(4000, &[(1, 34, 100)]);
            d.1[piece].1[byte] ^= 1;
            assert_eq!(PartitionTable::read(&d).unwrap_err().kind(), ErrorKind::Corrupt, "{piece} {byte}");
        }
        for parts in [&[(1, 33, 5)][..], &[(1, 3960, 9)], &[(1, 100, 9), (2, 108, 4)]] {
            PartitionTable::read(&gpt(4000, parts)).unwrap_err();
        }
        let mut d = gpt(4000, &[]);
        d.0 = 3000;
        PartitionTable::read(&d).unwrap_err();
    }
}
