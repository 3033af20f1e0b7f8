//! Requests that call back when they have ended, on a thread of the container.

use super::Container;
use super::dispatch::{Part, Task};
use super::flags::OpenFlags;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{BufSlice, sub_slices, total_len};
use crate::vd::Request;
use std::sync::mpsc;

/// Before all queues.
const PRIORITY: u32 = 0;

/// The end of a request, for whoever prefers to wait (see [`completion`]).
#[derive(Debug)]
pub struct Completion(mpsc::Receiver<Result<()>>);

impl Completion {
    /// Waits for it.
    ///
    /// # Errors
    /// The request's.
    pub fn wait(self) -> Result<()> {
        self.0.recv().unwrap_or_else(|_| Err(Error::new(ErrorKind::Cancelled, "the request was given up")))
    }

    /// How it has ended, if it has.
    pub fn try_wait(&self) -> Option<Result<()>> {
        self.0.try_recv().ok()
    }
}

/// A callback for one request, and what it tells.
pub fn completion() -> (impl FnOnce(Result<()>) + Send + 'static, Completion) {
    let (tell, told) = mpsc::channel();
    (move |ended| drop(tell.send(ended)), Completion(told))
}

impl Container {
    /// Starts to read `len` bytes from `off` on, multiples of 512, into memory (`VDAsyncRead`). `done` is called once, when that has ended, on a
    /// thread that serves the container: it must not wait for that, nor change the chain. If an error is returned it is not called.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless the last image was opened with [`OpenFlags::ASYNC_IO`]; [`ErrorKind::InvalidArgument`] if the memory is
    /// too short; otherwise as [`Self::read`].
    pub fn async_read(
        &self,
        off: u64,
        len: u64,
        memory: &[BufSlice],
        done: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<()> {
        self.check_async()?;
        let range = self.live()?.range(off, len)?;
        self.begin([Part::Io(Request::Read(range), part_of(memory, len)?)], done)
    }

    /// Starts to write memory (`VDAsyncWrite`), as [`Self::async_read`] reads. The memory is only read.
    ///
    /// # Errors
    /// As [`Self::async_read`] and [`Self::write`].
    pub fn async_write(
        &self,
        off: u64,
        len: u64,
        memory: &[BufSlice],
        done: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<()> {
        self.check_async()?;
        let range = self.live()?.range(off, len)?;
        self.writable()?;
        self.begin([Part::Io(Request::Write(range), part_of(memory, len)?)], done)
    }

    /// Starts a flush of what has ended before (`VDAsyncFlush`).
    ///
    /// # Errors
    /// As [`Self::async_read`].
    pub fn async_flush(&self, done: impl FnOnce(Result<()>) + Send + 'static) -> Result<()> {
        self.check_async()?;
        self.live()?;
        self.begin([Part::Io(Request::Flush, Vec::new())], done)
    }

    /// Starts discards (`VDAsyncDiscardRanges`).
    ///
    /// # Errors
    /// As [`Self::async_read`] and [`Self::discard`].
    pub fn async_discard(
        &self,
        ranges: &[(u64, u64)],
        done: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<()> {
        self.check_async()?;
        let ranges = self.to_discard(self.live()?, ranges)?;
        self.begin(ranges.into_iter().map(|r| Part::Io(Request::Discard(r), Vec::new())), done)
    }

    fn check_async(&self) -> Result<()> {
        match self.images.last() {
            Some(i) if !i.has(OpenFlags::ASYNC_IO) => {
                let what = "was not opened for asynchronous requests";
                Err(Error::new(ErrorKind::Unsupported, what).at(&i.path).hint("open it with ASYNC_IO"))
            }
            _ => Ok(()),
        }
    }

    fn begin(
        &self,
        parts: impl IntoIterator<Item = Part>,
        done: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<()> {
        let task = Task { parts: parts.into_iter().collect(), done: Box::new(done) };
        self.dispatcher.submit(self.dispatcher.key(PRIORITY), task)
    }
}

/// The first `len` bytes of memory.
pub(super) fn part_of(memory: &[BufSlice], len: u64) -> Result<Vec<BufSlice>> {
    let have = total_len(memory);
    if have < len {
        let what = format!("the memory has {have} bytes, and {len} are to be moved");
        return Err(Error::new(ErrorKind::InvalidArgument, what));
    }
    let mut parts = Vec::new();
    sub_slices(memory, 0, len, &mut parts);
    Ok(parts)
}
