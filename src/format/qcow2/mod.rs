//! QEMU's copy-on-write format, versions 2 and 3. docs/formats/qcow2.md says what its bytes mean.

mod check;
mod closing;
mod create;
mod header;
mod layout;
mod map;
mod refcounts;
mod relink;
mod repair;
mod resize;
mod snapshots;
mod spare;
mod writer;

use super::{Driver, ImageFile, only};

/// QCOW2 as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: &|files, how| {
        let ImageFile { id, source } = only(files);
        Ok(Box::new(Qcow2Map::open(source, id, how)?))
    },
    references: None,
    check: Some(&|files| check(only(files).source)),
    repair: Some(&|files| repair(only(files).source)),
    compact: None,
    resize: Some(&|files, size| resize::resize(only(files).source, size)),
    relink: Some(&|files, parent| relink::relink(only(files).source, parent)),
    blueprint: Some(&create::blueprint),
    options: &create::OPTIONS,
    properties: None,
};

pub use check::check;
pub use map::Qcow2Map;
pub use repair::repair;
pub use snapshots::Snapshot;
