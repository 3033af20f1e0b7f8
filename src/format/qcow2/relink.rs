//! Another parent for a QCOW2: its name behind the header's extensions, and the sector that says where it is, and of what format.

use super::super::bytes::{put_be32, put_be64};
use super::super::relink::{NameRoom, name_of};
use super::super::{FileStep, NewParent, blueprint::refused};
use super::create::backing_format;
use super::header::{EXT_BACKING_FORMAT, Extension, Header};
use crate::error::Result;
use crate::limits::SECTOR_BYTES;
use crate::map::ByteSource;

/// # Errors
/// As [`super::super::relink`].
pub(super) fn relink(source: &dyn ByteSource, parent: Option<&NewParent>) -> Result<Vec<FileStep>> {
    let mut header = Header::read(source)?;
    header.layout(source.len())?;
    let (start, old) = (header.extensions_start(), header.extensions(source)?);
    let word = parent.map(|p| Extension {
        kind: EXT_BACKING_FORMAT,
        bytes: backing_format(p.info.format).as_bytes().to_vec(),
    });
    let others = old.iter().filter(|e| e.kind != EXT_BACKING_FORMAT).cloned();
    let area = Extension::area(word.into_iter().chain(others));
    let end = start + area.len() as u64;
    // Longer ones cannot change at once; they may stay.
    let stays = area == Extension::area(old.into_iter());
    if end > SECTOR_BYTES && !stays {
        return Err(refused("its header has no room to say what format the parent has"));
    }
    let room = NameRoom { source, old: header.name_span(), room: end..1 << header.cluster_bits() };
    let list = room.steps(name_of(parent)?, |sector, at, len| {
        // all of it but the name, which stands behind
        header.clear_autoclear();
        let mut fields = Vec::new();
        header.write_to(&mut fields);
        let from = usize::try_from(start).expect("in the first sector");
        sector[..from].copy_from_slice(&fields[..from]);
        if !stays {
            sector[from..from + area.len()].copy_from_slice(&area);
        }
        put_be64(sector, 8, at);
        put_be32(sector, 16, len);
    })?;
    Ok(list.done())
}
