//! Parallels' expanding hard disk: a header and one flat table, then the blocks. docs/formats/parallels.md tells the facts and
//! the orders of our writes.

mod check;
mod compact;
mod create;
mod header;
mod layout;
mod map;
mod repair;
mod resize;
mod table;

pub use map::ParallelsMap;

use super::{Driver, ImageFile, only};

/// Parallels as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: &|files, how| {
        let ImageFile { id, source } = only(files);
        Ok(Box::new(ParallelsMap::open(source, id, how)?))
    },
    references: None,
    check: Some(&|files| check::check(only(files).source)),
    repair: Some(&|files| repair::repair(only(files).source)),
    compact: Some(&|files, spare| compact::compact(only(files).source, spare)),
    resize: Some(&|files, size| resize::resize(only(files).source, size)),
    // its images do not say that they have one
    relink: Some(&|_, _| Ok(Vec::new())),
    blueprint: Some(&create::blueprint),
    options: &create::OPTIONS,
    properties: None,
};
