//! Changing what images say of themselves. The file is changed while it is closed, under its lock, so that each value is the old or the new one
//! whatever happens meanwhile.

use super::Container;
use super::flags::OpenFlags;
use super::types::Geometry;
use crate::error::{Error, ErrorKind, Result, Status};
use crate::format::Properties;
use crate::job::{SetProperties, Watch, set_properties};
use uuid::Uuid;

impl Container {
    /// Sets the geometry that drives state; unset: none is stated (`VDSetPCHSGeometry`).
    ///
    /// # Errors
    /// [`Status::ImageNotFound`]; [`Status::ImageReadOnly`] if the image is not open for writing; [`Status::InvalidSize`];
    /// [`crate::ErrorKind::Unsupported`] where the format has no place for it; of closing, writing and opening. So for all that follow.
    pub fn set_pchs_geometry(&mut self, image: u32, geometry: Geometry) -> Result<()> {
        geometry.check_physical()?;
        self.set(image, Properties { geometry: Some(geometry.chs()), ..Properties::default() })
    }

    /// Sets the geometry that firmware addresses by; unset: none is stated (`VDSetLCHSGeometry`).
    ///
    /// # Errors
    /// As [`Self::set_pchs_geometry`].
    pub fn set_lchs_geometry(&mut self, image: u32, geometry: Geometry) -> Result<()> {
        geometry.check_logical()?;
        self.set(image, Properties { logical_geometry: Some(geometry.chs()), ..Properties::default() })
    }

    /// Sets the comment; `None`: there is none any more (`VDSetComment`).
    ///
    /// # Errors
    /// As [`Self::set_pchs_geometry`].
    pub fn set_comment(&mut self, image: u32, comment: Option<&str>) -> Result<()> {
        let comment = Some(comment.unwrap_or_default().to_string());
        self.set(image, Properties { comment, ..Properties::default() }).map_err(|e| match e.kind() {
            // The one thing that can be wrong with it.
            ErrorKind::InvalidArgument => e.with_status(Status::VdiCommentTooLong),
            _ => e,
        })
    }

    /// Sets the image's UUID; `None`: to one by chance (`VDSetUuid`). An image above it in the container names it as its parent, and would not
    /// know it again: such a change is refused unless [`super::ContainerOptions::allow_parent_mismatch`] is set.
    ///
    /// # Errors
    /// As [`Self::set_pchs_geometry`].
    pub fn set_uuid(&mut self, image: u32, uuid: Option<Uuid>) -> Result<()> {
        self.set(image, Properties { uuid: Some(chosen(uuid)), ..Properties::default() })
    }

    /// Sets the UUID of the present contents; `None`: to one by chance (`VDSetModificationUuid`).
    ///
    /// # Errors
    /// As [`Self::set_pchs_geometry`].
    pub fn set_modification_uuid(&mut self, image: u32, uuid: Option<Uuid>) -> Result<()> {
        self.set(image, Properties { modification_uuid: Some(chosen(uuid)), ..Properties::default() })
    }

    /// Sets the UUID that the image names as its parent's; `None`: to one by chance (`VDSetParentUuid`).
    ///
    /// # Errors
    /// As [`Self::set_pchs_geometry`], and for images without a parent.
    pub fn set_parent_uuid(&mut self, image: u32, uuid: Option<Uuid>) -> Result<()> {
        self.set(image, Properties { parent_uuid: Some(chosen(uuid)), ..Properties::default() })
    }

    fn set(&mut self, image: u32, properties: Properties) -> Result<()> {
        let index = self.index(image)?;
        let i = self.images[index].clone();
        if self.stream.is_some() {
            // That would end it.
            let what = "is being written from its start to its end, and says nothing of itself before that";
            return Err(Error::of(Status::InvalidState, what).at(&i.path));
        }
        if i.has(OpenFlags::READONLY) {
            let what = "is open for reading only, and keeps what it says of itself";
            return Err(Error::of(Status::ImageReadOnly, what).at(&i.path));
        }
        let parent = index.checked_sub(1).map(|below| self.uuid(u32::try_from(below).expect("an index")));
        if let (Some(Ok(parent)), Some(uuid)) = (parent, properties.parent_uuid)
            && uuid != parent
            && !self.options.allow_parent_mismatch
            && !i.has(OpenFlags::INFO)
        {
            let what = format!("lies over an image with the UUID {parent}, and would name {uuid}");
            return Err(Error::of(Status::UuidMismatch, what).at(&i.path));
        }
        let how = SetProperties {
            image: i.spec(),
            lock_wait: self.options.lock_wait,
            allow_raw_device: self.options.allow_raw_device,
            properties,
            force: true,
        };
        self.apart(|_| set_properties(&how, &mut Watch { cancelled: &|| false, progress: &mut |_| () }))?;
        Ok(())
    }
}

fn chosen(uuid: Option<Uuid>) -> Uuid {
    uuid.unwrap_or_else(Uuid::new_v4)
}
