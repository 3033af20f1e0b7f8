//! The memory of a simulated guest, and the region where its front-end keeps what is in flight. Both outlive the
//! processes that serve it.

use crate::io::{BufSlice, gather, scatter};
use crate::vhost::{InflightRegion, Memory, MemoryView, RegionInfo};
use crate::virtio::GuestMemory;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Entries of each ring.
pub(super) const ENTRIES: u16 = 16;
/// Data bytes of one request at most.
pub(super) const DATA_BYTES: u64 = 32 << 10;
/// Bytes of a queue's rings and of everything small beside them.
pub(super) const QUEUE_BYTES: u64 = SLOTS_AT + ENTRIES as u64 * SLOT_BYTES;
/// Where a queue's slots begin, behind its rings.
pub(super) const SLOTS_AT: u64 = 0x400;
/// Header, status, serial, an indirect table and segments of the chain with that head.
pub(super) const SLOT_BYTES: u64 = 0x400;

/// Memory of a guest.
#[derive(Debug)]
pub(super) struct Ram {
    pub(super) memory: Arc<Memory>,
    view: MemoryView,
    /// Rings and everything small.
    rings: File,
    inflight: File,
    inflight_bytes: u64,
    queues: u16,
}

impl Ram {
    /// Guest address of the rings.
    pub(super) const RINGS: u64 = 0x1_0000;
    /// Guest address of the data.
    pub(super) const DATA: u64 = 0x100_0000;
    /// What the front-end's addresses are ahead of the guest's.
    pub(super) const USER: u64 = 0x7f00_0000_0000;

    pub(super) fn new(queues: u16) -> io::Result<Ram> {
        let region = |gpa, len: u64| -> io::Result<_> {
            let len = len.next_multiple_of(4096);
            let info = RegionInfo { guest_addr: gpa, len, user_addr: gpa + Self::USER, mmap_offset: 0 };
            Ok((info, Memory::file(len)?))
        };
        let small = region(Self::RINGS, u64::from(queues) * QUEUE_BYTES)?;
        let data = region(Self::DATA, u64::from(queues) * u64::from(ENTRIES) * DATA_BYTES)?;
        let rings = small.1.try_clone()?;
        let memory = Arc::new(Memory::new([small, data])?);
        let (inflight_bytes, inflight) = InflightRegion::create(queues, ENTRIES)?;
        Ok(Ram {
            view: MemoryView::new(Arc::clone(&memory)),
            memory,
            rings,
            inflight,
            inflight_bytes,
            queues,
        })
    }

    /// The region, as a new process takes it up.
    pub(super) fn inflight(&self) -> io::Result<Arc<InflightRegion>> {
        let file = self.inflight.try_clone()?;
        InflightRegion::open(file, 0, self.inflight_bytes, self.queues, ENTRIES).map(Arc::new)
    }

    /// What a killed process must not change any more. Data that is read into is undefined until its request is answered.
    pub(super) fn files(&self) -> io::Result<[File; 2]> {
        Ok([self.rings.try_clone()?, self.inflight.try_clone()?])
    }

    fn slices(&self, gpa: u64, len: usize) -> Vec<BufSlice> {
        let mut slices = Vec::with_capacity(1);
        let len = u32::try_from(len).expect("a small buffer");
        assert!(self.view.resolve(gpa, len, &mut slices), "the driver's own memory");
        slices
    }

    pub(super) fn put(&self, gpa: u64, bytes: &[u8]) {
        scatter(bytes, &self.slices(gpa, bytes.len()));
    }

    pub(super) fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        if len > 0 {
            gather(&self.slices(gpa, len), &mut bytes);
        }
        bytes
    }

    pub(super) fn get16(&self, gpa: u64) -> u16 {
        let mut b = [0; 2];
        gather(&self.slices(gpa, 2), &mut b);
        u16::from_le_bytes(b)
    }
}
