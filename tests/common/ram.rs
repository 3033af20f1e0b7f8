//! A disk in memory behind the seam that the queue workers drive.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vdblk::error::Failure;
use vdblk::io::{BufSlice, gather, scatter, total_len};
use vdblk::map::GuestRange;
use vdblk::vd::{BlockDevice, Done, Outcome, Request};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// When requests end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Before `submit` returns.
    Inline,
    /// At the next poll, last first, as an asynchronous engine might.
    Deferred,
}

/// The disk; channels share it.
pub struct RamDisk {
    pub bytes: Mutex<Vec<u8>>,
    pub flushes: AtomicU64,
    pub discards: AtomicU64,
    pub write_through: AtomicBool,
    /// Deferred requests stay in flight as long as this is set.
    held: AtomicBool,
    wake: Mutex<Vec<EventFd>>,
}

impl RamDisk {
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(RamDisk {
            bytes: Mutex::new(vec![0; size]),
            flushes: AtomicU64::new(0),
            discards: AtomicU64::new(0),
            write_through: AtomicBool::new(false),
            held: AtomicBool::new(false),
            wake: Mutex::default(),
        })
    }

    pub fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    pub fn release(&self) {
        self.held.store(false, Ordering::SeqCst);
        self.wake.lock().unwrap().iter().for_each(|e| e.write(1).unwrap());
    }

    pub fn channel(self: &Arc<Self>, pace: Pace) -> RamChannel {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        self.wake.lock().unwrap().push(event.try_clone().unwrap());
        RamChannel { disk: Arc::clone(self), pace, waiting: Vec::new(), event }
    }

    fn slice(&self, range: GuestRange, work: impl FnOnce(&mut [u8])) -> Outcome {
        let mut bytes = self.bytes.lock().unwrap();
        let (from, to) = (range.start().0 as usize, range.end().0 as usize);
        bytes.get_mut(from..to).map(work).ok_or(Failure::OutOfRange)
    }

    fn serve(&self, request: Request, bufs: &[BufSlice]) -> Outcome {
        match request {
            Request::Read(r) => {
                assert_eq!(total_len(bufs), r.len());
                self.slice(r, |b| scatter(b, bufs))
            }
            Request::Write(r) => {
                assert_eq!(total_len(bufs), r.len());
                self.slice(r, |b| gather(bufs, b))
            }
            Request::Flush => {
                self.flushes.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
            Request::Discard(r) => {
                self.discards.fetch_add(1, Ordering::SeqCst);
                self.slice(r, |b| b.fill(0))
            }
            Request::WriteZeroes { range, .. } => self.slice(range, |b| b.fill(0)),
        }
    }
}

/// One queue's way to the disk.
pub struct RamChannel {
    disk: Arc<RamDisk>,
    pace: Pace,
    waiting: Vec<(u16, Request, Vec<BufSlice>)>,
    event: EventFd,
}

impl BlockDevice for RamChannel {
    fn submit(&mut self, slot: u16, request: Request, bufs: &[BufSlice]) -> Option<Outcome> {
        assert!(self.waiting.iter().all(|w| w.0 != slot), "slot {slot} is given twice");
        if self.pace == Pace::Inline {
            return Some(self.disk.serve(request, bufs));
        }
        self.waiting.push((slot, request, bufs.to_vec()));
        None
    }

    fn flush_queue(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() { Ok(()) } else { self.event.write(1) }
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        let _ = self.event.read();
        if self.disk.held.load(Ordering::SeqCst) {
            return;
        }
        while let Some((slot, request, bufs)) = self.waiting.pop() {
            done.push(Done { slot, outcome: self.disk.serve(request, &bufs) });
        }
    }

    fn set_write_through(&mut self, on: bool) {
        self.disk.write_through.store(on, Ordering::SeqCst);
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    fn event_fds(&self) -> Vec<RawFd> {
        vec![self.event.as_raw_fd()]
    }
}
