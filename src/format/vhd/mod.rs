//! VHD, the format of Microsoft's Virtual PC and of Hyper-V's first generation: a footer, and in images that grow a header,
//! one table of blocks, and blocks with a bitmap of their sectors in front. docs/formats/vhd.md tells the facts and the
//! orders of our writes.

mod bitmaps;
mod check;
mod compact;
mod create;
mod fixed;
mod footer;
mod header;
mod layout;
mod locator;
mod map;
mod properties;
mod relink;
mod repair;
mod resize;
mod table;
mod writer;

use super::properties::Keeper;
use super::{Driver, ImageFile, OpenHow, only};
use crate::error::Result;
use crate::map::ImageMap;
use fixed::FixedMap;
use footer::{Footers, Kind};
use map::VhdMap;

/// VHD as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: &|files, how| open(only(files), how),
    references: None,
    check: Some(&|files| check::check(only(files).source)),
    repair: Some(&|files| repair::repair(only(files).source)),
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

/// Everything that reading and writing rely on is verified.
fn open(file: ImageFile<'_>, how: OpenHow) -> Result<Box<dyn ImageMap>> {
    let footers = Footers::read(file.source)?;
    Ok(match footers.best.kind()? {
        Kind::Fixed => Box::new(FixedMap::open(file, &footers, how)?),
        Kind::Dynamic | Kind::Diff => Box::new(VhdMap::open(file, footers, how)?),
    })
}
