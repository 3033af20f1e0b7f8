//! Raw images: the file is the disk, byte for byte.
//!
//! A file whose length is no multiple of 512 is served with its last sector filled up with zeros. It stays as
//! it is while nobody writes; before the first change of a session the file is lengthened to whole sectors
//! ([`ImageMap::begin`]), so that no write has to decide about half a sector.

use super::blueprint::refused;
use super::steps::StepList;
use super::{Blueprint, Driver, FileStep, Format, ImageFile, NewImage, OpenHow, only};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::{MAX_DISK_BYTES, SECTOR_BYTES};
use crate::map::{
    BlockIndex, ByteSource, Change, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset,
    ImageInfo, ImageMap, Intent, Limits, MetaKey, MetaOp, Miss, Plan, PlanToken, Settled, Step,
};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use uuid::Uuid;

/// The only plan a raw image ever makes.
const LENGTHEN: PlanToken = PlanToken(0);

/// Raw as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: &|files, how| {
        let ImageFile { id, source } = only(files);
        Ok(Box::new(RawMap::open(source, id, how)?))
    },
    references: None,
    check: None,
    repair: None,
    compact: None,
    resize: Some(&resize),
    relink: None,
    blueprint: Some(&blueprint),
    options: &[],
    properties: None,
};

/// The file's length is the disk's size; nothing else has to change.
fn resize(files: &[ImageFile<'_>], size: u64) -> Result<Vec<FileStep>> {
    let ImageFile { id, source } = only(files);
    let mut list = StepList::new(id);
    if source.len() != size {
        list.set_len(size);
    }
    Ok(list.done())
}

fn blueprint(new: &NewImage) -> Result<Blueprint> {
    new.without(Format::Raw, "parent", new.parent.is_some())?;
    new.without(Format::Raw, "UUID", new.uuid.is_some())?;
    new.without(Format::Raw, "comment", new.comment.is_some())?;
    new.only_options(&[])?;
    let fixed = match new.variant.as_deref().map(str::to_ascii_lowercase).as_deref() {
        None | Some("dynamic") => false,
        Some("fixed") => true,
        Some(v) => {
            return Err(refused(format!("unknown variant '{v}'")).hint("dynamic (a sparse file) or fixed"));
        }
    };
    let whole = (HostOffset(0), new.size_bytes);
    Ok(Blueprint::single(new.size_bytes, fixed.then_some(whole), []))
}

/// The identity.
#[derive(Debug)]
pub struct RawMap {
    file: FileId,
    /// Bytes the file had when it was opened.
    file_bytes: u64,
    /// The disk's size: the same in whole sectors, and more when the file has grown since.
    size_bytes: AtomicU64,
    /// The file has whole sectors.
    whole: AtomicBool,
    read_only: bool,
}

impl RawMap {
    /// Takes the file as a disk.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] above [`MAX_DISK_BYTES`].
    pub fn open(source: &dyn ByteSource, file: FileId, how: OpenHow) -> Result<Self> {
        let file_bytes = source.len();
        if file_bytes > MAX_DISK_BYTES {
            let what = format!("the file has {file_bytes} bytes, a disk at most {MAX_DISK_BYTES}");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let size_bytes = file_bytes.next_multiple_of(SECTOR_BYTES);
        let whole = AtomicBool::new(size_bytes == file_bytes);
        let size_bytes = AtomicU64::new(size_bytes);
        Ok(RawMap { file, file_bytes, size_bytes, whole, read_only: how.read_only || how.info_only })
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.size_bytes()))
    }

    /// What is really in the file.
    fn stored(&self) -> GuestRange {
        let end = if self.whole.load(Ordering::Acquire) { self.size_bytes() } else { self.file_bytes };
        GuestRange::between(GuestOffset(0), GuestOffset(end))
    }
}

impl ImageMap for RawMap {
    fn limits(&self) -> Limits {
        Limits { size_bytes: self.size_bytes(), block_bytes: 0, is_diff: false, data_alignment: 1 << 63 }
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        if !self.disk().contains(r) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        if why == Intent::Overwrite && self.read_only {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        let data = r.intersect(self.stored());
        if !data.is_empty() {
            let kind = ExtentKind::Data { file: self.file, off: HostOffset(data.start().0) };
            return Ok(Extent { len: data.len(), kind });
        }
        match why {
            Intent::Read => Ok(Extent { len: r.len(), kind: ExtentKind::Zero }),
            Intent::Overwrite => Err(Miss::NeedsPlan), // before begin: there is no such plan
        }
    }

    fn unit(&self, _at: GuestOffset) -> GuestRange {
        self.disk()
    }

    fn claim_of(&self, _at: GuestOffset) -> BlockIndex {
        BlockIndex(0)
    }

    fn plan(&self, _change: Change) -> std::result::Result<Plan, Miss> {
        Err(Miss::Fail(Failure::Unsupported))
    }

    fn room(&self, _urgent: bool) -> Option<Plan> {
        None
    }

    fn settle(&self, _token: PlanToken, how: Settled) {
        if matches!(how, Settled::Done { .. }) {
            self.whole.store(true, Ordering::Release);
        }
    }

    fn compose(&self, _key: MetaKey, _ops: &[MetaOp], _out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        Err(Error::new(ErrorKind::Unsupported, "a raw image has no metadata"))
    }

    fn publish(&self, _key: MetaKey, _ops: &[MetaOp]) {}

    fn begin(&self, _modification: Uuid) -> Plan {
        if self.read_only || self.whole.load(Ordering::Acquire) {
            return Plan::default();
        }
        let (from, to) = (HostOffset(self.file_bytes), HostOffset(self.size_bytes()));
        Plan { token: Some(LENGTHEN), ..Plan::of([Step::Extend { file: self.file, from, to }]) }
    }

    fn end(&self) -> Plan {
        Plan::default()
    }

    /// Not while a last half sector waits to be filled up: the plan for that knows the file's end as it was.
    fn grown(&self, file_bytes: u64) -> Option<u64> {
        let size = file_bytes.min(MAX_DISK_BYTES) / SECTOR_BYTES * SECTOR_BYTES;
        if !self.whole.load(Ordering::Acquire) || size <= self.size_bytes() {
            return None;
        }
        self.size_bytes.store(size, Ordering::Release);
        Some(size)
    }

    fn info(&self) -> ImageInfo {
        ImageInfo { format: "raw", variant: "fixed", virtual_size: self.size_bytes(), ..ImageInfo::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ExtentList;

    fn map(m: &RawMap, start: u64, len: u64) -> Vec<Extent> {
        let mut out = ExtentList::new();
        m.map(GuestRange::new(GuestOffset(start), len).unwrap(), Intent::Read, &mut out).unwrap();
        out.as_slice().to_vec()
    }

    fn data(off: u64, len: u64) -> Extent {
        Extent { len, kind: ExtentKind::Data { file: FileId(3), off: HostOffset(off) } }
    }

    #[test]
    fn a_broken_last_sector_reads_zeros_until_the_file_is_lengthened() {
        let m = RawMap::open(&vec![1u8; 1000], FileId(3), OpenHow::default()).unwrap();
        assert_eq!(m.limits().size_bytes, 1024);
        assert_eq!(map(&m, 512, 512), [data(512, 488), Extent { len: 24, kind: ExtentKind::Zero }]);
        let p = m.begin(Uuid::nil());
        p.assert_ordered();
        assert_eq!(
            p.steps.as_slice(),
            [Step::Extend { file: FileId(3), from: HostOffset(1000), to: HostOffset(1024) }]
        );
        m.settle(p.token.unwrap(), Settled::Done { clean: true });
        assert_eq!(map(&m, 512, 512), [data(512, 512)]);
        assert_eq!(m.begin(Uuid::nil()), Plan::default());
    }

    #[test]
    fn whole_files_need_no_plan_and_bounds_hold() {
        let m = RawMap::open(&vec![1u8; 1024], FileId(3), OpenHow::default()).unwrap();
        assert_eq!(m.begin(Uuid::nil()), Plan::default());
        assert_eq!(map(&m, 0, 1024), [data(0, 1024)]);
        let out = &mut ExtentList::new();
        let beyond = GuestRange::new(GuestOffset(512), 1024).unwrap();
        assert_eq!(m.map(beyond, Intent::Read, out), Err(Miss::Fail(Failure::OutOfRange)));
    }

    #[test]
    fn a_file_that_grows_makes_the_disk_larger() {
        let m = RawMap::open(&vec![1u8; 1024], FileId(3), OpenHow::default()).unwrap();
        assert_eq!((m.grown(1024), m.grown(512), m.grown(1535)), (None, None, None));
        assert_eq!((m.grown(2047), m.limits().size_bytes), (Some(1536), 1536));
        assert_eq!(map(&m, 1024, 512), [data(1024, 512)]);
        assert_eq!(m.grown(u64::MAX), Some(MAX_DISK_BYTES));
        let half = RawMap::open(&vec![1u8; 1000], FileId(3), OpenHow::default()).unwrap();
        assert_eq!(half.grown(4096), None);
    }
}
