//! Another parent for a QCOW: its name between the header and the first-level table, and the sector that says where.

use super::super::bytes::{put_be32, put_be64};
use super::super::relink::{NameRoom, name_of};
use super::super::{FileStep, NewParent};
use super::header::{FIELD_BYTES, Header};
use crate::error::Result;
use crate::map::ByteSource;

/// # Errors
/// As [`super::super::relink`].
pub(super) fn relink(source: &dyn ByteSource, parent: Option<&NewParent>) -> Result<Vec<FileStep>> {
    let header = Header::read(source)?;
    let geometry = header.geometry(source.len())?;
    // QEMU puts the first level behind the name, at a multiple of eight; behind that may be anything.
    let room = NameRoom { source, old: header.name_span(), room: FIELD_BYTES as u64..geometry.l1_at };
    let list = room.steps(name_of(parent)?, |sector, at, len| {
        put_be64(sector, 8, at);
        put_be32(sector, 16, len);
    })?;
    Ok(list.done())
}
