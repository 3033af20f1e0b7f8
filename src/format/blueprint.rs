//! New images as values: which files they have, and what is written to them.

use super::Format;
use crate::error::{Error, ErrorKind, Result};
use crate::map::{HostOffset, ImageInfo};
use crate::size::parse_size;
use uuid::Uuid;

/// What an image to be made shall be like. A format refuses what it cannot express, with one line.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// The image's own file name, without folders: what it calls its further files by.
    pub file_name: String,
    /// Size of the disk in bytes, a multiple of 512 above 0.
    pub size_bytes: u64,
    /// One of the format's variants; `None`: its default.
    pub variant: Option<String>,
    /// Its UUID; `None`: one by chance.
    pub uuid: Option<Uuid>,
    /// The UUID of its first contents.
    pub modification: Uuid,
    /// The parent: makes a differencing image.
    pub parent: Option<NewParent>,
    /// A text for people.
    pub comment: Option<String>,
    /// Cylinders, heads, sectors.
    pub geometry: Option<(u32, u32, u32)>,
    /// `KEY=VALUE` options of the format, keys in any case.
    pub options: Vec<(String, String)>,
}

/// An option of the images of a format that is taken when one is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewOption {
    /// Its name, in any case.
    pub key: &'static str,
    /// Its value is a number, of bytes where nothing else makes sense; otherwise a word.
    pub is_number: bool,
    /// What is taken if nothing is said; `None`: that depends on the image.
    pub default: Option<&'static str>,
}

impl NewOption {
    /// One whose value is a number.
    pub(super) const fn number(key: &'static str, default: Option<&'static str>) -> Self {
        NewOption { key, is_number: true, default }
    }

    /// One whose value is a word.
    pub(super) const fn word(key: &'static str, default: Option<&'static str>) -> Self {
        NewOption { key, is_number: false, default }
    }
}

impl NewImage {
    /// The value of an option.
    pub(super) fn option(&self, key: &str) -> Option<&str> {
        self.options.iter().find(|(k, _)| k.eq_ignore_ascii_case(key)).map(|(_, v)| v.as_str())
    }

    /// The value of an option that is a number of bytes.
    pub(super) fn option_size(&self, key: &str) -> Result<Option<u64>> {
        self.option(key).map(parse_size).transpose()
    }

    /// Refuses options other than these.
    pub(crate) fn only_options(&self, known: &[NewOption]) -> Result<()> {
        let is_known = |k: &str| known.iter().any(|o| o.key.eq_ignore_ascii_case(k));
        let Some((k, _)) = self.options.iter().find(|(k, _)| !is_known(k)) else { return Ok(()) };
        let e = refused(format!("unknown option '{k}'"));
        Err(if known.is_empty() {
            e.hint("it has none")
        } else {
            e.hint(format!("known: {}", known.iter().map(|o| o.key).collect::<Vec<_>>().join(", ")))
        })
    }

    /// Refuses what the format has no place for.
    pub(crate) fn without(&self, format: Format, what: &str, given: bool) -> Result<()> {
        if given {
            return Err(refused(format!("{format} images have no {what}")));
        }
        Ok(())
    }
}

pub(super) fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}

/// A disk of the host, or parts of one, that an image describes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawDisk {
    /// All of the disk in one area.
    pub is_whole: bool,
    /// In the order of the disk.
    pub areas: Vec<RawArea>,
}

/// A part of a raw disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawArea {
    /// How long it is.
    pub sectors: u64,
    /// What it shows.
    pub kind: RawAreaKind,
}

/// What a part of a raw disk shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RawAreaKind {
    /// The device itself.
    Device {
        /// Its name, absolute.
        name: String,
        /// Where the area begins in it, in sectors.
        offset: u64,
        /// Writes are refused.
        read_only: bool,
    },
    /// A copy of these bytes, which the image keeps and the guest may change.
    Copy(Vec<u8>),
    /// Zeros, whatever is there.
    Hidden,
}

/// What a differencing image says of its parent.
#[derive(Clone, Debug)]
pub struct NewParent {
    /// What the parent says of itself.
    pub info: ImageInfo,
    /// Where the parent is, seen from the new image's folder, or absolute; `None`: not known.
    pub path: Option<String>,
}

/// A new image. Its files are made in this order, the one that names the others last.
#[derive(Debug)]
pub struct Blueprint {
    /// At least one.
    pub files: Vec<NewFile>,
}

/// A file of a new image.
pub struct NewFile {
    /// Its name in the image's folder; `None`: the image itself.
    pub name: Option<String>,
    /// Its length in bytes. What no piece covers reads as zeros.
    pub len: u64,
    /// Space to be reserved, not only spanned.
    pub preallocate: Option<(HostOffset, u64)>,
    /// The pieces, at most [`crate::limits::TABLE_PIECE_BYTES`] each, in the order of writing: what makes the file an image comes
    /// last, so that one that was begun and not finished is none.
    pub pieces: Pieces,
}

/// A new image that is written once, from the beginning of its disk to the end: what [`super::sequential`] makes. It says bytes,
/// somebody else writes them.
pub trait Sequential: std::fmt::Debug + Send {
    /// Bytes of the disk that are packed as one: a power of two, at most [`crate::limits::MAX_UNIT_BYTES`].
    fn unit_bytes(&self) -> u64;

    /// Where the first bytes go that are appended. What lies before is known last.
    fn begins_at(&self) -> HostOffset;

    /// Appends to `out` what goes into the file for the unit of this number, whose `bytes` are not all zeros; of the disk's last
    /// one there may be fewer. Units that are all zeros are left out, and numbers only ever grow.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] once the file is longer than the format can say.
    fn pack(&mut self, unit: u64, bytes: &[u8], out: &mut Vec<u8>) -> Result<()>;

    /// Appends the end of the file, and returns its beginning: only that makes the file an image, so it is written when all
    /// else is durable.
    ///
    /// # Errors
    /// As [`Self::pack`].
    fn finish(&mut self, out: &mut Vec<u8>) -> Result<Vec<u8>>;
}

/// Pieces of a file and where they go.
pub type Pieces = Box<dyn Iterator<Item = (HostOffset, Vec<u8>)> + Send>;

impl std::fmt::Debug for NewFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewFile").field("name", &self.name).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Blueprint {
    /// An image of one file.
    pub(crate) fn single(
        len: u64,
        preallocate: Option<(HostOffset, u64)>,
        pieces: impl IntoIterator<Item = (HostOffset, Vec<u8>), IntoIter: Send + 'static>,
    ) -> Self {
        let pieces = Box::new(pieces.into_iter());
        Blueprint { files: vec![NewFile { name: None, len, preallocate, pieces }] }
    }
}
