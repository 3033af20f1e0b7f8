//! A CD image that is open: the data of its tracks, one behind the other.

use super::super::{ImageFile, OpenHow};
use super::sheet::{File, Sheet, Track};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{
    BlockIndex, DataForm, DeviceType, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset,
    ImageInfo, ImageMap, Intent, Limits, Miss, Region,
};

/// Most blocks of a disc: a thousand minutes, far more than there are.
const MAX_BLOCKS: u64 = 1000 * 60 * 75;

/// A CD image that is open.
#[derive(Debug)]
pub struct CueMap {
    size_bytes: u64,
    regions: Vec<Region>,
    /// Those that are in a file.
    stretches: Vec<Stretch>,
}

/// A region that is in a file, and where it is.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    region: Region,
    /// The first byte on the disk that is served.
    start: u64,
    file: FileId,
    /// Where the first block's data is in the file.
    first: HostOffset,
}

impl Stretch {
    fn bytes(&self) -> u64 {
        self.region.blocks * u64::from(self.region.data_bytes)
    }
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

/// Of a block in a file: its bytes, where its data begins in it, and how many.
fn shape(form: DataForm) -> (u32, u32, u32) {
    match form {
        DataForm::Audio | DataForm::Pause => (2352, 0, 2352),
        DataForm::Mode1Cooked => (2048, 0, 2048),
        // 12 bytes of synchronisation and 4 of header
        DataForm::Mode1Raw => (2352, 16, 2048),
        // 8 bytes of subheader
        DataForm::Mode2Cooked => (2336, 8, 2048),
        DataForm::Mode2Raw => (2352, 24, 2048),
    }
}

/// Bytes of a block that lie before its data.
pub fn data_offset(form: DataForm) -> u32 {
    shape(form).1
}

impl CueMap {
    /// Opens the sheet, the first of `files`, and the files it names, for reading only.
    ///
    /// # Errors
    /// As [`super::super::open`]; [`ErrorKind::Unsupported`] for writing.
    pub fn open(files: &[ImageFile<'_>], how: OpenHow) -> Result<Self> {
        let Some((sheet, bins)) = files.split_first() else { return Err(corrupt("no file")) };
        let sheet = Sheet::read(sheet.source)?;
        if !how.read_only {
            return Err(
                Error::new(ErrorKind::Unsupported, "CUE images cannot be written").hint("open it read-only")
            );
        }
        let mut map = CueMap { size_bytes: 0, regions: Vec::new(), stretches: Vec::new() };
        for (file, bin) in sheet.files.iter().zip(bins) {
            map.add_file(file, bin)?;
        }
        map.size_bytes = map.size_bytes.next_multiple_of(SECTOR_BYTES);
        Ok(map)
    }

    fn add_file(&mut self, file: &File, bin: &ImageFile<'_>) -> Result<()> {
        let name = file.name.escape_debug();
        let mut off = 0u64;
        let mut at = 0;
        for (n, track) in file.tracks.iter().enumerate() {
            let (block, _, _) = shape(track.form);
            // What lies in front of the first track belongs to none.
            off += (track.first - at) * u64::from(block);
            at = track.first;
            let left = bin.source.len().checked_sub(off).map(|left| left / u64::from(block));
            let blocks = match (file.tracks.get(n + 1), left) {
                (Some(next), Some(left)) if next.first - at <= left => next.first - at,
                (None, Some(left)) if left > track.start - at => left,
                _ => return Err(corrupt(format!("'{name}' ends before its track {} does", track.number))),
            };
            self.add_track(track, blocks, bin.id, off)?;
            off += blocks * u64::from(block);
            at += blocks;
        }
        Ok(())
    }

    /// A track with so many blocks in its file, from `off` on.
    fn add_track(&mut self, track: &Track, blocks: u64, file: FileId, off: u64) -> Result<()> {
        let (block, _, _) = shape(track.form);
        // A gap before data is data like it.
        let silent = if track.form == DataForm::Audio { DataForm::Pause } else { track.form };
        let gap = track.start - track.first;
        let own = off + gap * u64::from(block);
        self.add(silent, track.pregap, None)?;
        self.add(silent, gap, Some((file, off)))?;
        self.add(track.form, blocks - gap, Some((file, own)))?;
        self.add(silent, track.postgap, None)
    }

    fn add(&mut self, form: DataForm, blocks: u64, place: Option<(FileId, u64)>) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let (block_bytes, skip, data_bytes) = shape(form);
        let data_bytes = if place.is_some() { data_bytes } else { 0 };
        let start = self.regions.last().map_or(0, |r| r.start + r.blocks);
        if start.checked_add(blocks).is_none_or(|end| end > MAX_BLOCKS) {
            let what = format!("the disc has more than {MAX_BLOCKS} blocks");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let region = Region { start, blocks, block_bytes, data_bytes, form };
        self.regions.push(region);
        if let Some((file, off)) = place {
            let first = HostOffset(off + u64::from(skip));
            let stretch = Stretch { region, start: self.size_bytes, file, first };
            self.size_bytes += stretch.bytes();
            self.stretches.push(stretch);
        }
        Ok(())
    }

    fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.size_bytes))
    }

    fn extent_at(&self, r: GuestRange) -> Extent {
        let at = r.start().0;
        let n = self.stretches.partition_point(|s| s.start + s.bytes() <= at);
        // The end of the last sector is in no block.
        let Some(s) = self.stretches.get(n) else { return Extent { len: r.len(), kind: ExtentKind::Zero } };
        let (into, left) = (at - s.start, s.start + s.bytes() - at);
        let (block, data) = (u64::from(s.region.block_bytes), u64::from(s.region.data_bytes));
        let off = s.first.plus(into / data * block + into % data);
        // Blocks with something around their data lie apart from each other.
        let len = if block == data { left } else { data - into % data };
        Extent { len: r.len().min(len), kind: ExtentKind::Data { file: s.file, off } }
    }
}

impl ImageMap for CueMap {
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

    fn unit(&self, _at: GuestOffset) -> GuestRange {
        self.disk()
    }

    fn claim_of(&self, _at: GuestOffset) -> BlockIndex {
        BlockIndex(0)
    }

    fn info(&self) -> ImageInfo {
        ImageInfo {
            format: "cue",
            variant: "read-only",
            device: DeviceType::Dvd,
            virtual_size: self.size_bytes,
            regions: self.regions.clone(),
            ..ImageInfo::default()
        }
    }
}
