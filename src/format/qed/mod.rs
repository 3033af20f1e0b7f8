//! QEMU's enhanced disk. docs/formats/qed.md says what its bytes mean.

mod header;

use super::levels::LevelMap;
use super::{Driver, ImageFile, only};

/// QED as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: |files, how| {
        let ImageFile { id, source } = only(files);
        let header = header::Header::read(source)?;
        let geometry = header.geometry(source.len())?;
        Ok(Box::new(LevelMap::open(source, id, how, geometry, header.info())?))
    },
    references: None,
    check: None,
    repair: None,
    blueprint: None,
    keeps_comment: false,
    keeps_geometry: false,
};
