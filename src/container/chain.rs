//! Opening and closing images, and changing how they are open. The disk is made anew whenever the list of images changes.

use super::Container;
use super::backends::{BackendInfo, backend_info_one};
use super::flags::OpenFlags;
use super::image::Image;
use super::live::Live;
use crate::error::{Error, ErrorKind, Result, Status};
use crate::format::{Format, device_type, signature};
use crate::io::{OpenHow, OsFile};
use crate::job::{StreamWriter, delete_image};
use crate::map::ByteSource;
use crate::map::DeviceType;
use crate::vd::{DiskOptions, FileSource, OpenDisk, open_disk};
use std::path::Path;
use std::sync::Mutex;

/// Which back-end takes a file, and the device it is an image of (`VDGetFormat`). Only for people: a guest that owns a raw disk can
/// write any signature into it, so a machine's disk is opened by the format its settings name. The file is read, and nothing more; as in
/// VirtualBox, a damaged image is one all the same, and what nothing else takes is raw.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a cache image; from the operating system.
pub fn get_format(path: &Path) -> Result<(BackendInfo, DeviceType)> {
    let file = OsFile::open(path, OpenHow::default())?;
    let source = FileSource::new(&file)?;
    let format = match signature(&source).map_err(|e| e.at(path))? {
        Some(format) => format,
        None if crate::job::inspect_cache(path).ok().flatten().is_some() => {
            return Err(Error::new(ErrorKind::Unsupported, "is a cache image and no disk").at(path));
        }
        None => Format::Raw,
    };
    Ok((BackendInfo::of(format), device_type(format, path, source.len())))
}

impl Container {
    /// Opens an image over those that are open: the base first (`VDOpen`). `backend` is a name of [`super::backend_info`], in any case.
    /// The image that was the last becomes read-only. Where the new one cannot be opened, the container stays what it was.
    ///
    /// # Errors
    /// Those of the flags (see [`OpenFlags`]) and of the image's place and device; [`ErrorKind::ParentMismatch`] if it names another parent;
    /// of opening and locking.
    pub fn open(&mut self, backend: &str, path: &Path, flags: OpenFlags) -> Result<()> {
        let format = backend_info_one(backend)?.format;
        let place = (self.images.is_empty(), self.options.allow_raw_device);
        let image = Image::look(path, format, flags, self.device, place)?;
        self.append(image)
    }

    /// The image as the last one.
    pub(super) fn append(&mut self, image: Image) -> Result<()> {
        if let Err(e) = self.shut() {
            self.forget();
            return Err(e);
        }
        let before = self.images.last().map(|i| i.flags);
        if let Some(last) = self.images.last_mut() {
            last.flags = last.flags.with(OpenFlags::READONLY);
        }
        self.images.push(image);
        let Err(e) = self.start_or_fall_back() else { return Ok(()) };
        self.images.pop();
        if let (Some(last), Some(flags)) = (self.images.last_mut(), before) {
            last.flags = flags;
        }
        match self.start() {
            Ok(()) => Err(e),
            Err(second) => {
                self.forget();
                Err(e.hint(format!("the others could not be opened again, and are closed: {second}")))
            }
        }
    }

    fn start_or_fall_back(&mut self) -> Result<()> {
        let started = self.start();
        let Err(e) = &started else { return started };
        let could_read =
            matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly | ErrorKind::Locked);
        let last = self.images.last_mut().expect("an image was added");
        if !self.options.read_only_fallback || !could_read || last.has(OpenFlags::READONLY) {
            return started;
        }
        tracing::warn!("{e}: opened read-only");
        last.flags = last.flags.with(OpenFlags::READONLY);
        self.start()
    }

    /// Makes the disk of the images, and lets requests go on. After an error none is open.
    pub(super) fn start(&mut self) -> Result<()> {
        debug_assert!(self.live.is_none(), "the disk was not shut");
        let is_asked_only = self.images.iter().any(|i| i.has(OpenFlags::INFO));
        if self.images.is_empty() || is_asked_only {
            self.dispatcher.close();
            return Ok(());
        }
        let how = OpenDisk { filters: self.filters.of_disk(), ..self.how() };
        let opened = open_disk(&how).and_then(Live::new)?;
        let last = self.images.last().expect("an image");
        if opened.disk.is_read_only() && !last.has(OpenFlags::READONLY) {
            let what = "is an optical medium, and only read";
            return Err(Error::of(Status::ImageReadOnly, what).at(&last.path).hint("open it with READONLY"));
        }
        self.dispatcher.open(opened.disk.clone())?;
        self.live = Some(opened);
        Ok(())
    }

    /// An image that is made from its start to its end, as the only one.
    pub(super) fn begin_stream(&mut self, image: Image, stream: StreamWriter) {
        self.images.push(image);
        self.stream = Some(Mutex::new(stream));
        self.dispatcher.close();
    }

    /// How what the images hold is opened: without filters, which only the disk has that is read and written by the container's users.
    pub(super) fn how(&self) -> OpenDisk {
        let (last, parents) = self.images.split_last().expect("an image");
        let has = |flag| last.has(flag);
        OpenDisk {
            image: last.spec(),
            parents: parents.iter().map(Image::spec).collect(),
            lock_wait: Some(self.options.lock_wait),
            allow_parent_mismatch: self.options.allow_parent_mismatch,
            // Who opens a parent alone for writing wants that; it is so between opening a base and its diff, too.
            allow_write_to_parent: true,
            allow_raw_device: self.options.allow_raw_device,
            shareable: has(OpenFlags::SHAREABLE) && last.kind.contains(super::ImageFlags::FIXED),
            skip_checks: has(OpenFlags::SKIP_CONSISTENCY_CHECKS),
            cache_image: self.cache.clone(),
            options: DiskOptions {
                read_only: has(OpenFlags::READONLY),
                skip_syncs: has(OpenFlags::IGNORE_FLUSH),
                discard: has(OpenFlags::DISCARD),
                write_same: has(OpenFlags::HONOR_SAME),
                store_zeros: has(OpenFlags::HONOR_ZEROES),
                ..DiskOptions::default()
            },
            ..OpenDisk::new(&last.path)
        }
    }

    /// Ends all requests, and leaves the images as a clean close does.
    pub(super) fn shut(&mut self) -> Result<()> {
        self.dispatcher.pause();
        if let Some(stream) = self.stream.take() {
            return stream.into_inner().expect("stream lock").finish();
        }
        let Some(live) = self.live.take() else { return Ok(()) };
        let is_synced = !self.images.last().is_some_and(|i| i.has(OpenFlags::IGNORE_FLUSH));
        live.close(is_synced)
    }

    /// Does something to the files of the images while none of them is open, and opens them again, whatever came of it. If that is not
    /// possible all are closed.
    pub(super) fn apart<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Err(e) = self.shut() {
            self.forget();
            return Err(e);
        }
        let done = work(self);
        match self.start() {
            Ok(()) => done,
            Err(e) => {
                self.forget();
                done.and(Err(e))
            }
        }
    }

    /// Closes the image that was opened last; with `delete` its files are removed (`VDClose`). If it was open for writing, so is the one
    /// beneath it from here on.
    ///
    /// # Errors
    /// [`Status::NotOpened`] without an image; of closing, removing, and opening the one beneath: it is closed in any case, and where the
    /// one beneath cannot be opened for writing, that one is open for reading only; where not even that, all are closed.
    pub fn close(&mut self, delete: bool) -> Result<()> {
        let Some(last) = self.images.last().cloned() else {
            return Err(Error::of(Status::NotOpened, "no image is open in the container"));
        };
        let is_stream = self.stream.is_some();
        if delete {
            // Unfinished it goes by itself.
            self.stream = None;
        }
        let shut = self.shut();
        self.images.pop();
        let delete = delete && !is_stream;
        let removed = if delete { delete_image(&last.spec(), self.options.lock_wait) } else { Ok(()) };
        if let Some(below) = self.images.last_mut()
            && !last.has(OpenFlags::READONLY)
        {
            below.flags = below.flags.without(OpenFlags::READONLY | OpenFlags::SKIP_CONSISTENCY_CHECKS);
        }
        if self.images.is_empty() {
            self.cache = None;
        }
        let started = self.start().or_else(|e| self.read_only_at_least(e));
        shut.and(removed).and(started)
    }

    /// The last image could not be opened as it was to be: for reading, or all are closed. Requests that wait must not wait for ever.
    fn read_only_at_least(&mut self, e: Error) -> Result<()> {
        if let Some(last) = self.images.last_mut().filter(|i| !i.has(OpenFlags::READONLY)) {
            last.flags = last.flags.with(OpenFlags::READONLY);
            if self.start().is_ok() {
                return Err(e.hint("what is left is open for reading only"));
            }
        }
        self.forget();
        Err(e.hint("all images of the container are closed"))
    }

    /// Closes all images, the last one first, and the cache image (`VDCloseAll`).
    ///
    /// # Errors
    /// Of closing; they are closed in any case.
    pub fn close_all(&mut self) -> Result<()> {
        let shut = self.shut();
        self.forget();
        shut
    }

    /// No image is open any more.
    pub(super) fn forget(&mut self) {
        self.images.clear();
        self.cache = None;
        self.dispatcher.close();
    }

    /// Changes how an image is open (`VDSetOpenFlags`). All images are opened again for that; where that fails, all are closed.
    ///
    /// # Errors
    /// Those of the flags, before anything is closed, and of the image's place and device if it was open to be asked about only;
    /// [`Status::ImageNotFound`], [`Status::InvalidState`] for an image that is not the last
    /// and shall be written; then of opening.
    pub fn set_open_flags(&mut self, image: u32, flags: OpenFlags) -> Result<()> {
        let index = self.index(image)?;
        let new =
            self.images[index].reopened(flags, self.device, (index == 0, self.options.allow_raw_device))?;
        if index + 1 < self.images.len() && !flags.contains(OpenFlags::READONLY) {
            let what = "only the last image of a container is written";
            return Err(Error::of(Status::InvalidState, what).at(&self.images[index].path));
        }
        self.apart(|this| {
            this.images[index] = new;
            Ok(())
        })
    }
}
