//! VMDK, VMware's disk image: a descriptor that lists extents, and the extents: sparse, flat or nothing but zeros.
//! docs/formats/vmdk.md tells the facts and the orders of our writes.

mod check;
mod compact;
mod create;
mod descriptor;
mod header;
mod layout;
mod map;
mod open;
mod places;
mod properties;
mod relink;
mod repair;
mod resize;
mod sesparse;
mod sparse;
mod stream;
mod table;
mod text;
mod writer;

pub(super) use create::{raw_disk, sequential};
pub(super) use descriptor::is_descriptor;
pub use map::VmdkMap;

use super::Driver;
use super::properties::Keeper;

/// VMDK as one of the formats.
pub(super) const DRIVER: Driver = Driver {
    open: &|files, how| Ok(Box::new(open::open(files, how)?)),
    references: Some(&open::references),
    check: Some(&check::check),
    repair: Some(&repair::repair),
    compact: Some(&compact::compact),
    resize: Some(&resize::resize),
    relink: Some(&relink::relink),
    blueprint: Some(&create::blueprint),
    options: &create::OPTIONS,
    properties: Some(Keeper { keeps: properties::KEEPS, plan: properties::set }),
};
