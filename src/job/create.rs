//! New images.

use crate::error::{Error, ErrorKind, Result};
use crate::format::{self, Format, NewFile, NewImage, NewParent, RawDisk, Sequential, extension_format};
use crate::io::{HostFile, OpenHow, OsFile, sync_dir};
use crate::limits::{MAX_DISK_BYTES, SECTOR_BYTES};
use crate::map::ImageInfo;
use std::fs;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// An image to be made.
#[derive(Clone, Debug)]
pub struct CreateImage {
    /// Where; nothing may be there yet.
    pub path: PathBuf,
    /// In which format.
    pub format: Format,
    /// Size of the disk in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// One of the format's variants; `None`: the format's default.
    pub variant: Option<String>,
    /// The image's UUID; `None`: a random one.
    pub uuid: Option<Uuid>,
    /// What the new image is a diff of.
    pub parent: Option<NewParent>,
    /// A comment, where the format keeps one.
    pub comment: Option<String>,
    /// Cylinders, heads, sectors, where the format keeps them.
    pub geometry: Option<(u32, u32, u32)>,
    /// `KEY=VALUE` options of the format.
    pub options: Vec<(String, String)>,
    /// The disk of the host it describes.
    pub raw_disk: Option<RawDisk>,
}

impl CreateImage {
    /// An image of the format's default kind.
    pub fn new(path: impl Into<PathBuf>, format: Format, size_bytes: u64) -> Self {
        CreateImage {
            path: path.into(),
            format,
            size_bytes,
            variant: None,
            uuid: None,
            parent: None,
            comment: None,
            geometry: None,
            options: Vec::new(),
            raw_disk: None,
        }
    }
}

/// Makes an image. It is complete and durable when this returns; after an error no file is left.
///
/// # Errors
/// For what the format cannot express, with one line; from the operating system.
pub fn create_image(new: &CreateImage) -> Result<()> {
    create_files(new).map(drop)
}

/// The same; tells which files were made: some images have several.
pub(crate) fn create_files(new: &CreateImage) -> Result<Vec<PathBuf>> {
    let new = checked(new)?;
    let blueprint = match &new.raw_disk {
        None => format::blueprint(new.format, &described(new)),
        Some(disk) => format::raw_disk(new.format, &described(new), disk),
    };
    let blueprint = blueprint.map_err(|e| e.at(&new.path))?;
    refuse_misleading_name(&new.path, new.format)?;
    let mut made = Vec::new();
    let done = blueprint
        .files
        .into_iter()
        .try_for_each(|file| make(new, file, &mut made))
        .and_then(|()| sync_dir(folder_of(&new.path)).map_err(|e| e.at(&new.path)));
    match done {
        Ok(()) => Ok(made),
        Err(e) => {
            remove_files(&made);
            Err(e)
        }
    }
}

/// A half-made image is worth nothing; what cannot be removed is at least no longer locked: the user can.
pub(crate) fn remove_files(files: &[PathBuf]) {
    for path in files {
        let _ = fs::remove_file(path);
    }
}

/// An image that is to be written once, with its contents, and its file, which is empty; `None` for the kinds that
/// [`create_image`] makes.
///
/// # Errors
/// As [`create_image`].
pub(super) fn begin_sequential(new: &CreateImage) -> Result<Option<(Box<dyn Sequential>, OsFile)>> {
    let new = checked(new)?;
    let image = format::sequential(new.format, &described(new)).map_err(|e| e.at(&new.path))?;
    let Some(image) = image else { return Ok(None) };
    refuse_misleading_name(&new.path, new.format)?;
    Ok(Some((image, open_new(&new.path)?)))
}

/// Sizes that no format has are refused.
fn checked(new: &CreateImage) -> Result<&CreateImage> {
    let refused = |what: String| Err(Error::new(ErrorKind::InvalidArgument, what).at(&new.path));
    if new.size_bytes == 0 || !new.size_bytes.is_multiple_of(SECTOR_BYTES) {
        return refused(format!(
            "a disk of {} bytes: the size must be a multiple of {SECTOR_BYTES}",
            new.size_bytes
        ));
    }
    if new.size_bytes > MAX_DISK_BYTES {
        return refused(format!("a disk of {} bytes: at most {MAX_DISK_BYTES} are possible", new.size_bytes));
    }
    Ok(new)
}

/// The wish in the words of formats.
fn described(new: &CreateImage) -> NewImage {
    let name = new.path.file_name().unwrap_or_default();
    NewImage {
        file_name: name.to_string_lossy().into_owned(),
        size_bytes: new.size_bytes,
        variant: new.variant.clone(),
        uuid: new.uuid,
        modification: Uuid::new_v4(),
        parent: new.parent.clone(),
        comment: new.comment.clone(),
        geometry: new.geometry,
        options: new.options.clone(),
    }
}

/// Makes one file, durably; its name is noted in `made` as soon as it is there.
fn make(new: &CreateImage, file: NewFile, made: &mut Vec<PathBuf>) -> Result<()> {
    let path = match &file.name {
        Some(name) => folder_of(&new.path).join(name),
        None => new.path.clone(),
    };
    let host = open_new(&path)?;
    made.push(path.clone());
    fill(&host, file).map_err(|e| e.at(&path))
}

pub(super) fn open_new(path: &Path) -> Result<OsFile> {
    let opened = OsFile::open(path, OpenHow { create_new: true, ..OpenHow::default() });
    opened.map_err(|e| match e.kind() {
        ErrorKind::Exists => e.hint("nothing is overwritten: choose another name"),
        _ => e,
    })
}

fn fill(host: &OsFile, file: NewFile) -> Result<()> {
    let len = file.len;
    host.set_len(len).map_err(|e| Error::io(format!("set its length to {len} bytes"), e))?;
    if let Some((off, len)) = file.preallocate {
        let tried = || format!("reserve its {len} bytes at {off}");
        host.allocate(off.0, len).map_err(|e| Error::io(tried(), e))?;
    }
    for (off, bytes) in file.pieces {
        let tried = || format!("write its header and tables at {off}");
        host.write_at(off.0, &bytes).map_err(|e| Error::io(tried(), e))?;
    }
    host.sync().map_err(|e| Error::io("sync it", e))
}

/// The extension decides how a file is opened later: one that names another format is refused.
fn refuse_misleading_name(path: &Path, format: Format) -> Result<()> {
    let Some(named) = extension_format(path).filter(|named| *named != format) else { return Ok(()) };
    let what = format!("its name says {named}, but it is to be {format}, and would be opened by its name");
    let better = path.with_extension(format.extensions()[0]);
    Err(Error::new(ErrorKind::InvalidArgument, what).at(path).hint(format!("call it {}", better.display())))
}

/// The folder a file's name is in.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a differencing VDI over an image, for writes that shall leave the image alone. It names `uuid` as its parent's;
/// `None`: a random one, where the parent has none.
///
/// # Errors
/// As [`create_image`].
pub fn create_overlay(path: &Path, parent: &ImageInfo, uuid: Option<Uuid>) -> Result<()> {
    let new = CreateImage {
        parent: Some(NewParent { info: ImageInfo { uuid, ..parent.clone() }, path: None }),
        geometry: Format::Vdi.geometry_from(parent.geometry),
        ..CreateImage::new(path, Format::Vdi, parent.virtual_size)
    };
    create_image(&new)
}
