//! Devices that lie in one request of many, each in a way that servers have been caught at: what the check has to notice.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vdblk::io::{BufSlice, gather, scatter, total_len};
use vdblk::map::GuestRange;
use vdblk::vd::{BlockDevice, Channel, Done, Outcome, Request};

/// The block of whoever cannot write sectors.
const PAGE: u64 = 4096;
/// How long a stale copy lives, and how late an answered change lands.
const LATE: Duration = Duration::from_micros(500);
/// Reads of other pages before another is kept.
const KEPT: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A write of a part of a page reads the page, changes it, and writes it back whole, without keeping others away.
    StalePage,
    /// A write is answered before it is done.
    LateWrite,
    /// A discard is answered before it is done.
    LateDiscard,
    /// A read finds a page as it was some time ago.
    StaleRead,
    /// The second half of a write's last sector is not written.
    HalfSector,
    /// A write goes to the neighbouring sector.
    Misplaced,
    /// The words of a write's last sector trade places.
    Rotated,
}

/// Each with how many requests that can have it there are to one that has. Discards, and reads of a page that was seen
/// some time ago, are few.
pub const FAULTS: [(Fault, u32); 7] = [
    (Fault::StalePage, 10_000),
    (Fault::LateWrite, 10_000),
    (Fault::LateDiscard, 100),
    (Fault::StaleRead, 60),
    (Fault::HalfSector, 10_000),
    (Fault::Misplaced, 10_000),
    (Fault::Rotated, 10_000),
];

/// A channel to a raw image, with a fault in one of `one_in` requests that can have it.
pub struct Broken {
    channel: Channel,
    image: Arc<File>,
    fault: Fault,
    one_in: u32,
    count: u32,
    /// A page seen some time ago.
    old: Option<(u64, Vec<u8>)>,
    /// Reads of others since.
    missed: u32,
}

impl Broken {
    pub fn new(channel: Channel, image: &Path, fault: Fault, one_in: u32, queue: u16) -> Self {
        let image = Arc::new(File::options().read(true).write(true).open(image).unwrap());
        // not all queues at the same time
        let count = u32::from(queue) * one_in / 8;
        Broken { channel, image, fault, one_in, count, old: None, missed: 0 }
    }

    /// Carries the request out in the broken way, if that is what this one gets.
    fn fail(&mut self, request: Request, bufs: &[BufSlice]) -> Option<Outcome> {
        let range = match (self.fault, request) {
            (Fault::LateDiscard, Request::Discard(r)) | (Fault::StaleRead, Request::Read(r)) => r,
            (Fault::LateDiscard | Fault::StaleRead, _) => return None,
            (_, Request::Write(r)) => r,
            _ => return None,
        };
        if self.fault == Fault::StaleRead && !self.has_old(range) {
            return None;
        }
        self.count += 1;
        if !self.count.is_multiple_of(self.one_in) {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(range.len()).unwrap()];
        if total_len(bufs) > 0 {
            gather(bufs, &mut bytes);
        }
        let at = range.start().0;
        match self.fault {
            Fault::StalePage => self.write_whole_pages(at, &bytes),
            Fault::LateWrite | Fault::LateDiscard => {
                let image = self.image.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(LATE);
                    image.write_all_at(&bytes, at).unwrap();
                });
            }
            Fault::StaleRead => {
                scatter(&self.old.take().unwrap().1[(at % PAGE) as usize..][..bytes.len()], bufs)
            }
            Fault::HalfSector => self.image.write_all_at(&bytes[..bytes.len() - 256], at).unwrap(),
            Fault::Misplaced => {
                self.image.write_all_at(&bytes, if at == 0 { 512 } else { at - 512 }).unwrap();
            }
            Fault::Rotated => {
                let last = bytes.len() - 512;
                bytes[last..].rotate_left(8);
                self.image.write_all_at(&bytes, at).unwrap();
            }
        }
        Some(Ok(()))
    }

    fn write_whole_pages(&self, at: u64, bytes: &[u8]) {
        let start = at / PAGE * PAGE;
        let end = (at + bytes.len() as u64).next_multiple_of(PAGE);
        let mut pages = vec![0; usize::try_from(end - start).unwrap()];
        self.image.read_exact_at(&mut pages, start).unwrap();
        std::thread::sleep(LATE);
        pages[(at - start) as usize..][..bytes.len()].copy_from_slice(bytes);
        self.image.write_all_at(&pages, start).unwrap();
    }

    /// Looks into the one page that is kept, or keeps one.
    fn has_old(&mut self, range: GuestRange) -> bool {
        let page = range.start().0 / PAGE * PAGE;
        if self.old.is_none() || self.missed == KEPT {
            let mut bytes = vec![0; PAGE as usize];
            self.image.read_exact_at(&mut bytes, page).unwrap();
            self.old = Some((page, bytes));
            self.missed = 0;
        }
        let hit = self.old.as_ref().is_some_and(|o| o.0 == page) && range.end().0 <= page + PAGE;
        self.missed += u32::from(!hit);
        hit
    }
}

impl BlockDevice for Broken {
    fn submit(&mut self, slot: u16, request: Request, bufs: &[BufSlice]) -> Option<Outcome> {
        self.fail(request, bufs).or_else(|| self.channel.submit(slot, request, bufs))
    }

    fn flush_queue(&mut self) -> io::Result<()> {
        self.channel.flush_queue()
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        self.channel.poll(done);
    }

    fn set_write_through(&mut self, on: bool) {
        self.channel.set_write_through(on);
    }

    fn is_idle(&self) -> bool {
        self.channel.is_idle()
    }

    fn event_fds(&self) -> Vec<RawFd> {
        self.channel.event_fds()
    }
}
