//! Requests to a disk, as queue workers and jobs make them.

use super::Disk;
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::io::BufSlice;
use crate::map::GuestRange;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

/// What is asked of the disk. Ranges are multiples of 512 bytes and lie inside the disk: whoever takes bytes from
/// a guest has checked that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the buffers from the range.
    Read(GuestRange),
    /// Write the buffers to the range.
    Write(GuestRange),
    /// Make everything completed before durable.
    Flush,
    /// The range's content is no longer needed.
    Discard(GuestRange),
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// Where.
        range: GuestRange,
        /// Its space may go back to the file system.
        unmap: bool,
    },
}

/// How a request ended.
pub type Outcome = std::result::Result<(), Failure>;

/// A request that has ended after [`BlockDevice::submit`] had returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The slot it was given.
    pub slot: u16,
    /// How.
    pub outcome: Outcome,
}

/// What a queue worker talks to: one channel to a disk, used by one thread. [`super::Channel`] is the real one; tests
/// put memory in its place.
pub trait BlockDevice {
    /// Starts a request in a free slot (below the number of slots the channel was made with). `Some`: it has ended
    /// already, and the slot is free; `None`: it will come out of [`Self::poll`].
    ///
    /// For `Read` and `Write` the buffers hold exactly the range's length. They belong to the device until the request
    /// has ended.
    fn submit(&mut self, slot: u16, request: Request, bufs: &[BufSlice]) -> Option<Outcome>;

    /// Hands what was queued to the operating system: once after a batch of submits.
    ///
    /// # Errors
    /// From the operating system; the next call tries again.
    fn flush_queue(&mut self) -> io::Result<()>;

    /// Moves everything that can move, and appends what has ended to `done`.
    fn poll(&mut self, done: &mut Vec<Done>);

    /// Gets ready to go over to another disk over the same images: what that takes time for is done here, beside requests.
    ///
    /// # Errors
    /// If it cannot be; the device goes on as before.
    fn prepare(&mut self, _disk: &Arc<Disk>) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "this device has one disk for good"))
    }

    /// Goes over to a disk it is prepared for. To be called while [`Self::is_idle`].
    fn move_to(&mut self, _disk: &Arc<Disk>) {
        unreachable!("a device that was not prepared")
    }

    /// Whether writes are durable before they complete: the driver cannot flush, or chose write-through. Holds for
    /// requests submitted from now on.
    fn set_write_through(&mut self, on: bool);

    /// No request is in flight and no background work runs on this channel.
    fn is_idle(&self) -> bool;

    /// Readable when [`Self::poll`] has something to do (all of them; at most two).
    fn event_fds(&self) -> Vec<RawFd>;
}
