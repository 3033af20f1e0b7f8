//! What a user may have an image say of itself: UUIDs, a comment, geometries.

use super::steps::FileStep;
use super::{Files, Format, ImageFile, Steps};
use crate::error::{Error, ErrorKind, Result};
use uuid::Uuid;

/// Cylinders, heads, sectors of a track; all 0: none is known.
pub type Chs = (u32, u32, u32);

/// Something an image says of itself that can be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Property {
    /// The image's UUID: what diffs name as their parent's.
    Uuid,
    /// UUID of this state of its contents.
    ModificationUuid,
    /// The parent's UUID.
    ParentUuid,
    /// The parent's modification UUID when the diff was made.
    ParentModificationUuid,
    /// The user's comment.
    Comment,
    /// Physical geometry (VirtualBox's PCHS): what the drive says it has.
    Geometry,
    /// Logical geometry (LCHS): what a BIOS uses.
    LogicalGeometry,
}

impl Property {
    /// All of them.
    pub const ALL: [Property; 7] = [
        Property::Uuid,
        Property::ModificationUuid,
        Property::ParentUuid,
        Property::ParentModificationUuid,
        Property::Comment,
        Property::Geometry,
        Property::LogicalGeometry,
    ];

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Property::Uuid => "UUID",
            Property::ModificationUuid => "modification UUID",
            Property::ParentUuid => "parent UUID",
            Property::ParentModificationUuid => "parent modification UUID",
            Property::Comment => "comment",
            Property::Geometry => "physical geometry",
            Property::LogicalGeometry => "logical geometry",
        }
    }
}

/// New values; what is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Properties {
    /// [`Property::Uuid`]; not nil.
    pub uuid: Option<Uuid>,
    /// [`Property::ModificationUuid`]; not nil.
    pub modification_uuid: Option<Uuid>,
    /// [`Property::ParentUuid`], of images that have a parent; not nil.
    pub parent_uuid: Option<Uuid>,
    /// [`Property::ParentModificationUuid`], of images that have a parent; nil: unknown.
    pub parent_modification_uuid: Option<Uuid>,
    /// [`Property::Comment`]; empty: none. Without NUL; VDI takes up to 255 bytes, VMDK up to 1,024.
    pub comment: Option<String>,
    /// [`Property::Geometry`]: heads up to 255, sectors up to 63 (VHD: cylinders up to 65,535, sectors up to 255).
    pub geometry: Option<Chs>,
    /// [`Property::LogicalGeometry`]: heads up to 255, sectors up to 63.
    pub logical_geometry: Option<Chs>,
}

impl Properties {
    /// Which of them are to be set.
    pub fn wanted(&self) -> Vec<Property> {
        let is_wanted = |p: &Property| match p {
            Property::Uuid => self.uuid.is_some(),
            Property::ModificationUuid => self.modification_uuid.is_some(),
            Property::ParentUuid => self.parent_uuid.is_some(),
            Property::ParentModificationUuid => self.parent_modification_uuid.is_some(),
            Property::Comment => self.comment.is_some(),
            Property::Geometry => self.geometry.is_some(),
            Property::LogicalGeometry => self.logical_geometry.is_some(),
        };
        Property::ALL.into_iter().filter(is_wanted).collect()
    }

    /// Those that can be told of an image without a parent are wanted alone.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`].
    pub(super) fn refuse_parent_unless(&self, is_diff: bool) -> Result<()> {
        let wanted = self.parent_uuid.or(self.parent_modification_uuid);
        if is_diff || wanted.is_none() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, "it has no parent of which a UUID could be told"))
    }

    fn refuse_impossible(&self, format: Format) -> Result<()> {
        let refused = |what: String| Err(Error::new(ErrorKind::InvalidArgument, what));
        if [self.uuid, self.modification_uuid, self.parent_uuid].contains(&Some(Uuid::nil())) {
            return refused("a nil UUID names nothing".into());
        }
        let (most_cylinders, most_sectors) =
            if format == Format::Vhd { (65535, 255) } else { (u32::MAX, 63) };
        for (c, h, s) in self.geometry.into_iter().chain(self.logical_geometry) {
            let is_one = (1..=most_cylinders).contains(&c)
                && (1..=255).contains(&h)
                && (1..=most_sectors).contains(&s);
            if !is_one && ((c, h, s) != (0, 0, 0) || format == Format::Vhd) {
                return refused(format!("the geometry {c}/{h}/{s} is not possible"));
            }
        }
        if self.comment.as_ref().is_some_and(|c| c.contains('\0')) {
            return refused("a comment cannot contain NUL".into());
        }
        Ok(())
    }
}

/// What of them a format's images have a place for, and how they are set.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) keeps: &'static [Property],
    pub(super) plan: fn(Files<'_>, &Properties) -> Steps,
}

impl Format {
    /// Its images have a place for such a value.
    pub fn keeps(self, property: Property) -> bool {
        self.driver().properties.as_ref().is_some_and(|k| k.keeps.contains(&property))
    }
}

/// Plans to set what an image says of itself. Nothing is written. The disk shows the same at any moment; whatever of the steps is
/// durable, the image opens, and each value is the old one or the new one; planned again they come to the same.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where format or image have no place for one of them; [`ErrorKind::InvalidArgument`] for values that
/// cannot be, or none at all; [`ErrorKind::Corrupt`] for a damaged image; those of reading.
pub fn set_properties(format: Format, files: &[ImageFile<'_>], new: &Properties) -> Result<Vec<FileStep>> {
    let wanted = new.wanted();
    if wanted.is_empty() {
        return Err(Error::new(ErrorKind::InvalidArgument, "there is nothing to set"));
    }
    let strange = wanted.iter().find(|p| !format.keeps(**p));
    let (None, Some(keeper)) = (strange, format.driver().properties.as_ref()) else {
        let what = strange.map_or("", |p| p.name());
        let what = format!("{} images have no place for a {what}", format.title());
        let e = Error::new(ErrorKind::Unsupported, what);
        let other = strange == Some(&Property::Geometry) && format.keeps(Property::LogicalGeometry);
        return Err(if other { e.hint("they have one for the logical geometry") } else { e });
    };
    new.refuse_impossible(format)?;
    (keeper.plan)(files, new)
}
