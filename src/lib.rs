//! vdblk: a vhost-user-blk back-end over virtual disk containers.
//!
//! The path of one request, top to bottom, is the layout of the crate:
//!
//! 1. [`vhost`] pops a descriptor chain from a virtqueue in guest memory;
//! 2. [`virtio`] checks every byte of it and makes a request of it;
//! 3. [`vd`] holds the disk: a chain of images, and one [`vd::Channel`] per queue which turns
//!    requests into I/O, following plans where a format's metadata has to change;
//! 4. [`mod@format`] translates guest ranges to places in files and says which changes are needed,
//!    in the words of [`map`]; it never reads or writes;
//! 5. [`io`] moves the bytes: io_uring, a thread pool, or the simulator.
//!
//! [`job`] does the long work (copy, check, repair) on the same images. [`container`] is the whole as one object: a chain that is opened
//! image by image, asked, changed and worked on, as VirtualBox's container is.
//! `docs/architecture.md` tells why it is so.

pub mod container;
pub mod daemon;
pub mod error;
pub mod filter;
pub mod format;
pub mod io;
pub mod job;
pub mod limits;
pub mod live;
pub mod map;
pub mod medium;
pub mod plugin;
pub mod probe;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
mod size;
pub mod vd;
pub mod vhost;
pub mod virtio;

pub use error::{Error, ErrorKind, Result, Status};
