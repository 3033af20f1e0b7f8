//! The container against a model: many channels with overlapping work, operations that end in any order, chains.

mod crash;
mod direct;
mod faults;
mod rig;
mod threads;

use super::chain::Layer;
use super::{BlockDevice, Chain, Channel, Disk, DiskOptions, Done, Request};
use crate::error::Failure;
use crate::format::vdi::{Parent, VdiCreate};
use crate::format::{self, Format};
use crate::io::sim::{Rng, SimEngine};
use crate::io::{AlignedBuf, Alignment, BufSlice, FileTraits, Host, HostFile, MemFile};
use crate::map::{ByteSource, FileId, GuestOffset, GuestRange};
use std::sync::Arc;
use std::time::Instant;
use uuid::Uuid;

const SECTOR: u64 = 512;

struct TestHost;

impl Host for TestHost {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn new_uuid(&self) -> Uuid {
        Uuid::from_u128(0x5eed)
    }
}

/// A file with a fresh VDI in it.
fn new_vdi(size: u64, block: u64, uuid: u128, parent: Option<u128>) -> Arc<MemFile> {
    let id = Uuid::from_u128(uuid);
    let mut c = VdiCreate::new(size, id, id);
    c.block_bytes = block;
    c.parent = parent.map(|p| Parent { uuid: Uuid::from_u128(p), modification: Uuid::from_u128(p) });
    let b = c.blueprint().unwrap();
    let f = MemFile::new(format!("{uuid:x}.vdi"), Vec::new());
    f.set_len(b.file_len()).unwrap();
    for (off, bytes) in b.writes() {
        f.write_at(off.0, &bytes).unwrap();
    }
    Arc::new(f)
}

fn open(files: &[Arc<MemFile>], read_only_below: bool, options: DiskOptions) -> Arc<Disk> {
    let layers = files.iter().zip(0u16..).map(|(f, i)| {
        let how =
            format::OpenHow { read_only: options.read_only || (read_only_below && i > 0), info_only: false };
        let bytes = f.bytes();
        let map = format::open(Format::Vdi, &bytes as &dyn ByteSource, FileId(i), how);
        Layer { number: u32::from(i), map: map.unwrap_or_else(|e| panic!("{e}")).into() }
    });
    let layers = layers.collect();
    let files = files.iter().map(|f| f.clone() as Arc<dyn HostFile>).collect();
    Disk::new(Chain::new(layers), files, options, Arc::new(TestHost), Box::new(|| ()))
}

/// What may be read from a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sector {
    value: u64,
    /// Discarded since: zero or the old value, and after the first look that one.
    or_zero: bool,
    busy: bool,
}

struct InFlight {
    request: Request,
    value: u64,
    buf: AlignedBuf,
}

/// Channels of one disk under random requests, none of which overlap while in flight.
struct World {
    disk: Arc<Disk>,
    channels: Vec<Channel>,
    slots: Vec<Vec<Option<InFlight>>>,
    model: Vec<Sector>,
    rng: Rng,
    next_value: u64,
    finished: u64,
}

/// Bytes of a sector with a value: the value and the sector's number, all over. Value 0 is zeros.
fn fill(buf: &mut [u8], first: u64, value: u64) {
    for (sector, chunk) in (first..).zip(buf.chunks_mut(512)) {
        let word = if value == 0 { 0 } else { value << 24 | sector };
        chunk.chunks_mut(8).for_each(|w| w.copy_from_slice(&word.to_le_bytes()));
    }
}

impl World {
    fn new(disk: Arc<Disk>, model: Vec<Sector>, seed: u64, channels: usize, slots: usize) -> World {
        let mut rng = Rng(seed);
        let channels: Vec<_> = (0..channels)
            .map(|_| {
                let mut e = SimEngine::new(rng.next());
                e.inline_percent = rng.below(100);
                e.depth = 1 + rng.below(20) as usize;
                Channel::new(disk.clone(), Box::new(e), slots as u16).unwrap()
            })
            .collect();
        let in_flight = channels.iter().map(|_| (0..slots).map(|_| None).collect()).collect();
        World { disk, channels, slots: in_flight, model, rng, next_value: seed << 20, finished: 0 }
    }

    fn random_range(&mut self) -> GuestRange {
        let all = self.model.len() as u64;
        let len = 1 + match self.rng.below(4) {
            0 => self.rng.below(8),
            1 => self.rng.below(64),
            2 => self.rng.below(600),
            _ => self.rng.below(16),
        };
        let len = len.min(all);
        let mut start = self.rng.below(all - len + 1);
        if self.rng.chance(30) {
            start = start / 8 * 8;
        }
        GuestRange::new(GuestOffset(start * SECTOR), len * SECTOR).unwrap()
    }

    fn sectors(r: GuestRange) -> std::ops::Range<usize> {
        (r.start().0 / SECTOR) as usize..(r.end().0 / SECTOR) as usize
    }

    fn post(&mut self, c: usize) {
        let Some(slot) = self.slots[c].iter().position(Option::is_none) else { return };
        let range = self.random_range();
        let sectors = Self::sectors(range);
        let request = match self.rng.below(20) {
            0 => Request::Flush,
            1..=7 => Request::Read(range),
            8..=15 => Request::Write(range),
            16 | 17 => Request::Discard(range),
            n => Request::WriteZeroes { range, unmap: n == 18 },
        };
        if request != Request::Flush && self.model[sectors.clone()].iter().any(|s| s.busy) {
            return;
        }
        let mut buf = AlignedBuf::new(range.len() as usize);
        self.next_value += 1;
        // Some writes are all zeros, some equal what was written before.
        let value = if self.rng.chance(10) { 0 } else { self.next_value };
        match request {
            Request::Write(_) => fill(buf.as_mut_slice(), range.start().0 / SECTOR, value),
            _ => buf.as_mut_slice().fill(0x5a),
        }
        if request != Request::Flush {
            self.model[sectors].iter_mut().for_each(|s| s.busy = true);
        }
        let bufs = self.cut(&buf, range.len() as usize);
        let bufs = if matches!(request, Request::Read(_) | Request::Write(_)) { bufs } else { Vec::new() };
        let outcome = self.channels[c].submit(slot as u16, request, &bufs);
        self.slots[c][slot] = Some(InFlight { request, value, buf });
        if let Some(outcome) = outcome {
            self.ended(c, Done { slot: slot as u16, outcome });
        }
    }

    /// The buffer in one to three pieces.
    fn cut(&mut self, buf: &AlignedBuf, len: usize) -> Vec<BufSlice> {
        // SAFETY: the buffer is kept with the request until that has ended.
        let whole = unsafe { buf.as_buf() };
        let a = self.rng.below(len as u64 + 1) as usize;
        let b = a + self.rng.below((len - a) as u64 + 1) as usize;
        let parts = [whole.part(0, a), whole.part(a, b - a), whole.part(b, len)];
        parts.into_iter().filter(|p| !p.is_empty()).collect()
    }

    fn ended(&mut self, c: usize, done: Done) {
        let f = self.slots[c][usize::from(done.slot)].take().expect("a request in that slot");
        done.outcome.unwrap_or_else(|e| panic!("{:?} failed: {e}", f.request));
        self.finished += 1;
        let range = match f.request {
            Request::Flush => return,
            Request::Read(r) | Request::Write(r) | Request::Discard(r) => r,
            Request::WriteZeroes { range, .. } => range,
        };
        let sectors = Self::sectors(range);
        for s in &mut self.model[sectors.clone()] {
            assert!(std::mem::replace(&mut s.busy, false));
        }
        match f.request {
            Request::Read(_) => self.compare(sectors, f.buf.as_slice()),
            Request::Write(_) => self.set(sectors, f.value),
            Request::WriteZeroes { .. } => self.set(sectors, 0),
            Request::Discard(_) => self.model[sectors].iter_mut().for_each(|s| s.or_zero = true),
            Request::Flush => unreachable!(),
        }
    }

    fn set(&mut self, sectors: std::ops::Range<usize>, value: u64) {
        for s in &mut self.model[sectors] {
            (s.value, s.or_zero) = (value, false);
        }
    }

    fn compare(&mut self, sectors: std::ops::Range<usize>, got: &[u8]) {
        let mut want = [0; 512];
        for (sector, got) in sectors.zip(got.chunks(512)) {
            let s = &mut self.model[sector];
            if s.or_zero {
                s.or_zero = false;
                if got.iter().all(|b| *b == 0) {
                    s.value = 0;
                    continue;
                }
            }
            fill(&mut want, sector as u64, s.value);
            assert!(got == want, "sector {sector}: got {:x?}, want {:x?}", &got[..8], &want[..8]);
        }
    }

    fn poll(&mut self, c: usize) {
        let mut done = Vec::new();
        self.channels[c].flush_queue().unwrap();
        self.channels[c].poll(&mut done);
        for d in done {
            self.ended(c, d);
        }
    }

    fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            let c = self.rng.below(self.channels.len() as u64) as usize;
            if self.rng.chance(60) { self.post(c) } else { self.poll(c) }
        }
        self.drain();
        let all = self.model.len();
        self.sweep(all);
    }

    fn drain(&mut self) {
        for _ in 0..1_000_000 {
            (0..self.channels.len()).for_each(|c| self.poll(c));
            if self.channels.iter().all(BlockDevice::is_idle) {
                assert!(self.slots.iter().flatten().all(Option::is_none), "a request was forgotten");
                assert_eq!(self.disk.claims.held(), 0, "a claim was forgotten");
                return;
            }
        }
        panic!("requests hang: {:?}", self.channels);
    }

    /// Reads everything once.
    fn sweep(&mut self, sectors: usize) {
        for first in (0..sectors).step_by(512) {
            let n = 512.min(sectors - first);
            let range = GuestRange::new(GuestOffset(first as u64 * SECTOR), n as u64 * SECTOR).unwrap();
            self.model[first..first + n].iter_mut().for_each(|s| s.busy = true);
            let buf = AlignedBuf::new(n * 512);
            // SAFETY: the buffer is kept with the request until that has ended.
            let whole = unsafe { buf.as_buf() };
            let outcome = self.channels[0].submit(0, Request::Read(range), &[whole]);
            self.slots[0][0] = Some(InFlight { request: Request::Read(range), value: 0, buf });
            match outcome {
                Some(outcome) => self.ended(0, Done { slot: 0, outcome }),
                None => self.drain(),
            }
        }
    }

    /// Closes the disk cleanly; what the guest should see afterwards.
    fn close(mut self) -> Vec<Sector> {
        while self.channels.len() > 1 {
            self.channels.pop();
        }
        self.channels[0].close_disk(true).unwrap();
        self.model
    }
}

fn blank(size: u64) -> Vec<Sector> {
    vec![Sector { value: 0, or_zero: false, busy: false }; (size / SECTOR) as usize]
}

/// Sessions on a chain that grows by a diff after each: write, close, check, open again.
fn sessions(seed: u64, depth: usize) {
    let mut rng = Rng(seed);
    // Now and then blocks larger than a piece of a copy.
    let large = seed % 5 == 4;
    let block = if large { 512 << 10 } else { 4096 << rng.below(5) };
    let size = (block * if large { 5 } else { 20 } + rng.below(block / SECTOR) * SECTOR).max(1 << 20);
    let mut files = vec![new_vdi(size, block, 1, None)];
    let mut model = blank(size);
    for level in 0..depth {
        for _ in 0..2 {
            let write_through = rng.chance(20);
            let options = DiskOptions { write_through, skip_syncs: rng.chance(10), ..DiskOptions::default() };
            let disk = open(&files, true, options);
            let (channels, slots) = (1 + rng.below(4), 1 + rng.below(12));
            let mut w = World::new(disk, model, rng.next(), channels as usize, slots as usize);
            w.run(600);
            model = w.close();
            check_clean(&files[0], seed);
        }
        let uuid = level as u128 + 2;
        let block = if large { 1 << 20 } else { 4096 << rng.below(5) };
        files.insert(0, new_vdi(size, block, uuid, Some(uuid - 1)));
    }
}

/// A clean close leaves a VDI dense, with an exact count.
fn check_clean(file: &MemFile, seed: u64) {
    let bytes = file.bytes();
    let report = format::vdi::check(&bytes as &dyn ByteSource).unwrap();
    assert!(report.is_clean(), "seed {seed}: {report:?}");
}

#[test]
fn a_base_behaves_like_a_model() {
    for seed in 0..60 {
        sessions(seed, 1);
    }
}

#[test]
fn chains_behave_like_a_model() {
    for seed in 1000..1030 {
        sessions(seed, 4);
    }
}

/// Writing what is there already allocates nothing; writing zeros to a whole block marks it.
#[test]
fn equal_bytes_allocate_nothing_and_zeros_are_marked() {
    let (size, block) = (1 << 20, 4096);
    let files = vec![new_vdi(size, block, 2, Some(1)), new_vdi(size, block, 1, None)];
    let base = open(&files[1..], true, DiskOptions::default());
    let mut data = AlignedBuf::new(8192);
    data.as_mut_slice().fill(7);
    let r = GuestRange::new(GuestOffset(4096), 8192).unwrap();
    let mut c = Channel::new(base, Box::new(SimEngine::new(1)), 1).unwrap();
    finish(&mut c, Request::Write(r), &data).unwrap();
    c.close_disk(false).unwrap();
    drop(c);

    let disk = open(&files, true, DiskOptions::default());
    let mut c = Channel::new(disk.clone(), Box::new(SimEngine::new(1)), 1).unwrap();
    finish(&mut c, Request::Write(r), &data).unwrap();
    assert_eq!(disk.chain().top().map.info().allocated_blocks, Some(0));
    let zeros = AlignedBuf::new(8192);
    finish(&mut c, Request::Write(r), &zeros).unwrap();
    assert_eq!(disk.chain().top().map.info().allocated_blocks, Some(0));
    finish(&mut c, Request::Read(r), &data).unwrap();
    assert!(data.as_slice().iter().all(|b| *b == 0));
    c.close_disk(false).unwrap();
}

#[test]
fn a_read_only_disk_takes_no_change_and_reads_on() {
    let files = vec![new_vdi(1 << 20, 4096, 1, None)];
    let before = files[0].bytes();
    let disk = open(&files, true, DiskOptions { read_only: true, ..DiskOptions::default() });
    let mut c = Channel::new(disk, Box::new(SimEngine::new(1)), 1).unwrap();
    let buf = AlignedBuf::new(4096);
    let r = GuestRange::new(GuestOffset(0), 4096).unwrap();
    assert_eq!(finish(&mut c, Request::Write(r), &buf), Err(Failure::ReadOnly));
    assert_eq!(finish(&mut c, Request::Discard(r), &buf), Err(Failure::ReadOnly));
    assert_eq!(finish(&mut c, Request::Read(r), &buf), Ok(()));
    assert_eq!(finish(&mut c, Request::Flush, &buf), Ok(()));
    let beyond = GuestRange::new(GuestOffset(1 << 20), 512).unwrap();
    assert_eq!(finish(&mut c, Request::Read(beyond), &AlignedBuf::new(512)), Err(Failure::OutOfRange));
    c.close_disk(true).unwrap();
    assert_eq!(files[0].bytes(), before);
}

fn finish(c: &mut Channel, request: Request, buf: &AlignedBuf) -> Result<(), Failure> {
    // SAFETY: the buffer outlives this function, which waits for the request's end.
    let whole = [unsafe { buf.as_buf() }];
    let bufs = if matches!(request, Request::Read(_) | Request::Write(_)) { &whole[..] } else { &[] };
    if let Some(outcome) = c.submit(0, request, bufs) {
        return outcome;
    }
    let mut done = Vec::new();
    for _ in 0..100_000 {
        c.flush_queue().unwrap();
        c.poll(&mut done);
        if let [d] = done[..] {
            return d.outcome;
        }
    }
    panic!("{request:?} hangs");
}
