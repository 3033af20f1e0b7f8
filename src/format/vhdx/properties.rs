//! What a VHDX says of itself: the GUIDs of its contents and of its file, in the two headers.

use super::super::{FileStep, Properties, Property};
use super::check::examine;
use super::header::{Header, Ids};
use crate::error::{Error, ErrorKind, Result};
use crate::map::{ByteSource, FileId, HostOffset};
use uuid::Uuid;
use zerocopy::IntoBytes;

/// DataWriteGuid, which diffs name, and FileWriteGuid.
pub(super) const KEEPS: &[Property] = &[Property::Uuid, Property::ModificationUuid];

/// The header that does not count is written first; then that counts, and the other follows.
///
/// # Errors
/// As [`super::super::set_properties`].
pub(super) fn set(source: &dyn ByteSource, new: &Properties) -> Result<Vec<FileStep>> {
    let image = match examine(source)? {
        Ok(image) => image,
        Err(report) => return report.refuse_damage().map(|()| Vec::new()),
    };
    image.report.refuse_damage()?;
    let headers = &image.parts.headers;
    if headers.current.log()?.is_some() {
        let what = "it was not closed: its log may hold what is not in its place yet";
        return Err(Error::new(ErrorKind::Unsupported, what).hint("vdimg repair it first"));
    }
    let old = headers.current.ids();
    // Whatever changes the file gives that GUID another value.
    let file_write = new.modification_uuid.unwrap_or_else(Uuid::new_v4);
    let ids = Ids { file_write, data_write: new.uuid.unwrap_or(old.data_write), ..old };
    let mut steps = vec![FileStep::Sync { file: FileId(0) }];
    for (slot, ahead) in [(1 - headers.slot, 1), (headers.slot, 2)] {
        let bytes = headers.current.renewed(ids, ahead).as_bytes().to_vec();
        steps.push(FileStep::Write { file: FileId(0), at: HostOffset(Header::at(slot)), bytes });
        steps.push(FileStep::Sync { file: FileId(0) });
    }
    Ok(steps)
}
