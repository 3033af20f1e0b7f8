//! Copying an image from one container into another, and moving one.

use super::backends::backend_info_one;
use super::create::{CreateBase, wish};
use super::flags::{ImageFlags, OpenFlags};
use super::image::inspect;
use super::types::{Geometry, IMAGE_CONTENT_UNKNOWN};
use super::{Container, LAST_IMAGE};
use crate::error::{Error, ErrorKind, Result, Status};
use crate::filter::Filters;
use crate::format::{Format, Property};
use crate::job::{
    Convert, CopyJob, DiskBytes, MoveImage, Selection, Survey, Watch, change, convert, create_files,
    delete_image, move_image, open_channel, remove_files,
};
use crate::limits::SECTOR_BYTES;
use crate::map::GuestOffset;
use crate::vd::{CacheMode, Disk, DiskOptions, ImageFiles, OpenDisk, open_disk};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// Where a copy goes and what it is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyImage {
    /// The back-end of the new image; `None`: that of the source.
    pub backend: Option<String>,
    /// The new image; `None`: the copy goes into the last image of the target.
    pub path: Option<PathBuf>,
    /// The size of the new disk; 0: the source's. A smaller one takes what fits, if there are only zeros behind.
    pub size_bytes: u64,
    /// The image of the source which holds the same as `to_same` of the target, with all beneath: only what the images above it say is
    /// copied. [`IMAGE_CONTENT_UNKNOWN`]: nothing is known, and what the target has already is left out by comparing.
    pub from_same: u32,
    /// The image of the target, or [`IMAGE_CONTENT_UNKNOWN`] like `from_same`.
    pub to_same: u32,
    /// The kind of the new image.
    pub flags: ImageFlags,
    /// The UUID of the new image; `None`: one by chance.
    pub uuid: Option<Uuid>,
    /// How the new image is opened.
    pub open_flags: OpenFlags,
}

impl Default for CopyImage {
    fn default() -> Self {
        CopyImage {
            backend: None,
            path: None,
            size_bytes: 0,
            from_same: IMAGE_CONTENT_UNKNOWN,
            to_same: IMAGE_CONTENT_UNKNOWN,
            flags: ImageFlags::NONE,
            uuid: None,
            open_flags: OpenFlags::NONE,
        }
    }
}

impl Container {
    /// Copies what the chain shows from its base up to `image` into another container: into a new image, a base there if it is empty and otherwise over its
    /// last one, or into its last one (`VDCopyEx`; `VDCopy` is the same with nothing known to be the same). The copy has the source's comment, geometry and
    /// modification UUID where its format keeps them. Failed or cancelled, a new image is removed.
    ///
    /// # Errors
    /// [`Status::ImageNotFound`]; [`ErrorKind::InvalidArgument`] if only one of the two images that hold the same is named;
    /// [`Status::ShrinkNotSupported`] where data would be lost; otherwise as [`Self::create_base`], and of reading and writing; [`ErrorKind::Cancelled`].
    pub fn copy_to(
        &mut self,
        image: u32,
        target: &mut Container,
        how: &CopyImage,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let index = self.index(image)?;
        self.live()?;
        let number = u32::try_from(index).expect("limits::MAX_CHAIN_IMAGES");
        let selection = self.selection(index, target, how)?;
        let have = self.size(number)?;
        let size = if how.size_bytes == 0 { have } else { how.size_bytes };
        if !size.is_multiple_of(SECTOR_BYTES) {
            let what = format!("a disk of {size} bytes is none of whole sectors of {SECTOR_BYTES} bytes");
            return Err(Error::of(Status::InvalidSize, what));
        }
        if how.flags.contains(ImageFlags::VMDK_STREAM_OPTIMIZED) {
            return self.stream_to(index, (have, size), target, how, watch);
        }
        let source = self.disk_up_to(index)?;
        refuse_loss(&source, size, watch)?;
        let new = self.make_room(number, target, how, size)?;
        let copied = self.copy_bytes(&source, size.min(have), target, selection, watch).and_then(|()| {
            let modification = self.modification_uuid(number).ok();
            let keeps = target.image(LAST_IMAGE)?.format.keeps(Property::ModificationUuid);
            match modification.filter(|_| keeps) {
                Some(uuid) => target.set_modification_uuid(LAST_IMAGE, Some(uuid)),
                None => Ok(()),
            }
        });
        if copied.is_err() && new {
            // What is half there is worth nothing.
            if let Err(e) = target.close(true) {
                tracing::warn!("{e}");
            }
        }
        copied?;
        match how.open_flags.contains(OpenFlags::READONLY) && new {
            true => target.set_open_flags(LAST_IMAGE, how.open_flags),
            false => Ok(()),
        }
    }

    /// What is copied.
    fn selection(&self, index: usize, target: &Container, how: &CopyImage) -> Result<Selection> {
        let all = |zeros| Selection { depths: 0..usize::MAX, zeros };
        match (how.from_same, how.to_same) {
            (IMAGE_CONTENT_UNKNOWN, IMAGE_CONTENT_UNKNOWN) => Ok(all(!target.images.is_empty())),
            (IMAGE_CONTENT_UNKNOWN, _) | (_, IMAGE_CONTENT_UNKNOWN) => {
                let what = "of two images that hold the same both have to be named, or none";
                Err(Error::new(ErrorKind::InvalidArgument, what))
            }
            (from, to) => {
                let (from, to) = (self.index(from)?, target.index(to)?);
                if from > index {
                    let what = "the image that the target has already is above the one that is copied";
                    return Err(Error::new(ErrorKind::InvalidArgument, what));
                }
                let into_existing = usize::from(how.path.is_none());
                if to + 1 + into_existing != target.images.len() {
                    // What lies between may say something else: it is compared.
                    return Ok(all(true));
                }
                Ok(Selection { depths: 0..index - from, zeros: true })
            }
        }
    }

    /// The image in the target that takes the copy; true if it was made for that.
    fn make_room(&self, number: u32, target: &mut Container, how: &CopyImage, size: u64) -> Result<bool> {
        let Some(path) = &how.path else {
            target.live()?;
            target.writable()?;
            let have = target.size(LAST_IMAGE)?;
            if have < size {
                let what = format!("{size} bytes do not fit a disk of {have} bytes");
                return Err(Error::of(Status::InvalidSize, what));
            }
            return Ok(false);
        };
        let backend =
            how.backend.clone().unwrap_or_else(|| self.images[number as usize].format.name().to_string());
        let format: Format = backend.parse()?;
        let info = self.info(number)?;
        let geometry = format.geometry_from(info.geometry).map(Geometry::from).unwrap_or_default();
        let logical = info.logical_geometry.map(Geometry::from).unwrap_or_default();
        let like = CreateBase {
            flags: how.flags,
            comment: info.comment.filter(|_| format.keeps_comment()),
            // Of a physical one that no drive could state nothing is said.
            pchs: Some(geometry).filter(|g| g.check_physical().is_ok()).unwrap_or_default(),
            lchs: logical,
            uuid: how.uuid,
            ..CreateBase::default()
        };
        // A new image is written first, however it is to be open in the end.
        let open_flags = how.open_flags.without(OpenFlags::READONLY.with(OpenFlags::SKIP_CONSISTENCY_CHECKS));
        if target.images.is_empty() {
            target.create_base(&backend, path, size, &like, open_flags)?;
        } else {
            target.create_diff(&backend, path, &like, open_flags)?;
            if target.size(LAST_IMAGE)? < size {
                target.resize(
                    size,
                    Geometry::default(),
                    Geometry::default(),
                    &mut Watch { cancelled: &|| false, progress: &mut |_| () },
                )?;
            }
        }
        Ok(true)
    }

    fn copy_bytes(
        &self,
        source: &Arc<Disk>,
        bytes: u64,
        target: &mut Container,
        selection: Selection,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        target.apart(|target| {
            let filters = target.filters.of_disk();
            let into = open_disk(&OpenDisk { cache_image: None, filters, ..target.how() })?;
            run_copy(source, bytes, &into.disk, selection, watch)
                .map_err(|e| e.at(&target.images.last().expect("a target").path))
        })
    }

    /// The disk of the images from the base up to this one.
    fn disk_up_to(&self, index: usize) -> Result<Arc<Disk>> {
        if index + 1 == self.images.len() {
            return Ok(self.live()?.disk.clone());
        }
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        let filters = self.filters.of_disk();
        Ok(open_disk(&OpenDisk { options, filters, ..self.how_from(index) })?.disk)
    }

    /// Into an image that is written once.
    fn stream_to(
        &mut self,
        index: usize,
        (have, size): (u64, u64),
        target: &mut Container,
        how: &CopyImage,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let Some(path) = how.path.clone().filter(|_| target.images.is_empty()) else {
            let what = "a stream-optimized image is a new base";
            return Err(Error::of(Status::InvalidType, what));
        };
        if have != size {
            let what = format!("a stream-optimized image has the size of what it is made of, {have} bytes");
            return Err(Error::of(Status::InvalidSize, what));
        }
        if target.filters.any() {
            let what = "a stream-optimized image is written past the filters of its container";
            return Err(Error::new(ErrorKind::Unsupported, what).hint("remove them, or copy to another kind"));
        }
        let backend = how.backend.clone().unwrap_or_else(|| self.images[index].format.name().to_string());
        let format = backend_info_one(&backend)?.format;
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        let source = OpenDisk { options, filters: self.filters.of_disk(), ..self.how_from(index) };
        let convert_how = Convert {
            source,
            target: path.clone(),
            format,
            variant: Some("stream".into()),
            options: Vec::new(),
            filters: Filters::default(),
            cache: CacheMode::Writeback,
        };
        self.apart(|_| convert(&convert_how, watch))?;
        target.open(&backend, &path, how.open_flags.with(OpenFlags::READONLY))
    }

    /// Moves an image to another place, in another back-end if one is named (`VDCopy` within one container). Everything it is stays the same, its UUIDs too.
    /// `by_rename`: its files get further names, or copies on another file system, as [`move_image`] does it, where the back-end stays; otherwise what it holds is
    /// copied into a new image. The old one goes once the new one is durable and the image above it, if that says where its parent is, names the new place.
    /// Nothing is overwritten. Failed or cancelled, everything is what it was.
    ///
    /// # Errors
    /// [`Status::ImageNotFound`]; [`ErrorKind::Exists`]; otherwise as [`move_image`] and [`Self::copy_to`].
    pub fn move_image(
        &mut self,
        image: u32,
        backend: Option<&str>,
        path: &Path,
        by_rename: bool,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let index = self.index(image)?;
        self.live()?;
        let format =
            backend.map_or(Ok(self.images[index].format), |b| backend_info_one(b).map(|b| b.format))?;
        let renames = by_rename && format == self.images[index].format && !self.has_child_elsewhere(index)?;
        // A second name of the same file is what a move leaves that was ended.
        if path.is_dir() || (!renames && fs::symlink_metadata(path).is_ok()) {
            return Err(Error::new(ErrorKind::Exists, "something is there already").at(path));
        }
        self.apart(|this| match renames {
            true => {
                let image = OpenDisk { quiet: true, ..this.how_from(index) };
                move_image(&MoveImage { image, target: path.to_path_buf() }, watch)?;
                this.images[index].path = path.to_path_buf();
                Ok(())
            }
            false => this.move_by_copy(index, format, path, watch),
        })
    }

    /// The image above says where this one is, and lies in another folder: there [`move_image`] does not look.
    fn has_child_elsewhere(&self, index: usize) -> Result<bool> {
        let Some(child) = self.images.get(index + 1) else { return Ok(false) };
        let number = u32::try_from(index + 1).expect("limits::MAX_CHAIN_IMAGES");
        let elsewhere = folder_of(&child.path) != folder_of(&self.images[index].path);
        Ok(elsewhere && !self.info(number)?.parent_names.is_empty())
    }

    fn move_by_copy(
        &mut self,
        index: usize,
        format: Format,
        path: &Path,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let old = self.images[index].clone();
        let files = self.copy_away(index, format, path, watch)?;
        (self.images[index].path, self.images[index].format) = (path.to_path_buf(), format);
        if let Err(e) = self.name_parent_again(index, watch) {
            let not_cancelled = &mut Watch { cancelled: &|| false, progress: &mut |_| () };
            self.images[index] = old;
            // What was told is taken back as far as it can be: both are there.
            if self.name_parent_again(index, not_cancelled).is_ok() {
                remove_files(&files);
            }
            return Err(e);
        }
        delete_image(&old.spec(), self.options.lock_wait)
    }

    /// The image by itself, as it is, at another place, durable; its files there.
    fn copy_away(
        &self,
        index: usize,
        format: Format,
        path: &Path,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<PathBuf>> {
        let old = &self.images[index];
        let info = inspect(&old.path, old.format, self.options.allow_raw_device)?.info;
        let kind = if format == old.format {
            old.kind
        } else {
            old.kind.without(ImageFlags::VMDK_MASK.without(ImageFlags::DIFF.with(ImageFlags::FIXED)))
        };
        let like = CreateBase {
            flags: kind,
            comment: info.comment.clone(),
            uuid: info.uuid.filter(|_| format.keeps(Property::Uuid)),
            ..CreateBase::default()
        };
        let mut new = wish(format, path, info.virtual_size, &like)?;
        new.geometry = format.geometry_from(info.geometry);
        if let Some(below) = index.checked_sub(1) {
            new.parent = Some(self.describe(&self.images[below], path, None)?);
        }
        let files = create_files(&new)?;
        let copied = self.copy_own(index, format, path, watch);
        match copied {
            Ok(()) => Ok(files),
            Err(e) => {
                remove_files(&files);
                Err(e)
            }
        }
    }

    fn copy_own(&self, index: usize, format: Format, path: &Path, watch: &mut Watch<'_>) -> Result<()> {
        let from = self.how_from(index);
        let read = DiskOptions { read_only: true, ..DiskOptions::default() };
        let source = open_disk(&OpenDisk { options: read, ..from.clone() })?;
        let image = crate::vd::ImageSpec { path: path.to_path_buf(), format: Some(format) };
        let write = DiskOptions { write_same: index > 0, ..DiskOptions::default() };
        let into = open_disk(&OpenDisk { image, options: write, ..from })?;
        let selection = Selection { depths: 0..1, zeros: index > 0 };
        run_copy(&source.disk, source.disk.size_bytes(), &into.disk, selection, watch)
    }

    /// The image above one that has moved says where its parent is, if its format has it say so.
    fn name_parent_again(&self, index: usize, watch: &mut Watch<'_>) -> Result<()> {
        let Some(child) = self.images.get(index + 1) else { return Ok(()) };
        let parent = self.describe(&self.images[index], &child.path, None)?;
        let files = ImageFiles::open(&child.path, Some(child.format), true, Some(self.options.lock_wait))?;
        match files.relink(Some(&parent)) {
            Ok(steps) => change(&files, steps, watch),
            // It is known by its UUID alone.
            Err(e) if e.kind() == ErrorKind::Unsupported => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// Copies the first bytes, and leaves the target as a clean close does.
fn run_copy(
    source: &Arc<Disk>,
    bytes: u64,
    into: &Arc<Disk>,
    selection: Selection,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let slots = CopyJob::slots();
    let mut job =
        CopyJob::of_first(open_channel(source, slots)?, open_channel(into, slots)?, selection, bytes)?;
    let done = watch.run(&mut job);
    let closed = job.close_target();
    done.and(closed)
}

/// Looks for bytes other than zeros behind the end of a smaller disk.
fn refuse_loss(source: &Arc<Disk>, size: u64, watch: &Watch<'_>) -> Result<()> {
    let mut survey = Survey::behind(source.clone(), GuestOffset(size));
    let bytes = DiskBytes::new(source)?;
    let mut buf = vec![0; 1 << 20];
    while let Some(piece) = survey.next_piece()? {
        let mut rest = piece.range;
        while survey.must_read(piece.kind) && !rest.is_empty() {
            watch.stop_if_cancelled()?;
            let part = rest.take(buf.len() as u64);
            let read = &mut buf[..usize::try_from(part.len()).expect("1 MiB at most")];
            bytes.read(part.start().0, read)?;
            if let Some(into) = read.iter().position(|b| *b != 0) {
                let at = part.start().0 + into as u64;
                let what = format!("the disk has data at byte {at}, behind the new end at {size}");
                return Err(Error::of(Status::ShrinkNotSupported, what));
            }
            rest = rest.skip(part.len());
        }
    }
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
