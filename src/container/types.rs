//! Numbers and small values of VirtualBox's header that are no flags.

use super::flags::RegionListFlags;
use crate::error::{Error, Result, Status};
use crate::map::{DataForm, DeviceType, ImageInfo};

/// The image that was opened last (`VD_LAST_IMAGE`).
pub const LAST_IMAGE: u32 = u32::MAX;
/// Of a copy: it is not known which images of the two containers hold the same (`VD_IMAGE_CONTENT_UNKNOWN`).
pub const IMAGE_CONTENT_UNKNOWN: u32 = u32::MAX;
/// Version of VMDKs that vdblk makes (`VMDK_IMAGE_VERSION`).
pub const VMDK_IMAGE_VERSION: u32 = 1;
/// Version of VDIs that vdblk makes (`VDI_IMAGE_VERSION`).
pub const VDI_IMAGE_VERSION: u32 = VDI_IMAGE_VERSION_MAJOR << 16 | VDI_IMAGE_VERSION_MINOR;
/// Its upper half (`VDI_IMAGE_VERSION_MAJOR`).
pub const VDI_IMAGE_VERSION_MAJOR: u32 = 1;
/// Its lower half (`VDI_IMAGE_VERSION_MINOR`).
pub const VDI_IMAGE_VERSION_MINOR: u32 = 1;

/// The upper half of a VDI's version (`VDI_GET_VERSION_MAJOR`).
pub const fn vdi_version_major(version: u32) -> u32 {
    version >> 16
}

/// The lower half of a VDI's version (`VDI_GET_VERSION_MINOR`).
pub const fn vdi_version_minor(version: u32) -> u32 {
    version & 0xffff
}

/// The number of a device type (`VDTYPE`); 0 is none.
pub fn device_number(device: DeviceType) -> u32 {
    match device {
        DeviceType::HardDisk => 1,
        DeviceType::Dvd => 2,
        DeviceType::Floppy => 3,
    }
}

/// A geometry (`VDGEOMETRY`). All zeros: none, or to be chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u32,
    /// Heads.
    pub heads: u32,
    /// Sectors of a track.
    pub sectors: u32,
}

impl Geometry {
    /// A geometry.
    pub const fn new(cylinders: u32, heads: u32, sectors: u32) -> Self {
        Geometry { cylinders, heads, sectors }
    }

    /// Nothing is said.
    pub fn is_unset(self) -> bool {
        self.cylinders == 0 || self.heads == 0 || self.sectors == 0
    }

    /// As other modules have it; `None` where nothing is said.
    pub(super) fn stated(self) -> Option<(u32, u32, u32)> {
        (!self.is_unset()).then(|| self.chs())
    }

    /// The three numbers.
    pub(super) fn chs(self) -> (u32, u32, u32) {
        (self.cylinders, self.heads, self.sectors)
    }

    /// Checks that a drive could state it: at most 16383 cylinders, 16 heads and 63 sectors.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`].
    pub fn check_physical(self) -> Result<()> {
        self.check(16383, 16)
    }

    /// Checks that firmware could address it: at most 255 heads and 63 sectors.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`].
    pub fn check_logical(self) -> Result<()> {
        self.check(u32::MAX, 255)
    }

    fn check(self, cylinders: u32, heads: u32) -> Result<()> {
        if self.cylinders <= cylinders && self.heads <= heads && self.sectors <= 63 {
            return Ok(());
        }
        let Geometry { cylinders: c, heads: h, sectors: s } = self;
        let what = format!("the geometry {c}/{h}/{s} is not possible");
        let hint = format!("{cylinders}/{heads}/63 at most");
        Err(Error::of(Status::InvalidSize, what).hint(hint))
    }
}

impl From<(u32, u32, u32)> for Geometry {
    fn from((cylinders, heads, sectors): (u32, u32, u32)) -> Self {
        Geometry { cylinders, heads, sectors }
    }
}

/// What the blocks of a region hold, by number (`VDREGIONDATAFORM`).
pub fn data_form_number(form: Option<DataForm>) -> u32 {
    match form {
        None => 1,
        Some(DataForm::Audio) => 2,
        Some(DataForm::Pause) => 3,
        Some(DataForm::Mode1Cooked) => 4,
        Some(DataForm::Mode1Raw) => 5,
        Some(DataForm::Mode2Cooked) => 10,
        Some(DataForm::Mode2Raw) => 11,
    }
}

/// Whether blocks of a region have metadata, by number (`VDREGIONMETADATAFORM`): 1 no, 2 as it lies in the image.
pub fn metadata_form_number(region: &RegionDesc) -> u32 {
    if region.metadata_bytes == 0 { 1 } else { 2 }
}

/// A stretch of a medium whose blocks are of one kind (`VDREGIONDESC`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionDesc {
    /// Where it begins, in the units of its list.
    pub start: u64,
    /// How long it is, in the units of its list.
    pub size: u64,
    /// Bytes of a block in the image.
    pub block_bytes: u64,
    /// What the blocks hold; `None`: bytes, as on a hard disk.
    pub form: Option<DataForm>,
    /// Bytes of a block that the disk shows.
    pub data_bytes: u64,
    /// Bytes of a block around those.
    pub metadata_bytes: u64,
}

/// The regions of a medium (`VDREGIONLIST`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionList {
    /// Whether starts and sizes are blocks or bytes. Bytes are those of whole blocks in the image.
    pub flags: RegionListFlags,
    /// In the medium's order; at least one.
    pub regions: Vec<RegionDesc>,
}

impl RegionList {
    /// What an image of `size_bytes` states.
    pub(super) fn of(info: &ImageInfo, size_bytes: u64, flags: RegionListFlags) -> RegionList {
        let in_blocks = flags.contains(RegionListFlags::LOC_SIZE_BLOCKS);
        if info.regions.is_empty() {
            let block_bytes = u64::from(sector_bytes(info.device));
            let size = if in_blocks { size_bytes.div_ceil(block_bytes) } else { size_bytes };
            let region = RegionDesc {
                start: 0,
                size,
                block_bytes,
                form: None,
                data_bytes: block_bytes,
                metadata_bytes: 0,
            };
            return RegionList { flags, regions: vec![region] };
        }
        let mut at = 0;
        let regions = info.regions.iter().map(|r| {
            let block_bytes = u64::from(r.block_bytes);
            let unit = if in_blocks { 1 } else { block_bytes };
            let start = if in_blocks { r.start } else { at };
            let size = r.blocks * unit;
            at += size;
            // A pause that no file has shows nothing and has nothing around it.
            let data_bytes = u64::from(r.data_bytes);
            let metadata_bytes = if data_bytes == 0 { 0 } else { block_bytes - data_bytes };
            RegionDesc { start, size, block_bytes, form: Some(r.form), data_bytes, metadata_bytes }
        });
        RegionList { flags, regions: regions.collect() }
    }
}

/// Bytes of a sector as the device has them.
pub(super) fn sector_bytes(device: DeviceType) -> u32 {
    match device {
        DeviceType::Dvd => 2048,
        DeviceType::HardDisk | DeviceType::Floppy => 512,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::Region;

    #[test]
    fn numbers_are_the_header_s() {
        assert_eq!((LAST_IMAGE, IMAGE_CONTENT_UNKNOWN), (0xffff_ffff, 0xffff_ffff));
        assert_eq!((VDI_IMAGE_VERSION, VMDK_IMAGE_VERSION), (0x1_0001, 1));
        assert_eq!((vdi_version_major(0x2_0003), vdi_version_minor(0x2_0003)), (2, 3));
        let devices = [DeviceType::HardDisk, DeviceType::Dvd, DeviceType::Floppy];
        assert_eq!(devices.map(device_number), [1, 2, 3]);
        assert_eq!(
            [None, Some(DataForm::Mode1Raw), Some(DataForm::Mode2Raw)].map(data_form_number),
            [1, 5, 11]
        );
    }

    #[test]
    fn geometries_have_bounds() {
        assert!(Geometry::new(16383, 16, 63).check_physical().is_ok());
        assert!(Geometry::default().check_physical().is_ok() && Geometry::default().is_unset());
        for g in [Geometry::new(16384, 16, 63), Geometry::new(1, 17, 63), Geometry::new(1, 16, 64)] {
            assert_eq!(g.check_physical().unwrap_err().status(), Some(Status::InvalidSize));
        }
        assert!(Geometry::new(100_000, 255, 63).check_logical().is_ok());
        assert!(Geometry::new(1, 256, 63).check_logical().is_err());
    }

    #[test]
    fn a_disc_has_its_regions_and_a_disk_one() {
        let plain = ImageInfo::default();
        let list = RegionList::of(&plain, 4096, RegionListFlags::LOC_SIZE_BLOCKS);
        assert_eq!((list.regions[0].size, list.regions[0].block_bytes, list.regions.len()), (8, 512, 1));
        assert_eq!(metadata_form_number(&list.regions[0]), 1);
        let raw =
            Region { start: 150, blocks: 10, block_bytes: 2352, data_bytes: 2048, form: DataForm::Mode1Raw };
        let gap =
            Region { start: 0, blocks: 150, block_bytes: 2352, data_bytes: 0, form: DataForm::Mode1Raw };
        let disc = ImageInfo { regions: vec![gap, raw], device: DeviceType::Dvd, ..ImageInfo::default() };
        let blocks = RegionList::of(&disc, 20480, RegionListFlags::LOC_SIZE_BLOCKS).regions;
        assert_eq!((blocks[1].start, blocks[1].size, blocks[1].metadata_bytes), (150, 10, 304));
        let bytes = RegionList::of(&disc, 20480, RegionListFlags::NONE).regions;
        assert_eq!((bytes[1].start, bytes[1].size), (150 * 2352, 10 * 2352));
        assert_eq!((metadata_form_number(&bytes[0]), metadata_form_number(&bytes[1])), (1, 2));
    }
}
