//! Formats of disk images: pure translators between guest ranges and places in files.
//!
//! A format sees the words of [`crate::map`] and nothing of files, engines or guests. It is opened from a
//! [`ByteSource`], answers from memory, and says as plans what shall be written.

mod blocks;
mod blueprint;
mod bytes;
mod crc32c;
pub mod cue;
mod detect;
pub mod dmg;
mod levels;
pub mod parallels;
pub mod partitions;
mod properties;
mod qcow;
pub mod qcow2;
mod qed;
pub mod raw;
mod registered;
mod relink;
mod report;
mod sector_bits;
mod spare;
mod steps;
pub mod vci;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

pub use blueprint::{
    Blueprint, NewFile, NewImage, NewOption, NewParent, Pieces, RawArea, RawAreaKind, RawDisk, Sequential,
};
pub use detect::{RAW_EXTENSIONS, detect, device_type, extension_format, is_optical_name, signature};
pub use properties::{Chs, Properties, Property, set_properties};
pub use registered::Registered;
pub(crate) use registered::{NewFormat, register, unregister};
pub use report::{CheckReport, Finding, Repair, Severity};
pub use spare::Spare;
pub use steps::FileStep;

use crate::error::{Error, ErrorKind, Result};
use crate::map::{ByteSource, FileId, ImageMap};
use std::fmt;
use std::str::FromStr;

/// The formats known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// No format: the file is the disk.
    Raw,
    /// VirtualBox's own.
    Vdi,
    /// VMware's.
    Vmdk,
    /// Microsoft's Virtual PC and Hyper-V, first generation.
    Vhd,
    /// Hyper-V's second generation.
    Vhdx,
    /// QEMU's first copy-on-write format (version 1).
    Qcow,
    /// QEMU's present one (versions 2 and 3).
    Qcow2,
    /// QEMU's enhanced disk, no longer developed.
    Qed,
    /// Parallels' hard disk.
    Parallels,
    /// Apple's disk image (UDIF).
    Dmg,
    /// A CD: a cue sheet and the files it names.
    Cue,
    /// One that a plug-in has brought (docs/plugins.md).
    Registered(Registered),
}

impl Format {
    /// Every format of our own, in the order users read them in messages.
    pub const ALL: [Format; 11] = [
        Format::Raw,
        Format::Vdi,
        Format::Vmdk,
        Format::Vhd,
        Format::Vhdx,
        Format::Qcow,
        Format::Qcow2,
        Format::Qed,
        Format::Parallels,
        Format::Dmg,
        Format::Cue,
    ];

    /// Every format there is now: our own, and behind them those of plug-ins, the oldest first.
    pub fn all() -> Vec<Format> {
        Self::ALL.into_iter().chain(registered::all().into_iter().map(Format::Registered)).collect()
    }

    /// The name for options and output, lower case.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Vdi => "vdi",
            Format::Vmdk => "vmdk",
            Format::Vhd => "vhd",
            Format::Vhdx => "vhdx",
            Format::Qcow => "qcow",
            Format::Qcow2 => "qcow2",
            Format::Qed => "qed",
            Format::Parallels => "parallels",
            Format::Dmg => "dmg",
            Format::Cue => "cue",
            Format::Registered(r) => r.name(),
        }
    }

    /// The extensions that go with the format, lower case, without the dot. `raw` alone stands for raw files:
    /// `img`, `iso` and the like say nothing about what is inside.
    pub fn extensions(self) -> &'static [&'static str] {
        match self {
            Format::Raw => &["raw"],
            Format::Vdi => &["vdi"],
            Format::Vmdk => &["vmdk"],
            Format::Vhd => &["vhd", "vpc"],
            Format::Vhdx => &["vhdx"],
            Format::Qcow => &["qcow"],
            Format::Qcow2 => &["qcow2"],
            Format::Qed => &["qed"],
            Format::Parallels => &["hdd", "hds", "parallels"],
            Format::Dmg => &["dmg"],
            Format::Cue => &["cue"],
            Format::Registered(r) => r.extensions(),
        }
    }

    /// True if [`blueprint`] makes images of it.
    pub fn can_be_created(self) -> bool {
        self.driver().blueprint.is_some()
    }

    /// Its images have a place for a comment.
    pub fn keeps_comment(self) -> bool {
        self.keeps(Property::Comment)
    }

    /// What a new image of it takes over of another one's geometry: nothing where it has no place for one, or not for such a
    /// one. Of VHDs larger than 31 GiB tracks have 255 sectors, which nobody else allows.
    pub fn geometry_from(self, other: Option<(u32, u32, u32)>) -> Option<(u32, u32, u32)> {
        let (most_cylinders, most_sectors) = if self == Format::Vhd { (65535, 255) } else { (u32::MAX, 63) };
        other.filter(|(c, h, s)| {
            (self.keeps(Property::Geometry) || self.keeps(Property::LogicalGeometry))
                && (1..=most_cylinders).contains(c)
                && (1..=255).contains(h)
                && (1..=most_sectors).contains(s)
        })
    }

    /// The options its new images take.
    pub fn options(self) -> &'static [NewOption] {
        self.driver().options
    }

    /// [`repair`] puts right what [`check`] finds.
    pub fn can_be_repaired(self) -> bool {
        self.driver().repair.is_some()
    }

    /// [`compact`] takes from its images what they need not keep.
    pub fn can_be_compacted(self) -> bool {
        self.driver().compact.is_some()
    }

    /// What vdblk knows of the format.
    fn driver(self) -> &'static Driver {
        match self {
            Format::Raw => &raw::DRIVER,
            Format::Vdi => &vdi::DRIVER,
            Format::Vhd => &vhd::DRIVER,
            Format::Vhdx => &vhdx::DRIVER,
            Format::Parallels => &parallels::DRIVER,
            Format::Qcow => &qcow::DRIVER,
            Format::Qcow2 => &qcow2::DRIVER,
            Format::Vmdk => &vmdk::DRIVER,
            Format::Dmg => &dmg::DRIVER,
            Format::Cue => &cue::DRIVER,
            Format::Qed => &qed::DRIVER,
            Format::Registered(r) => r.driver(),
        }
    }

    /// The name as people write it in a sentence.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Vdi => "VDI",
            Format::Vmdk => "VMDK",
            Format::Vhd => "VHD",
            Format::Vhdx => "VHDX",
            Format::Qcow => "QCOW",
            Format::Qcow2 => "QCOW2",
            Format::Qed => "QED",
            Format::Parallels => "Parallels",
            Format::Dmg => "DMG",
            Format::Cue => "CUE",
            Format::Registered(r) => r.title(),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    /// Takes a name in any case; `vpc`, QEMU's word, is `vhd`.
    fn from_str(name: &str) -> Result<Self> {
        let lower = name.to_ascii_lowercase();
        if lower == "vpc" {
            return Ok(Format::Vhd);
        }
        let all = Self::all();
        all.iter().find(|f| f.name() == lower).copied().ok_or_else(|| {
            let names: Vec<_> = all.iter().map(|f| f.name()).collect();
            Error::new(ErrorKind::InvalidArgument, format!("unknown format '{name}'"))
                .hint(format!("one of: {}", names.join(", ")))
        })
    }
}

/// What an image is opened for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenHow {
    /// Nothing will be written: what only writing needs is not built up, and every change is refused.
    pub read_only: bool,
    /// Only [`ImageMap::info`] and [`ImageMap::limits`] will be asked: tables are neither kept nor verified.
    pub info_only: bool,
}

/// A file of an image, for its format.
#[derive(Clone, Copy)]
pub struct ImageFile<'a> {
    /// What plans and extents will call it.
    pub id: FileId,
    /// Its bytes.
    pub source: &'a dyn ByteSource,
}

impl fmt::Debug for ImageFile<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ImageFile").field(&self.id).finish()
    }
}

/// A further file that an image consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// Its name as the image states it: nothing an image says decides by itself what is opened.
    pub name: String,
    /// It is written when the image is.
    pub writable: bool,
    /// It is a disk of the host, which only the operator can allow.
    pub is_device: bool,
}

type Files<'a> = &'a [ImageFile<'a>];
type Steps = Result<Vec<FileStep>>;

type Open = dyn Fn(Files<'_>, OpenHow) -> Result<Box<dyn ImageMap>> + Send + Sync;
type Named = dyn Fn(&dyn ByteSource) -> Result<Vec<Reference>> + Send + Sync;
type Check = dyn Fn(Files<'_>) -> Result<CheckReport> + Send + Sync;
type Mend = dyn Fn(Files<'_>) -> Result<Repair> + Send + Sync;
type Compact = dyn Fn(Files<'_>, &Spare) -> Steps + Send + Sync;
type Resize = dyn Fn(Files<'_>, u64) -> Steps + Send + Sync;
type Relink = dyn Fn(Files<'_>, Option<&NewParent>) -> Steps + Send + Sync;
type Make = dyn Fn(&NewImage) -> Result<Blueprint> + Send + Sync;

/// What a format can do, a function each: constants of the formats here, closures of those that are registered.
struct Driver {
    open: &'static Open,
    /// The further files; `None`: there never are any.
    references: Option<&'static Named>,
    /// `None`: there is nothing that could be wrong.
    check: Option<&'static Check>,
    repair: Option<&'static Mend>,
    /// `None`: nothing is taken from it.
    compact: Option<&'static Compact>,
    /// `None`: the disk keeps its size.
    resize: Option<&'static Resize>,
    /// `None`: the parent's name stays what it is.
    relink: Option<&'static Relink>,
    /// `None`: none can be made.
    blueprint: Option<&'static Make>,
    /// Those that `blueprint` takes.
    options: &'static [NewOption],
    /// `None`: what its images say of themselves, if anything, stays what it is.
    properties: Option<properties::Keeper>,
}

/// The file of a format whose images have one.
fn only<'a>(files: &[ImageFile<'a>]) -> ImageFile<'a> {
    let [file] = files else { unreachable!("references named no further file") };
    *file
}

/// The further files that an image consists of, in the order in which [`open`] takes them behind the first.
///
/// # Errors
/// As [`open`].
pub fn references(format: Format, first: &dyn ByteSource) -> Result<Vec<Reference>> {
    format.driver().references.map_or_else(|| Ok(Vec::new()), |f| f(first))
}

/// Opens an image of `format`: its own file, and behind it those that [`references`] named.
///
/// # Errors
/// [`ErrorKind::NotThisFormat`], [`ErrorKind::Corrupt`], [`ErrorKind::Unsupported`] or [`ErrorKind::Limit`],
/// each with one line that names the field; [`ErrorKind::Io`] and friends from reading. Nothing was written.
pub fn open(format: Format, files: &[ImageFile<'_>], how: OpenHow) -> Result<Box<dyn ImageMap>> {
    (format.driver().open)(files, how)
}

/// Opens an image for reading only. What only matters for writing is not verified: VDIs two of whose blocks share a place, or which end
/// before their blocks do, can be read.
///
/// # Errors
/// As [`open`].
pub fn open_unchecked(format: Format, files: &[ImageFile<'_>]) -> Result<Box<dyn ImageMap>> {
    if format != Format::Vdi {
        return open(format, files, OpenHow { read_only: true, info_only: false });
    }
    let ImageFile { id, source } = only(files);
    Ok(Box::new(vdi::VdiMap::open_unchecked(source, id)?))
}

/// Opens an image as it was when the internal snapshot of this name, or else of this number, was made. Only for reading.
///
/// # Errors
/// [`ErrorKind::NotFound`] without such a snapshot, with those there are; [`ErrorKind::Unsupported`] for formats whose images have
/// none; otherwise as [`open`].
pub fn open_snapshot(format: Format, files: &[ImageFile<'_>], name: &str) -> Result<Box<dyn ImageMap>> {
    if format != Format::Qcow2 {
        let what = format!("{} images have no internal snapshots", format.title());
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    let ImageFile { id, source } = only(files);
    Ok(Box::new(qcow2::Qcow2Map::open_snapshot(source, id, name)?))
}

/// Opens an image that consists of one file, whose bytes are `source` and which plans will call `file`.
///
/// # Errors
/// As [`open`]; [`ErrorKind::Unsupported`] if it names further files.
pub fn open_single(
    format: Format,
    source: &dyn ByteSource,
    file: FileId,
    how: OpenHow,
) -> Result<Box<dyn ImageMap>> {
    if let Some(more) = references(format, source)?.first() {
        let what = format!("consists of several files, '{}' among them", more.name);
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    open(format, &[ImageFile { id: file, source }], how)
}

/// What is wrong with an image; `None` where the format has nothing that could be.
///
/// # Errors
/// [`ErrorKind::NotThisFormat`], [`ErrorKind::Unsupported`], and those of reading. An image that cannot be used is no error but
/// a report with a corruption.
pub fn check(format: Format, files: &[ImageFile<'_>]) -> Result<Option<CheckReport>> {
    let driver = format.driver();
    match driver.check {
        Some(f) => f(files).map(Some),
        // It has to be one at least.
        None => (driver.open)(files, OpenHow { read_only: true, info_only: true }).map(|_| None),
    }
}

/// Plans the repair of an image. Nothing is written. `None` where nothing can be wrong.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where it is impossible, with the first reason; [`ErrorKind::Limit`]; [`ErrorKind::Unsupported`] where
/// vdblk does not repair the format; otherwise as [`check`].
pub fn repair(format: Format, files: &[ImageFile<'_>]) -> Result<Option<Repair>> {
    let driver = format.driver();
    match (driver.repair, driver.check) {
        (Some(f), _) => f(files).map(Some),
        (None, None) => Ok(None),
        (None, Some(_)) => {
            let what = format!("the repair of {} images is not supported", format.title());
            Err(Error::new(ErrorKind::Unsupported, what))
        }
    }
}

/// Plans the change of a disk's size to `size_bytes` (a multiple of 512 above 0), for the files as they are now. Nothing is written.
/// What lies behind a smaller end is given up; what is added reads as zeros, or as what the parent has there. Between any two
/// of the steps, and whatever of them is durable, the disk has the old size or the new one; planned again they come to the same.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where the format, or this image, keeps its size; [`ErrorKind::Limit`] and
/// [`ErrorKind::InvalidArgument`] for sizes it cannot have; [`ErrorKind::Corrupt`] for a damaged image; those of reading.
pub fn resize(format: Format, files: &[ImageFile<'_>], size_bytes: u64) -> Result<Vec<FileStep>> {
    match format.driver().resize {
        Some(f) => f(files, size_bytes),
        None => {
            let what = format!("changing the size of {} images is not supported", format.title());
            Err(Error::new(ErrorKind::Unsupported, what).hint("vdimg convert it to another format first"))
        }
    }
}

/// Plans to take `spare` from an image, and to make its files as short as they can be. Nothing is written. Between any two of the
/// steps, and whatever of them is durable, the disk shows the same as long as what is beneath it does.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for formats without it; [`ErrorKind::Corrupt`] for a damaged image; those of reading.
pub fn compact(format: Format, files: &[ImageFile<'_>], spare: &Spare) -> Result<Vec<FileStep>> {
    match format.driver().compact {
        Some(f) => f(files, spare),
        None => {
            let what = format!("compacting {} images is not supported", format.title());
            Err(Error::new(ErrorKind::Unsupported, what).hint("vdimg convert leaves out what is zeros"))
        }
    }
}

/// Plans to give an image another parent, or none: all it says of it. Nothing is written. The bytes of its own stay. Whatever of the
/// steps is durable, the image opens, and names the old parent or the new one; planned again they come to the same.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for formats without it, and images that cannot say so; [`ErrorKind::InvalidArgument`] where there is
/// no room for the parent's name; those of opening.
pub fn relink(format: Format, files: &[ImageFile<'_>], parent: Option<&NewParent>) -> Result<Vec<FileStep>> {
    match format.driver().relink {
        Some(f) => f(files, parent),
        None => {
            let what = format!("changing the parent of {} images is not supported", format.title());
            Err(Error::new(ErrorKind::Unsupported, what))
        }
    }
}

/// A new image that describes a disk of the host.
///
/// # Errors
/// As [`blueprint`].
pub fn raw_disk(format: Format, new: &NewImage, disk: &RawDisk) -> Result<Blueprint> {
    match format {
        Format::Vmdk => vmdk::raw_disk(new, disk),
        _ => {
            let what = format!("{} images of raw disks", format.title());
            Err(Error::new(ErrorKind::Unsupported, what).hint("--format vmdk has them"))
        }
    }
}

/// A new image of a kind that is written once, with its contents; `None` for kinds that are made empty, by [`blueprint`].
///
/// # Errors
/// As [`blueprint`].
pub fn sequential(format: Format, new: &NewImage) -> Result<Option<Box<dyn Sequential>>> {
    match format {
        Format::Vmdk => vmdk::sequential(new),
        _ => Ok(None),
    }
}

/// A new image.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] naming the value that is not possible; [`ErrorKind::Unsupported`] for formats that are only read.
pub fn blueprint(format: Format, new: &NewImage) -> Result<Blueprint> {
    match format.driver().blueprint {
        Some(f) => f(new),
        None => {
            let what = format!("{} images cannot be created yet", format.title());
            Err(Error::new(ErrorKind::Unsupported, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_any_case() {
        for f in Format::ALL {
            assert_eq!(f.name().to_uppercase().parse::<Format>().unwrap(), f);
        }
        assert_eq!("VPC".parse::<Format>().unwrap(), Format::Vhd);
        let e = "img".parse::<Format>().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArgument);
        assert!(e.to_string().contains("raw, vdi"), "{e}");
    }
}
