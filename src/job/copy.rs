//! Copying what one disk shows onto another: all of it, where the other reads as zeros so far, or what some of its images decide.

use super::lanes::{Ended, Lanes};
use super::survey::Survey;
use super::{Job, LANE_BYTES, LANES, Progress, Step};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{Channel, Disk, Outcome, Request};
use std::ops::Range;

/// Zero runs of this length at such a multiple are not written: the block of common file systems.
const ZERO_UNIT: u64 = 4096;
/// Shorter runs of zeros are written with the bytes around them where zeros have to be written.
const ZERO_RUN: u64 = 64 << 10;
/// Zeros that one request writes, at most.
const ZEROS_BYTES: u64 = 16 << 20;
/// The channels among the lanes'.
const SOURCE: usize = 0;
const TARGET: usize = 1;

/// What is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The images of the source's chain whose bytes are, by their depth, 0 for the top one.
    pub depths: Range<usize>,
    /// What they say is zeros is written too: something else may show there in the target.
    pub zeros: bool,
}

impl Selection {
    /// What a merge of an image into another one moves, both counted from the top of a chain of so many: the image whose view is
    /// read, and what of it.
    pub fn of_merge(from: usize, into: usize, images: usize) -> (usize, Selection) {
        if from < into {
            return (from, Selection { depths: 0..into - from, zeros: true });
        }
        // Where nothing is beneath, what is not there reads as zeros.
        (into, Selection { depths: 1..from - into + 1, zeros: from + 1 < images })
    }
}

/// Copies the whole view of a chain, or a part of it. What is known to be zeros is not read. Several reads and writes run at a
/// time.
pub struct CopyJob {
    lanes: Lanes,
    survey: Survey,
    selection: Selection,
    /// Zeros that were read are written like other bytes: filters of the target make something else of them, which other
    /// programs turn back into zeros.
    keep_zeros: bool,
    states: Vec<State>,
    /// What the survey has found and no lane has taken yet.
    found: GuestRange,
    /// It has to be read.
    found_data: bool,
    /// The survey has come to the end.
    exhausted: bool,
    ended: Vec<Ended>,
    failure: Option<Error>,
    progress: Progress,
}

impl std::fmt::Debug for CopyJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CopyJob").field("states", &self.states).finish_non_exhaustive()
    }
}

/// What a lane does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// The range is being read.
    Reading(GuestRange),
    /// Zeros are being written there.
    Clearing(GuestRange),
    /// Of the range that was read, the first `done` bytes are dealt with; `run` of them behind that are being written.
    Writing {
        range: GuestRange,
        done: u64,
        run: u64,
    },
}

impl CopyJob {
    /// A copy between two channels with at least [`Self::slots`] slots each. The target is as large as the source or
    /// larger, and reads as zeros.
    ///
    /// # Errors
    /// If the target is smaller; if no descriptor is left.
    pub fn new(source: Channel, target: Channel) -> Result<CopyJob> {
        Self::of(source, target, Selection { depths: 0..usize::MAX, zeros: false })
    }

    /// A copy of what is selected. The target need not read as zeros if zeros are copied too.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of(source: Channel, target: Channel, selection: Selection) -> Result<CopyJob> {
        let size = source.disk().size_bytes();
        Self::of_first(source, target, selection, size)
    }

    /// The same of the first `need` bytes, a multiple of 512, of a source that is no smaller: for targets that are.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_first(
        source: Channel,
        target: Channel,
        mut selection: Selection,
        need: u64,
    ) -> Result<CopyJob> {
        let disk = source.disk().clone();
        let have = target.disk().size_bytes();
        if have < need {
            let what = format!("{need} bytes do not fit a disk of {have} bytes");
            return Err(Error::new(ErrorKind::OutOfRange, what));
        }
        let filters = target.disk().filters();
        selection.zeros |= filters.hide_zeros();
        Ok(CopyJob {
            keep_zeros: filters.changes_writes(),
            lanes: Lanes::new(vec![source, target], LANES)?,
            survey: Survey::new(disk),
            selection,
            found_data: false,
            states: vec![State::Idle; usize::from(LANES)],
            found: GuestRange::EMPTY,
            exhausted: false,
            ended: Vec::new(),
            failure: None,
            progress: Progress { done: 0, total: need },
        })
    }

    /// Slots a channel must have.
    pub const fn slots() -> u16 {
        LANES
    }

    /// Leaves the target as a clean close does, and durable. To be called once the job is done.
    ///
    /// # Errors
    /// If that could not be written.
    pub fn close_target(&mut self) -> Result<()> {
        self.lanes.close_disk(TARGET, true)
    }

    /// The same, but not durable.
    ///
    /// # Errors
    /// If it could not be written.
    pub(super) fn leave_target(&mut self) -> Result<()> {
        self.lanes.close_disk(TARGET, false)
    }

    /// The next range to copy: at most what a lane holds, never across a multiple of that; or of zeros to write.
    fn next_range(&mut self) -> Result<Option<GuestRange>> {
        while self.found.is_empty() {
            let Some(piece) = self.survey.next_piece()? else { return Ok(None) };
            let end = self.progress.total.next_multiple_of(SECTOR_BYTES);
            let left = end.saturating_sub(piece.range.start().0);
            if left == 0 {
                return Ok(None);
            }
            self.progress.done = piece.range.start().0;
            self.found_data = self.survey.must_read(piece.kind);
            if (self.found_data || self.selection.zeros) && self.selection.depths.contains(&piece.depth) {
                self.found = piece.range.take(left);
            }
        }
        let start = self.found.start().0;
        let most = if self.found_data { LANE_BYTES } else { ZEROS_BYTES };
        let range = self.found.take(most - start % most);
        self.found = self.found.skip(range.len());
        self.progress.done = start;
        Ok(Some(range))
    }

    /// Gives idle lanes something to read, the first one again if it has ended at once: what it wrote from is still in the
    /// processor's cache. True: nothing is left to do.
    fn fill(&mut self) -> Result<bool> {
        for _ in 0..LANES {
            let idle = (0..LANES).find(|l| self.states[usize::from(*l)] == State::Idle);
            let Some(lane) = idle.filter(|_| self.failure.is_none()) else { break };
            let Some(range) = self.next_range()? else {
                self.exhausted = true;
                break;
            };
            let (state, started) = if self.found_data {
                (State::Reading(range), self.lanes.read(lane, SOURCE, range))
            } else {
                (State::Clearing(range), self.clear(lane, range))
            };
            self.states[usize::from(lane)] = state;
            if let Some(outcome) = started {
                self.advance(lane, outcome);
            }
        }
        let idle = self.states.iter().all(|s| *s == State::Idle);
        Ok(idle && (self.exhausted || self.failure.is_some()))
    }

    /// Zeros in the target.
    fn clear(&mut self, lane: u16, range: GuestRange) -> Option<Outcome> {
        self.lanes.start(lane, TARGET, Request::WriteZeroes { range, unmap: true }, &[])
    }

    /// A request of the lane has ended: on to the next run that is to be written.
    fn advance(&mut self, lane: u16, mut outcome: Outcome) {
        loop {
            let (range, done) = match (outcome, self.states[usize::from(lane)]) {
                (_, State::Idle) => unreachable!("an end in an idle lane"),
                (Err(f), state) => return self.fail(lane, state, f),
                (Ok(()), State::Clearing(_)) => {
                    self.states[usize::from(lane)] = State::Idle;
                    return;
                }
                (Ok(()), State::Reading(range)) => (range, 0),
                (Ok(()), State::Writing { range, done, run }) => (range, done + run),
            };
            let read = usize::try_from(range.len()).expect("inside a lane");
            let bytes = &self.lanes.bytes(lane)[..read];
            let next = if self.keep_zeros {
                (done < range.len()).then_some((done, range.len() - done, false))
            } else if self.selection.zeros {
                next_part(bytes, range.start(), done)
            } else {
                next_run(bytes, range.start(), done).map(|(skip, run)| (skip, run, false))
            };
            let Some((skip, run, zeros)) = next else {
                self.states[usize::from(lane)] = State::Idle;
                return;
            };
            self.states[usize::from(lane)] = State::Writing { range, done: skip, run };
            let (part, to) = (usize::try_from(skip).expect("inside a lane"), range.skip(skip).take(run));
            let started = if zeros { self.clear(lane, to) } else { self.lanes.write(lane, TARGET, part, to) };
            match started {
                Some(o) => outcome = o,
                None => return,
            }
        }
    }

    fn fail(&mut self, lane: u16, state: State, f: Failure) {
        self.states[usize::from(lane)] = State::Idle;
        let e = match state {
            State::Writing { .. } | State::Clearing(_) => {
                let at = match state {
                    State::Writing { range, done, .. } => range.skip(done).start(),
                    State::Clearing(range) | State::Reading(range) => range.start(),
                    State::Idle => GuestOffset(0),
                };
                Error::new(Error::from(f).kind(), format!("cannot write {at} of its disk: {f}"))
            }
            State::Reading(range) => {
                Error::new(Error::from(f).kind(), format!("cannot read {} of its disk: {f}", range.start()))
                    .at(top_path(self.survey.disk()))
            }
            State::Idle => unreachable!("an idle lane failed"),
        };
        self.failure.get_or_insert(e);
    }
}

/// The file of a disk's top image.
pub(super) fn top_path(disk: &Disk) -> &std::path::Path {
    disk.host_file(crate::map::FileId(0)).path()
}

impl Job for CopyJob {
    fn step(&mut self) -> Result<Step> {
        if self.fill()? {
            self.progress.done = self.progress.total;
            return self.failure.take().map_or(Ok(Step::Done), Err);
        }
        let mut ended = std::mem::take(&mut self.ended);
        self.lanes.wait(&mut ended)?;
        for e in ended.drain(..) {
            self.advance(e.lane, e.outcome);
        }
        self.ended = ended;
        Ok(Step::More)
    }

    fn progress(&self) -> Progress {
        self.progress
    }
}

/// The first run of units that are not all zeros behind `done`: how far it is from the start of `bytes`, and its length.
/// `bytes` lie on the disk at `at`.
fn next_run(bytes: &[u8], at: GuestOffset, done: u64) -> Option<(u64, u64)> {
    let len = bytes.len() as u64;
    let unit_end = |from: u64| ((at.0 + from) / ZERO_UNIT * ZERO_UNIT + ZERO_UNIT - at.0).min(len);
    let is_zero = |from: u64, to: u64| all_zero(&bytes[from as usize..to as usize]);
    let mut start = done;
    while start < len && is_zero(start, unit_end(start)) {
        start = unit_end(start);
    }
    if start >= len {
        return None;
    }
    let mut end = unit_end(start);
    while end < len && !is_zero(end, unit_end(end)) {
        end = unit_end(end);
    }
    Some((start, end - start))
}

/// The next part behind `done`, where everything is to be written: how far it is from the start of `bytes`, its length, and
/// whether it is a run of zeros that is worth a request of its own.
fn next_part(bytes: &[u8], at: GuestOffset, done: u64) -> Option<(u64, u64, bool)> {
    let len = bytes.len() as u64;
    if done >= len {
        return None;
    }
    let (mut end, mut data) = (done, done);
    // Runs of data as long as the zeros between them are few.
    while let Some((skip, run)) = next_run(bytes, at, end) {
        if skip - data >= ZERO_RUN {
            break;
        }
        (data, end) = (skip + run, skip + run);
    }
    if data > done {
        return Some((done, data - done, false));
    }
    let zeros = next_run(bytes, at, done).map_or(len, |(skip, _)| skip);
    Some((done, zeros - done, zeros - done >= ZERO_RUN || zeros == len))
}

/// True without a byte but zeros, for up to [`ZERO_UNIT`] bytes.
fn all_zero(unit: &[u8]) -> bool {
    // A comparison of memory is several times as fast as a loop that may stop at each byte.
    static ZEROS: [u8; ZERO_UNIT as usize] = [0; ZERO_UNIT as usize];
    unit == &ZEROS[..unit.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_data_or_long_zeros_and_leave_nothing_out() {
        let run = ZERO_RUN as usize;
        let mut b = vec![0u8; 4 * run];
        assert_eq!(next_part(&b, GuestOffset(0), 0), Some((0, 4 * ZERO_RUN, true)));
        b[5000] = 1;
        b[5000 + run / 2] = 1;
        let end = (5000 + ZERO_RUN / 2).next_multiple_of(4096);
        assert_eq!(next_part(&b, GuestOffset(0), 0), Some((0, end, false)), "few zeros are data");
        assert_eq!(next_part(&b, GuestOffset(0), end), Some((end, 4 * ZERO_RUN - end, true)));
        b[4 * run - 1] = 1;
        assert_eq!(next_part(&b, GuestOffset(0), end), Some((end, 4 * ZERO_RUN - 4096 - end, true)));
        assert_eq!(
            next_part(&b, GuestOffset(0), 4 * ZERO_RUN - 4096),
            Some((4 * ZERO_RUN - 4096, 4096, false))
        );
        assert_eq!(next_part(&b, GuestOffset(0), 4 * ZERO_RUN), None);
    }

    #[test]
    fn runs_between_zeros() {
        let mut b = vec![0u8; 5 * 4096];
        assert_eq!(next_run(&b, GuestOffset(0), 0), None);
        b[4096] = 1;
        b[3 * 4096 - 1] = 1;
        b[5 * 4096 - 1] = 1;
        assert_eq!(next_run(&b, GuestOffset(0), 0), Some((4096, 8192)));
        assert_eq!(next_run(&b, GuestOffset(0), 4096 + 8192), Some((4 * 4096, 4096)));
        assert_eq!(next_run(&b, GuestOffset(0), 5 * 4096), None);
        // Units lie where they lie on the disk: the first is cut short.
        assert_eq!(next_run(&b, GuestOffset(512), 0), Some((4096 - 512, 4096)));
        assert_eq!(next_run(&b[..512], GuestOffset(3584), 0), None);
        assert_eq!(next_run(&[0, 0, 1], GuestOffset(1 << 20), 0), Some((0, 3)));
    }
}
