//! New images.

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Format, extension_format, vdi};
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
    pub parent: Option<ImageInfo>,
    /// A comment, where the format keeps one.
    pub comment: Option<String>,
    /// Cylinders, heads, sectors, where the format keeps them.
    pub geometry: Option<(u32, u32, u32)>,
    /// `KEY=VALUE` options of the format.
    pub options: Vec<(String, String)>,
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
        }
    }
}

/// Makes an image. It is complete and durable when this returns; after an error no file is left.
///
/// # Errors
/// For what the format cannot express, with one line; from the operating system.
pub fn create_image(new: &CreateImage) -> Result<()> {
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
    let writes = match new.format {
        Format::Raw => raw_writes(new),
        Format::Vdi => vdi_writes(new),
        other => Err(Error::new(ErrorKind::Unsupported, format!("{other} images cannot be created yet"))),
    };
    let make = writes.map_err(|e| e.at(&new.path))?;
    refuse_misleading_name(&new.path, new.format)?;
    let opened = OsFile::open(&new.path, OpenHow { create_new: true, ..OpenHow::default() });
    let file = opened.map_err(|e| match e.kind() {
        ErrorKind::Exists => e.hint("nothing is overwritten: choose another name"),
        _ => e,
    })?;
    let made = make(&file).and_then(|()| {
        file.sync().map_err(|e| Error::io("sync it", e))?;
        sync_dir(folder_of(&new.path))
    });
    made.map_err(|e| {
        // A half-made image is worth nothing; what is left of it cannot be helped.
        let _ = fs::remove_file(&new.path);
        e.at(&new.path)
    })
}

/// The extension decides how a file is opened later: one that names another format is refused.
fn refuse_misleading_name(path: &Path, format: Format) -> Result<()> {
    let Some(named) = extension_format(path).filter(|named| *named != format) else { return Ok(()) };
    let what = format!("its name says {named}, but it is to be {format}, and would be opened by its name");
    let better = path.with_extension(format.extensions()[0]);
    Err(Error::new(ErrorKind::InvalidArgument, what).at(path).hint(format!("call it {}", better.display())))
}

/// The folder a file's name is in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

type Make = Box<dyn Fn(&dyn HostFile) -> Result<()>>;

fn only_for(new: &CreateImage, what: &str, given: bool) -> Result<()> {
    if given {
        let text = format!("{} images have no {what}", new.format);
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    Ok(())
}

fn raw_writes(new: &CreateImage) -> Result<Make> {
    only_for(new, "parent", new.parent.is_some())?;
    only_for(new, "UUID", new.uuid.is_some())?;
    only_for(new, "comment", new.comment.is_some())?;
    unknown_options(new, &[])?;
    let fixed = match new.variant.as_deref().map(str::to_ascii_lowercase).as_deref() {
        None | Some("dynamic") => false,
        Some("fixed") => true,
        Some(v) => return Err(unknown_variant(v, "dynamic (a sparse file) or fixed")),
    };
    let size = new.size_bytes;
    Ok(Box::new(move |file| {
        file.set_len(size).map_err(|e| Error::io(format!("set its length to {size} bytes"), e))?;
        if fixed {
            file.allocate(0, size).map_err(|e| Error::io(format!("reserve its {size} bytes"), e))?;
        }
        Ok(())
    }))
}

fn unknown_variant(v: &str, known: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("unknown variant '{v}'")).hint(known)
}

fn unknown_options(new: &CreateImage, known: &[&str]) -> Result<()> {
    match new.options.iter().find(|(k, _)| !known.iter().any(|n| n.eq_ignore_ascii_case(k))) {
        None => Ok(()),
        Some((k, _)) => {
            let e = Error::new(ErrorKind::InvalidArgument, format!("unknown option '{k}' of {}", new.format));
            Err(if known.is_empty() {
                e.hint("it has none")
            } else {
                e.hint(format!("known: {}", known.join(", ")))
            })
        }
    }
}

fn vdi_writes(new: &CreateImage) -> Result<Make> {
    unknown_options(new, &["AllocationBlockSize"])?;
    let mut c = vdi::VdiCreate::new(new.size_bytes, new.uuid.unwrap_or_else(Uuid::new_v4), Uuid::new_v4());
    if let Some(v) = &new.variant {
        c.variant = v.parse()?;
    }
    if let Some((_, size)) = new.options.iter().find(|(k, _)| k.eq_ignore_ascii_case("AllocationBlockSize")) {
        c.block_bytes = super::parse_size(size)?;
    }
    c.comment = new.comment.clone().unwrap_or_default();
    c.geometry = new.geometry;
    c.parent = new.parent.as_ref().map(|p| vdi::Parent {
        // A raw file has no UUID to name; a diff must name one all the same.
        uuid: p.uuid.unwrap_or_else(Uuid::new_v4),
        modification: p.modification_uuid.unwrap_or_default(),
    });
    let blueprint = c.blueprint()?;
    Ok(Box::new(move |file| {
        let len = blueprint.file_len();
        file.set_len(len).map_err(|e| Error::io(format!("set its length to {len} bytes"), e))?;
        if let Some((off, len)) = blueprint.preallocate() {
            let tried = || format!("reserve its {len} bytes at {off}");
            file.allocate(off.0, len).map_err(|e| Error::io(tried(), e))?;
        }
        for (off, bytes) in blueprint.writes() {
            let tried = || format!("write its header and table at {off}");
            file.write_at(off.0, &bytes).map_err(|e| Error::io(tried(), e))?;
        }
        Ok(())
    }))
}

/// Makes a differencing VDI over an image, for writes that shall leave the image alone. It names `uuid` as its parent's;
/// `None`: a random one, where the parent has none.
///
/// # Errors
/// As [`create_image`].
pub fn create_overlay(path: &Path, parent: &ImageInfo, uuid: Option<Uuid>) -> Result<()> {
    let new = CreateImage {
        parent: Some(ImageInfo { uuid, ..parent.clone() }),
        geometry: parent.geometry,
        ..CreateImage::new(path, Format::Vdi, parent.virtual_size)
    };
    create_image(&new)
}
