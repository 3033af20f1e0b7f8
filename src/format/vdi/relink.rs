//! Another parent for a VDI: one sector of the header.

use super::super::steps::StepList;
use super::super::{FileStep, NewParent};
use super::header::Header;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, FileId};
use uuid::Uuid;

/// # Errors
/// As [`super::super::relink`].
pub(super) fn relink(source: &dyn ByteSource, parent: Option<&NewParent>) -> Result<Vec<FileStep>> {
    let mut header = Header::read(source)?;
    if !header.is_diff() && parent.is_some() {
        return Err(Error::new(ErrorKind::Unsupported, "a VDI without a parent cannot be given one"));
    }
    let of = |u: Option<Uuid>| u.unwrap_or_else(Uuid::nil);
    match parent {
        // A parent that no UUID names is told by the user.
        Some(p) => {
            let named = p.info.uuid.unwrap_or_else(Uuid::new_v4);
            header.set_parent(named, of(p.info.modification_uuid));
        }
        None => header.set_parent(Uuid::nil(), Uuid::nil()),
    }
    let mut bytes = Vec::new();
    header.write_to(&mut bytes);
    debug_assert!(bytes.len() as u64 <= SECTOR_BYTES, "the header is written whole or not at all");
    let mut list = StepList::new(FileId(0));
    list.write(0, bytes);
    Ok(list.done())
}
