//! A guest that writes anything into a virtqueue, against the real worker over a disk in memory.
//!
//! The case is a program: first what the device is like, then what the guest does, step by step. Between the steps nobody
//! but the worker touches guest memory, so what it takes from the ring is known beforehand, and each change it makes is
//! held against the buffers that the guest has offered for writing.

use super::{Input, memfd};
use crate::common::ram::{Pace, RamChannel, RamDisk};
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vdblk::vhost::{
    DirtyLog, InflightRegion, Memory, QueueWorker, RegionInfo, Ring, RingExtras, RingLog, RingSetup,
    WorkerOptions,
};
use vdblk::virtio::Rules;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Longer cases are no cases.
pub(crate) const MAX_BYTES: usize = 4096;
/// Things a guest does in one case.
const MAX_ACTIONS: usize = 300;
const DISK_BYTES: usize = 64 << 10;
/// Entries of the largest ring.
const SLOTS: u16 = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Guest memory: ring and tables; buffers, side by side with it and ending inside a page; behind a hole, one page more.
const REGIONS: [(u64, u64); 3] = [(0x1000, 0x4000), (0x5000, 0x3800), (0x10000, 0x1000)];
/// Where each region begins in the one file that holds them all. What lies between is nobody's.
const FILE_AT: [u64; 3] = [0x1000, 0x6000, 0xb000];
const FILE_BYTES: u64 = 0xd000;
const CANARY: u8 = 0xc5;

const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT_TABLES: u64 = 0x4000;
const BUFFERS: u64 = 0x5000;
/// Front-ends' addresses are other ones.
const USER: u64 = 0x7f00_0000_0000;

type Range = std::ops::Range<u64>;

fn overlap(a: &Range, b: &Range) -> bool {
    a.start < b.end && b.start < a.end
}

fn any_overlap(a: &[Range], b: &[Range]) -> bool {
    a.iter().any(|a| b.iter().any(|b| overlap(a, b)))
}

/// The guest's memory; made once, since mapping it takes longer than a case.
struct Guest {
    file: File,
    /// As the worker sees it.
    memory: Arc<Memory>,
    /// As the guest does.
    view: GuestMemoryMmap,
}

impl Guest {
    fn new() -> Self {
        let file = memfd(FILE_BYTES);
        let region = |(i, &(guest_addr, len)): (usize, &(u64, u64))| {
            let info = RegionInfo { guest_addr, len, user_addr: USER + guest_addr, mmap_offset: FILE_AT[i] };
            (info, file.try_clone().unwrap())
        };
        let memory = Arc::new(Memory::new(REGIONS.iter().enumerate().map(region)).unwrap());
        let range = |(i, &(at, len)): (usize, &(u64, u64))| {
            (GuestAddress(at), len as usize, Some(FileOffset::new(file.try_clone().unwrap(), FILE_AT[i])))
        };
        let ranges = REGIONS.iter().enumerate().map(range);
        let view = GuestMemoryMmap::from_ranges_with_files(ranges.collect::<Vec<_>>()).unwrap();
        Guest { file, memory, view }
    }

    fn clear(&self) {
        let mut all = vec![CANARY; FILE_BYTES as usize];
        for (at, (_, len)) in FILE_AT.iter().zip(REGIONS) {
            all[*at as usize..(at + len) as usize].fill(0);
        }
        self.file.write_all_at(&all, 0).unwrap();
    }

    fn all(&self) -> Vec<u8> {
        let mut all = vec![0; FILE_BYTES as usize];
        self.file.read_exact_at(&mut all, 0).unwrap();
        all
    }

    /// The guest address of a byte of the file.
    fn address(place: u64) -> Option<u64> {
        let inside = |(at, (_, len)): (&u64, &(u64, u64))| (*at..at + len).contains(&place);
        let i = FILE_AT.iter().zip(&REGIONS).position(inside)?;
        Some(REGIONS[i].0 + (place - FILE_AT[i]))
    }

    /// Writes as much as there is memory for.
    fn put(&self, gpa: u64, bytes: &[u8]) {
        let _ = self.view.write(bytes, GuestAddress(gpa));
    }

    /// A copy of guest memory; `None` where some of it is missing.
    fn get(&self, gpa: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.view.read_slice(&mut bytes, GuestAddress(gpa)).ok().map(|()| bytes)
    }

    fn u16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.get(gpa, 2).unwrap().try_into().unwrap())
    }
}

/// What a chain offers, by the descriptors that can be reached at all.
#[derive(Clone, Debug, Default)]
struct Offer {
    head: u16,
    /// Bytes in device-writable descriptors.
    writable: u64,
    /// Where they are.
    ranges: Vec<Range>,
    /// Indirect tables.
    tables: Vec<Range>,
}

#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn descriptors(raw: &[u8]) -> Vec<Descriptor> {
    let one = |d: &[u8; 16]| Descriptor {
        addr: u64::from_le_bytes(d[..8].try_into().unwrap()),
        len: u32::from_le_bytes(d[8..12].try_into().unwrap()),
        flags: u16::from_le_bytes([d[12], d[13]]),
        next: u16::from_le_bytes([d[14], d[15]]),
    };
    raw.as_chunks::<16>().0.iter().map(one).collect()
}

impl Offer {
    /// Everything a chain could mean: more than a device may make of it, never less.
    fn of(guest: &Guest, table: &[Descriptor], head: u16) -> Self {
        let mut offer = Offer { head, ..Offer::default() };
        offer.walk(guest, table, head, true);
        offer
    }

    fn walk(&mut self, guest: &Guest, table: &[Descriptor], head: u16, outer: bool) {
        let mut at = head;
        for _ in 0..table.len() {
            let Some(d) = table.get(usize::from(at)) else { return };
            let range = d.addr..d.addr.saturating_add(u64::from(d.len));
            if d.flags & INDIRECT != 0 {
                if outer && let Some(raw) = guest.get(d.addr, d.len.min(0x8000) as usize) {
                    self.tables.push(range);
                    self.walk(guest, &descriptors(&raw), 0, false);
                }
            } else if d.flags & WRITE != 0 {
                self.writable += u64::from(d.len);
                self.ranges.push(range);
            }
            if d.flags & NEXT == 0 {
                return;
            }
            at = d.next;
        }
    }
}

/// The ring as the guest has set it up.
#[derive(Clone, Copy, Debug)]
struct Shape {
    size: u16,
    event_idx: bool,
    start_avail: u16,
    inflight: bool,
    log: bool,
}

/// A worker, and what it must have taken and may have answered.
struct Bench<'a> {
    guest: &'a Guest,
    disk: Arc<RamDisk>,
    worker: QueueWorker<RamChannel>,
    shape: Shape,
    next_avail: u16,
    next_used: u16,
    /// Taken and not answered.
    outstanding: Vec<Offer>,
    /// The guest's index has contradicted itself: nothing more is taken.
    broken: bool,
    /// What is offered for writing may change what is to be read as ring: no statement about the rest of the case.
    tangled: bool,
    tracked: Option<Arc<InflightRegion>>,
    log: Option<File>,
}

impl<'a> Bench<'a> {
    fn new(guest: &'a Guest, input: &mut Input<'_>) -> Self {
        let (flags, size) = (input.u8(), input.u8());
        let pace = if flags & 1 == 0 { Pace::Deferred } else { Pace::Inline };
        let rules =
            Rules { size_bytes: DISK_BYTES as u64, read_only: flags & 2 != 0, discard: flags & 4 == 0 };
        let disk = RamDisk::new(DISK_BYTES);
        let options = WorkerOptions { queue: 0, slots: SLOTS, rules, serial: "a serial number".into() };
        let shape = Shape {
            size: [16, 1, 2, 4, 8, 64][usize::from(size % 6)],
            event_idx: flags & 8 != 0,
            start_avail: if flags & 16 != 0 { 0xfff8 } else { 0 },
            inflight: flags & 32 != 0,
            log: flags & 64 != 0,
        };
        let mut bench = Bench {
            guest,
            worker: QueueWorker::new(disk.channel(pace), &options),
            disk,
            shape,
            next_avail: shape.start_avail,
            next_used: shape.start_avail.wrapping_add(u16::from(flags >> 7) * 77),
            outstanding: Vec::new(),
            broken: false,
            tangled: false,
            tracked: None,
            log: None,
        };
        guest.put(AVAIL + 2, &bench.next_avail.to_le_bytes());
        guest.put(USED + 2, &bench.next_used.to_le_bytes());
        bench.worker.set_memory(guest.memory.clone());
        bench.start();
        bench
    }

    fn start(&mut self) {
        let Shape { size, event_idx, .. } = self.shape;
        let setup = RingSetup {
            size,
            descriptors: USER + TABLE,
            available: USER + AVAIL,
            used: USER + USED,
            next_avail: self.next_avail,
            event_idx,
        };
        let mut extras = RingExtras::default();
        // a tracker takes the used index for what was taken and answered
        if self.shape.inflight && self.next_avail == self.next_used {
            let (bytes, file) = InflightRegion::create(1, SLOTS).unwrap();
            let region = Arc::new(InflightRegion::open(file, 0, bytes, 1, SLOTS).unwrap());
            extras.inflight = region.tracker(0);
            self.tracked = Some(region);
        }
        if self.shape.log {
            let file = memfd(4096);
            let log = DirtyLog::open(file.try_clone().unwrap(), 0, 4096).unwrap();
            extras.log = Some(RingLog { log: Arc::new(log), used: Some(USED) });
            self.log = Some(file);
        }
        let ring = Ring::new(&setup, &self.guest.memory).unwrap();
        self.worker.start(ring, extras).unwrap();
    }

    fn used_ring(&self) -> Range {
        USED..USED + 6 + 8 * u64::from(self.shape.size)
    }

    /// The heads the worker has to take in its next step.
    fn announced(&mut self) -> Vec<u16> {
        if self.broken {
            return Vec::new();
        }
        let size = self.shape.size;
        let n = self.guest.u16(AVAIL + 2).wrapping_sub(self.next_avail);
        if n > size {
            self.broken = true;
            return Vec::new();
        }
        let mut heads = Vec::new();
        for _ in 0..n {
            let head = self.guest.u16(AVAIL + 4 + 2 * u64::from(self.next_avail % size));
            if head >= size {
                self.broken = true;
                break;
            }
            self.next_avail = self.next_avail.wrapping_add(1);
            heads.push(head);
        }
        heads
    }

    /// Lets the worker do what it can, once.
    fn step(&mut self) -> bool {
        let size = u64::from(self.shape.size);
        let table = descriptors(&self.guest.get(TABLE, 16 * usize::from(self.shape.size)).unwrap());
        let heads = self.announced();
        let taken: Vec<Offer> = heads.iter().map(|h| Offer::of(self.guest, &table, *h)).collect();
        let mut read = vec![TABLE..TABLE + 16 * size, AVAIL..AVAIL + 6 + 2 * size, self.used_ring()];
        read.extend(taken.iter().flat_map(|o| o.tables.clone()));
        self.outstanding.extend(taken);
        let offered: Vec<Range> = self.outstanding.iter().flat_map(|o| o.ranges.clone()).collect();
        self.tangled |= any_overlap(&offered, &read);
        // a guest that writes to the used ring itself, or has more under way than that has entries
        self.tangled |= self.guest.u16(USED + 2) != self.next_used;
        self.tangled |= self.outstanding.len() > usize::from(self.shape.size);
        let before = self.guest.all();
        let moved = self.worker.step(true);
        if !self.tangled {
            self.judge_changes(&before, &offered);
            self.collect();
        }
        moved
    }

    /// Nothing was written but what was offered, and the used ring; and it was logged.
    fn judge_changes(&self, before: &[u8], offered: &[Range]) {
        let log = self.log.as_ref().map(|f| {
            let mut pages = [0; 4096];
            f.read_exact_at(&mut pages, 0).unwrap();
            pages
        });
        let after = self.guest.all();
        // most of it is as it was
        let pieces =
            before.chunks(256).zip(after.chunks(256)).enumerate().filter(|(_, (old, new))| old != new);
        for (i, (old, new)) in pieces {
            let changed = old.iter().zip(new).enumerate().filter(|(_, (old, new))| old != new);
            for place in changed.map(|(n, _)| (256 * i + n) as u64) {
                let gpa =
                    Guest::address(place).unwrap_or_else(|| panic!("wrote outside memory, at {place:#x}"));
                let may = self.used_ring().contains(&gpa) || offered.iter().any(|r| r.contains(&gpa));
                assert!(may, "wrote to {gpa:#x}, which was not offered");
                let page = gpa / 4096;
                let logged = log.is_none_or(|l| l[(page / 8) as usize] & 1 << (page % 8) != 0);
                assert!(logged, "wrote to {gpa:#x} and did not log it");
            }
        }
    }

    /// Every new used entry answers something that was taken.
    fn collect(&mut self) {
        let now = self.guest.u16(USED + 2);
        while self.next_used != now {
            let entry = USED + 4 + 8 * u64::from(self.next_used % self.shape.size);
            let raw = self.guest.get(entry, 8).unwrap();
            let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
            let (id, len) = (word(0), u64::from(word(4)));
            let fits = |o: &Offer| u32::from(o.head) == id && o.writable >= len;
            let Some(i) = self.outstanding.iter().position(fits) else {
                panic!("head {id} answered with {len} bytes; there are {:?}", self.outstanding)
            };
            let answered = self.outstanding.remove(i);
            // announced twice, so it might as well have been the other
            if let Some(twin) = self.outstanding.iter_mut().find(|o| o.head == answered.head) {
                twin.writable = twin.writable.max(answered.writable);
                twin.ranges.extend(answered.ranges);
            }
            self.next_used = self.next_used.wrapping_add(1);
        }
    }

    /// Until nothing moves any more.
    fn drain(&mut self) {
        self.disk.release();
        let steps = (0..10_000).take_while(|_| self.step()).count();
        assert!(steps < 10_000, "the worker does not come to rest");
        assert_eq!(self.worker.in_flight(), 0);
        if !self.tangled {
            assert!(self.outstanding.is_empty(), "never answered: {:?}", self.outstanding);
        }
    }

    /// Stops the ring and sets up a clean one on the same worker.
    fn restart(&mut self) {
        self.worker.stop();
        let next = self.worker.stopped().expect("nothing is in flight");
        if !self.tangled {
            assert_eq!(next, self.next_avail, "the index of the next chain to take");
        }
        if let Some(region) = self.tracked.take()
            && !self.tangled
        {
            let left = region.tracker(0).unwrap().resume(self.shape.size, self.next_used);
            assert_eq!(left, Ok(Some(Vec::new())), "everything was answered");
        }
        self.guest.clear();
        (self.next_avail, self.next_used) = (next, 0);
        self.guest.put(AVAIL + 2, &next.to_le_bytes());
        (self.broken, self.tangled) = (false, false);
        self.outstanding.clear();
        self.start();
    }

    /// A request in order is served; its status and data.
    fn good(&mut self, kind: u32, data: &[u8], inward: u32) -> (u8, Vec<u8>) {
        let (header, payload, status) = (BUFFERS, BUFFERS + 0x100, BUFFERS + 0x1000);
        self.guest.put(header, &[&kind.to_le_bytes()[..], &[0; 4], &3u64.to_le_bytes()].concat());
        self.guest.put(payload, data);
        self.guest.put(status, &[0xee]);
        let len = if inward > 0 { inward } else { u32::try_from(data.len()).unwrap() };
        let write = if inward > 0 { WRITE } else { 0 };
        let entries = [
            descriptor(header, 16, NEXT, 1),
            descriptor(payload, len, NEXT | write, 2),
            descriptor(status, 1, WRITE, 0),
        ];
        // in a table of its own: the ring may have one entry only
        self.guest.put(INDIRECT_TABLES, &entries.concat());
        self.guest.put(TABLE, &descriptor(INDIRECT_TABLES, 48, INDIRECT, 0));
        announce(self, 0);
        self.drain();
        let got = self.guest.get(payload, inward as usize).unwrap();
        (self.guest.get(status, 1).unwrap()[0], got)
    }

    /// What is written is read back, or refused where nothing may be written.
    fn is_served(&mut self, read_only: bool, fill: u8) {
        let data = [fill; 512];
        let (status, _) = self.good(1, &data, 0);
        assert_eq!(status, u8::from(read_only), "a write in order");
        let (status, got) = self.good(0, &[], 512);
        assert_eq!(status, 0, "a read in order");
        assert!(read_only || got == data, "what was written is not what was read");
    }
}

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

/// Puts a head into the available ring.
fn announce(bench: &Bench<'_>, head: u16) {
    let index = bench.guest.u16(AVAIL + 2);
    let at = AVAIL + 4 + 2 * u64::from(index % bench.shape.size);
    bench.guest.put(at, &head.to_le_bytes());
    bench.guest.put(AVAIL + 2, &index.wrapping_add(1).to_le_bytes());
}

/// An address on a border, somewhere in memory, or anywhere.
fn address(input: &mut Input<'_>) -> u64 {
    let borders = [
        0,
        0xfff,
        0x1000,
        AVAIL,
        USED,
        0x4ff0,
        0x4fff,
        0x5000,
        0x87f0,
        0x87ff,
        0x8800,
        0x1_0000,
        0x1_0ff0,
        0x1_0fff,
        0x1_1000,
        u64::MAX,
        u64::MAX - 15,
        1 << 32,
    ];
    match input.u8() {
        b @ 0..=127 => BUFFERS + u64::from(b) * 0x70,
        b @ 128..=191 => INDIRECT_TABLES + u64::from(b % 64) * 64,
        b @ 192..=223 => borders[usize::from(b - 192) % borders.len()],
        224..=247 => u64::from(input.u16()),
        _ => input.u64(),
    }
}

fn length(input: &mut Input<'_>) -> u32 {
    let usual = [16, 1, 512, 513, 0, 15, 17, 32, 48, 64, 528, 1024, 4096, 0x3800, 20, 21];
    match input.u8() {
        b @ 0..=191 => usual[usize::from(b) % usual.len()],
        b @ 192..=239 => u32::from(b) * 16,
        240..=250 => u32::from(input.u16()),
        _ => input.u32(),
    }
}

fn any_descriptor(input: &mut Input<'_>) -> Vec<u8> {
    let (addr, len, f) = (address(input), length(input), input.u8());
    let flags = if f < 240 { u16::from(f & 7) } else { input.u16() };
    let next = if f < 200 { u16::from(input.u8() % 24) } else { input.u16() };
    descriptor(addr, len, flags, next)
}

/// One thing that a guest does.
fn act(bench: &mut Bench<'_>, input: &mut Input<'_>) {
    let size = bench.shape.size;
    match input.u8() % 12 {
        0 | 1 => {
            let at = TABLE + 16 * u64::from(u16::from(input.u8()) % size);
            let d = any_descriptor(input);
            bench.guest.put(at, &d);
        }
        2 => {
            let at = INDIRECT_TABLES + 16 * u64::from(input.u8());
            let d = any_descriptor(input);
            bench.guest.put(at, &d);
        }
        3 => {
            let (at, kind) = (address(input), u32::from(input.u8() % 16));
            let sector = if input.u8() < 250 { u64::from(input.u8()) } else { input.u64() };
            bench.guest.put(at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        }
        4 | 5 => {
            let head = u16::from(input.u8()) % size;
            announce(bench, head);
        }
        6 => whole_chain(bench, input),
        7 => drop(bench.step()),
        8 => bench.disk.hold(),
        9 => bench.disk.release(),
        10 => {
            let (at, n) = (address(input), input.u8() % 64);
            let bytes = input.take(usize::from(n)).to_vec();
            bench.guest.put(at, &bytes);
        }
        _ => match input.u8() {
            0..=99 => bench.guest.put(AVAIL + 2, &input.u16().to_le_bytes()),
            100..=199 => announce(bench, input.u16()),
            _ => {
                bench.guest.put(AVAIL, &input.u16().to_le_bytes());
                bench.guest.put(AVAIL + 4 + 2 * u64::from(size), &input.u16().to_le_bytes());
            }
        },
    }
}

/// A request as drivers make them, at some descriptors in a row.
fn whole_chain(bench: &Bench<'_>, input: &mut Input<'_>) {
    let (kind, first) = (u32::from(input.u8() % 14), u16::from(input.u8()) % bench.shape.size);
    let (sector, n) = (u64::from(input.u8()), u64::from(input.u8() % 8));
    let at = BUFFERS + n * 0x600;
    bench.guest.put(at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    let segment = [&sector.to_le_bytes()[..], &8u32.to_le_bytes(), &u32::from(input.u8() & 1).to_le_bytes()];
    bench.guest.put(at + 16, &segment.concat());
    let (data, flags) = match kind {
        0 => (512, WRITE),
        8 => (20, WRITE),
        11 | 13 => (16, 0),
        _ => (512, 0),
    };
    let next = |i: u16| (first + i) % bench.shape.size;
    let parts = [
        descriptor(at, 16, NEXT, next(1)),
        descriptor(at + 16, data, NEXT | flags, next(2)),
        descriptor(at + 0x5ff, 1, WRITE, next(3)),
    ];
    for (i, d) in (0..).zip(parts) {
        bench.guest.put(TABLE + 16 * u64::from(next(i)), &d);
    }
    announce(bench, first);
}

/// Runs a case.
///
/// # Panics
/// Where a promise is broken.
pub(crate) fn run(case: &[u8]) {
    thread_local!(static GUEST: RefCell<Guest> = RefCell::new(Guest::new()));
    if case.len() > MAX_BYTES {
        return;
    }
    GUEST.with_borrow(|guest| {
        guest.clear();
        let read_only = case.first().is_some_and(|f| f & 2 != 0);
        let mut input = Input::new(case);
        let mut bench = Bench::new(guest, &mut input);
        for _ in 0..MAX_ACTIONS {
            if input.is_empty() {
                break;
            }
            act(&mut bench, &mut input);
        }
        bench.drain();
        if !bench.broken && !bench.tangled {
            bench.is_served(read_only, 0x5a);
        }
        bench.restart();
        bench.is_served(read_only, 0xa5);
    });
}
