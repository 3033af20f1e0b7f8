//! Loads on one channel of the product's, over io_uring and through the page cache.

use crate::disks::{BLOCK_BYTES, DISK_BYTES, Fresh};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vdblk::io::{AlignedBuf, EngineKind, make_engine};
use vdblk::map::{GuestOffset, GuestRange};
use vdblk::vd::{BlockDevice, Channel, Disk, Done, Request};

/// Requests in flight.
const DEPTH: u16 = 32;
/// Those who write and flush side by side.
pub(crate) const MAX_JOURNALS: usize = 4;
/// Longer than any request takes.
const PATIENCE: Duration = Duration::from_secs(10);
/// Times a disk is opened, or closed, in a run.
const SESSIONS: u32 = 10;
/// First writes before a close that is measured: enough for the file to reach beyond what is in use.
const BEFORE_CLOSE: u64 = 256;
/// What is in the base, and what is written over it: neither zeros nor the same.
const BASE: u8 = 0x42;
const OVER: u8 = 0x77;

/// Writes, each to a block of its own.
pub(crate) struct Load {
    pub(crate) bytes: usize,
    pub(crate) sequential: bool,
    /// So many journals, which do not wait for each other (0: no flushes).
    pub(crate) journals: usize,
    /// A journal waits for so many writes of its own, flushes, and waits for that before it goes on.
    pub(crate) flush_every: u64,
    pub(crate) seconds: f64,
}

/// What came out.
#[derive(Debug)]
pub(crate) struct Cost {
    /// Writes a second, or milliseconds.
    pub(crate) figure: f64,
    /// CPU time of the process, the kernel's on its behalf included, in microseconds: for each write, or for each opening or
    /// closing.
    pub(crate) cpu_us: f64,
}

/// The base of the diffs: all blocks full.
pub(crate) fn fill(disk: &Fresh, load: &Load) -> io::Result<()> {
    let mut d = Driver::new(&disk.open(true)?, load.bytes, BASE)?;
    let written = d.write_all(load)?;
    if written != DISK_BYTES / BLOCK_BYTES {
        return Err(io::Error::other(format!("the base was filled with {written} blocks only")));
    }
    d.channel.close_disk(false).map_err(io::Error::other)
}

/// First writes a second.
pub(crate) fn rate(disk: &Fresh, skip_syncs: bool, load: &Load) -> io::Result<Cost> {
    let mut d = Driver::new(&disk.open(skip_syncs)?, load.bytes, OVER)?;
    // what comes before the first change of a session is measured elsewhere
    d.one(Request::Write(range(0, 512)))?;
    let (start, cpu) = (Instant::now(), cpu_us()?);
    let written = d.write_all(load)?;
    let (took, cpu) = (start.elapsed(), cpu_us()? - cpu);
    Ok(Cost { figure: written as f64 / took.as_secs_f64(), cpu_us: cpu / written as f64 })
}

/// Milliseconds from opening to the end of the first write, of a disk whose last process was killed.
pub(crate) fn opening(disk: &Fresh) -> io::Result<Cost> {
    let mut sum = Sum::default();
    for n in 0..u64::from(SESSIONS) {
        sum.begin()?;
        let mut d = Driver::new(&disk.open(false)?, 4 << 10, OVER)?;
        d.one(Request::Write(range(n * BLOCK_BYTES, 4 << 10)))?;
        sum.end()?;
        d.settle()?;
    }
    Ok(sum.cost())
}

/// Milliseconds of a clean close, sync included, everything before it flushed.
pub(crate) fn closing(disk: &Fresh) -> io::Result<Cost> {
    let mut sum = Sum::default();
    for n in 0..u64::from(SESSIONS) {
        let mut d = Driver::new(&disk.open(false)?, 64 << 10, OVER)?;
        for block in n * BEFORE_CLOSE..(n + 1) * BEFORE_CLOSE {
            d.one(Request::Write(range(block * BLOCK_BYTES, BLOCK_BYTES)))?;
        }
        d.one(Request::Flush)?;
        d.settle()?;
        sum.begin()?;
        d.channel.close_disk(true).map_err(io::Error::other)?;
        sum.end()?;
    }
    Ok(sum.cost())
}

/// What several sessions took.
#[derive(Default)]
struct Sum {
    begun: Option<(Instant, f64)>,
    time: Duration,
    cpu_us: f64,
}

impl Sum {
    fn begin(&mut self) -> io::Result<()> {
        self.begun = Some((Instant::now(), cpu_us()?));
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        let (start, cpu) = self.begun.take().expect("begun before it ends");
        self.time += start.elapsed();
        self.cpu_us += cpu_us()? - cpu;
        Ok(())
    }

    fn cost(&self) -> Cost {
        let n = f64::from(SESSIONS);
        Cost { figure: self.time.as_secs_f64() * 1e3 / n, cpu_us: self.cpu_us / n }
    }
}

struct Driver {
    // First: dropping it waits for what is in flight on the buffer.
    channel: Channel,
    /// What every write brings; nobody changes it.
    buf: AlignedBuf,
    free: Vec<u16>,
    /// By slot: whose request is in it.
    owner: [usize; DEPTH as usize],
    journals: [Journal; MAX_JOURNALS],
    done: Vec<Done>,
}

#[derive(Clone, Copy, Default)]
struct Journal {
    in_flight: u64,
    /// Since its last flush.
    written: u64,
    /// What is in flight, if anything is, is a flush.
    flushes: bool,
}

#[derive(Clone, Copy)]
enum Next {
    Write,
    Flush,
}

impl Journal {
    /// What it does next; `None`: it waits.
    fn next(&mut self, load: &Load) -> Option<Next> {
        let full = load.journals > 0 && self.written == load.flush_every;
        if self.in_flight > 0 && (full || self.flushes) {
            return None;
        }
        self.flushes = full;
        self.written = if full { 0 } else { self.written + 1 };
        Some(if full { Next::Flush } else { Next::Write })
    }
}

fn range(start: u64, bytes: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), bytes).expect("inside the disk")
}

impl Driver {
    fn new(disk: &Arc<Disk>, bytes: usize, value: u8) -> io::Result<Driver> {
        let engine = make_engine(EngineKind::IoUring, u32::from(DEPTH)).map_err(io::Error::other)?.engine;
        let channel = Channel::new(disk.clone(), engine, DEPTH).map_err(io::Error::other)?;
        let mut buf = AlignedBuf::new(bytes);
        buf.as_mut_slice().fill(value);
        let (owner, journals) = ([0; DEPTH as usize], [Journal::default(); MAX_JOURNALS]);
        Ok(Driver { channel, buf, free: (0..DEPTH).collect(), owner, journals, done: Vec::new() })
    }

    /// Writes to each block once, or until the time is over; how many writes there were.
    fn write_all(&mut self, load: &Load) -> io::Result<u64> {
        let blocks = DISK_BYTES / BLOCK_BYTES;
        let until = Instant::now() + Duration::from_secs_f64(load.seconds);
        let (mut written, mut turn) = (0, 0);
        while written < blocks && Instant::now() < until {
            turn += 1;
            let n = load.journals.max(1);
            let next = match self.free.is_empty() {
                true => None,
                false => (turn..turn + n).find_map(|i| Some((i % n, self.journals[i % n].next(load)?))),
            };
            match next {
                None => self.drive()?,
                Some((journal, Next::Flush)) => self.start(journal, Request::Flush)?,
                Some((journal, Next::Write)) => {
                    let range = range(place(load, written), load.bytes as u64);
                    self.start(journal, Request::Write(range))?;
                    written += 1;
                }
            }
        }
        self.settle()?;
        Ok(written)
    }

    /// One request, from start to end.
    fn one(&mut self, request: Request) -> io::Result<()> {
        self.start(0, request)?;
        while self.free.len() < usize::from(DEPTH) {
            self.drive()?;
        }
        Ok(())
    }

    /// Nothing is in flight, the disk's own work included.
    fn settle(&mut self) -> io::Result<()> {
        while !self.channel.is_idle() {
            self.drive()?;
        }
        Ok(())
    }

    fn start(&mut self, journal: usize, request: Request) -> io::Result<()> {
        let slot = self.free.pop().expect("a slot is free");
        let len = match request {
            Request::Write(r) => usize::try_from(r.len()).expect("a small request"),
            _ => 0,
        };
        // SAFETY: the channel, which waits for what is in flight, is dropped before the buffer is; and nobody looks at
        // the buffer after it was filled.
        let whole = unsafe { self.buf.as_buf() };
        let bufs = if len > 0 { &[whole.part(0, len)][..] } else { &[] };
        self.owner[usize::from(slot)] = journal;
        self.journals[journal].in_flight += 1;
        if let Some(outcome) = self.channel.submit(slot, request, bufs) {
            self.ended(slot, request, outcome)?;
        }
        Ok(())
    }

    fn ended(
        &mut self,
        slot: u16,
        what: impl std::fmt::Debug,
        outcome: vdblk::vd::Outcome,
    ) -> io::Result<()> {
        self.free.push(slot);
        self.journals[self.owner[usize::from(slot)]].in_flight -= 1;
        outcome.map_err(|f| io::Error::other(format!("{what:?} failed: {f}")))
    }

    fn drive(&mut self) -> io::Result<()> {
        let mut done = std::mem::take(&mut self.done);
        self.channel.drive(PATIENCE, &mut done)?;
        for d in done.drain(..) {
            self.ended(d.slot, "a request", d.outcome)?;
        }
        self.done = done;
        Ok(())
    }
}

/// Where the `n`th write goes: to a block of its own, in the order of their numbers or all over the disk.
fn place(load: &Load, n: u64) -> u64 {
    // odd, and the number of blocks is a power of two: every block comes once
    const STRIDE: u64 = 0x9e37_79b1;
    let blocks = DISK_BYTES / BLOCK_BYTES;
    let block = if load.sequential { n } else { n.wrapping_mul(STRIDE) % blocks };
    let pieces = BLOCK_BYTES / load.bytes as u64;
    block * BLOCK_BYTES + n % pieces * load.bytes as u64
}

/// CPU time of this process so far, threads of the kernel that work for it included, in microseconds.
fn cpu_us() -> io::Result<f64> {
    // SAFETY: rusage is a plain structure; zeros are one.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the structure may be written.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let us = |t: libc::timeval| t.tv_sec as f64 * 1e6 + t.tv_usec as f64;
    Ok(us(usage.ru_utime) + us(usage.ru_stime))
}
