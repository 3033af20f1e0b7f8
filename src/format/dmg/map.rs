//! A DMG that is open: look-ups in the list of its chunks, which is kept whole.

use super::super::OpenHow;
use super::chunks::{self, Chunk, Place};
use super::koly::Koly;
use super::plist;
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{
    BlockIndex, ByteSource, Extent, ExtentKind, FileId, GuestOffset, GuestRange, ImageInfo, ImageMap, Intent,
    Limits, Miss, Packed,
};

/// A DMG that is open.
#[derive(Debug)]
pub struct DmgMap {
    file: FileId,
    size_bytes: u64,
    /// In the disk's order, none over another. What lies between them is zeros.
    chunks: Box<[Chunk]>,
}

impl DmgMap {
    /// Opens the image, for reading only.
    ///
    /// # Errors
    /// As [`super::super::open`]; [`ErrorKind::Unsupported`] for writing.
    pub fn open(source: &dyn ByteSource, file: FileId, how: OpenHow) -> Result<Self> {
        let koly = Koly::read(source)?;
        if !how.read_only {
            let e = Error::new(ErrorKind::Unsupported, "DMG images cannot be written");
            return Err(e.hint("open it read-only, or use --overlay"));
        }
        let (at, len) = koly.plist;
        let mut xml = vec![0; len];
        source.read_at(at, &mut xml)?;
        let tables = plist::tables(&xml)?;
        drop(xml);
        if tables.is_empty() {
            return Err(Error::new(ErrorKind::Corrupt, "the property list has no table of chunks ('blkx')"));
        }
        let (chunks, end) = chunks::read(&tables, &koly)?;
        let size_bytes = if koly.sectors == 0 { end } else { koly.sectors * SECTOR_BYTES };
        if end > size_bytes {
            let what = format!("its chunks reach to {end}, behind the end of the disk at {size_bytes}");
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        Ok(DmgMap { file, size_bytes, chunks })
    }

    fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.size_bytes))
    }

    /// The chunk around `at`, or the zeros between two.
    fn around(&self, at: GuestOffset) -> (GuestRange, Place) {
        let next = self.chunks.partition_point(|c| c.end <= at.0);
        let range = |start, end| GuestRange::between(GuestOffset(start), GuestOffset(end));
        match self.chunks.get(next) {
            Some(c) if c.start <= at.0 => (range(c.start, c.end), c.place),
            after => {
                let start = next.checked_sub(1).map_or(0, |before| self.chunks[before].end);
                (range(start, after.map_or(self.size_bytes, |c| c.start)), Place::Zero)
            }
        }
    }

    fn extent_at(&self, r: GuestRange) -> Extent {
        let (around, place) = self.around(r.start());
        let into = r.start().since(around.start());
        let len = r.len().min(around.len() - into);
        let kind = match place {
            Place::Zero => ExtentKind::Zero,
            Place::Raw(off) => ExtentKind::Data { file: self.file, off: off.plus(into) },
            Place::Packed { off, len, codec } => {
                let small = |n: u64| u32::try_from(n).expect("limits::MAX_UNIT_BYTES");
                let packed = Packed { off, len, unit: small(around.len()), file: self.file, codec };
                ExtentKind::Packed { packed, into: small(into) }
            }
        };
        Extent { len, kind }
    }
}

impl ImageMap for DmgMap {
    fn limits(&self) -> Limits {
        Limits { size_bytes: self.size_bytes, block_bytes: 0, is_diff: false, data_alignment: 1 }
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        if !self.disk().contains(r) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        if why == Intent::Overwrite {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        Ok(self.extent_at(r))
    }

    fn unit(&self, at: GuestOffset) -> GuestRange {
        self.around(at).0
    }

    fn claim_of(&self, at: GuestOffset) -> BlockIndex {
        BlockIndex(self.unit(at).start().0 / SECTOR_BYTES)
    }

    fn info(&self) -> ImageInfo {
        ImageInfo {
            format: "dmg",
            variant: "read-only",
            virtual_size: self.size_bytes,
            version: Some("4".into()),
            ..ImageInfo::default()
        }
    }
}
