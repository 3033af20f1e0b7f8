//! VDI, VirtualBox's disk image: a header, one flat table of blocks, and the blocks. docs/formats/vdi.md tells
//! the facts and the orders of our writes.

mod check;
mod compact;
mod create;
mod dense;
mod header;
mod layout;
mod map;
mod properties;
mod relink;
mod repair;
mod resize;
mod table;
mod writer;

pub use check::check;
pub use create::{Parent, Variant, VdiBlueprint, VdiCreate};
pub use header::SIGNATURE;
pub use map::VdiMap;
pub use repair::repair;

use super::properties::Keeper;
use super::{Driver, ImageFile, only};

/// VDI as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: &|files, how| {
        let ImageFile { id, source } = only(files);
        Ok(Box::new(VdiMap::open(source, id, how)?))
    },
    references: None,
    check: Some(&|files| check(only(files).source)),
    repair: Some(&|files| repair(only(files).source)),
    compact: Some(&|files, spare| compact::compact(only(files).source, spare)),
    resize: Some(&|files, size| resize::resize(only(files).source, size)),
    relink: Some(&|files, parent| relink::relink(only(files).source, parent)),
    blueprint: Some(&create::blueprint),
    options: &create::OPTIONS,
    properties: Some(Keeper {
        keeps: properties::KEEPS,
        plan: |files, new| properties::set(only(files).source, new),
    }),
};
