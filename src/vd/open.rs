//! Opening a disk: its image, its parents, their locks.

use super::cache::{Cache, Scope};
use super::chain::{Chain, Layer};
use super::disk::NewTop;
use super::identity::base_of;
use super::image_files::{Further, ImageFiles};
use super::marker::SyncFailureMarker;
use super::parents::{ParentSearch, Sought, above_snapshots, any_other_child, default_dirs};
use super::references::parent_path;
use super::stand_in::stand_in;
use super::unfinished::refuse_if_unfinished;
use super::{Disk, DiskOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::Filters;
use crate::format::{self, Format};
use crate::io::{HostFile, ImageLock, OpenHow, OsFile, OsHost};
use crate::limits::{MAX_CHAIN_IMAGES, MAX_FILES, SECTOR_BYTES};
use crate::map::{FileId, ImageInfo, ImageMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// A file and, if it was said, its format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// Where it is.
    pub path: PathBuf,
    /// `None`: extension and signature must agree.
    pub format: Option<Format>,
}

impl ImageSpec {
    /// Parses `FILE[,format=F]`.
    ///
    /// # Errors
    /// If the format is not known.
    pub fn parse(text: &str) -> Result<ImageSpec> {
        match text.rsplit_once(",format=") {
            Some((path, format)) => Ok(ImageSpec { path: path.into(), format: Some(format.parse()?) }),
            None => Ok(ImageSpec { path: text.into(), format: None }),
        }
    }
}

/// How a disk is to be opened.
#[derive(Clone, Debug)]
pub struct OpenDisk {
    /// The image that is written (or read).
    pub image: ImageSpec,
    /// The internal snapshot of it that is shown, by name or number; only for reading. `None`: what it is now.
    pub snapshot: Option<String>,
    /// Its parents, base first. Empty: they are searched by UUID.
    pub parents: Vec<ImageSpec>,
    /// Where parents are searched first, and below; then, if none was named, in the image's own folder and below. Of a
    /// folder called `Snapshots` the one above is searched too.
    pub parent_dirs: Vec<PathBuf>,
    /// Nothing is said of links between images that are not as they should be: they are about to change.
    pub quiet: bool,
    /// Past the page cache.
    pub direct: bool,
    /// `None`: no locks (looking only). Else how long to wait for one.
    pub lock_wait: Option<Duration>,
    /// A parent that is not the one the child names is taken all the same.
    pub allow_parent_mismatch: bool,
    /// An image may be written although a diff in its folder has it as its parent.
    pub allow_write_to_parent: bool,
    /// Images may describe disks of this host.
    pub allow_raw_device: bool,
    /// A raw file whose name says that it is a CD or DVD may be written: for whoever has just made it.
    pub write_optical: bool,
    /// Others may write the image at the same time. Only fixed images, whose metadata nobody changes.
    pub shareable: bool,
    /// What only matters for writing is not verified: a damaged image may be read. Only for reading.
    pub skip_checks: bool,
    /// A cache image for those images of the chain that nobody writes: made by [`crate::job::create_cache`], used by one disk at a
    /// time. Its session has to be ended, by [`super::Channel::close_disk`] or [`Disk::end_cache`], or the next begins empty.
    pub cache_image: Option<PathBuf>,
    /// Between what the disk shows and what its images hold.
    pub filters: Filters,
    /// What channels may do.
    pub options: DiskOptions,
}

impl OpenDisk {
    /// The image at `path`, read-only, unlocked, everything else as people expect.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        OpenDisk {
            image: ImageSpec { path: path.into(), format: None },
            snapshot: None,
            parents: Vec::new(),
            parent_dirs: Vec::new(),
            quiet: false,
            direct: false,
            lock_wait: None,
            allow_parent_mismatch: false,
            allow_write_to_parent: false,
            allow_raw_device: false,
            write_optical: false,
            shareable: false,
            skip_checks: false,
            cache_image: None,
            filters: Filters::default(),
            options: DiskOptions { read_only: true, ..DiskOptions::default() },
        }
    }
}

/// An image of an open disk.
#[derive(Debug)]
pub struct OpenImage {
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// What it says of itself.
    pub info: ImageInfo,
    map: Arc<dyn ImageMap>,
    /// Its own first.
    files: Vec<Arc<dyn HostFile>>,
    /// Held by the disk once it is open.
    locks: Vec<ImageLock>,
}

impl OpenImage {
    /// Bytes of the image's own disk, whatever those above it have.
    pub fn size_bytes(&self) -> u64 {
        self.map.limits().size_bytes
    }

    /// Its files, its own first.
    pub(super) fn files(&self) -> &[Arc<dyn HostFile>] {
        &self.files
    }

    /// Makes durable what is read of it.
    ///
    /// # Errors
    /// From the operating system.
    pub(crate) fn sync(&self) -> Result<()> {
        let sync = |f: &Arc<dyn HostFile>| {
            f.sync().map_err(|e| {
                SyncFailureMarker::of(self.file().traits().identity, &self.path).set();
                Error::io("make it durable", e).at(f.path())
            })
        };
        self.files.iter().try_for_each(sync)
    }

    /// Device and inode of each file.
    pub(crate) fn identities(&self) -> Vec<(u64, u64)> {
        self.files.iter().map(|f| f.traits().identity).collect()
    }

    /// The file that was named.
    fn file(&self) -> &Arc<dyn HostFile> {
        &self.files[0]
    }

    /// The UUID that a diff over this image names: its own, or for a raw file one made from its name, number, size and time
    /// of change.
    pub fn uuid(&self) -> Option<Uuid> {
        self.info.uuid.or_else(|| stand_in(&self.path))
    }
}

/// An open disk with what is known of its images.
#[derive(Debug)]
pub struct OpenedDisk {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Its images, top first.
    pub images: Vec<OpenImage>,
}

/// Opens a disk.
///
/// # Errors
/// With the file and one line saying what to do. Nothing has been written.
pub fn open_disk(how: &OpenDisk) -> Result<OpenedDisk> {
    let read_only = how.options.read_only || (is_optical(&how.image) && !how.write_optical);
    let (write, options) = (!read_only, DiskOptions { read_only, ..how.options });
    if read_only && !how.options.read_only {
        tracing::info!("{}: is an optical medium, and only read", how.image.path.display());
    }
    if write && how.snapshot.is_some() {
        let what = "an internal snapshot is only read";
        return Err(Error::new(ErrorKind::ReadOnly, what).at(&how.image.path).hint("pass --read-only"));
    }
    let mut images = vec![open_image(&how.image, how, write, &[])?];
    if write && how.shareable && images[0].info.variant != "fixed" {
        let what = "is not fixed: two that write it would spoil each other's tables";
        return Err(Error::new(ErrorKind::Unsupported, what).at(&how.image.path));
    }
    if how.parents.is_empty() {
        let mut places = named_places(how);
        places.push(ParentSearch::new(default_dirs(&how.image.path)));
        search_parents(how, &mut images, &mut places)?;
    } else {
        open_named_parents(how, &mut images)?;
    }
    if write && !how.allow_write_to_parent {
        refuse_parent_of_another(&images[0].path, images[0].info.uuid)?;
    }
    let marker = SyncFailureMarker::of(images[0].file().traits().identity, &images[0].path);
    if write {
        marker.refuse_if_set().map_err(|e| e.at(&how.image.path))?;
        refuse_unaligned_metadata(&images[0])?;
    }
    let cache = open_cache(how, &images, read_only)?;
    if !how.quiet {
        images.windows(2).for_each(|w| warn_of_odd_link(&w[0], &w[1]));
    }
    for image in &images {
        image.info.notes.iter().for_each(|note| tracing::warn!("{}: {note}", image.path.display()));
    }
    let layers = images.iter().zip(0u32..).map(|(i, number)| Layer { number, map: i.map.clone() }).collect();
    let files = images.iter().flat_map(|i| i.files.iter().cloned()).collect::<Vec<_>>();
    let on_failure = Box::new(move || marker.set());
    let disk = Disk::with_cache(Chain::new(layers), (files, cache), options, Arc::new(OsHost), on_failure);
    for (image, number) in images.iter_mut().zip(0..) {
        disk.hold(number, std::mem::take(&mut image.locks));
    }
    disk.change_filters(|filters| filters.clone_from(&how.filters));
    Ok(OpenedDisk { disk, images })
}

/// The cache image, if one was named: its session begins.
fn open_cache(how: &OpenDisk, images: &[OpenImage], read_only: bool) -> Result<Option<Cache>> {
    let Some(path) = &how.cache_image else { return Ok(None) };
    let files = images.iter().map(|i| i.files.len());
    let Some(scope) = Scope::of(files.clone(), read_only) else {
        let what = "a cache image needs images that nobody writes, and this one has no parent";
        return Err(Error::new(ErrorKind::InvalidArgument, what)
            .at(&images[0].path)
            .hint("put an overlay above it (--overlay FILE), or pass --read-only"));
    };
    let base = base_of(&images[scope.layer..], how.snapshot.as_deref(), images[0].size_bytes())?;
    let file: Arc<dyn HostFile> =
        Arc::new(OsFile::open(path, OpenHow { write: true, ..OpenHow::default() })?);
    let lock = ImageLock::exclusive(&*file, how.lock_wait.unwrap_or_default())?;
    let id = FileId(u16::try_from(files.sum::<usize>()).expect("limits::MAX_FILES"));
    Cache::begin((file, id, Some(lock)), base, scope)
}

/// A CD or DVD, by its name: nothing is ever written to one, as in VirtualBox.
fn is_optical(image: &ImageSpec) -> bool {
    match image.format.or_else(|| format::extension_format(&image.path)) {
        None | Some(Format::Raw) => format::is_optical_name(&image.path),
        named => named == Some(Format::Cue),
    }
}

/// Opens the image that lies beneath those `above` it.
fn open_image(spec: &ImageSpec, how: &OpenDisk, write: bool, above: &[OpenImage]) -> Result<OpenImage> {
    if how.lock_wait.is_some() {
        refuse_if_unfinished(&spec.path)?;
    }
    let open_how = OpenHow { write, direct: how.direct, ..OpenHow::default() };
    let file = OsFile::open(&spec.path, open_how).map_err(|e| advise(e, write))?;
    let file: Arc<dyn HostFile> = Arc::new(file);
    // Before the lock, which we would wait for ourselves to give up.
    if above.iter().any(|i| i.files.iter().any(|f| f.traits().identity == file.traits().identity)) {
        let what = "appears twice in its own chain";
        return Err(Error::new(ErrorKind::ParentMismatch, what)
            .at(&spec.path)
            .hint("name its parents with --parent, base first"));
    }
    // The lock comes before the first byte is read: whoever writes it may be changing what we would read.
    let further = Further {
        how: open_how,
        lock_wait: how.lock_wait,
        allow_raw_device: how.allow_raw_device,
        shareable: how.shareable,
    };
    let lock = further.lock(&*file)?;
    refuse_if_replaced(spec, &*file)?;
    let image = ImageFiles::around(&spec.path, file, spec.format, further)?;
    let first = first_file_id(above, &image).map_err(|e| e.at(&spec.path))?;
    let map = match &how.snapshot {
        Some(name) if above.is_empty() => image.snapshot(first, name)?,
        None if !write && how.skip_checks => image.unchecked(first)?,
        _ => image.map(first, format::OpenHow { read_only: !write, info_only: false })?,
    };
    Ok(opened(spec, image, lock, map))
}

fn opened(
    spec: &ImageSpec,
    mut image: ImageFiles,
    lock: Option<ImageLock>,
    map: Box<dyn ImageMap>,
) -> OpenImage {
    let locks = lock.into_iter().chain(image.take_locks()).collect();
    let (format, files) = (image.format(), image.files().to_vec());
    let mut info = map.info();
    info.device = format::device_type(format, &spec.path, info.virtual_size);
    OpenImage { path: spec.path.clone(), format, info, map: map.into(), files, locks }
}

/// Opens and locks an image that has just been made as a diff of the top image of `disk`, and puts it on top; what is written goes into it
/// from then on. `direct`: past the page cache.
///
/// # Errors
/// As [`open_disk`]. Nothing has been written, and `disk` is as it was.
pub(crate) fn open_on_top(
    disk: &Arc<Disk>,
    spec: &ImageSpec,
    direct: bool,
) -> Result<(Arc<Disk>, OpenImage)> {
    let how = OpenHow { write: true, direct, ..OpenHow::default() };
    let file: Arc<dyn HostFile> = Arc::new(OsFile::open(&spec.path, how)?);
    let further = Further { how, lock_wait: Some(Duration::ZERO), allow_raw_device: false, shareable: false };
    let lock = further.lock(&*file)?;
    let image = ImageFiles::around(&spec.path, file, spec.format, further)?;
    let first = disk.free_files(image.files().len()).ok_or_else(|| {
        let what = format!("more than {MAX_FILES} files in a chain");
        Error::new(ErrorKind::Limit, what).at(&spec.path)
    })?;
    let map = image.map(first, format::OpenHow { read_only: false, info_only: false })?;
    let mut image = opened(spec, image, lock, map);
    refuse_unaligned_metadata(&image)?;
    let marker = SyncFailureMarker::of(image.file().traits().identity, &image.path);
    let top = NewTop {
        map: image.map.clone(),
        files: image.files.clone(),
        locks: std::mem::take(&mut image.locks),
        on_sync_failure: Box::new(move || marker.set()),
    };
    Ok((disk.under(top), image))
}

/// The number of an image's first file: they are counted through the chain.
fn first_file_id(above: &[OpenImage], image: &ImageFiles) -> Result<FileId> {
    let before: usize = above.iter().map(|i| i.files.len()).sum();
    if before + image.files().len() > MAX_FILES {
        let what = format!("more than {MAX_FILES} files in a chain");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    Ok(FileId(u16::try_from(before).expect("limits::MAX_FILES")))
}

/// Whoever held the lock before us may have put another file in its place, or none: what we then wrote would be lost.
fn refuse_if_replaced(spec: &ImageSpec, file: &dyn HostFile) -> Result<()> {
    let traits = file.traits();
    let now = fs::metadata(&spec.path).map_err(|e| Error::io("look at it again", e).at(&spec.path))?;
    if traits.is_device || traits.identity == (now.dev(), now.ino()) {
        return Ok(());
    }
    let what = "was replaced by another file while it was being opened";
    Err(Error::new(ErrorKind::Locked, what).at(&spec.path).hint("try again"))
}

/// What to do about a file that the operating system does not open.
fn advise(e: Error, write: bool) -> Error {
    match (e.kind(), write) {
        (ErrorKind::NotFound, _) => e.hint("check the name"),
        (ErrorKind::PermissionDenied, true) => {
            e.hint("give this user permission to write, or pass --read-only")
        }
        (ErrorKind::PermissionDenied, false) => e.hint("give this user permission to read"),
        (ErrorKind::ReadOnly, _) => e.hint("its file system is read-only: pass --read-only or --overlay"),
        _ => e,
    }
}

fn open_named_parents(how: &OpenDisk, images: &mut Vec<OpenImage>) -> Result<()> {
    for spec in how.parents.iter().rev() {
        let parent = open_parent(how, spec, images)?;
        images.push(parent);
    }
    if !how.parent_dirs.is_empty() {
        // Those beneath the ones that were named.
        return search_parents(how, images, &mut named_places(how));
    }
    let base = images.last().expect("the image itself");
    if needs_parent(&base.info) && !how.allow_parent_mismatch {
        return Err(missing_parent(base));
    }
    Ok(())
}

/// The folders that were named.
fn named_places(how: &OpenDisk) -> Vec<ParentSearch> {
    let above = how.parent_dirs.iter().filter_map(|d| above_snapshots(d)).collect();
    vec![ParentSearch::new(how.parent_dirs.clone()), ParentSearch::new(above)]
}

/// Looks in these places, one after the other, for each parent that is missing.
fn search_parents(how: &OpenDisk, images: &mut Vec<OpenImage>, places: &mut [ParentSearch]) -> Result<()> {
    loop {
        let child = images.last().expect("the image itself");
        if !needs_parent(&child.info) {
            return Ok(());
        }
        let Some(spec) = find_parent(how, child, places)? else {
            let waived = how.allow_parent_mismatch && !how.parents.is_empty();
            return if waived { Ok(()) } else { Err(missing_parent(child)) };
        };
        let parent = open_parent(how, &spec, images)?;
        images.push(parent);
    }
}

/// The parent by its UUID, and where the image knows none, by the name it gives it.
fn find_parent(how: &OpenDisk, child: &OpenImage, places: &mut [ParentSearch]) -> Result<Option<ImageSpec>> {
    if let Some(wanted) = child.info.parent_uuid {
        for place in places {
            if let Some(path) = place.find(wanted, &child.path)? {
                return Ok(Some(ImageSpec { path, format: None }));
            }
        }
    }
    let folders: Vec<_> = how.parent_dirs.iter().cloned().chain(default_dirs(&how.image.path)).collect();
    let Some(path) = parent_path(&child.path, &child.info.parent_names, &folders)? else { return Ok(None) };
    let stated = child.info.parent_format.as_deref();
    // A raw parent's name need not say that it is one; what has a signature has to bear it.
    let format = stated.and_then(|f| f.parse().ok()).filter(|f| *f == Format::Raw);
    Ok(Some(ImageSpec { path, format }))
}

/// The image says that it has a parent.
pub(super) fn needs_parent(info: &ImageInfo) -> bool {
    info.variant == "diff" || info.parent_uuid.is_some() || !info.parent_names.is_empty()
}

fn missing_parent(child: &OpenImage) -> Error {
    let what = match (child.info.parent_uuid, child.info.parent_names.first()) {
        (Some(u), None) => format!("its parent {u} was not found"),
        (Some(u), Some(name)) => format!("its parent {u} '{}' was not found", name.escape_debug()),
        (None, Some(name)) => format!("its parent '{}' was not found", name.escape_debug()),
        (None, None) => "is a differencing image, and its parent was not named".to_string(),
    };
    Error::new(ErrorKind::NotFound, what)
        .at(&child.path)
        .hint("name it with --parent FILE, or the folder with --parent-dir DIR")
}

fn open_parent(how: &OpenDisk, spec: &ImageSpec, images: &[OpenImage]) -> Result<OpenImage> {
    if images.len() >= MAX_CHAIN_IMAGES {
        let what = format!("more than {MAX_CHAIN_IMAGES} images in a chain");
        return Err(Error::new(ErrorKind::Limit, what).at(&how.image.path));
    }
    let child = images.last().expect("the image itself");
    if !needs_parent(&child.info) && !child.map.limits().is_diff && !how.allow_parent_mismatch {
        let what = format!("is a base image, but {} was named as its parent", spec.path.display());
        return Err(Error::new(ErrorKind::ParentMismatch, what).at(&child.path).hint("leave --parent out"));
    }
    let parent = open_image(spec, how, false, images)?;
    check_link(child, &parent, how.allow_parent_mismatch)?;
    Ok(parent)
}

/// The child names the parent by UUID.
fn check_link(child: &OpenImage, parent: &OpenImage, allow_mismatch: bool) -> Result<()> {
    match wrong_parent(child, parent) {
        Some(what) if !allow_mismatch => Err(Error::new(ErrorKind::ParentMismatch, what)
            .at(&child.path)
            .hint("name the right parents, base first, or pass --allow-parent-mismatch")),
        _ => Ok(()),
    }
}

fn wrong_parent(child: &OpenImage, parent: &OpenImage) -> Option<String> {
    let other = |what: &str, wanted: String, got: String| {
        (wanted != got)
            .then(|| format!("its parent has {what} {wanted}, but {} has {got}", parent.path.display()))
    };
    if let (Some(wanted), Some(got)) = (child.info.parent_uuid, parent.info.uuid) {
        return other("UUID", wanted.to_string(), got.to_string());
    }
    let (wanted, got) = (child.info.parent_content_id?, parent.info.content_id?);
    other("content ID", format!("{wanted:08x}"), format!("{got:08x}"))
}

/// Said once the disk is open, so that what is refused is told in one line. The parent's modification UUID is only
/// warned about: VirtualBox itself leaves it stale after a merge, and does not check it.
fn warn_of_odd_link(child: &OpenImage, parent: &OpenImage) {
    if let Some(what) = wrong_parent(child, parent) {
        tracing::warn!("{}: {what}", child.path.display());
    }
    let (then, now) = (child.info.parent_modification_uuid, parent.info.modification_uuid);
    if let (Some(then), Some(now)) = (then, now)
        && then != now
    {
        tracing::warn!(
            "{}: {} was changed since this image was made on top of it",
            child.path.display(),
            parent.path.display()
        );
    }
}

/// A parent that is written to changes what its children show, whether they name it by UUID or by its file. `own`: the UUID it has.
pub(super) fn refuse_parent_of_another(path: &Path, own: Option<Uuid>) -> Result<()> {
    let sought = [Sought { path, own, named: own.or_else(|| stand_in(path)) }];
    let Some((_, child)) = any_other_child(&sought, &[path]) else { return Ok(()) };
    let what = format!("is the parent of {}: writing to it would corrupt that image", child.display());
    Err(Error::new(ErrorKind::ReadOnly, what)
        .at(path)
        .hint("serve the child, use --overlay or --read-only, or pass --allow-write-to-parent"))
}

/// Unbuffered I/O writes whole device sectors. Guests write sectors of 512 bytes, and metadata may share a sector with
/// data: where the device's are larger, two writers of one would overwrite each other.
fn refuse_unaligned_metadata(image: &OpenImage) -> Result<()> {
    let unit = u64::from(image.file().traits().alignment.offset);
    if unit > SECTOR_BYTES {
        let what = format!(
            "its storage takes only writes of {unit} bytes past the page cache, guests write {SECTOR_BYTES}"
        );
        return Err(Error::new(ErrorKind::Unsupported, what).at(&image.path).hint("use --cache writeback"));
    }
    let granularity = image.map.limits().data_alignment;
    if granularity.is_multiple_of(unit) {
        return Ok(());
    }
    let what =
        format!("its data is aligned to {granularity} bytes, and this disk needs {unit} without the cache");
    Err(Error::new(ErrorKind::Unsupported, what).at(&image.path).hint("use --cache writeback"))
}
