//! A disk with one queue's worker, and the guest that asks it, in one thread.

use super::guest::{Ask, ENTRIES, Guest, Places};
use std::io;
use std::path::Path;
use std::sync::Arc;
use vdblk::io::{EngineKind, make_engine};
use vdblk::vd::{BlockDevice, Channel, Disk, OpenDisk, open_disk};
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

impl Load<'_> {
    /// Opens the disk.
    ///
    /// # Errors
    /// As one that cannot be opened.
    pub(crate) fn open(&self) -> io::Result<Arc<Disk>> {
        let mut how = OpenDisk::new(self.image);
        how.options.read_only = self.ask != Ask::Write;
        how.direct = self.direct;
        Ok(open_disk(&how).map_err(io::Error::other)?.disk)
    }
}

/// A disk, or what stands for one, that is served.
pub(crate) struct Served<D = Channel> {
    worker: QueueWorker<D>,
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
        let disk = load.open()?;
        let size_bytes = disk.size_bytes();
        let engine = make_engine(EngineKind::IoUring, u32::from(ENTRIES)).map_err(io::Error::other)?.engine;
        Self::over(Channel::new(disk, engine, ENTRIES).map_err(io::Error::other)?, size_bytes, load)
    }

    /// Ends it.
    ///
    /// # Errors
    /// If a disk that was written cannot be closed.
    pub(crate) fn close(mut self) -> io::Result<()> {
        self.stop();
        match self.writes {
            true => self.worker.device().close_disk(false).map_err(io::Error::other),
            false => Ok(()),
        }
    }
}

impl<D: BlockDevice> Served<D> {
    /// Starts the ring of a device.
    ///
    /// # Errors
    /// From the operating system.
    pub(crate) fn over(device: D, size_bytes: u64, load: &Load<'_>) -> io::Result<Served<D>> {
        let writes = load.ask == Ask::Write;
        let rules = Rules { size_bytes, read_only: !writes, discard: true };
        let options = WorkerOptions { queue: 0, slots: ENTRIES, rules, serial: "hotpath".into() };
        let mut worker = QueueWorker::new(device, &options);
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

    /// Lets the ring go.
    pub(crate) fn stop(&mut self) {
        self.worker.stop();
        while self.worker.stopped().is_none() {
            self.worker.step(true);
        }
    }
}
