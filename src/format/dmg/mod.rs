//! Apple's disk image (UDIF), read only. docs/formats/dmg.md says what its bytes mean.

mod chunks;
mod koly;
mod map;
mod plist;

pub use map::DmgMap;

use super::{Driver, ImageFile, only};

/// DMG as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: &|files, how| {
        let ImageFile { id, source } = only(files);
        Ok(Box::new(DmgMap::open(source, id, how)?))
    },
    references: None,
    check: None,
    repair: None,
    compact: None,
    resize: None,
    relink: None,
    blueprint: None,
    options: &[],
    properties: None,
};
