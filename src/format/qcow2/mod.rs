//! QEMU's copy-on-write format, versions 2 and 3. docs/formats/qcow2.md says what its bytes mean.

mod header;
mod layout;
mod map;
mod snapshots;

use super::{Driver, ImageFile, only};

/// QCOW2 as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: |files, how| {
        let ImageFile { id, source } = only(files);
        Ok(Box::new(Qcow2Map::open(source, id, how)?))
    },
    references: None,
    check: None,
    repair: None,
    blueprint: None,
    keeps_comment: false,
    keeps_geometry: false,
};

pub use map::Qcow2Map;
pub use snapshots::Snapshot;
