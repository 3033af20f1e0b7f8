//! The ranges in which two disks differ; and, where a disk is given for it, what the first one shows there written to that.

use super::compare::Pairing;
use super::lanes::{Ended, Lanes};
use super::{Job, LANE_BYTES, LANES, Progress, Step, Watch, open_channel};
use crate::error::{Error, Failure, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{Channel, Disk, Outcome, Request};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What is written is whole units of this: the block of common file systems.
const WRITE_UNIT: u64 = 4096;
/// The channel that is written.
const TARGET: usize = 2;

/// Finds the ranges in which two disks differ, in whole sectors. What both know to be zeros, or have in the same place of the same
/// file, is not read.
pub struct DiffJob {
    /// Each pair has two lanes: its own number, for the first disk and what is written, and that plus [`LANES`].
    lanes: Lanes,
    pairing: Pairing,
    work: Vec<Option<Work>>,
    /// Start and end of what was found, not yet taken.
    found: BTreeMap<u64, u64>,
    /// Of what differs.
    unit: u64,
    writes: bool,
    ended: Vec<Ended>,
    failure: Option<Error>,
}

/// A range being compared.
#[derive(Clone, Copy, Debug)]
struct Work {
    range: GuestRange,
    has_data: [bool; 2],
    /// Reads to come.
    pending: u8,
    /// Bytes dealt with, and bytes behind them that are being written.
    done: u64,
    run: u64,
}

impl std::fmt::Debug for DiffJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiffJob").field("work", &self.work).finish_non_exhaustive()
    }
}

impl DiffJob {
    /// The differences of two disks, over channels with at least [`Self::slots`] slots each.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn new(a: Channel, b: Channel) -> Result<DiffJob> {
        Self::of(vec![a, b], SECTOR_BYTES)
    }

    /// The same, and what `a` shows where it differs from `b` is written to `target`, a disk as large as both.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn writing(a: Channel, b: Channel, target: Channel) -> Result<DiffJob> {
        Self::of(vec![a, b, target], WRITE_UNIT)
    }

    fn of(channels: Vec<Channel>, unit: u64) -> Result<DiffJob> {
        Ok(DiffJob {
            pairing: Pairing::new(channels[0].disk(), channels[1].disk()),
            work: vec![None; usize::from(LANES)],
            found: BTreeMap::new(),
            unit,
            writes: channels.len() > TARGET,
            ended: Vec::new(),
            failure: None,
            lanes: Lanes::new(channels, Self::slots())?,
        })
    }

    /// Slots a channel must have.
    pub const fn slots() -> u16 {
        2 * LANES
    }

    /// Bytes of the two disks.
    pub fn sizes(&self) -> [u64; 2] {
        self.pairing.sizes()
    }

    /// Leaves the disk that is written as a clean close does, and durable. To be called once the job has ended.
    ///
    /// # Errors
    /// If that could not be written.
    pub fn close_target(&mut self) -> Result<()> {
        if self.writes { self.lanes.close_disk(TARGET, true) } else { Ok(()) }
    }

    /// The next range that differs, in the disk's order, once it is known where it ends. Where it is written nothing is told.
    pub fn next_found(&mut self) -> Option<GuestRange> {
        let at_work = self.work.iter().flatten().map(|w| w.range.start().0).min();
        let known = at_work.unwrap_or(self.pairing.at());
        let all = at_work.is_none() && known >= self.pairing.end();
        let (start, mut end) = self.found.first_key_value().map(|(s, e)| (*s, *e))?;
        while let Some(next) = self.found.get(&end) {
            end = *next;
        }
        // What touches the unknown may go on there.
        if !all && end >= known {
            return None;
        }
        self.found.retain(|s, _| *s >= end);
        Some(GuestRange::between(GuestOffset(start), GuestOffset(end)))
    }

    fn start(&mut self, n: u16, range: GuestRange, has_data: [bool; 2]) {
        let pending = u8::try_from(has_data.iter().filter(|d| **d).count()).expect("two");
        self.work[usize::from(n)] = Some(Work { range, has_data, pending, done: 0, run: 0 });
        for side in (0..2u16).filter(|s| has_data[usize::from(*s)]) {
            let lane = n + side * LANES;
            if let Some(outcome) = self.lanes.read(lane, usize::from(side), range) {
                self.advance(lane, outcome);
            }
        }
    }

    /// A request has ended: the last read is followed by writes of what differs.
    fn advance(&mut self, lane: u16, mut outcome: Outcome) {
        let n = lane % LANES;
        let mut work = self.work[usize::from(n)].take().expect("a pair at work");
        if work.pending > 0 {
            work.pending -= 1;
            if let Err(f) = outcome {
                let e = self.pairing.failed(usize::from(lane / LANES), work.range, f);
                self.failure.get_or_insert(e);
                outcome = Ok(());
            }
            if work.pending > 0 {
                self.work[usize::from(n)] = Some(work);
                return;
            }
        }
        loop {
            if let Err(f) = outcome {
                self.fail_write(work, f);
            }
            work.done += work.run;
            let next = if self.failure.is_some() { None } else { self.next_run(n, &work) };
            let Some((skip, run)) = next else { return };
            (work.done, work.run) = (skip, run);
            let start = work.range.start().0 + skip;
            if !self.writes {
                self.found.insert(start, start + run);
                continue;
            }
            self.work[usize::from(n)] = Some(work);
            match self.write(n, work) {
                Some(o) => outcome = o,
                None => return,
            }
            self.work[usize::from(n)] = None;
        }
    }

    fn write(&mut self, n: u16, work: Work) -> Option<Outcome> {
        let to = work.range.skip(work.done).take(work.run);
        let from = usize::try_from(work.done).expect("inside a lane");
        let len = usize::try_from(work.run).expect("inside a lane");
        let zeros = !work.has_data[0] || self.lanes.bytes(n)[from..from + len].iter().all(|b| *b == 0);
        if zeros {
            let request = Request::WriteZeroes { range: to, unmap: true };
            return self.lanes.start(n, TARGET, request, &[]);
        }
        self.lanes.write(n, TARGET, from, to)
    }

    fn fail_write(&mut self, work: Work, f: Failure) {
        let at = work.range.skip(work.done).start();
        let e = Error::new(Error::from(f).kind(), format!("cannot write {at} of its disk: {f}"));
        self.failure.get_or_insert(e);
    }

    /// The first run of units that differ behind what was dealt with: how far into the range it is, and its length.
    fn next_run(&self, n: u16, work: &Work) -> Option<(u64, u64)> {
        let len = usize::try_from(work.range.len()).expect("inside a lane");
        let side = |n: u16, has: bool| has.then(|| &self.lanes.bytes(n)[..len]);
        let (a, b) = (side(n, work.has_data[0]), side(n + LANES, work.has_data[1]));
        next_run(a, b, (work.range.start().0, work.range.len()), work.done, self.unit)
    }
}

/// The first run of units behind `done` in which the bytes of a range differ (`None`: zeros).
fn next_run(
    a: Option<&[u8]>,
    b: Option<&[u8]>,
    (at, len): (u64, u64),
    done: u64,
    unit: u64,
) -> Option<(u64, u64)> {
    static ZEROS: [u8; WRITE_UNIT as usize] = [0; WRITE_UNIT as usize];
    let unit_end = |from: u64| ((at + from) / unit * unit + unit - at).min(len);
    let differs = |from: u64| {
        let range = small(from)..small(unit_end(from));
        let zeros = &ZEROS[..range.len()];
        a.map_or(zeros, |a| &a[range.clone()]) != b.map_or(zeros, |b| &b[range.clone()])
    };
    let mut start = done;
    while start < len && !differs(start) {
        start = unit_end(start);
    }
    let mut end = start;
    while end < len && differs(end) {
        end = unit_end(end);
    }
    (end > start).then_some((start, end - start))
}

fn small(n: u64) -> usize {
    debug_assert!(n <= LANE_BYTES);
    usize::try_from(n).expect("inside a lane")
}

impl Job for DiffJob {
    fn step(&mut self) -> Result<Step> {
        for n in 0..LANES {
            if self.failure.is_some() {
                break;
            }
            if self.work[usize::from(n)].is_none() {
                let Some((range, has_data)) = self.pairing.next()? else { break };
                self.start(n, range, has_data);
            }
        }
        let mut ended = std::mem::take(&mut self.ended);
        self.lanes.wait(&mut ended)?;
        for e in ended.drain(..) {
            self.advance(e.lane, e.outcome);
        }
        self.ended = ended;
        if self.work.iter().any(Option::is_some) {
            return Ok(Step::More);
        }
        if let Some(e) = self.failure.take() {
            return Err(e);
        }
        Ok(if self.pairing.at() >= self.pairing.end() { Step::Done } else { Step::More })
    }

    fn progress(&self) -> Progress {
        Progress { done: self.pairing.at(), total: self.pairing.end() }
    }
}

/// Tells `told` of all ranges in which two open disks differ, in the disk's order, on this thread.
///
/// # Errors
/// Of reading; those of `told`; [`crate::ErrorKind::Cancelled`].
pub fn diff_disks(
    a: &Arc<Disk>,
    b: &Arc<Disk>,
    told: &mut dyn FnMut(GuestRange) -> Result<()>,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let slots = DiffJob::slots();
    let mut job = DiffJob::new(open_channel(a, slots)?, open_channel(b, slots)?)?;
    loop {
        watch.stop_if_cancelled()?;
        let step = job.step()?;
        (watch.progress)(job.progress());
        while let Some(range) = job.next_found() {
            told(range)?;
        }
        if step == Step::Done {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_whole_units_of_the_disk() {
        let (mut a, b) = (vec![0u8; 16384], vec![0u8; 16384]);
        assert_eq!(next_run(Some(&a), Some(&b), (0, 16384), 0, 512), None);
        a[513] = 1;
        a[1024] = 1;
        a[9000] = 1;
        for other in [Some(&*b), None] {
            assert_eq!(next_run(Some(&a), other, (0, 16384), 0, 512), Some((512, 1024)));
            assert_eq!(next_run(other, Some(&a), (0, 16384), 1536, 512), Some((8704, 512)));
            assert_eq!(next_run(Some(&a), other, (0, 16384), 9216, 512), None);
            assert_eq!(next_run(Some(&a), other, (512, 16384), 0, 4096), Some((0, 3584)));
            assert_eq!(next_run(Some(&a), other, (512, 16384), 3584, 4096), Some((7680, 4096)));
        }
    }
}
