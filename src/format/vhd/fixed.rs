//! A fixed VHD: the disk, byte for byte, and a footer behind it that never changes.

use super::super::{ImageFile, OpenHow};
use super::footer::{FOOTER_BYTES, Footer, Footers, corrupt};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::map::{
    BlockIndex, Change, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset, ImageInfo, ImageMap,
    Intent, Limits, MetaKey, MetaOp, Miss, Plan, PlanToken, Settled,
};
use uuid::Uuid;

#[derive(Debug)]
pub(super) struct FixedMap {
    file: FileId,
    footer: Footer,
    size_bytes: u64,
    read_only: bool,
    note: Option<&'static str>,
}

/// The disk's size, if the file holds all of it.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if it does not.
pub(super) fn checked_size(footer: &Footer, file_bytes: u64) -> Result<u64> {
    let (size, room) = (footer.size_bytes()?, file_bytes.saturating_sub(FOOTER_BYTES));
    if size > room {
        return Err(corrupt(format!("the disk has {size} bytes, but only {room} stand before the footer")));
    }
    Ok(size)
}

impl FixedMap {
    pub(super) fn open(file: ImageFile<'_>, footers: &Footers, how: OpenHow) -> Result<Self> {
        let size_bytes = checked_size(&footers.best, file.source.len())?;
        let read_only = how.read_only || how.info_only;
        Ok(FixedMap {
            file: file.id,
            footer: footers.best.clone(),
            size_bytes,
            read_only,
            note: footers.note(),
        })
    }

    fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.size_bytes))
    }
}

impl ImageMap for FixedMap {
    fn limits(&self) -> Limits {
        Limits { size_bytes: self.size_bytes, block_bytes: 0, is_diff: false, data_alignment: 512 }
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        if !self.disk().contains(r) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        if why == Intent::Overwrite && self.read_only {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        let kind = ExtentKind::Data { file: self.file, off: HostOffset(r.start().0) };
        Ok(Extent { len: r.len(), kind })
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

    fn settle(&self, _token: PlanToken, _how: Settled) {}

    fn compose(&self, _key: MetaKey, _ops: &[MetaOp], _out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        Err(Error::new(ErrorKind::Unsupported, "a fixed VHD has no metadata that changes"))
    }

    fn publish(&self, _key: MetaKey, _ops: &[MetaOp]) {}

    fn begin(&self, _modification: Uuid) -> Plan {
        Plan::default()
    }

    fn end(&self) -> Plan {
        Plan::default()
    }

    fn info(&self) -> ImageInfo {
        ImageInfo {
            format: "vhd",
            variant: "fixed",
            virtual_size: self.size_bytes,
            uuid: self.footer.id(),
            geometry: self.footer.geometry(),
            version: Some(self.footer.version()),
            notes: self.note.map(str::to_string).into_iter().collect(),
            ..ImageInfo::default()
        }
    }
}
