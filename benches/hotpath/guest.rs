//! A guest's side of one virtqueue, in the memory of this process: batches of chains of a header, data and a status.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use vdblk::io::BufSlice;
use vdblk::vhost::{InflightRegion, Memory, MemoryView, RegionInfo, Ring, RingExtras, RingSetup};
use vdblk::virtio::GuestMemory;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// Entries of the ring; a chain takes three descriptors.
pub(crate) const ENTRIES: u16 = 256;
/// Chains of a batch at most. A power of two, so that each place of the ring always announces the same chain.
pub(crate) const MAX_DEPTH: u16 = 64;
const SECTOR_BYTES: u64 = 512;
const DESCRIPTORS_AT: u64 = 0;
const AVAILABLE_AT: u64 = 0x1000;
/// Behind the entries of the available ring.
const USED_EVENT_AT: u64 = AVAILABLE_AT + 4 + 2 * ENTRIES as u64;
const USED_AT: u64 = 0x2000;
/// Headers and statuses, 32 bytes a chain.
const SMALL_AT: u64 = 0x4000;
const SMALL_BYTES: u64 = 32;
const STATUS_IN_SMALL: u64 = 16;
const DATA_AT: u64 = 0x1_0000;
/// Where guest memory begins, for the guest and for the front-end.
const GUEST_ADDR: u64 = 0x10_0000;
const USER_ADDR: u64 = 0x7f00_0000_0000;
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
/// Not a status of virtio.
const UNANSWERED: u8 = 0xee;

/// What all chains ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// To read.
    Read = 0,
    /// To write.
    Write = 1,
}

/// A guest with one ring.
pub(crate) struct Guest {
    memory: Arc<Memory>,
    inflight: Arc<InflightRegion>,
    /// Where signals arrive; nobody takes them.
    _signals: EventConsumer,
    call: Cell<Option<EventNotifier>>,
    all: BufSlice,
    depth: u16,
    announced: u16,
}

impl Guest {
    /// A guest whose batches are of `depth` chains of `bytes` data each.
    ///
    /// # Errors
    /// From the operating system.
    ///
    /// # Panics
    /// If `depth` is not a power of two up to [`MAX_DEPTH`].
    pub(crate) fn new(depth: u16, bytes: u32, ask: Ask) -> io::Result<Guest> {
        assert!(depth.is_power_of_two() && depth <= MAX_DEPTH);
        let len = (DATA_AT + u64::from(depth) * u64::from(bytes)).next_multiple_of(4096);
        let info = RegionInfo { guest_addr: GUEST_ADDR, len, user_addr: USER_ADDR, mmap_offset: 0 };
        let memory = Arc::new(Memory::new([(info, memory_file(len)?)])?);
        let mut found = Vec::new();
        let len = u32::try_from(len).map_err(io::Error::other)?;
        assert!(MemoryView::new(Arc::clone(&memory)).resolve(GUEST_ADDR, len, &mut found));
        let (region, file) = InflightRegion::create(1, ENTRIES)?;
        let inflight = Arc::new(InflightRegion::open(file, 0, region, 1, ENTRIES)?);
        let (signals, call) = new_event_consumer_and_notifier(EventFlag::NONBLOCK)?;
        let call = Cell::new(Some(call));
        let guest = Guest { memory, inflight, _signals: signals, call, all: found[0], depth, announced: 0 };
        guest.all.clear();
        for chain in 0..depth {
            guest.describe(chain, bytes, ask);
        }
        for place in 0..ENTRIES {
            guest.put(AVAILABLE_AT + 4 + u64::from(place) * 2, &(place % depth * 3).to_le_bytes());
        }
        Ok(guest)
    }

    /// Its memory, its ring and what is beside the ring; once.
    ///
    /// # Errors
    /// Never for this ring.
    pub(crate) fn ring(&self) -> io::Result<(Arc<Memory>, Ring, RingExtras)> {
        let setup = RingSetup {
            size: ENTRIES,
            descriptors: USER_ADDR + DESCRIPTORS_AT,
            available: USER_ADDR + AVAILABLE_AT,
            used: USER_ADDR + USED_AT,
            next_avail: 0,
            event_idx: true,
        };
        let ring = Ring::new(&setup, &self.memory).map_err(io::Error::other)?;
        let extras = RingExtras {
            inflight: self.inflight.tracker(0),
            call: self.call.take(),
            ..RingExtras::default()
        };
        Ok((Arc::clone(&self.memory), ring, extras))
    }

    /// Announces a batch; `sector` says where each of its chains begins.
    pub(crate) fn announce(&mut self, mut sector: impl FnMut() -> u64) {
        for chain in 0..self.depth {
            let small = small(chain);
            self.put(small + 8, &sector().to_le_bytes());
            self.put(small + STATUS_IN_SMALL, &[UNANSWERED]);
        }
        // as drivers do before they wait: one signal, at the first answer
        self.put(USED_EVENT_AT, &self.announced.to_le_bytes());
        self.announced = self.announced.wrapping_add(self.depth);
        fence(Ordering::Release);
        self.put(AVAILABLE_AT + 2, &self.announced.to_le_bytes());
    }

    /// All chains of the batch are answered, and well.
    ///
    /// # Errors
    /// If one is not.
    pub(crate) fn check(&self) -> io::Result<()> {
        for chain in 0..self.depth {
            let mut status = [0];
            self.at(small(chain) + STATUS_IN_SMALL, 1).read(&mut status);
            if status != [0] {
                return Err(io::Error::other(format!("request {chain} has ended with status {status:?}")));
            }
        }
        Ok(())
    }

    /// Chains answered so far, as the ring counts them.
    pub(crate) fn answered(&self) -> u16 {
        let mut index = [0; 2];
        self.at(USED_AT + 2, 2).read(&mut index);
        u16::from_le_bytes(index)
    }

    /// Chains announced so far, as the ring counts them.
    pub(crate) fn announced(&self) -> u16 {
        self.announced
    }

    fn describe(&self, chain: u16, bytes: u32, ask: Ask) {
        let data = DATA_AT + u64::from(chain) * u64::from(bytes);
        let direction = if ask == Ask::Read { WRITABLE } else { 0 };
        let first = chain * 3;
        self.descriptor(first, small(chain), 16, NEXT);
        self.descriptor(first + 1, data, bytes, NEXT | direction);
        self.descriptor(first + 2, small(chain) + STATUS_IN_SMALL, 1, WRITABLE);
        self.put(small(chain), &(ask as u32).to_le_bytes());
    }

    fn descriptor(&self, index: u16, at: u64, len: u32, flags: u16) {
        let to = DESCRIPTORS_AT + u64::from(index) * 16;
        self.put(to, &(GUEST_ADDR + at).to_le_bytes());
        self.put(to + 8, &len.to_le_bytes());
        self.put(to + 12, &flags.to_le_bytes());
        self.put(to + 14, &(index + 1).to_le_bytes());
    }

    fn at(&self, at: u64, len: usize) -> BufSlice {
        self.all.part(usize::try_from(at).expect("a small memory"), len)
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.at(at, bytes.len()).write(bytes);
    }
}

fn small(chain: u16) -> u64 {
    SMALL_AT + u64::from(chain) * SMALL_BYTES
}

/// Places on a disk by chance, the same ones in every run.
pub(crate) struct Places {
    state: u64,
    blocks: u64,
    sectors: u64,
}

impl Places {
    /// Blocks of `bytes` on a disk of `disk_bytes`.
    pub(crate) fn new(disk_bytes: u64, bytes: u32) -> Places {
        let bytes = u64::from(bytes);
        Places { state: 0x9e37_79b9_7f4a_7c15, blocks: disk_bytes / bytes, sectors: bytes / SECTOR_BYTES }
    }

    /// The sector where the next one begins.
    pub(crate) fn next(&mut self) -> u64 {
        // xorshift64
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % self.blocks * self.sectors
    }
}

/// A file in memory.
fn memory_file(len: u64) -> io::Result<File> {
    let file = tempfile::tempfile_in("/dev/shm")?;
    file.set_len(len)?;
    Ok(file)
}
