//! Long work on the images of a container: merging, compacting, resizing, repairing. Each is a job of [`crate::job`] on images that are closed for it and
//! opened again, whatever came of it; requests wait meanwhile.

use super::backends::backend_info_one;
use super::flags::RepairFlags;
use super::image::Image;
use super::types::Geometry;
use super::{Container, LAST_IMAGE};
use crate::error::{Error, ErrorKind, Result, Status};
use crate::format::Property;
use crate::job::{
    Compacted, Merge, NewSize, Repaired, Resize, Watch, compact_image, merge_images, repair_image,
    resize_image,
};
use crate::vd::{ImageSpec, OpenDisk};
use std::path::Path;
use std::time::Duration;

impl Container {
    /// Merges the image `from` into the image `to`, with those between them, and deletes those that are not needed any more (`VDMerge`). With `from` below
    /// `to` the content moves up, otherwise down. What the disk shows stays the same, unless the last image was kept out of it by going down beneath it.
    /// Cancelled or failed, nothing is lost, and the chain is what it was.
    ///
    /// # Errors
    /// [`Status::ImageNotFound`]; [`ErrorKind::InvalidArgument`] for one image; otherwise as [`merge_images`].
    pub fn merge(&mut self, from: u32, to: u32, watch: &mut Watch<'_>) -> Result<()> {
        let (from, to) = (self.index(from)?, self.index(to)?);
        if from == to {
            return Err(Error::new(ErrorKind::InvalidArgument, "an image cannot be merged into itself"));
        }
        self.live()?;
        let how = Merge {
            // Images that are not in the container may lie over these.
            chain: OpenDisk { allow_write_to_parent: false, cache_image: None, ..self.how() },
            from: Some(self.images[from].path.clone()),
            into: Some(self.images[to].path.clone()),
            keep: false,
        };
        self.apart(|this| {
            let merged = merge_images(&how, watch)?;
            for (path, why) in merged.left {
                tracing::warn!("{}: stays where it is: {why}", path.display());
            }
            let last = this.images.len() - 1;
            let flags = this.images[last].flags;
            let spent = if from < to { from..to } else { to + 1..from + 1 };
            this.images.drain(spent);
            // Whoever is the last now is open as the last was.
            this.images.last_mut().expect("the one that took the others in").flags = flags;
            Ok(())
        })
    }

    /// Takes from an image what it need not keep: blocks of zeros and those that are equal to what is beneath, and holes, which blocks from the end
    /// fill (`VDCompact`). Unlike in VirtualBox's words blocks are not put in the order of the disk. Safe at any moment.
    ///
    /// # Errors
    /// [`Status::ImageNotFound`]; [`Status::ImageReadOnly`] in a container that is not written; otherwise as [`compact_image`].
    pub fn compact(&mut self, image: u32, watch: &mut Watch<'_>) -> Result<Compacted> {
        let index = self.index(image)?;
        self.live()?;
        self.writable()?;
        let how = self.how_from(index);
        self.apart(|_| compact_image(&how, watch))
    }

    /// Changes the size of the last image's disk, in bytes, and the geometries it states; unset ones are left (`VDResize`). A smaller size is refused where
    /// data would be lost.
    ///
    /// # Errors
    /// [`Status::NotOpened`]; [`Status::ImageReadOnly`]; [`Status::InvalidSize`] for a geometry; otherwise as [`resize_image`].
    pub fn resize(
        &mut self,
        size_bytes: u64,
        pchs: Geometry,
        lchs: Geometry,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        pchs.check_physical()?;
        lchs.check_logical()?;
        self.live()?;
        self.writable()?;
        let image = OpenDisk { cache_image: None, ..self.how() };
        let how = Resize { image, size: NewSize::To(size_bytes), shrink: false };
        self.apart(|_| resize_image(&how, watch))?;
        let format = self.image(LAST_IMAGE)?.format;
        if !pchs.is_unset() && format.keeps(Property::Geometry) {
            self.set_pchs_geometry(LAST_IMAGE, pchs)?;
        }
        if !lchs.is_unset() && format.keeps(Property::LogicalGeometry) {
            self.set_lchs_geometry(LAST_IMAGE, lchs)?;
        }
        Ok(())
    }

    /// How the chain from its base to an image is opened.
    pub(super) fn how_from(&self, index: usize) -> OpenDisk {
        let (image, parents) = self.images[..=index].split_last().expect("an image");
        OpenDisk {
            image: image.spec(),
            parents: parents.iter().map(Image::spec).collect(),
            cache_image: None,
            ..self.how()
        }
    }
}

/// Repairs an image that is not open, or with [`RepairFlags::DRY_RUN`] tells what would be done (`VDRepair`).
///
/// # Errors
/// [`Status::ImageRepairNotSupported`]; [`Status::ImageRepairImpossible`]; otherwise as [`repair_image`].
pub fn repair(
    backend: &str,
    path: &Path,
    flags: RepairFlags,
    lock_wait: Duration,
    watch: &mut Watch<'_>,
) -> Result<Repaired> {
    let spec = ImageSpec { path: path.to_path_buf(), format: Some(backend_info_one(backend)?.format) };
    let repaired = repair_image(&spec, flags.contains(RepairFlags::DRY_RUN), lock_wait, watch);
    match repaired.map_err(|e| match e.kind() {
        ErrorKind::Unsupported => e.with_status(Status::ImageRepairNotSupported),
        ErrorKind::Corrupt => e.with_status(Status::ImageRepairImpossible),
        _ => e,
    })? {
        Repaired::NothingToRepair(format) => {
            let what = format!("{} images have nothing that could be repaired", format.title());
            Err(Error::of(Status::ImageRepairNotSupported, what).at(path))
        }
        report => Ok(report),
    }
}
