//! The side file of a change in place: what was about to be written when the power went. It never holds plain bytes: the
//! encrypted ones of the two, old or new, are kept.
//!
//! A head says what is done to which images; two places behind it hold the last two records in turns. A record is durable before the
//! images are written, and they are durable before the next one is.

use crate::error::{Error, ErrorKind, Result};
use crate::io::HostFile;
use crate::limits::SECTOR_BYTES;
use crate::map::{FileId, GuestOffset, GuestRange, HostOffset};
use sha2::{Digest, Sha256};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const HEAD_MAGIC: [u8; 8] = *b"VDBLKRC1";
const RECORD_MAGIC: [u8; 8] = *b"VDBLKRCR";
/// Bytes of the disk in one record, at most.
pub(super) const RECORD_BYTES: usize = 4 << 20;
/// Where the first record begins.
const FIRST: u64 = 4096;
/// Places that one record tells of: each has a sector at least.
const MAX_PLACES: usize = RECORD_BYTES / SECTOR_BYTES as usize;
/// Where a record's bytes begin.
const BYTES_AT: u64 = 256 << 10;
/// From one record's place to the other's.
const STRIDE: u64 = BYTES_AT + RECORD_BYTES as u64;

/// What is done, and to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Task {
    /// Names the key that the images are encrypted with; zeros: none.
    pub from: [u8; 32],
    /// The one that they will be.
    pub to: [u8; 32],
    /// Names the images.
    pub images: [u8; 32],
    /// 1: holes of the files are written, too.
    pub fill_holes: u8,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    task: Task,
    sum: [u8; 32],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RecordHead {
    magic: [u8; 8],
    sum: [u8; 32],
    number: U64,
    image: U32,
    places: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct PackedPlace {
    at: U64,
    off: U64,
    len: U32,
    file: U16,
}

const _: () = assert!(size_of::<RecordHead>() + MAX_PLACES * size_of::<PackedPlace>() <= BYTES_AT as usize);

/// A range of an image's disk that lies in one piece in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) range: GuestRange,
    pub(super) file: FileId,
    pub(super) off: HostOffset,
}

/// Bytes that are about to be written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// The image, counted from the top.
    pub(super) image: usize,
    pub(super) places: Vec<Place>,
    /// Of all places, one behind the other.
    pub(super) bytes: Vec<u8>,
}

/// The side file.
#[derive(Debug)]
pub(super) struct Journal<'a> {
    file: &'a dyn HostFile,
    /// Number of the next record.
    next: u64,
}

impl<'a> Journal<'a> {
    /// A new one, in an empty file; durable when this returns.
    ///
    /// # Errors
    /// Of writing.
    pub(super) fn begin(file: &'a dyn HostFile, task: &Task) -> Result<Self> {
        let sum = Sha256::digest(task.as_bytes()).into();
        let head = Head { magic: HEAD_MAGIC, task: *task, sum };
        let written = file.write_at(0, head.as_bytes()).and_then(|()| file.sync());
        written.map_err(|e| Error::io("write its head", e).at(file.path()))?;
        Ok(Journal { file, next: 0 })
    }

    /// The one that is there, and its last record. `None`: it was not begun, and nothing of the images was changed.
    ///
    /// # Errors
    /// Of reading; [`ErrorKind::Corrupt`] for another file; [`ErrorKind::InvalidArgument`] if it belongs to another task.
    pub(super) fn resume(file: &'a dyn HostFile, task: &Task) -> Result<Option<(Self, Option<Record>)>> {
        let bytes = read(file, 0, size_of::<Head>())?;
        let head = Head::read_from_bytes(&bytes).expect("as long as that");
        let good = head.magic == HEAD_MAGIC && head.sum[..] == Sha256::digest(head.task.as_bytes())[..];
        if !good {
            // Its head is durable before anything else happens: a file of no more than that was never used.
            let len = file.len().map_err(|e| Error::io("find out its length", e).at(file.path()))?;
            if len <= FIRST {
                return Ok(None);
            }
            let what = "is not the side file of a change of keys, or damaged";
            return Err(Error::new(ErrorKind::Corrupt, what).at(file.path()));
        }
        refuse_other(&head.task, task).map_err(|e| e.at(file.path()))?;
        let mut last: Option<(u64, Record)> = None;
        for place in 0..2 {
            if let Some((number, record)) = read_record(file, place)?
                && last.as_ref().is_none_or(|(n, _)| number > *n)
            {
                last = Some((number, record));
            }
        }
        let next = last.as_ref().map_or(0, |(n, _)| n + 1);
        Ok(Some((Journal { file, next }, last.map(|(_, r)| r))))
    }

    /// Makes a record durable.
    ///
    /// # Errors
    /// Of writing.
    pub(super) fn write(&mut self, record: &Record) -> Result<()> {
        let at = FIRST + self.next % 2 * STRIDE;
        let places = packed(&record.places);
        let mut head = RecordHead {
            magic: RECORD_MAGIC,
            sum: [0; 32],
            number: U64::new(self.next),
            image: U32::new(u32::try_from(record.image).expect("limits::MAX_CHAIN_IMAGES")),
            places: U32::new(u32::try_from(record.places.len()).expect("bounded")),
        };
        head.sum = sum_of(&head, &places, &record.bytes);
        let head = [head.as_bytes(), places.as_bytes()].concat();
        let written = self
            .file
            .write_at(at, &head)
            .and_then(|()| self.file.write_at(at + BYTES_AT, &record.bytes))
            .and_then(|()| self.file.sync());
        written.map_err(|e| Error::io("write to it", e).at(self.file.path()))?;
        self.next += 1;
        Ok(())
    }
}

fn refuse_other(there: &Task, wanted: &Task) -> Result<()> {
    let what = match () {
        () if there.images != wanted.images => "belongs to a change of keys of other images",
        () if there.from != wanted.from || there.to != wanted.to => {
            "belongs to a change to or from another key than that of this command"
        }
        () if there.fill_holes != wanted.fill_holes => "was begun with another --unallocated",
        () => return Ok(()),
    };
    Err(Error::new(ErrorKind::InvalidArgument, what).hint("the command that began it completes it"))
}

fn packed(places: &[Place]) -> Vec<PackedPlace> {
    let one = |p: &Place| PackedPlace {
        at: U64::new(p.range.start().0),
        off: U64::new(p.off.0),
        len: U32::new(u32::try_from(p.range.len()).expect("inside a record")),
        file: U16::new(p.file.0),
    };
    places.iter().map(one).collect()
}

fn sum_of(head: &RecordHead, places: &[PackedPlace], bytes: &[u8]) -> [u8; 32] {
    let cleared = RecordHead { sum: [0; 32], ..*head };
    let mut sum = Sha256::new();
    sum.update(cleared.as_bytes());
    sum.update(places.as_bytes());
    sum.update(bytes);
    sum.finalize().into()
}

/// The record at one of the two places; `None` if none is whole.
fn read_record(file: &dyn HostFile, place: u64) -> Result<Option<(u64, Record)>> {
    let at = FIRST + place * STRIDE;
    let head = read(file, at, size_of::<RecordHead>())?;
    let head = RecordHead::read_from_bytes(&head).expect("as long as that");
    let count = usize::try_from(head.places.get()).unwrap_or(usize::MAX);
    if head.magic != RECORD_MAGIC || count > MAX_PLACES {
        return Ok(None);
    }
    let list = read(file, at + size_of::<RecordHead>() as u64, count * size_of::<PackedPlace>())?;
    let list: Vec<_> = list
        .chunks_exact(size_of::<PackedPlace>())
        .filter_map(|b| PackedPlace::read_from_bytes(b).ok())
        .collect();
    let total = list.iter().try_fold(0usize, |sum, p| sum.checked_add(usize::try_from(p.len.get()).ok()?));
    let Some(total) = total.filter(|t| *t <= RECORD_BYTES) else { return Ok(None) };
    let bytes = read(file, at + BYTES_AT, total)?;
    if sum_of(&head, &list, &bytes) != head.sum {
        return Ok(None);
    }
    let unpacked = |p: &PackedPlace| {
        let range = GuestRange::new(GuestOffset(p.at.get()), u64::from(p.len.get()))?;
        Some(Place { range, file: FileId(p.file.get()), off: HostOffset(p.off.get()) })
    };
    let Some(places) = list.iter().map(unpacked).collect::<Option<Vec<_>>>() else { return Ok(None) };
    let image = usize::try_from(head.image.get()).unwrap_or(usize::MAX);
    Ok(Some((head.number.get(), Record { image, places, bytes })))
}

/// Bytes of a file; zeros behind its end.
pub(super) fn read(file: &dyn HostFile, off: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut got = 0;
    while got < len {
        match file.read_at(off + got as u64, &mut bytes[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) => return Err(Error::io(format!("read it at {off}"), e).at(file.path())),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::MemFile;

    fn task() -> Task {
        Task { from: [0; 32], to: [2; 32], images: [3; 32], fill_holes: 0 }
    }

    fn record(n: u64) -> Record {
        let range = GuestRange::new(GuestOffset(n * 1024), 1024).unwrap();
        let place = Place { range, file: FileId(0), off: HostOffset(n * 4096) };
        Record { image: 1, places: vec![place; 2], bytes: vec![u8::try_from(n).unwrap(); 2048] }
    }

    #[test]
    fn the_last_whole_record_is_found() {
        let f = MemFile::new("side", Vec::new());
        assert!(Journal::resume(&f, &task()).unwrap().is_none());
        let mut j = Journal::begin(&f, &task()).unwrap();
        assert!(Journal::resume(&f, &task()).unwrap().unwrap().1.is_none());
        for n in 1..=5 {
            j.write(&record(n)).unwrap();
            let (again, last) = Journal::resume(&f, &task()).unwrap().unwrap();
            assert_eq!((again.next, last), (n, Some(record(n))));
        }
        // the fifth record is torn: the fourth counts
        f.write_at(FIRST + BYTES_AT + 700, &[9]).unwrap();
        assert_eq!(Journal::resume(&f, &task()).unwrap().unwrap().1, Some(record(4)));
    }

    #[test]
    fn other_tasks_and_other_files_are_refused() {
        let f = MemFile::new("side", Vec::new());
        Journal::begin(&f, &task()).unwrap();
        for other in [
            Task { from: [9; 32], ..task() },
            Task { to: [9; 32], ..task() },
            Task { images: [9; 32], ..task() },
            Task { fill_holes: 1, ..task() },
        ] {
            assert_eq!(Journal::resume(&f, &other).unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
        let other = MemFile::new("side", vec![7; 10_000]);
        assert_eq!(Journal::resume(&other, &task()).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn hostile_records_are_no_records() {
        let f = MemFile::new("side", Vec::new());
        let mut j = Journal::begin(&f, &task()).unwrap();
        j.write(&record(1)).unwrap();
        for (at, bytes) in [(52, [0xff; 4]), (56, [0xff; 4]), (56 + 16, [0xff; 4])] {
            let mut changed = f.bytes();
            let at = usize::try_from(FIRST).unwrap() + at;
            changed[at..at + 4].copy_from_slice(&bytes);
            let g = MemFile::new("side", changed);
            assert!(Journal::resume(&g, &task()).unwrap().unwrap().1.is_none(), "{at}");
        }
    }
}
