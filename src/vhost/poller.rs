//! An epoll set that closes itself.

use epoll::{ControlOptions, Event, Events};
use std::io;
use std::os::fd::{AsRawFd, RawFd};

/// Descriptors to wait for, each under a number of its owner's.
#[derive(Debug)]
pub(super) struct Poller {
    set: RawFd,
}

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        epoll::create(true).map(|set| Poller { set })
    }

    /// Adds a descriptor. It has to be taken out with [`Self::remove`] before it is closed: a duplicate elsewhere
    /// would keep it in the set.
    pub(super) fn add(&self, fd: RawFd, events: Events, token: u64) -> io::Result<()> {
        epoll::ctl(self.set, ControlOptions::EPOLL_CTL_ADD, fd, Event::new(events, token))
    }

    pub(super) fn remove(&self, fd: &impl AsRawFd) {
        let nothing = Event::new(Events::empty(), 0);
        if let Err(e) = epoll::ctl(self.set, ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd(), nothing) {
            tracing::debug!("cannot take a descriptor out of an epoll set: {e}");
        }
    }

    /// Waits, for ever if `timeout_ms` is negative, and calls `each` with the token of what is ready.
    pub(super) fn wait(&self, timeout_ms: i32, mut each: impl FnMut(u64)) -> io::Result<()> {
        let mut events = [Event::new(Events::empty(), 0); 8];
        match epoll::wait(self.set, timeout_ms, &mut events) {
            Ok(n) => {
                events.iter().take(n).for_each(|e| each(e.data));
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e),
        }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        // nothing can be done about a failure, and nothing is lost by it
        let _ = epoll::close(self.set);
    }
}
