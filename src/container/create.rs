//! New images, opened as they are made.

use super::backends::{BackendInfo, backend_info_one};
use super::flags::{BackendCaps, ImageFlags, OpenFlags};
use super::image::{Image, check_back_end, check_flags, inspect, variant_of};
use super::types::Geometry;
use super::{Container, LAST_IMAGE};
use crate::error::{Error, ErrorKind, Result, Status};
use crate::format::{Format, NewParent, Property};
use crate::job::{CreateImage, StreamWriter, create_files, named_from, remove_files};
use crate::limits::SECTOR_BYTES;
use crate::map::DeviceType;
use crate::vd::stand_in;
use std::path::Path;
use uuid::Uuid;

/// What a new image shall be like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateBase {
    /// Its kind; a diff is one without being told.
    pub flags: ImageFlags,
    /// A comment.
    pub comment: Option<String>,
    /// What drives state; unset: it is chosen, or the parent's. Kept by formats that have a place for it.
    pub pchs: Geometry,
    /// What firmware addresses by, likewise.
    pub lchs: Geometry,
    /// Its UUID; `None`: one by chance.
    pub uuid: Option<Uuid>,
    /// The UUID it names as its parent's; `None`: the one its parent has. Only for diffs.
    pub parent_uuid: Option<Uuid>,
    /// Configuration keys of the back-end and their values.
    pub config: Vec<(String, String)>,
}

impl Container {
    /// Makes a base image and opens it (`VDCreateBase`). Where that fails no file is left. A stream-optimized VMDK is made with [`OpenFlags::SEQUENTIAL`]: it
    /// takes writes in the order of its disk, and nothing else, and is complete when it is closed.
    ///
    /// # Errors
    /// [`Status::InvalidState`] if an image is open; [`Status::InvalidType`] for kinds the back-end does not make; [`Status::InvalidSize`];
    /// of making and opening it.
    pub fn create_base(
        &mut self,
        backend: &str,
        path: &Path,
        size_bytes: u64,
        like: &CreateBase,
        flags: OpenFlags,
    ) -> Result<()> {
        let format = backend_info_one(backend)?.format;
        if !self.images.is_empty() {
            let what = "a base is made in an empty container, and this one has images";
            return Err(Error::of(Status::InvalidState, what).hint("close them, or make a diff"));
        }
        if like.flags.contains(ImageFlags::DIFF) {
            return Err(Error::of(Status::InvalidType, "a base is no differencing image").at(path));
        }
        self.check_size(format, size_bytes).map_err(|e| e.at(path))?;
        let new = wish(format, path, size_bytes, like)?;
        self.create(format, new, flags)?;
        let has_both = format.keeps(Property::Geometry) && format.keeps(Property::LogicalGeometry);
        // Of an image that is written once only what it is made with is stated.
        if !has_both || like.lchs.is_unset() || self.stream.is_some() {
            return Ok(());
        }
        self.set_lchs_geometry(LAST_IMAGE, like.lchs).inspect_err(|_| {
            if self.count() > 0
                && let Err(e) = self.close(true)
            {
                tracing::warn!("{e}");
            }
        })
    }

    /// Makes a differencing image over those that are open, and opens it (`VDCreateDiff`). It has the size of the last one and names it as
    /// its parent; that becomes read-only. Where that fails no file is left, and the container stays what it was.
    ///
    /// # Errors
    /// [`Status::NotOpened`] without an image to lie over; otherwise as [`Self::create_base`].
    pub fn create_diff(
        &mut self,
        backend: &str,
        path: &Path,
        like: &CreateBase,
        flags: OpenFlags,
    ) -> Result<()> {
        let format = backend_info_one(backend)?.format;
        let Some(parent) = self.images.last().cloned() else {
            return Err(Error::of(Status::NotOpened, "no image is open that a diff could lie over"));
        };
        self.live()?;
        if !BackendInfo::of(format).caps.contains(BackendCaps::DIFF) {
            let what = format!("{} images cannot lie over others", format.title());
            return Err(Error::of(Status::InvalidType, what).at(path));
        }
        let like = CreateBase { flags: like.flags.with(ImageFlags::DIFF), ..like.clone() };
        let mut new = wish(format, path, self.size(LAST_IMAGE)?, &like)?;
        // What a diff says of its parent is what the parent says when it has been closed.
        let described = self.apart(|this| this.describe(&parent, path, like.parent_uuid))?;
        if new.geometry.is_none() {
            new.geometry = format.geometry_from(described.info.geometry);
        }
        new.parent = Some(described);
        self.create(format, new, flags)
    }

    /// An image in the words of a diff over it.
    pub(super) fn describe(&self, parent: &Image, child: &Path, uuid: Option<Uuid>) -> Result<NewParent> {
        let mut info = inspect(&parent.path, parent.format, self.options.allow_raw_device)?.info;
        info.uuid = uuid.or(info.uuid).or_else(|| stand_in(&parent.path));
        Ok(NewParent { info, path: named_from(child, &parent.path) })
    }

    fn create(&mut self, format: Format, new: CreateImage, flags: OpenFlags) -> Result<()> {
        check_flags(flags)?;
        check_back_end(format, ImageFlags::NONE, flags)?;
        if flags.intersects(OpenFlags::INFO | OpenFlags::READONLY) {
            let what = "a new image is opened for writing";
            return Err(Error::new(ErrorKind::InvalidArgument, what).at(&new.path));
        }
        if flags.contains(OpenFlags::SEQUENTIAL)
            && self.images.is_empty()
            && self.begin_sequential(format, &new, flags)?
        {
            return Ok(());
        }
        let files = create_files(&new)?;
        let place = (self.images.is_empty(), self.options.allow_raw_device);
        let opened = Image::look(&new.path, format, flags, self.device, place).and_then(|i| self.append(i));
        if opened.is_err() {
            remove_files(&files);
        }
        opened
    }

    /// A stream-optimized VMDK, which takes writes from its start to its end. False for other kinds.
    fn begin_sequential(&mut self, format: Format, new: &CreateImage, flags: OpenFlags) -> Result<bool> {
        let Some(stream) = StreamWriter::begin(new)? else { return Ok(false) };
        let kind = ImageFlags::VMDK_STREAM_OPTIMIZED;
        check_back_end(format, kind, flags).map_err(|e| e.at(&new.path))?;
        if self.filters.any() || self.device != DeviceType::HardDisk {
            let what =
                "a stream-optimized image is of a hard disk, and written past the filters of its container";
            return Err(Error::new(ErrorKind::Unsupported, what).at(&new.path));
        }
        self.begin_stream(Image { path: new.path.clone(), format, flags, kind }, stream);
        Ok(true)
    }

    /// Sizes that no image, or none for this device, has.
    fn check_size(&self, format: Format, size: u64) -> Result<()> {
        let refused = |status, what: &str| Err(Error::of(status, format!("a disk of {size} bytes {what}")));
        let is_raw = format == Format::Raw;
        if size == 0 || !size.is_multiple_of(SECTOR_BYTES) {
            let status = if is_raw { Status::RawSizeModulo512 } else { Status::InvalidSize };
            return refused(status, "is none of whole sectors of 512 bytes");
        }
        match self.device {
            DeviceType::Dvd if !size.is_multiple_of(2048) => {
                refused(Status::RawSizeModulo2048, "is none of whole sectors of 2048 bytes")
            }
            DeviceType::Dvd if size < 32 * 2048 => {
                refused(Status::RawSizeOpticalTooSmall, "is no optical medium")
            }
            DeviceType::Floppy if size > 512 * 82 * 48 * 2 => {
                refused(Status::RawSizeFloppyTooBig, "is no floppy disk")
            }
            _ => Ok(()),
        }
    }
}

/// The wish in the words of jobs.
///
/// # Errors
/// For what the back-end does not make.
pub(super) fn wish(format: Format, path: &Path, size_bytes: u64, like: &CreateBase) -> Result<CreateImage> {
    like.pchs.check_physical().and_then(|()| like.lchs.check_logical()).map_err(|e| e.at(path))?;
    let BackendInfo { caps, config, .. } = BackendInfo::of(format);
    let is_known = |key: &str| config.iter().any(|c| c.key.eq_ignore_ascii_case(key));
    if let Some((key, _)) = like.config.iter().find(|(key, _)| !is_known(key)) {
        let what = format!("{} images have no option '{key}'", format.title());
        return Err(Error::of(Status::UnknownCfgValues, what).at(path));
    }
    let needed = match like.flags {
        f if f.contains(ImageFlags::VMDK_SPLIT_2G) => BackendCaps::CREATE_SPLIT_2G,
        f if f.contains(ImageFlags::FIXED) => BackendCaps::CREATE_FIXED,
        f if f.contains(ImageFlags::DIFF) => BackendCaps::DIFF,
        _ => BackendCaps::CREATE_DYNAMIC,
    };
    if !caps.contains(needed) {
        let what = format!("{} images of this kind ({:?}) are not made", format.title(), like.flags);
        return Err(Error::of(Status::InvalidType, what).at(path));
    }
    // Where there is a place for one of the two, it is made with that.
    let stated = if format.keeps(Property::Geometry) { like.pchs } else { like.lchs };
    Ok(CreateImage {
        variant: variant_of(format, like.flags).map_err(|e| e.at(path))?.map(str::to_string),
        uuid: like.uuid,
        comment: like.comment.clone().filter(|_| format.keeps_comment()),
        geometry: format.geometry_from(stated.stated()),
        options: like.config.clone(),
        ..CreateImage::new(path, format, size_bytes)
    })
}
