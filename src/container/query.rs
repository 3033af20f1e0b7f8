//! Questions about the images of a container.

use super::Container;
use super::backends::BackendInfo;
use super::flags::{ImageFlags, OpenFlags, RegionListFlags};
use super::image::{inspect, kind_of};
use super::types::{Geometry, RegionList, sector_bytes};
use crate::error::{Error, ErrorKind, Result, Status};
use crate::format::{Format, Property};
use crate::map::ImageInfo;
use std::fmt::Write as _;
use std::path::Path;
use uuid::Uuid;

impl Container {
    /// How many images are open (`VDGetCount`).
    pub fn count(&self) -> usize {
        self.images.len()
    }

    /// Nothing can be written; so also without an image (`VDIsReadOnly`).
    pub fn is_read_only(&self) -> bool {
        self.images.last().is_none_or(|i| i.has(OpenFlags::READONLY))
    }

    /// Bytes of a sector as the device has them: 2048 of optical media, otherwise 512 (`VDGetSectorSize`).
    ///
    /// # Errors
    /// [`Status::ImageNotFound`]; so for all that follow.
    pub fn sector_size(&self, image: u32) -> Result<u32> {
        self.image(image).map(|_| sector_bytes(self.device))
    }

    /// Bytes of an image's disk (`VDGetSize`).
    ///
    /// # Errors
    /// As [`Self::sector_size`].
    pub fn size(&self, image: u32) -> Result<u64> {
        Ok(self.info(image)?.virtual_size)
    }

    /// Bytes of an image's files, all together (`VDGetFileSize`).
    ///
    /// # Errors
    /// As [`Self::sector_size`]; from the operating system.
    pub fn file_size(&self, image: u32) -> Result<u64> {
        let i = self.image(image)?;
        Ok(inspect(&i.path, i.format, self.options.allow_raw_device)?.file_size)
    }

    /// What an image says of itself.
    ///
    /// # Errors
    /// As [`Self::sector_size`]; of reading it, where it is open to be asked about only.
    pub fn info(&self, image: u32) -> Result<ImageInfo> {
        let index = self.index(image)?;
        let i = &self.images[index];
        if let Some(stream) = &self.stream {
            let virtual_size = stream.lock().expect("stream lock").size_bytes();
            return Ok(ImageInfo { format: "vmdk", variant: "stream", virtual_size, ..ImageInfo::default() });
        }
        let Some(live) = &self.live else {
            return Ok(inspect(&i.path, i.format, self.options.allow_raw_device)?.info);
        };
        let layer = &live.disk.chain().layers()[self.images.len() - 1 - index];
        Ok(ImageInfo { device: live.images[index].info.device, ..layer.map.info() })
    }

    /// The geometry that drives state (`VDGetPCHSGeometry`).
    ///
    /// # Errors
    /// As [`Self::sector_size`]; [`Status::GeometryNotSet`].
    pub fn pchs_geometry(&self, image: u32) -> Result<Geometry> {
        let i = self.image(image)?;
        let stated = self.info(image)?.geometry.filter(|_| i.format.keeps(Property::Geometry));
        stated.map(Geometry::from).ok_or_else(|| no_geometry(&i.path))
    }

    /// The geometry that firmware addresses by (`VDGetLCHSGeometry`).
    ///
    /// # Errors
    /// As [`Self::pchs_geometry`].
    pub fn lchs_geometry(&self, image: u32) -> Result<Geometry> {
        let i = self.image(image)?;
        let stated = self.info(image)?.logical_geometry;
        stated.map(Geometry::from).ok_or_else(|| no_geometry(&i.path))
    }

    /// The regions of an image's medium (`VDQueryRegions`): several of a CD, otherwise one.
    ///
    /// # Errors
    /// As [`Self::sector_size`].
    pub fn regions(&self, image: u32, flags: RegionListFlags) -> Result<RegionList> {
        let info = self.info(image)?;
        Ok(RegionList::of(&info, info.virtual_size, flags))
    }

    /// The version of an image's format (`VDGetVersion`): of a VDI the major one in the upper 16 bits, of others what stands before the
    /// first point; 0 where there is none.
    ///
    /// # Errors
    /// As [`Self::sector_size`].
    pub fn version(&self, image: u32) -> Result<u32> {
        let format = self.image(image)?.format;
        let info = self.info(image)?;
        let text = info.version.as_deref().unwrap_or("0");
        let mut numbers = text.split('.').map(|n| n.trim().parse().unwrap_or(0u32));
        let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        Ok(if format == Format::Vdi { major << 16 | minor } else { major })
    }

    /// The back-end of an image (`VDBackendInfoSingle`).
    ///
    /// # Errors
    /// As [`Self::sector_size`].
    pub fn image_backend(&self, image: u32) -> Result<BackendInfo> {
        Ok(BackendInfo::of(self.image(image)?.format))
    }

    /// What an image is like (`VDGetImageFlags`).
    ///
    /// # Errors
    /// As [`Self::sector_size`].
    pub fn image_flags(&self, image: u32) -> Result<ImageFlags> {
        self.info(image).map(|info| kind_of(&info))
    }

    /// How an image is open (`VDGetOpenFlags`): with [`OpenFlags::READONLY`] for all but the last.
    ///
    /// # Errors
    /// As [`Self::sector_size`].
    pub fn open_flags(&self, image: u32) -> Result<OpenFlags> {
        self.image(image).map(|i| i.flags)
    }

    /// The image's own file (`VDGetFilename`).
    ///
    /// # Errors
    /// As [`Self::sector_size`].
    pub fn filename(&self, image: u32) -> Result<&Path> {
        self.image(image).map(|i| i.path.as_path())
    }

    /// The comment of an image (`VDGetComment`); empty where there is none.
    ///
    /// # Errors
    /// As [`Self::sector_size`]; [`ErrorKind::Unsupported`] where the format has no place for one.
    pub fn comment(&self, image: u32) -> Result<String> {
        let i = self.image(image)?;
        if !i.format.keeps_comment() {
            return Err(lacks(&i.path, i.format, "comment"));
        }
        Ok(self.info(image)?.comment.unwrap_or_default())
    }

    /// The UUID of an image (`VDGetUuid`).
    ///
    /// # Errors
    /// As [`Self::sector_size`]; [`ErrorKind::Unsupported`] where it has none.
    pub fn uuid(&self, image: u32) -> Result<Uuid> {
        let i = self.image(image)?;
        self.info(image)?.uuid.ok_or_else(|| lacks(&i.path, i.format, "UUID"))
    }

    /// The UUID of the present contents of an image (`VDGetModificationUuid`).
    ///
    /// # Errors
    /// As [`Self::uuid`].
    pub fn modification_uuid(&self, image: u32) -> Result<Uuid> {
        let i = self.image(image)?;
        self.info(image)?.modification_uuid.ok_or_else(|| lacks(&i.path, i.format, "modification UUID"))
    }

    /// The UUID of the parent that an image names; nil for a base (`VDGetParentUuid`).
    ///
    /// # Errors
    /// As [`Self::uuid`].
    pub fn parent_uuid(&self, image: u32) -> Result<Uuid> {
        let i = self.image(image)?;
        let info = self.info(image)?;
        match info.parent_uuid {
            Some(uuid) => Ok(uuid),
            None if info.uuid.is_some() => Ok(Uuid::nil()),
            None => Err(lacks(&i.path, i.format, "parent's UUID")),
        }
    }

    /// All there is to tell of the images, for people, a line each, the base first (`VDDumpImages`).
    pub fn dump(&self) -> String {
        let mut text = String::new();
        for (n, i) in (0u32..).zip(&self.images) {
            let _ = write!(text, "{n}: {} {}", i.format, i.path.display());
            let _ = match self.info(n) {
                Ok(info) => {
                    let uuid = |u: Option<Uuid>| u.map_or_else(|| "-".into(), |u| u.to_string());
                    write!(
                        text,
                        " {} {} bytes uuid {} modification {} parent {}",
                        info.variant,
                        info.virtual_size,
                        uuid(info.uuid),
                        uuid(info.modification_uuid),
                        uuid(info.parent_uuid)
                    )
                }
                Err(e) => write!(text, " ({e})"),
            };
            let _ = writeln!(text, " {:?}", i.flags);
        }
        text
    }
}

fn lacks(path: &Path, format: Format, what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{} images have no {what}", format.title())).at(path)
}

fn no_geometry(path: &Path) -> Error {
    Error::of(Status::GeometryNotSet, "states no such geometry").at(path)
}
