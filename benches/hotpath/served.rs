//! A disk with one queue's worker, and the guest that asks it, in one thread.

use super::guest::{Ask, ENTRIES, Guest, Places};
use std::io;
use std::path::Path;
use vdblk::io::{EngineKind, make_engine};
use vdblk::vd::{Channel, OpenDisk, open_disk};
use vdblk::vhost::{QueueCounters, QueueWorker, WorkerOptions};
use vdblk::virtio::Rules;

/// What is asked of which disk.
pub(crate) struct Load<'a> {
    /// The image.
    pub(crate) image: &'a Path,
    /// Past the page cache.
    pub(crate) direct: bool,
    /// Reads or writes.
    pub(crate) ask: Ask,
    /// Requests of a batch.
    pub(crate) depth: u16,
    /// Bytes of a request.
    pub(crate) bytes: u32,
}

/// A disk that is served.
pub(crate) struct Served {
    worker: QueueWorker<Channel>,
    guest: Guest,
    places: Places,
    writes: bool,
}

impl Served {
    /// Opens the disk and starts its ring.
    ///
    /// # Errors
    /// From whatever part of that.
    pub(crate) fn new(load: &Load<'_>) -> io::Result<Served> {
        let writes = load.ask == Ask::Write;
        let mut how = OpenDisk::new(load.image);
        how.options.read_only = !writes;
        how.direct = load.direct;
        let disk = open_disk(&how).map_err(io::Error::other)?.disk;
        let size_bytes = disk.size_bytes();
        let rules = Rules { size_bytes, read_only: !writes, discard: true };
        let options = WorkerOptions { queue: 0, slots: ENTRIES, rules, serial: "hotpath".into() };
        let engine = make_engine(EngineKind::IoUring, u32::from(ENTRIES)).map_err(io::Error::other)?.engine;
        let channel = Channel::new(disk, engine, ENTRIES).map_err(io::Error::other)?;
        let mut worker = QueueWorker::new(channel, &options);
        let guest = Guest::new(load.depth, load.bytes, load.ask)?;
        let (memory, ring, extras) = guest.ring()?;
        worker.set_memory(memory);
        worker.start(ring, extras).map_err(io::Error::other)?;
        Ok(Served { worker, guest, places: Places::new(size_bytes, load.bytes), writes })
    }

    /// One batch at places by chance, until all of it is answered.
    ///
    /// # Errors
    /// If a request is not answered well.
    pub(crate) fn batch(&mut self) -> io::Result<()> {
        let Served { guest, places, worker, .. } = self;
        guest.announce(|| places.next());
        while guest.answered() != guest.announced() {
            worker.step(true);
        }
        guest.check()
    }

    /// What has happened on the queue.
    pub(crate) fn counters(&self) -> QueueCounters {
        self.worker.counters()
    }

    /// Ends it.
    ///
    /// # Errors
    /// If a disk that was written cannot be closed.
    pub(crate) fn close(mut self) -> io::Result<()> {
        self.worker.stop();
        while self.worker.stopped().is_none() {
            self.worker.step(true);
        }
        match self.writes {
            true => self.worker.device().close_disk(false).map_err(io::Error::other),
            false => Ok(()),
        }
    }
}
