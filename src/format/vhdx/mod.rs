//! VHDX, Hyper-V's disk image of the second generation: two headers, a log, two copies of a table of regions, metadata by
//! GUIDs, one table of blocks. docs/formats/vhdx.md tells the facts and the orders of our writes.

mod bat;
mod check;
mod create;
mod header;
mod journal;
mod locator;
mod log;
mod map;
mod metadata;
mod place;
mod properties;
mod region;
mod repair;
mod replayed;
mod writer;

use super::properties::Keeper;
use super::{Driver, ImageFile, only};
use map::VhdxMap;

/// VHDX as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: &|files, how| {
        let ImageFile { id, source } = only(files);
        Ok(Box::new(VhdxMap::open(source, id, how)?))
    },
    references: None,
    check: Some(&|files| check::check(only(files).source)),
    repair: Some(&|files| repair::repair(only(files).source)),
    compact: None,
    resize: None,
    relink: None,
    blueprint: Some(&create::blueprint),
    options: &create::OPTIONS,
    properties: Some(Keeper {
        keeps: properties::KEEPS,
        plan: |files, new| properties::set(only(files).source, new),
    }),
};

fn corrupt(what: impl Into<String>) -> crate::error::Error {
    crate::error::Error::new(crate::error::ErrorKind::Corrupt, what)
}

fn unsupported(what: impl Into<String>) -> crate::error::Error {
    crate::error::Error::new(crate::error::ErrorKind::Unsupported, what)
}
