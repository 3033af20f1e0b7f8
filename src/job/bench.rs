//! Timing requests to a disk: so many of one size, so many at a time.

use super::lanes::{Ended, Lanes};
use super::{Job, LANE_BYTES, Progress, Step, Watch, open_channel};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{Disk, Outcome, Request};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most requests at a time.
pub const MAX_BENCH_DEPTH: u16 = 256;
/// Latencies are counted in classes, each wider than the one before by 1/16.
const CLASSES: usize = 64 * 16;

/// What is to be timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bench {
    /// Requests.
    pub count: u64,
    /// Requests at a time, 1 to [`MAX_BENCH_DEPTH`].
    pub depth: u16,
    /// Bytes of a request: a multiple of 512, up to 1 MiB.
    pub size: u64,
    /// Bytes from one request to the next; behind the disk's end it goes on at its beginning. A multiple of 512.
    pub step: u64,
    /// Where the first request begins: a multiple of 512.
    pub offset: u64,
    /// `Some`: bytes of this value are written; else they are read.
    pub write: Option<u8>,
    /// Requests between flushes; 0: none but at the end.
    pub flush_interval: u64,
}

/// What was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timed {
    /// Requests that have ended, flushes not counted.
    pub requests: u64,
    /// From the first request's start to the last one's end.
    pub elapsed: Duration,
    /// Mean of their latencies.
    pub mean: Duration,
    /// Below which half of them were, 99 of 100, and all: to a sixteenth.
    pub percentiles: [Duration; 3],
}

impl Timed {
    /// Requests a second.
    pub fn iops(&self) -> f64 {
        // Both are far below what a double counts exactly.
        self.requests as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

struct BenchJob {
    lanes: Lanes,
    how: Bench,
    /// When each lane's request began; `None`: the lane is idle.
    began: Vec<Option<Instant>>,
    /// Of each lane: it flushes.
    flushes: Vec<bool>,
    started: u64,
    ended: u64,
    next: u64,
    size_bytes: u64,
    /// A flush is due before the next request.
    flush_due: bool,
    sum: Duration,
    classes: Vec<u64>,
    longest: Duration,
    out: Vec<Ended>,
    failure: Option<Error>,
}

fn refused(what: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}

impl Bench {
    fn refuse_impossible(&self, disk_bytes: u64) -> Result<()> {
        let whole = |n: u64| n.is_multiple_of(SECTOR_BYTES);
        if !whole(self.size) || !(SECTOR_BYTES..=LANE_BYTES).contains(&self.size) {
            return Err(refused(format!(
                "a request has {} bytes; multiples of 512 up to 1M can be",
                self.size
            )));
        }
        if !whole(self.step) || !whole(self.offset) {
            return Err(refused("offset and step must be multiples of 512".into()));
        }
        if self.offset.checked_add(self.size).is_none_or(|end| end > disk_bytes) {
            return Err(refused(format!("the first request reaches behind the disk's end at {disk_bytes}")));
        }
        if !(1..=MAX_BENCH_DEPTH).contains(&self.depth) {
            return Err(refused(format!("{} requests at a time; 1 to {MAX_BENCH_DEPTH} can be", self.depth)));
        }
        Ok(())
    }
}

/// The class of a latency, and the longest one in a class.
fn class_of(latency: Duration) -> usize {
    let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX).max(16);
    let power = ns.ilog2();
    let within = (ns >> (power - 4)) & 15;
    usize::try_from(u64::from(power) * 16 + within).expect("64 powers")
}

fn longest_of(class: usize) -> Duration {
    let (power, within) = (class / 16, class as u64 % 16);
    let unit = 1u64 << power.saturating_sub(4);
    Duration::from_nanos((16 + within + 1).saturating_mul(unit))
}

impl BenchJob {
    fn new(disk: &Arc<Disk>, how: Bench) -> Result<Self> {
        how.refuse_impossible(disk.size_bytes())?;
        let depth = usize::from(how.depth);
        let mut lanes = Lanes::new(vec![open_channel(disk, how.depth)?], how.depth)?;
        for lane in 0..how.depth {
            lanes.bytes_mut(lane).fill(how.write.unwrap_or(0));
        }
        Ok(BenchJob {
            lanes,
            how,
            began: vec![None; depth],
            flushes: vec![false; depth],
            started: 0,
            ended: 0,
            next: how.offset,
            size_bytes: disk.size_bytes(),
            flush_due: false,
            sum: Duration::ZERO,
            classes: vec![0; CLASSES],
            longest: Duration::ZERO,
            out: Vec::new(),
            failure: None,
        })
    }

    fn start(&mut self, lane: u16) {
        let n = usize::from(lane);
        self.began[n] = Some(Instant::now());
        self.flushes[n] = std::mem::take(&mut self.flush_due);
        let outcome = if self.flushes[n] {
            self.lanes.start(lane, 0, Request::Flush, &[])
        } else {
            let range = GuestRange::between(GuestOffset(self.next), GuestOffset(self.next + self.how.size));
            self.started += 1;
            self.next = self.next.saturating_add(self.how.step);
            if self.next.saturating_add(self.how.size) > self.size_bytes {
                self.next = 0;
            }
            let interval = self.how.flush_interval;
            self.flush_due = interval > 0 && self.started.is_multiple_of(interval);
            match self.how.write {
                Some(_) => self.lanes.write(lane, 0, 0, range),
                None => self.lanes.read(lane, 0, range),
            }
        };
        if let Some(outcome) = outcome {
            self.ended(lane, outcome);
        }
    }

    fn ended(&mut self, lane: u16, outcome: Outcome) {
        let n = usize::from(lane);
        let latency = self.began[n].take().map_or(Duration::ZERO, |began| began.elapsed());
        if let Err(f) = outcome {
            let e = Error::new(Error::from(f).kind(), format!("a request failed: {f}"));
            self.failure.get_or_insert(e);
        }
        if self.flushes[n] {
            return;
        }
        self.ended += 1;
        self.sum += latency;
        self.longest = self.longest.max(latency);
        self.classes[class_of(latency)] += 1;
    }

    /// The latency below which so many of a thousand were.
    fn percentile(&self, of_1000: u64) -> Duration {
        let wanted = (self.ended * of_1000).div_ceil(1000);
        let mut seen = 0;
        let class = self.classes.iter().position(|n| {
            seen += n;
            seen >= wanted
        });
        class.map_or(Duration::ZERO, longest_of).min(self.longest)
    }
}

impl Job for BenchJob {
    fn step(&mut self) -> Result<Step> {
        for lane in 0..self.how.depth {
            let more = self.started < self.how.count || self.flush_due;
            if more && self.failure.is_none() && self.began[usize::from(lane)].is_none() {
                self.start(lane);
            }
        }
        let mut out = std::mem::take(&mut self.out);
        self.lanes.wait(&mut out)?;
        for e in out.drain(..) {
            self.ended(e.lane, e.outcome);
        }
        self.out = out;
        if self.began.iter().any(Option::is_some) {
            return Ok(Step::More);
        }
        if let Some(e) = self.failure.take() {
            return Err(e);
        }
        Ok(if self.started >= self.how.count && !self.flush_due { Step::Done } else { Step::More })
    }

    fn progress(&self) -> Progress {
        let bytes = |n: u64| n.saturating_mul(self.how.size);
        Progress { done: bytes(self.ended), total: bytes(self.how.count).max(1) }
    }
}

/// Times requests on this thread, and leaves the disk as a clean close does.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for requests that cannot be; of reading and writing; [`ErrorKind::Cancelled`].
pub fn bench_disk(disk: &Arc<Disk>, how: Bench, watch: &mut Watch<'_>) -> Result<Timed> {
    let mut job = BenchJob::new(disk, how)?;
    let began = Instant::now();
    let ran = watch.run(&mut job);
    let elapsed = began.elapsed();
    let closed = job.lanes.close_disk(0, how.write.is_some());
    ran.and(closed)?;
    let requests = u32::try_from(job.ended.max(1)).unwrap_or(u32::MAX);
    Ok(Timed {
        requests: job.ended,
        elapsed,
        mean: job.sum / requests,
        percentiles: [job.percentile(500), job.percentile(990), job.longest],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_their_latencies() {
        for ns in [0u64, 16, 17, 31, 32, 1000, 12_345, 1 << 40, u64::MAX] {
            let (class, latency) = (class_of(Duration::from_nanos(ns)), Duration::from_nanos(ns));
            assert!(class < CLASSES);
            assert!(longest_of(class) >= latency, "{ns}");
            assert!(longest_of(class) <= latency + latency / 15 + Duration::from_nanos(17), "{ns}");
        }
    }
}
