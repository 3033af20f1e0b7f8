//! A file that remembers what a power cut may take away, an engine that fails on demand, and a model of what a guest
//! may then see.

use super::*;
use crate::io::{Completion, Full, IoEngine, IoKind, IoOp, Tag};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Where the data of a small VDI begins.
pub(super) const DATA: u64 = 2 << 20;

/// Where a VDI says how many blocks it has.
const BLOCKS_AT: usize = 384;

/// A change that no sync has covered yet.
#[derive(Clone, Debug)]
enum Change {
    Write {
        off: usize,
        bytes: Vec<u8>,
    },
    /// fallocate: what it adds reads as zeros.
    Allocate {
        end: usize,
    },
    /// ftruncate: what it adds may be anything until it is durable.
    Length {
        end: usize,
    },
}

#[derive(Debug, Default)]
struct Contents {
    durable: Vec<u8>,
    now: Vec<u8>,
    log: Vec<Option<Change>>,
    /// Number of the first change in `log`.
    first: usize,
}

/// A file with a page cache that can be lost.
#[derive(Debug)]
pub(super) struct CrashFile {
    c: Mutex<Contents>,
    name: PathBuf,
    pub(super) alignment: Alignment,
    fail_syncs: AtomicBool,
    frozen: AtomicBool,
    data_writes: AtomicU64,
}

fn apply(bytes: &mut Vec<u8>, change: &Change, fill: u8, keep: &mut dyn FnMut() -> bool) {
    match change {
        Change::Write { off, bytes: new } => {
            let mut at = *off;
            for chunk in sectors_of(*off, new) {
                if keep() {
                    let end = at + chunk.len();
                    if bytes.len() < end {
                        bytes.resize(end, 0);
                    }
                    bytes[at..end].copy_from_slice(chunk);
                }
                at += chunk.len();
            }
        }
        Change::Allocate { end } => bytes.resize(bytes.len().max(*end), 0),
        Change::Length { end } => bytes.resize(*end, fill),
    }
}

/// Pieces that are written whole or not at all.
fn sectors_of(off: usize, bytes: &[u8]) -> Vec<&[u8]> {
    let head = bytes.len().min(off.next_multiple_of(512) - off);
    let (head, rest) = bytes.split_at(head);
    std::iter::once(head).chain(rest.chunks(512)).filter(|c| !c.is_empty()).collect()
}

impl CrashFile {
    pub(super) fn new(bytes: Vec<u8>) -> Arc<CrashFile> {
        let c = Contents { durable: bytes.clone(), now: bytes, ..Contents::default() };
        let alignment = Alignment::NONE;
        Arc::new(CrashFile {
            c: Mutex::new(c),
            name: "crash.vdi".into(),
            alignment,
            fail_syncs: false.into(),
            frozen: false.into(),
            data_writes: 0.into(),
        })
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.c.lock().unwrap().now.clone()
    }

    /// Takes some blocks away as other programs do, without a sync: their places become holes. Returns the blocks.
    pub(super) fn make_holes(&self, rng: &mut Rng) -> Vec<u64> {
        let c = &mut *self.c.lock().unwrap();
        let word = |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().unwrap());
        let blocks = word(&c.now, BLOCKS_AT) as usize;
        let entry = |i: usize| (1 << 20) + i * 4..(1 << 20) + i * 4 + 4;
        let used: Vec<_> = (0..blocks).filter(|i| word(&c.now, entry(*i).start) < u32::MAX - 1).collect();
        let freed: Vec<_> = used.into_iter().filter(|_| rng.chance(30)).collect();
        for i in &freed {
            c.now[entry(*i)].fill(0xff);
            c.log.push(Some(Change::Write { off: entry(*i).start, bytes: vec![0xff; 4] }));
        }
        freed.iter().map(|i| *i as u64).collect()
    }

    /// Syncs that go past the engines fail from now on.
    pub(super) fn fail_direct_syncs(&self) {
        self.fail_syncs.store(true, Ordering::SeqCst);
    }

    fn change(&self, change: Change) {
        if self.frozen.load(Ordering::SeqCst) {
            return;
        }
        let c = &mut *self.c.lock().unwrap();
        apply(&mut c.now, &change, 0, &mut || true);
        c.log.push(Some(change));
    }

    /// Writes of data there were.
    pub(super) fn data_writes(&self) -> u64 {
        self.data_writes.load(Ordering::SeqCst)
    }

    /// Everything before is what a sync submitted now covers.
    fn mark(&self) -> usize {
        let c = self.c.lock().unwrap();
        c.first + c.log.len()
    }

    /// A sync of everything before `mark` has ended.
    fn persist(&self, mark: usize) {
        if self.frozen.load(Ordering::SeqCst) {
            return;
        }
        let c = &mut *self.c.lock().unwrap();
        for change in c.log.drain(..mark.saturating_sub(c.first).min(c.log.len())).flatten() {
            apply(&mut c.durable, &change, 0, &mut || true);
            c.first += 1;
        }
        c.first = c.first.max(mark);
    }

    /// It has failed: some of it is on the disk, and what is not will never be.
    fn sync_failed(&self, mark: usize, rng: &mut Rng) {
        if self.frozen.load(Ordering::SeqCst) {
            return;
        }
        let c = &mut *self.c.lock().unwrap();
        let upto = mark.saturating_sub(c.first).min(c.log.len());
        for change in c.log[..upto].iter_mut() {
            if let Some(change) = change.take()
                && rng.chance(50)
            {
                apply(&mut c.durable, &change, 0, &mut || true);
            }
        }
    }

    /// The power is gone and back: of what no sync has covered any part may be there.
    pub(super) fn power_cut(&self, rng: &mut Rng) {
        let c = &mut *self.c.lock().unwrap();
        let mode = rng.below(4);
        for change in c.log.drain(..).flatten() {
            let p = [50, 90, 10, 50][mode as usize];
            if mode == 3 && rng.chance(30) {
                apply(&mut c.durable, &change, 0xdb, &mut || rng.chance(50));
            } else if rng.chance(p) {
                apply(&mut c.durable, &change, 0xdb, &mut || true);
            }
        }
        c.first = 0;
        c.now = c.durable.clone();
    }
}

impl HostFile for CrashFile {
    fn path(&self) -> &Path {
        &self.name
    }

    fn traits(&self) -> FileTraits {
        let identity = (1, std::ptr::from_ref(self) as usize as u64);
        let direct = self.alignment != Alignment::NONE;
        FileTraits { writable: true, direct, alignment: self.alignment, is_device: false, identity }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.c.lock().unwrap().now.len() as u64)
    }

    fn read_at(&self, off: u64, buf: &mut [u8]) -> io::Result<usize> {
        let c = self.c.lock().unwrap();
        let start = (off as usize).min(c.now.len());
        let n = buf.len().min(c.now.len() - start);
        buf[..n].copy_from_slice(&c.now[start..start + n]);
        Ok(n)
    }

    fn write_at(&self, off: u64, buf: &[u8]) -> io::Result<()> {
        self.data_writes.fetch_add(u64::from(off >= DATA), Ordering::SeqCst);
        self.change(Change::Write { off: off as usize, bytes: buf.to_vec() });
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Length { end: len as usize });
        Ok(())
    }

    fn allocate(&self, off: u64, len: u64) -> io::Result<()> {
        self.change(Change::Allocate { end: (off + len) as usize });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.fail_syncs.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.persist(self.mark());
        Ok(())
    }

    fn next_data(&self, off: u64) -> io::Result<Option<u64>> {
        Ok((off < self.len()?).then_some(off))
    }

    fn next_hole(&self, _off: u64) -> io::Result<u64> {
        self.len()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Which operation fails, and how.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    /// Only these kinds are counted; empty: all.
    pub(super) kinds: Vec<IoKind>,
    /// Only operations on the file whose number this is.
    pub(super) file: FileId,
    /// Only operations that begin there.
    pub(super) place: std::ops::Range<u64>,
    /// How many of them pass first.
    pub(super) after: u64,
    /// All further ones fail as well.
    pub(super) sticky: bool,
    /// A write that fails is done all the same.
    pub(super) takes_effect: bool,
    pub(super) errno: i32,
}

impl Fault {
    pub(super) fn of(kinds: &[IoKind], after: u64, errno: i32) -> Fault {
        let kinds = kinds.to_vec();
        Fault { kinds, file: FileId(0), place: 0..u64::MAX, after, sticky: false, takes_effect: false, errno }
    }
}

/// The faults of all engines of a test.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults(pub(super) Arc<Mutex<Vec<Fault>>>);

impl Faults {
    pub(super) fn add(&self, f: Fault) {
        self.0.lock().unwrap().push(f);
    }

    pub(super) fn clear(&self) {
        self.0.lock().unwrap().clear();
    }

    fn hit(&self, op: &IoOp) -> Option<(i32, bool)> {
        let mut all = self.0.lock().unwrap();
        let i = all.iter().position(|f| {
            (f.kinds.is_empty() || f.kinds.contains(&op.kind))
                && f.file == op.file
                && f.place.contains(&op.off.0)
        })?;
        let f = &mut all[i];
        if f.after > 0 {
            f.after -= 1;
            return None;
        }
        let hit = (f.errno, f.takes_effect);
        if !f.sticky {
            all.remove(i);
        }
        Some(hit)
    }
}

#[derive(Debug)]
struct Held {
    tag: Tag,
    /// A sync of file 0, and what it covers.
    mark: Option<usize>,
    result: Result<u64, i32>,
}

/// The seeded engine with faults, and with syncs that cover what was complete when they were submitted, not more.
pub(super) struct RigEngine {
    inner: SimEngine,
    top: Arc<CrashFile>,
    faults: Faults,
    held: Vec<Held>,
    rng: Rng,
    inline_percent: u64,
}

impl RigEngine {
    pub(super) fn new(top: &Arc<CrashFile>, faults: &Faults, seed: u64) -> RigEngine {
        let mut rng = Rng(seed);
        let mut inner = SimEngine::new(rng.next());
        inner.depth = 1 + rng.below(20) as usize;
        inner.inline_percent = 100;
        let inline_percent = rng.below(101);
        RigEngine { inner, top: top.clone(), faults: faults.clone(), held: Vec::new(), rng, inline_percent }
    }
}

impl IoEngine for RigEngine {
    fn attach(&mut self, id: FileId, file: &Arc<dyn HostFile>) -> io::Result<()> {
        self.inner.attach(id, file)
    }

    fn try_now(&mut self, op: &IoOp, bufs: &[BufSlice]) -> Option<Result<u64, i32>> {
        if !self.rng.chance(self.inline_percent) {
            return None;
        }
        match self.faults.hit(op) {
            Some((errno, effect)) => {
                if effect {
                    self.inner.try_now(op, bufs);
                }
                Some(Err(errno))
            }
            None => self.inner.try_now(op, bufs),
        }
    }

    fn submit(&mut self, op: &IoOp, bufs: &[BufSlice], tag: Tag) -> Result<(), Full> {
        if self.inner.in_flight() + self.held.len() >= self.inner.depth {
            return Err(Full);
        }
        let fault = self.faults.hit(op);
        if let Some((_, true)) = fault
            && op.kind == IoKind::Write
        {
            self.inner.try_now(op, bufs);
        }
        let result = fault.map_or(Ok(0), |(errno, _)| Err(errno));
        if op.kind == IoKind::Sync {
            let mark = (op.file == FileId(0)).then(|| self.top.mark());
            self.held.push(Held { tag, mark, result });
            return Ok(());
        }
        if result.is_err() {
            self.held.push(Held { tag, mark: None, result });
            return Ok(());
        }
        self.inner.submit(op, bufs, tag)
    }

    fn enter(&mut self) -> io::Result<()> {
        self.inner.enter()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.inner.reap(out);
        let mut i = 0;
        while i < self.held.len() {
            if self.rng.chance(60) {
                i += 1;
                continue;
            }
            let h = self.held.swap_remove(i);
            match (h.mark, h.result) {
                (Some(mark), Ok(_)) => self.top.persist(mark),
                (Some(mark), Err(_)) => self.top.sync_failed(mark, &mut self.rng),
                (None, _) => {}
            }
            out.push(Completion { tag: h.tag, result: h.result });
        }
    }

    fn wait(&mut self, _at_most: Duration) -> io::Result<()> {
        Ok(())
    }

    fn event_fd(&self) -> Option<RawFd> {
        None
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len()
    }
}

/// What one sector may hold.
#[derive(Clone, Debug)]
pub(super) struct Past {
    /// What a read may return now.
    may: Vec<u64>,
    /// What was asked to be written, in order, with the time it was asked.
    asked: Vec<(u64, u64)>,
    /// Successful writes: when asked, when answered.
    done: Vec<(u64, u64)>,
    pub(super) busy: bool,
}

impl Past {
    pub(super) fn known(value: u64) -> Past {
        Past { may: vec![value], asked: vec![(0, value)], done: vec![(0, 0)], busy: false }
    }

    /// What may be there after everything answered before `time` was made durable.
    pub(super) fn after_cut(&self, time: u64) -> Vec<u64> {
        let from = self.done.iter().filter(|(_, d)| *d <= time).map(|(a, _)| *a).max().unwrap_or(0);
        self.asked.iter().filter(|(a, _)| *a >= from).map(|(_, v)| *v).collect()
    }

    /// Another program has put `value` here, without a sync.
    pub(super) fn changed_by_another(&mut self, value: u64) {
        self.may = vec![value];
        let last = self.asked.last().map_or(0, |a| a.0);
        self.asked.push((last, value));
    }

    fn ask(&mut self, time: u64, value: u64) {
        self.busy = true;
        self.asked.push((time, value));
    }
}

struct Under {
    request: Request,
    value: u64,
    time: u64,
    buf: AlignedBuf,
}

/// Random requests against a disk whose top file may lose its power.
pub(super) struct Rig {
    top: Arc<CrashFile>,
    faults: Faults,
    pub(super) disk: Arc<Disk>,
    pub(super) channels: Vec<Channel>,
    under: Vec<Vec<Option<Under>>>,
    pub(super) past: Vec<Past>,
    pub(super) rng: Rng,
    pub(super) time: u64,
    /// Everything answered before this is durable.
    pub(super) flushed: u64,
    pub(super) failures: Vec<(Request, Failure)>,
    pub(super) marks: Arc<AtomicU32>,
    pub(super) no_flush: bool,
}

/// The value of a sector's bytes.
fn value_of(sector: usize, got: &[u8]) -> u64 {
    let word = u64::from_le_bytes(got[..8].try_into().unwrap());
    let mut want = [0; 512];
    let value = word >> 24;
    fill(&mut want, sector as u64, value);
    assert!(want == *got, "sector {sector} holds what nobody wrote there: {:x?}", &got[..16]);
    value
}

/// Opens a chain: the crash file on top of others.
pub(super) fn open_chain(
    top: &Arc<CrashFile>,
    below: &[Arc<MemFile>],
    options: DiskOptions,
    marks: &Arc<AtomicU32>,
) -> Arc<Disk> {
    let how = |read_only| format::OpenHow { read_only, info_only: false };
    let bytes = top.bytes();
    let map = format::open(Format::Vdi, &bytes as &dyn ByteSource, FileId(0), how(false));
    let mut layers = vec![Layer { number: 0, map: map.unwrap_or_else(|e| panic!("{e}")).into() }];
    let mut files = vec![top.clone() as Arc<dyn HostFile>];
    for (f, i) in below.iter().zip(1u16..) {
        let map = format::open(Format::Vdi, &f.bytes() as &dyn ByteSource, FileId(i), how(true)).unwrap();
        layers.push(Layer { number: u32::from(i), map: map.into() });
        files.push(f.clone());
    }
    let marks = marks.clone();
    let on_failure = Box::new(move || {
        marks.fetch_add(1, Ordering::SeqCst);
    });
    Disk::new(Chain::new(layers), files, options, Arc::new(TestHost), on_failure)
}

impl Rig {
    pub(super) fn new(
        top: &Arc<CrashFile>,
        below: &[Arc<MemFile>],
        options: DiskOptions,
        faults: &Faults,
        past: Vec<Past>,
        seed: u64,
    ) -> Rig {
        let mut rng = Rng(seed);
        let marks = Arc::default();
        let disk = open_chain(top, below, options, &marks);
        let (channels, slots) = (1 + rng.below(3), 1 + rng.below(10));
        let channels: Vec<_> = (0..channels)
            .map(|_| {
                let e = RigEngine::new(top, faults, rng.next());
                Channel::new(disk.clone(), Box::new(e), slots as u16).unwrap()
            })
            .collect();
        let under = channels.iter().map(|_| (0..slots).map(|_| None).collect()).collect();
        let time = past.iter().flat_map(|p| p.asked.iter().map(|a| a.0)).max().unwrap_or(0) + 1;
        Rig {
            top: top.clone(),
            faults: faults.clone(),
            disk,
            channels,
            under,
            past,
            rng,
            time,
            flushed: 0,
            failures: Vec::new(),
            marks,
            no_flush: false,
        }
    }

    fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    fn random_range(&mut self) -> GuestRange {
        let all = self.past.len() as u64;
        // Often the same few blocks, so that things meet.
        let near = if self.rng.chance(50) { all.min(64) } else { all };
        let len = 1 + match self.rng.below(4) {
            0 => self.rng.below(8),
            1 => self.rng.below(32),
            2 => self.rng.below(200),
            _ => self.rng.below(16),
        };
        let len = len.min(near);
        let mut start = self.rng.below(near - len + 1);
        if self.rng.chance(40) {
            start = start / 8 * 8;
        }
        GuestRange::new(GuestOffset(start * SECTOR), len * SECTOR).unwrap()
    }

    pub(super) fn post_random(&mut self) {
        let c = self.rng.below(self.channels.len() as u64) as usize;
        let range = self.random_range();
        let request = match self.rng.below(20) {
            0 | 1 if !self.no_flush => Request::Flush,
            2..=5 => Request::Read(range),
            16 => Request::Discard(range),
            17 | 18 => Request::WriteZeroes { range, unmap: self.rng.chance(50) },
            _ => Request::Write(range),
        };
        let value = match self.rng.below(20) {
            0..=2 => 0,
            // What is there already, as far as one value says it.
            3 | 4 => self.past[World::sectors(range).start].may[0],
            _ => self.time + 1,
        };
        self.post(c, request, value);
    }

    /// Posts a request if a slot is free and nothing in flight overlaps.
    pub(super) fn post(&mut self, c: usize, request: Request, value: u64) -> bool {
        let Some(slot) = self.under[c].iter().position(Option::is_none) else { return false };
        let range = match request {
            Request::Flush => GuestRange::EMPTY,
            Request::Read(r) | Request::Write(r) | Request::Discard(r) => r,
            Request::WriteZeroes { range, .. } => range,
        };
        let sectors = World::sectors(range);
        if self.past[sectors.clone()].iter().any(|s| s.busy) {
            return false;
        }
        let time = self.tick();
        let mut buf = AlignedBuf::new((range.len() as usize).max(512));
        match request {
            Request::Write(_) => fill(buf.as_mut_slice(), range.start().0 / SECTOR, value),
            _ => buf.as_mut_slice().fill(0x5a),
        }
        for s in &mut self.past[sectors] {
            match request {
                Request::Write(_) => s.ask(time, value),
                Request::Discard(_) | Request::WriteZeroes { .. } => s.ask(time, 0),
                Request::Read(_) | Request::Flush => s.busy = true,
            }
        }
        // SAFETY: the buffer is kept with the request until that has ended.
        let whole = [unsafe { buf.as_buf() }.part(0, range.len() as usize)];
        let bufs = if matches!(request, Request::Read(_) | Request::Write(_)) { &whole[..] } else { &[] };
        let outcome = self.channels[c].submit(slot as u16, request, bufs);
        self.under[c][slot] = Some(Under { request, value, time, buf });
        if let Some(outcome) = outcome {
            self.ended(c, Done { slot: slot as u16, outcome });
        }
        true
    }

    fn ended(&mut self, c: usize, done: Done) {
        let u = self.under[c][usize::from(done.slot)].take().expect("a request in that slot");
        let now = self.tick();
        let (range, value) = match u.request {
            Request::Flush => {
                match done.outcome {
                    Ok(()) => self.flushed = self.flushed.max(u.time),
                    Err(f) => self.failures.push((u.request, f)),
                }
                return;
            }
            Request::Read(r) | Request::Write(r) => (r, u.value),
            Request::Discard(r) => (r, 0),
            Request::WriteZeroes { range, .. } => (range, 0),
        };
        let sectors = World::sectors(range);
        self.past[sectors.clone()].iter_mut().for_each(|s| s.busy = false);
        if let Err(f) = done.outcome {
            self.failures.push((u.request, f));
            if !matches!(u.request, Request::Read(_)) {
                self.past[sectors].iter_mut().for_each(|s| s.may.push(value));
            }
            return;
        }
        if self.disk.options().write_through && !matches!(u.request, Request::Read(_)) {
            self.flushed = now;
        }
        for (i, sector) in sectors.enumerate() {
            let s = &mut self.past[sector];
            match u.request {
                Request::Read(_) => {
                    let got = value_of(sector, &u.buf.as_slice()[i * 512..(i + 1) * 512]);
                    assert!(s.may.contains(&got), "sector {sector} reads {got}, may be {:?}", s.may);
                    s.may = vec![got];
                }
                Request::Discard(_) => s.may.push(0),
                _ => {
                    s.may = vec![value];
                    s.done.push((u.time, now));
                }
            }
        }
    }

    pub(super) fn poll(&mut self, c: usize) {
        let mut done = Vec::new();
        self.channels[c].flush_queue().unwrap();
        self.channels[c].poll(&mut done);
        for d in done {
            self.ended(c, d);
        }
    }

    pub(super) fn steps(&mut self, n: u64) {
        for _ in 0..n {
            if self.rng.chance(60) {
                self.post_random();
            } else {
                let c = self.rng.below(self.channels.len() as u64) as usize;
                self.poll(c);
            }
        }
    }

    pub(super) fn drain(&mut self) {
        for _ in 0..200_000 {
            (0..self.channels.len()).for_each(|c| self.poll(c));
            if self.channels.iter().all(BlockDevice::is_idle) {
                assert!(self.under.iter().flatten().all(Option::is_none), "a request was forgotten");
                assert_eq!(self.disk.claims.held(), 0, "a claim was forgotten");
                return;
            }
        }
        panic!("requests hang: {:?}", self.channels);
    }

    /// Reads everything.
    pub(super) fn sweep(&mut self) {
        self.drain();
        for first in (0..self.past.len() as u64).step_by(256) {
            let n = 256.min(self.past.len() as u64 - first);
            let r = GuestRange::new(GuestOffset(first * SECTOR), n * SECTOR).unwrap();
            assert!(self.post(0, Request::Read(r), 0));
            self.drain();
        }
    }

    /// The process dies where it is. What the sectors may hold afterwards.
    pub(super) fn die(mut self, power_cut: bool) -> Vec<Past> {
        // From here on nothing reaches the file; what is in flight fails, so that the channels can be dropped.
        self.top.frozen.store(true, Ordering::SeqCst);
        self.faults.clear();
        self.faults.add(Fault { sticky: true, ..Fault::of(&[], 0, libc::EIO) });
        while !self.channels.iter().all(BlockDevice::is_idle) {
            for c in &mut self.channels {
                c.flush_queue().unwrap();
                c.poll(&mut Vec::new());
            }
        }
        self.channels.clear();
        self.faults.clear();
        self.top.frozen.store(false, Ordering::SeqCst);
        let flushed = if power_cut { self.flushed } else { u64::MAX };
        for p in &mut self.past {
            p.may = p.after_cut(flushed);
            p.busy = false;
        }
        self.past
    }

    /// After [`Self::die`] and opening again: reads everything and takes it as it is. `power_cut`: all of it is
    /// durable.
    pub(super) fn look_again(&mut self, power_cut: bool) {
        self.sweep();
        let time = self.tick();
        for p in &mut self.past {
            let value = p.may[0];
            if power_cut {
                *p = Past::known(value);
            } else {
                p.asked.push((time, value));
                p.done.push((time, time));
            }
        }
    }

    /// Begins a clean close and leaves it somewhere on its way.
    pub(super) fn close_halfway(&mut self) {
        self.drain();
        if !self.disk.start.is_done() {
            return;
        }
        let plan = self.disk.chain.top().map.end();
        self.channels[0].run_internal(super::super::slot::Job::End, plan);
        for _ in 0..self.rng.below(30) {
            self.poll(0);
        }
    }

    pub(super) fn close(&mut self) -> crate::error::Result<()> {
        self.drain();
        while self.channels.len() > 1 {
            self.channels.pop();
            self.under.pop();
        }
        self.channels[0].close_disk(true)
    }
}

/// A parent full of data: values by block, some of it zeros.
pub(super) fn full_parent(size: u64, block: u64, uuid: u128, rng: &mut Rng) -> (Arc<MemFile>, Vec<Past>) {
    let f = new_vdi(size, block, uuid, None);
    let disk = open(std::slice::from_ref(&f), true, DiskOptions::default());
    let mut c = Channel::new(disk, Box::new(SimEngine::new(1)), 1).unwrap();
    let sectors = size / SECTOR;
    let mut past = vec![Past::known(0); sectors as usize];
    let mut at = 0;
    while at < sectors {
        let n = (1 + rng.below(block / SECTOR * 2)).min(sectors - at);
        if rng.chance(60) {
            let mut buf = AlignedBuf::new((n * SECTOR) as usize);
            let value = 1 + rng.below(1000);
            fill(buf.as_mut_slice(), at, value);
            let r = GuestRange::new(GuestOffset(at * SECTOR), n * SECTOR).unwrap();
            finish(&mut c, Request::Write(r), &buf).unwrap();
            (at..at + n).for_each(|s| past[s as usize] = Past::known(value));
        }
        at += n;
    }
    c.close_disk(true).unwrap();
    (f, past)
}
