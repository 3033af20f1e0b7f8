//! The device's side of a split virtqueue. Addresses are resolved once, when the ring is set up; after that every access
//! is a plain load or store. What comes out of guest memory is checked by whoever uses it: an index here, a descriptor in
//! `virtio::chain`.

use super::memory::{Memory, SHARE_IT};
use crate::io::BufSlice;
use crate::limits;
use crate::virtio::DescriptorTable;
use std::fmt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

const DESCRIPTOR_BYTES: usize = 16;
/// Flags and index before the entries of both rings.
const RING_HEADER_BYTES: usize = 4;
const AVAIL_ENTRY_BYTES: usize = 2;
const USED_ENTRY_BYTES: usize = 8;
/// `used_event` behind the available ring, `avail_event` behind the used one.
const EVENT_BYTES: usize = 2;
const INDEX_AT: usize = 2;

/// A ring as the front-end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSetup {
    /// Entries.
    pub size: u16,
    /// Descriptor table, in the front-end's addresses; so the next two.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    /// Index of the first available entry to take.
    pub next_avail: u16,
    /// EVENT_IDX was negotiated.
    pub event_idx: bool,
}

/// What is wrong with a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// The size is not a power of two up to the limit.
    Size(u16),
    /// A part of it is misaligned or not in guest memory.
    Place(&'static str),
    /// The driver announced more chains than the ring has entries.
    AvailJump(u16),
    /// The driver announced a chain that starts outside the descriptor table.
    Head(u16),
    /// What is said to be in flight cannot be.
    InFlight(&'static str),
    /// The front-end has taken memory away.
    MemoryLost,
    /// What is written to guest memory cannot be noted in the log of dirty pages.
    Unlogged,
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RingError::Size(n) => write!(f, "a ring of {n} entries is not possible"),
            RingError::Place(what) => {
                write!(
                    f,
                    "the {what} is misaligned or outside the memory that is shared with us ({SHARE_IT})"
                )
            }
            RingError::AvailJump(n) => write!(f, "the available index jumped by {n}"),
            RingError::Head(n) => write!(f, "the chain head {n} is outside the descriptor table"),
            RingError::InFlight(why) => write!(f, "what is in flight is unknown: {why}"),
            RingError::MemoryLost => {
                f.write_str("guest memory has gone: its file was shortened, or the host has none left for it")
            }
            RingError::Unlogged => f.write_str(
                "the log of dirty pages has gone or does not reach this far; a migration would lose what is written",
            ),
        }
    }
}

impl std::error::Error for RingError {}

/// A virtqueue in guest memory. One thread uses it.
#[derive(Debug)]
pub struct Ring {
    size: u16,
    descriptors: BufSlice,
    available: BufSlice,
    used: BufSlice,
    next_avail: u16,
    next_used: u16,
    /// `used.idx` at the last decision about a signal; `None` before the first.
    signalled: Option<u16>,
    event_idx: bool,
    /// Keeps the three parts mapped.
    _memory: Arc<Memory>,
}

impl Ring {
    /// Resolves a ring. The used index goes on from where guest memory has it.
    ///
    /// # Errors
    /// [`RingError::Size`] or [`RingError::Place`].
    pub fn new(setup: &RingSetup, memory: &Arc<Memory>) -> Result<Self, RingError> {
        let size = setup.size;
        let mut layout = Queue::new(limits::MAX_QUEUE_SIZE).map_err(|_| RingError::Size(size))?;
        layout.try_set_size(size).map_err(|_| RingError::Size(size))?;
        let n = usize::from(size);
        let place = |what, addr, len: usize, align: usize| {
            let found = memory.at_user_addr(addr, len as u64).ok_or(RingError::Place(what))?;
            let aligned = (found.0.as_ptr() as usize).is_multiple_of(align);
            if aligned { Ok(found) } else { Err(RingError::Place(what)) }
        };
        let avail_bytes = RING_HEADER_BYTES + n * AVAIL_ENTRY_BYTES + EVENT_BYTES;
        let used_bytes = RING_HEADER_BYTES + n * USED_ENTRY_BYTES + EVENT_BYTES;
        let (descriptors, d) = place("descriptor table", setup.descriptors, n * DESCRIPTOR_BYTES, 16)?;
        let (available, a) = place("available ring", setup.available, avail_bytes, 2)?;
        let (used, u) = place("used ring", setup.used, used_bytes, 4)?;
        check_layout(&mut layout, memory, [d, a, u])?;
        let mut ring = Ring {
            size,
            descriptors,
            available,
            used,
            next_avail: setup.next_avail,
            next_used: 0,
            signalled: None,
            event_idx: setup.event_idx,
            _memory: Arc::clone(memory),
        };
        ring.next_used = ring.load(ring.used, INDEX_AT, Ordering::Relaxed);
        Ok(ring)
    }

    /// A 16-bit field of the rings.
    fn field(&self, part: BufSlice, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= part.len() && at.is_multiple_of(2));
        // SAFETY: `new` checked that the part is mapped in the length its layout demands and aligned to at least 2;
        // all callers pass even offsets within that length (entries are masked by the size). `_memory` keeps it mapped
        // as long as `self`. The guest reads and writes the same memory: atomics are the access for that.
        unsafe { AtomicU16::from_ptr(part.as_ptr().add(at).cast()) }
    }

    fn load(&self, part: BufSlice, at: usize, order: Ordering) -> u16 {
        u16::from_le(self.field(part, at).load(order))
    }

    fn store(&self, part: BufSlice, at: usize, value: u16, order: Ordering) {
        self.field(part, at).store(value.to_le(), order);
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// Index of the next entry to take: what GET_VRING_BASE answers once everything taken is published.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Bytes of the used ring, its event index included.
    pub fn used_bytes(&self) -> u64 {
        self.used.len() as u64
    }

    /// Index of the next used entry: what the driver sees once everything pushed is published.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Goes on behind `in_flight` chains that were taken before and are not answered yet: as the available ring has
    /// them, they follow those that were.
    pub fn resume(&mut self, in_flight: u16) {
        self.next_avail = self.next_used.wrapping_add(in_flight);
    }

    /// Chains that the driver has announced and we have not taken.
    ///
    /// # Errors
    /// [`RingError::AvailJump`]: the ring cannot be trusted any more.
    pub fn available(&self) -> Result<u16, RingError> {
        // pairs with the driver's release of the index: entries and descriptors before it are visible
        let index = self.load(self.available, INDEX_AT, Ordering::Acquire);
        let n = index.wrapping_sub(self.next_avail);
        if n > self.size { Err(RingError::AvailJump(n)) } else { Ok(n) }
    }

    /// Takes the next chain; [`Self::available`] has said that there is one.
    ///
    /// # Errors
    /// [`RingError::Head`]: the ring cannot be trusted any more.
    pub fn pop(&mut self) -> Result<u16, RingError> {
        let at = RING_HEADER_BYTES + self.slot(self.next_avail) * AVAIL_ENTRY_BYTES;
        let head = self.load(self.available, at, Ordering::Relaxed);
        if head >= self.size {
            return Err(RingError::Head(head));
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(head)
    }

    /// Puts a chain into the used ring, `len` bytes written. The driver sees it after [`Self::publish`].
    pub fn push_used(&mut self, head: u16, len: u32) {
        let at = RING_HEADER_BYTES + self.slot(self.next_used) * USED_ENTRY_BYTES;
        debug_assert!(at + USED_ENTRY_BYTES <= self.used.len());
        // SAFETY: as in `field`; entries of the used ring lie at multiples of 4 from its start, which `new` checked to
        // be aligned to 4.
        let (id, length) = unsafe {
            let p = self.used.as_ptr().add(at).cast::<u32>();
            (AtomicU32::from_ptr(p), AtomicU32::from_ptr(p.add(1)))
        };
        id.store(u32::from(head).to_le(), Ordering::Relaxed);
        length.store(len.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver everything pushed.
    pub fn publish(&mut self) {
        // status bytes and data before this are visible to a driver that sees the index
        self.store(self.used, INDEX_AT, self.next_used, Ordering::Release);
    }

    /// True if the driver wants a signal about what was published since the last call.
    pub fn should_signal(&mut self) -> bool {
        // the used index must be visible before the driver's wish is read, or both sides go to sleep
        fence(Ordering::SeqCst);
        let old = self.signalled.replace(self.next_used);
        if self.event_idx {
            let at = RING_HEADER_BYTES + usize::from(self.size) * AVAIL_ENTRY_BYTES;
            let event = self.load(self.available, at, Ordering::Relaxed);
            // the first time we do not know what the driver has seen
            return old.is_none_or(|old| passed(event, old, self.next_used));
        }
        let flags = self.load(self.available, 0, Ordering::Relaxed);
        u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
    }

    /// Tells the driver that kicks are not needed for now.
    pub fn disable_kicks(&mut self) {
        // with EVENT_IDX an index left behind says the same
        if !self.event_idx {
            self.store(self.used, 0, VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
        }
    }

    /// Asks the driver for a kick at the next chain; true if one is there already (or the ring is broken).
    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            let at = RING_HEADER_BYTES + usize::from(self.size) * USED_ENTRY_BYTES;
            self.store(self.used, at, self.next_avail, Ordering::Relaxed);
        } else {
            self.store(self.used, 0, 0, Ordering::Relaxed);
        }
        // the wish must be visible before the index is read again, or both sides go to sleep
        fence(Ordering::SeqCst);
        self.available() != Ok(0)
    }
}

/// The same rules again, as virtio-queue has them: a ring that its users would refuse is refused here too.
fn check_layout(layout: &mut Queue, memory: &Memory, parts: [GuestAddress; 3]) -> Result<(), RingError> {
    let [descriptors, available, used] = parts;
    layout.try_set_desc_table_address(descriptors).map_err(|_| RingError::Place("descriptor table"))?;
    layout.try_set_avail_ring_address(available).map_err(|_| RingError::Place("available ring"))?;
    layout.try_set_used_ring_address(used).map_err(|_| RingError::Place("used ring"))?;
    layout.set_ready(true);
    if layout.is_valid(memory.guest()) { Ok(()) } else { Err(RingError::Place("ring")) }
}

/// True if the step from `old` to `new` went past `event` (virtio 2.7.10, `vring_need_event`).
fn passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

impl DescriptorTable for Ring {
    fn size(&self) -> u16 {
        self.size
    }

    fn get(&self, index: u16) -> Descriptor {
        let at = self.slot(index) * DESCRIPTOR_BYTES;
        // SAFETY: `new` checked that the table is mapped, `size` entries long and aligned to 16; the index is masked.
        // Volatile: the guest may write meanwhile, and each half is fetched exactly once.
        let [addr, rest] =
            unsafe { ptr::read_volatile(self.descriptors.as_ptr().add(at).cast::<[u64; 2]>()) };
        let [l0, l1, l2, l3, f0, f1, n0, n1] = rest.to_ne_bytes();
        Descriptor::new(
            u64::from_le(addr),
            u32::from_le_bytes([l0, l1, l2, l3]),
            u16::from_le_bytes([f0, f1]),
            u16::from_le_bytes([n0, n1]),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::RegionInfo;
    use super::*;
    use proptest::prelude::*;

    const USER: u64 = 0x7f00_0000_0000;

    fn memory() -> Arc<Memory> {
        let f = tempfile::tempfile().unwrap();
        f.set_len(0x10000).unwrap();
        let info = RegionInfo { guest_addr: 0x1000, len: 0x10000, user_addr: USER, mmap_offset: 0 };
        Arc::new(Memory::new([(info, f)]).unwrap())
    }

    fn setup(size: u16, next_avail: u16, event_idx: bool) -> RingSetup {
        RingSetup {
            size,
            descriptors: USER,
            available: USER + 0x4000,
            used: USER + 0x8000,
            next_avail,
            event_idx,
        }
    }

    /// The driver's side, through the same memory.
    struct Driver(Arc<Memory>);

    impl Driver {
        fn put(&self, at: u64, v: u16) {
            self.0.at_user_addr(USER + at, 2).unwrap().0.write(&v.to_le_bytes());
        }
        fn get(&self, at: u64) -> u16 {
            let mut b = [0; 2];
            self.0.at_user_addr(USER + at, 2).unwrap().0.read(&mut b);
            u16::from_le_bytes(b)
        }
    }

    #[test]
    fn rings_out_of_place_are_refused() {
        let m = memory();
        let ok = setup(256, 0, true);
        assert!(Ring::new(&ok, &m).is_ok());
        for size in [0, 3, 2048] {
            assert_eq!(Ring::new(&RingSetup { size, ..ok }, &m).unwrap_err(), RingError::Size(size));
        }
        for s in [
            RingSetup { descriptors: USER + 8, ..ok },
            RingSetup { descriptors: USER + 0x10000 - 16 * 255, ..ok },
            RingSetup { available: USER + 0x4001, ..ok },
            RingSetup { available: USER + 0x10000 - 4 - 512, ..ok },
            RingSetup { used: USER + 0x8002, ..ok },
            RingSetup { used: USER + 0x10000 - 4 - 2048, ..ok },
            RingSetup { used: USER - 16, ..ok },
            RingSetup { used: u64::MAX - 3, ..ok },
        ] {
            let refused = Ring::new(&s, &m).err();
            assert!(matches!(refused, Some(RingError::Place(_))), "{s:x?}");
            // QEMU with memory-backend-ram sends what little has a descriptor, and the rings are elsewhere
            assert!(refused.is_some_and(|e| e.to_string().contains("share=on")), "{s:x?}");
        }
    }

    #[test]
    fn broken_indices_are_told() {
        let m = memory();
        let d = Driver(Arc::clone(&m));
        let mut r = Ring::new(&setup(8, 0xfffe, false), &m).unwrap();
        d.put(0x4002, 7);
        assert_eq!(r.available(), Err(RingError::AvailJump(9)));
        d.put(0x4002, 6);
        assert_eq!(r.available(), Ok(8));
        d.put(0x4004 + 2 * 6, 8);
        assert_eq!(r.pop(), Err(RingError::Head(8)));
        d.put(0x4004 + 2 * 6, 7);
        assert_eq!(r.pop(), Ok(7));
        assert_eq!(r.next_avail(), 0xffff);
    }

    proptest! {
        /// Both directions against the rule written out: a signal exactly when the driver's event lies among the
        /// entries published since the last decision.
        #[test]
        fn signals_come_when_the_event_was_passed(start: u16, steps in prop::collection::vec((1u16..20, any::<u16>()), 1..40)) {
            let m = memory();
            let d = Driver(Arc::clone(&m));
            d.put(0x8002, start);
            let mut r = Ring::new(&setup(32, start, true), &m).unwrap();
            prop_assert!(r.should_signal());
            let mut old = start;
            for (n, ahead) in steps {
                let event = old.wrapping_add(ahead % 40);
                d.put(0x4004 + 64, event);
                for i in 0..n {
                    r.push_used(i, 1);
                }
                r.publish();
                let new = old.wrapping_add(n);
                prop_assert_eq!(d.get(0x8002), new);
                let within = (0..n).any(|i| old.wrapping_add(i) == event);
                prop_assert_eq!(r.should_signal(), within);
                old = new;
            }
        }

        #[test]
        fn chains_come_out_in_order_over_the_wrap(start: u16, batches in prop::collection::vec(0u16..=16, 1..60)) {
            let m = memory();
            let d = Driver(Arc::clone(&m));
            let mut r = Ring::new(&setup(16, start, true), &m).unwrap();
            let mut index = start;
            for n in batches {
                for i in 0..n {
                    let at = index.wrapping_add(i);
                    d.put(0x4004 + 2 * u64::from(at % 16), at % 16);
                }
                d.put(0x4002, index.wrapping_add(n));
                prop_assert_eq!(r.enable_kicks(), n > 0);
                prop_assert_eq!(r.available(), Ok(n));
                for i in 0..n {
                    prop_assert_eq!(r.pop(), Ok(index.wrapping_add(i) % 16));
                }
                index = index.wrapping_add(n);
                prop_assert!(!r.enable_kicks());
                prop_assert_eq!(d.get(0x8004 + 128), index);
            }
        }
    }

    #[test]
    fn flags_without_event_idx() {
        let m = memory();
        let d = Driver(Arc::clone(&m));
        let mut r = Ring::new(&setup(8, 0, false), &m).unwrap();
        assert!(r.should_signal());
        d.put(0x4000, 1);
        assert!(!r.should_signal());
        r.disable_kicks();
        assert_eq!(d.get(0x8000), 1);
        assert!(!r.enable_kicks());
        assert_eq!(d.get(0x8000), 0);
    }
}
