//! QEMU's first copy-on-write format. docs/formats/qcow.md says what its bytes mean.

mod create;
mod header;
mod relink;

use super::levels::{self, Extra, Geometry, LevelMap};
use super::{Driver, ImageFile, only};
use crate::error::Result;
use crate::map::ByteSource;

/// QCOW as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: &|files, how| {
        let ImageFile { id, source } = only(files);
        let header = header::Header::read(source)?;
        let geometry = header.geometry(source.len())?;
        let (extra, info) = (header.extra(&geometry), header.info());
        Ok(Box::new(LevelMap::open(
            source,
            id,
            how,
            levels::Header { geometry, extra, info, zeros: None, marking: None },
        )?))
    },
    references: None,
    check: Some(&|files| levels::check(only(files).source, examine)),
    repair: Some(&|files| levels::repair(only(files).source, examine)),
    compact: None,
    resize: None,
    relink: Some(&|files, parent| relink::relink(only(files).source, parent)),
    blueprint: Some(&create::blueprint),
    options: &create::OPTIONS,
    properties: None,
};

/// For checks and repairs.
fn examine(source: &dyn ByteSource) -> Result<(Geometry, Extra)> {
    let header = header::Header::read(source)?;
    let geometry = header.geometry(source.len())?;
    Ok((geometry, header.extra(&geometry)))
}
