//! VDI, VirtualBox's disk image: a header, one flat table of blocks, and the blocks. docs/formats/vdi.md tells
//! the facts and the orders of our writes.

mod check;
mod create;
mod dense;
mod header;
mod layout;
mod map;
mod repair;
mod table;
mod writer;

pub use check::{CheckReport, Finding, Severity, check};
pub use create::{Blueprint, Parent, Variant, VdiCreate};
pub use header::SIGNATURE;
pub use map::VdiMap;
pub use repair::{Repair, RepairStep, repair};
