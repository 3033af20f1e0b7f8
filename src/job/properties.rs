//! Setting what an image says of itself.

use super::{Watch, change};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{OpenHow, Properties, Property};
use crate::map::{FileId, ImageInfo};
use crate::vd::{ImageFiles, ImageSpec, child_that_names, stand_in};
use std::time::Duration;

/// New values for what an image says of itself.
#[derive(Clone, Debug)]
pub struct SetProperties {
    /// The image.
    pub image: ImageSpec,
    /// How long to wait for its lock.
    pub lock_wait: Duration,
    /// It may describe a disk of this host.
    pub allow_raw_device: bool,
    /// The values.
    pub properties: Properties,
    /// UUIDs change although a diff in the image's folder names them: its parent is not found any more.
    pub force: bool,
}

/// Sets what an image says of itself, under an exclusive lock. Its disk shows the same at any moment. Stopped in any way, each value is
/// the old one or the new one; the same call completes it. Returns what the image says afterwards.
///
/// # Errors
/// As [`crate::format::set_properties`]; [`ErrorKind::ReadOnly`] where a diff names a UUID that would change, unless forced; of opening,
/// locking, reading and writing; [`ErrorKind::Cancelled`].
pub fn set_properties(how: &SetProperties, watch: &mut Watch<'_>) -> Result<ImageInfo> {
    let (path, new) = (&how.image.path, &how.properties);
    let wait = Some(how.lock_wait);
    let image = ImageFiles::open_with(path, how.image.format, true, wait, how.allow_raw_device)?;
    let info = || Ok::<_, Error>(image.map(FileId(0), OpenHow { read_only: true, info_only: true })?.info());
    let old = info()?;
    let steps = image.set_properties(new)?;
    image.refuse_after_failed_sync()?;
    if !how.force {
        refuse_orphans(how, &old)?;
    }
    change(&image, steps, watch)?;
    let now = info()?;
    match unlike(new, &now) {
        None => Ok(now),
        Some(p) => {
            let what = format!("has another {} after it was set", p.name());
            Err(Error::new(ErrorKind::Io, what).at(path))
        }
    }
}

/// Diffs that would look for their parent in vain, or take it for one that was written to.
fn refuse_orphans(how: &SetProperties, old: &ImageInfo) -> Result<()> {
    let (path, new) = (&how.image.path, &how.properties);
    let known = old.uuid.or_else(|| stand_in(path));
    let changes = (new.uuid.is_some() && new.uuid != known)
        || (new.modification_uuid.is_some() && new.modification_uuid != old.modification_uuid);
    let child = known.filter(|_| changes).and_then(|u| child_that_names(path, u));
    let Some(child) = child else { return Ok(()) };
    let what =
        format!("is the parent of {}, which names its UUIDs and would not know it again", child.display());
    let hint = "pass --force, and set the child's parent UUIDs afterwards (vdimg setuuid --parent)";
    Err(Error::new(ErrorKind::ReadOnly, what).at(path).hint(hint))
}

/// The first value that is not what was wished.
fn unlike(new: &Properties, is: &ImageInfo) -> Option<Property> {
    let same = |p: &Property| match p {
        Property::Uuid => new.uuid == is.uuid,
        Property::ModificationUuid => new.modification_uuid == is.modification_uuid,
        Property::ParentUuid => new.parent_uuid == is.parent_uuid,
        Property::ParentModificationUuid => {
            new.parent_modification_uuid.filter(|u| !u.is_nil()) == is.parent_modification_uuid
        }
        Property::Comment => new.comment.as_ref().filter(|c| !c.is_empty()) == is.comment.as_ref(),
        Property::Geometry => new.geometry.filter(|g| g.0 > 0) == is.geometry,
        Property::LogicalGeometry => new.logical_geometry.filter(|g| g.0 > 0) == is.logical_geometry,
    };
    new.wanted().into_iter().find(|p| !same(p))
}
