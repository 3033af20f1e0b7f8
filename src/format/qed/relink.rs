//! Another parent for a QED: its name in the header's clusters, and the sector that says where.

use super::super::relink::{NameRoom, name_of};
use super::super::{FileStep, NewParent};
use super::header::{BACKING, BACKING_RAW, FEATURES_AT, FIELD_BYTES, Header};
use crate::error::Result;
use crate::map::ByteSource;

/// # Errors
/// As [`super::super::relink`].
pub(super) fn relink(source: &dyn ByteSource, parent: Option<&NewParent>) -> Result<Vec<FileStep>> {
    let header = Header::read(source)?;
    let geometry = header.geometry(source.len())?;
    let room = NameRoom {
        source,
        old: header.name_span(),
        room: FIELD_BYTES as u64..geometry.header_bytes.min(geometry.l1_at),
    };
    let raw = parent.is_some_and(|p| p.info.format == "raw");
    let list = room.steps(name_of(parent)?, |sector, at, len| {
        let bits = u8::try_from(BACKING | BACKING_RAW).expect("two of the low bits");
        let own = if parent.is_some() { BACKING } else { 0 } | if raw { BACKING_RAW } else { 0 };
        let features = &mut sector[usize::try_from(FEATURES_AT).expect("in the first sector")];
        *features = *features & !bits | u8::try_from(own).expect("two of the low bits");
        let at = u32::try_from(at).expect("in the header's clusters, of which there are 4 GiB at most");
        sector[56..60].copy_from_slice(&at.to_le_bytes());
        sector[60..64].copy_from_slice(&len.to_le_bytes());
    })?;
    Ok(list.done())
}
