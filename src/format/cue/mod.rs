//! CD images of a cue sheet and the files it names (CUE/BIN), read only. docs/formats/raw.md says what is shown of them.

mod map;
mod sheet;

pub use map::{CueMap, data_offset};
pub(super) use sheet::is_sheet;

use super::{Driver, Reference};

/// CUE as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: &|files, how| Ok(Box::new(CueMap::open(files, how)?)),
    references: Some(&|source| {
        let files = sheet::Sheet::read(source)?.files;
        Ok(files.into_iter().map(|f| Reference { name: f.name, writable: false, is_device: false }).collect())
    }),
    check: None,
    repair: None,
    compact: None,
    resize: None,
    relink: None,
    blueprint: None,
    options: &[],
    properties: None,
};
