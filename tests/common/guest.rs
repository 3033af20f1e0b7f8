//! A guest without a VM: memory in a file, and the driver's side of virtqueues.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

const WRITE: u16 = 2;
const NEXT: u16 = 1;

/// Bytes of a usual huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// One region of guest memory. Its "user address" is made up: nobody follows it on this side.
pub struct GuestRegion {
    pub memory: GuestMemoryMmap,
    file: File,
    pub gpa: u64,
    pub user: u64,
    pub len: u64,
    offset: u64,
}

impl GuestRegion {
    pub fn new(gpa: u64, len: u64, offset: u64) -> Arc<Self> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(offset + len).unwrap();
        Self::of(file, gpa, len, offset)
    }

    /// Memory at address 0 in so many huge pages; `None`, with a word why, where the machine has none to spare.
    pub fn huge(pages: u64) -> Option<Arc<Self>> {
        // SAFETY: a C string and flags.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_HUGETLB) };
        // SAFETY: the descriptor, if it is one, is new and nobody else's.
        let file = (fd >= 0).then(|| File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
        let reserved = file.filter(|f| {
            let page = f.metadata().is_ok_and(|m| m.blksize() == HUGE_PAGE);
            // Mapping alone reserves none.
            // SAFETY: takes numbers.
            page && unsafe { libc::fallocate(f.as_raw_fd(), 0, 0, (pages * HUGE_PAGE) as libc::off_t) } == 0
        });
        if reserved.is_none() {
            println!("skipped: {pages} huge pages cannot be had (sysctl vm.nr_overcommit_hugepages)");
        }
        reserved.map(|file| Self::of(file, 0, pages * HUGE_PAGE, 0))
    }

    fn of(file: File, gpa: u64, len: u64, offset: u64) -> Arc<Self> {
        let place = FileOffset::new(file.try_clone().unwrap(), offset);
        let ranges = [(GuestAddress(gpa), len as usize, Some(place))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        Arc::new(GuestRegion { memory, file, gpa, user: 0x7f00_0000_0000 + gpa, len, offset })
    }

    pub fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.gpa,
            memory_size: self.len,
            userspace_addr: self.user,
            mmap_offset: self.offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Takes the memory from this address on away, as a front-end can. Nobody on this side may touch it afterwards.
    pub fn shorten(&self, gpa: u64) {
        self.file.set_len(self.offset + (gpa - self.gpa)).unwrap();
    }

    pub fn put(&self, gpa: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(gpa)).unwrap();
    }

    pub fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.memory.read_slice(&mut b, GuestAddress(gpa)).unwrap();
        b
    }

    fn put16(&self, gpa: u64, v: u16) {
        self.memory.store(v.to_le(), GuestAddress(gpa), Ordering::Release).unwrap();
    }

    fn get16(&self, gpa: u64) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(gpa), Ordering::Acquire).unwrap())
    }
}

/// A descriptor of a chain to be: address, length, device-writable.
pub type Part = (u64, u32, bool);

const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
const SLOTS: u64 = 0x10000;
const SLOT_BYTES: u64 = 0x8000;
const DATA: u64 = 0x1000;
/// Slots of buffers of a queue.
pub const QUEUE_SLOTS: usize = 16;
/// Bytes that a slot takes.
pub const SLOT_DATA: u64 = SLOT_BYTES - DATA;
/// Memory that a queue takes.
pub const QUEUE_BYTES: u64 = SLOTS + QUEUE_SLOTS as u64 * SLOT_BYTES;

/// The driver's side of a virtqueue, with 16 slots of buffers behind it.
pub struct GuestQueue {
    pub region: Arc<GuestRegion>,
    at: u64,
    pub size: u16,
    avail: u16,
    used: u16,
    next_desc: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    event_idx: bool,
}

impl GuestQueue {
    /// A queue at the `n`-th place of a region.
    pub fn new(region: &Arc<GuestRegion>, n: u64, size: u16, event_idx: bool) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let at = region.gpa + n * QUEUE_BYTES;
        region.put(at, &vec![0; SLOTS as usize]);
        let region = Arc::clone(region);
        let (kick, call, err) = (event(), event(), event());
        GuestQueue { region, at, size, avail: 0, used: 0, next_desc: 0, kick, call, err, event_idx }
    }

    pub fn config(&self) -> VringConfigData {
        let user = |at: u64| self.region.user + (self.at + at - self.region.gpa);
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: user(0),
            used_ring_addr: user(USED),
            avail_ring_addr: user(AVAIL),
            log_addr: None,
        }
    }

    pub fn avail_index(&self) -> u16 {
        self.avail
    }

    /// Announces a chain of these parts, without a kick; returns its head.
    pub fn push(&mut self, parts: &[Part]) -> u16 {
        let head = self.next_desc;
        for (i, (addr, len, writable)) in parts.iter().enumerate() {
            let this = self.next_desc;
            self.next_desc = (self.next_desc + 1) % self.size;
            let mut d = [0; 16];
            d[..8].copy_from_slice(&addr.to_le_bytes());
            d[8..12].copy_from_slice(&len.to_le_bytes());
            let more = if i + 1 < parts.len() { NEXT } else { 0 };
            let flags = more | if *writable { WRITE } else { 0 };
            d[12..14].copy_from_slice(&flags.to_le_bytes());
            d[14..].copy_from_slice(&self.next_desc.to_le_bytes());
            self.region.put(self.at + 16 * u64::from(this), &d);
        }
        self.announce(head, 1);
        head
    }

    /// Puts a head into the available ring and moves the index on by `by`.
    pub fn announce(&mut self, head: u16, by: u16) {
        let entry = self.at + AVAIL + 4 + 2 * u64::from(self.avail % self.size);
        self.region.put(entry, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(by);
        self.region.put16(self.at + AVAIL + 2, self.avail);
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Kicks if the device asked for that at one of the chains announced since the index was `since`.
    pub fn kick_if_asked(&self, since: u16) {
        std::sync::atomic::fence(Ordering::SeqCst);
        let asked = self.region.get16(self.at + USED + 4 + 8 * u64::from(self.size));
        if !self.event_idx || self.avail.wrapping_sub(asked).wrapping_sub(1) < self.avail.wrapping_sub(since)
        {
            self.kick();
        }
    }

    /// The next used entry, if one comes in time.
    pub fn wait(&mut self, at_most: Duration) -> Option<(u16, u32)> {
        let start = Instant::now();
        while self.region.get16(self.at + USED + 2) == self.used {
            if start.elapsed() > at_most {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let entry = self.region.get(self.at + USED + 4 + 8 * u64::from(self.used % self.size), 8);
        self.used = self.used.wrapping_add(1);
        if self.event_idx {
            let event = self.at + AVAIL + 4 + 2 * u64::from(self.size);
            self.region.put16(event, self.used);
        }
        let word = |i: usize| u32::from_le_bytes(entry[i..i + 4].try_into().unwrap());
        Some((u16::try_from(word(0)).unwrap(), word(4)))
    }

    /// The next used entry, for a driver that sleeps until it is signalled; `None`: no signal came in time.
    pub fn wait_for_signal(&mut self, at_most: Duration) -> Option<(u16, u32)> {
        loop {
            // what was asked for at the last entry comes before the look
            std::sync::atomic::fence(Ordering::SeqCst);
            if let Some(entry) = self.wait(Duration::ZERO) {
                return Some(entry);
            }
            let mut call = libc::pollfd { fd: self.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor, on the stack for as long as the call lasts.
            let n = unsafe { libc::poll(&raw mut call, 1, at_most.as_millis() as libc::c_int) };
            if n == 0 {
                return None;
            }
            let _ = self.call.read();
        }
    }

    /// As [`Self::post`], with descriptors of the slot's own: for requests that end in any order. Needs a size of 64.
    pub fn post_in_place(&mut self, n: u64, kind: u32, sector: u64, out: &[u8], inward: u32) -> u16 {
        self.next_desc = 4 * u16::try_from(n).unwrap();
        self.post(n, kind, sector, out, inward)
    }

    fn slot(&self, n: u64) -> u64 {
        self.at + SLOTS + n * SLOT_BYTES
    }

    /// Announces a request with buffers of slot `n`; data of the driver's first part follows the header.
    pub fn post(&mut self, n: u64, kind: u32, sector: u64, out: &[u8], inward: u32) -> u16 {
        let at = self.slot(n);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.region.put(at, &header);
        self.region.put(at + 16, &[0xee]);
        let mut parts = vec![(at, 16, false)];
        if !out.is_empty() {
            self.region.put(at + DATA, out);
            parts.push((at + DATA, out.len() as u32, false));
        }
        if inward > 0 {
            parts.push((at + DATA, inward, true));
        }
        parts.push((at + 16, 1, true));
        self.push(&parts)
    }

    /// Where the data of slot `n` is.
    pub fn data_at(&self, n: u64) -> u64 {
        self.slot(n) + DATA
    }

    pub fn status(&self, n: u64) -> u8 {
        self.region.get(self.slot(n) + 16, 1)[0]
    }

    pub fn data_into(&self, n: u64, out: &mut [u8]) {
        self.region.memory.read_slice(out, GuestAddress(self.slot(n) + DATA)).unwrap();
    }

    pub fn data(&self, n: u64, len: usize) -> Vec<u8> {
        self.region.get(self.slot(n) + DATA, len)
    }

    /// Makes a request in slot 0 and waits for it: status, used length, data.
    pub fn request(&mut self, kind: u32, sector: u64, out: &[u8], inward: u32) -> (u8, u32, Vec<u8>) {
        let head = self.post(0, kind, sector, out, inward);
        self.kick();
        let (id, len) = self.wait(Duration::from_secs(10)).expect("an answer");
        assert_eq!(id, head);
        (self.status(0), len, self.data(0, inward as usize))
    }

    /// Writes a pattern and reads it back.
    pub fn check_io(&mut self, sector: u64, seed: u8) {
        let data: Vec<u8> = (0..1024u32).map(|i| (i as u8).wrapping_mul(7) ^ seed).collect();
        let (status, len, _) = self.request(T_OUT, sector, &data, 0);
        assert_eq!((status, len), (0, 1));
        let (status, len, got) = self.request(T_IN, sector, &[], 1024);
        assert_eq!((status, len), (0, 1025));
        assert!(got == data, "what was written is not what was read");
    }
}
