//! Formats of disk images: pure translators between guest ranges and places in files.
//!
//! A format sees the words of [`crate::map`] and nothing of files, engines or guests. It is opened from a
//! [`ByteSource`], answers from memory, and says as plans what shall be written.

mod blocks;
mod detect;
pub mod raw;
pub mod vdi;

pub use detect::{detect, extension_format, signature};

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
}

impl Format {
    /// Every format, in the order users read them in messages.
    pub const ALL: [Format; 10] = [
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
    ];

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
        }
    }

    /// True if [`open`] can open it.
    pub fn is_supported(self) -> bool {
        matches!(self, Format::Raw | Format::Vdi)
    }

    /// The name as people write it in a sentence.
    fn title(self) -> &'static str {
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
        }
    }

    fn unsupported(self) -> Error {
        let what = format!("this is {}, which is not supported yet", self.title());
        Error::new(ErrorKind::Unsupported, what).hint("convert it to vdi or raw first")
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
        Self::ALL.into_iter().find(|f| f.name() == lower).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|f| f.name()).collect();
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

/// Opens an image of `format` whose bytes are `source` and which plans will call `file`.
///
/// # Errors
/// [`ErrorKind::NotThisFormat`], [`ErrorKind::Corrupt`], [`ErrorKind::Unsupported`] or [`ErrorKind::Limit`],
/// each with one line that names the field; [`ErrorKind::Io`] and friends from reading. Nothing was written.
pub fn open(
    format: Format,
    source: &dyn ByteSource,
    file: FileId,
    how: OpenHow,
) -> Result<Box<dyn ImageMap>> {
    match format {
        Format::Raw => Ok(Box::new(raw::RawMap::open(source, file, how)?)),
        Format::Vdi => Ok(Box::new(vdi::VdiMap::open(source, file, how)?)),
        other => Err(other.unsupported()),
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

    #[test]
    fn what_is_not_supported_is_named() {
        let e = open(Format::Vmdk, &vec![0u8; 512], FileId(0), OpenHow::default()).unwrap_err();
        assert_eq!(
            e.to_string(),
            "this is VMDK, which is not supported yet (convert it to vdi or raw first)"
        );
    }
}
