//! The container: a chain of images as one disk, and the interpreter that carries out what formats plan.
//!
//! A [`Disk`] is shared; each thread that uses it has a [`Channel`] of its own. A request occupies a slot of its channel
//! from [`BlockDevice::submit`] until it has ended, and moves by these rules:
//! look-ups and operations in place need nothing else; where metadata has to change, the slot takes the claim on
//! the unit, compares, asks the format for a plan, and runs it.

mod adc;
mod advance;
mod allocate;
mod bounce;
mod cache;
mod cache_file;
mod chain;
mod channel;
mod disk;
mod fills;
mod filtering;
mod finish;
mod identity;
mod image_files;
mod loads;
mod mailbox;
mod marker;
mod open;
mod ops;
mod own;
mod pages;
mod parents;
mod references;
mod request;
mod run;
mod shared;
mod slot;
mod source;
mod stand_in;
mod sync;
#[cfg(test)]
mod tests;
mod unfinished;
mod units;
mod unpack;

pub use cache::CacheCounts;
#[cfg(any(test, feature = "sim"))]
pub(crate) use cache::{Cache, Scope};
pub use cache_file::{read_cache_header, read_cache_table};
pub use chain::{Chain, Lack, Layer};
pub use channel::Channel;
#[cfg(any(test, feature = "sim"))]
pub(crate) use disk::NewTop;
pub use disk::{CacheMode, Disk, DiskOptions};
pub(crate) use finish::{Finish, FinishStep};
pub use image_files::ImageFiles;
pub(crate) use open::open_on_top;
pub use open::{ImageSpec, OpenDisk, OpenImage, OpenedDisk, open_disk};
pub(crate) use own::Own;
pub(crate) use parents::{Sought, any_other_child, child_that_names};
pub use request::{BlockDevice, Done, Outcome, Request};
pub use source::FileSource;
pub(crate) use stand_in::stand_in;
pub(crate) use unfinished::{refuse_if_unfinished, side_file};
pub use unpack::unpack;
