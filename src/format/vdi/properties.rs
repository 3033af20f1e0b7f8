//! What a VDI says of itself: one sector of the header.

use super::super::steps::StepList;
use super::super::{FileStep, Properties, Property};
use super::header::Header;
use crate::error::Result;
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, FileId};

/// The physical geometry is nowhere.
pub(super) const KEEPS: &[Property] = &[
    Property::Uuid,
    Property::ModificationUuid,
    Property::ParentUuid,
    Property::ParentModificationUuid,
    Property::Comment,
    Property::LogicalGeometry,
];

/// # Errors
/// As [`super::super::set_properties`].
pub(super) fn set(source: &dyn ByteSource, new: &Properties) -> Result<Vec<FileStep>> {
    let mut header = Header::read(source)?;
    header.layout(source.len())?;
    new.refuse_parent_unless(header.is_diff())?;
    if let Some(uuid) = new.uuid {
        header.set_uuid(uuid);
    }
    if let Some(uuid) = new.modification_uuid {
        header.set_modification(uuid);
    }
    if new.parent_uuid.or(new.parent_modification_uuid).is_some() {
        let parent = new.parent_uuid.unwrap_or(header.parent());
        header
            .set_parent_uuids(parent, new.parent_modification_uuid.unwrap_or(header.parent_modification()))?;
    }
    if let Some(comment) = &new.comment {
        header.set_comment(comment)?;
    }
    if let Some(chs) = new.logical_geometry {
        header.set_geometry(chs);
    }
    let mut bytes = Vec::new();
    header.write_to(&mut bytes);
    debug_assert!(bytes.len() as u64 <= SECTOR_BYTES, "the header is written whole or not at all");
    let mut list = StepList::new(FileId(0));
    list.write(0, bytes);
    Ok(list.done())
}
