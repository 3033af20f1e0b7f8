//! Copying what one disk shows onto another that reads as zeros so far.

use super::lanes::{Ended, Lanes};
use super::survey::Survey;
use super::{Job, LANE_BYTES, LANES, Progress, Step};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{Channel, Disk, Outcome};

/// Zero runs of this length at such a multiple are not written: the block of common file systems.
const ZERO_UNIT: u64 = 4096;
/// The channels among the lanes'.
const SOURCE: usize = 0;
const TARGET: usize = 1;

/// Copies the whole view of a chain. What is known to be zeros is not read, what is found to be is not written. Several
/// reads and writes run at a time.
pub struct CopyJob {
    lanes: Lanes,
    survey: Survey,
    states: Vec<State>,
    /// Data that the survey has found and no lane has taken yet.
    found: GuestRange,
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
        let disk = source.disk().clone();
        let (have, need) = (target.disk().size_bytes(), disk.size_bytes());
        if have < need {
            let what = format!("{need} bytes do not fit a disk of {have} bytes");
            return Err(Error::new(ErrorKind::OutOfRange, what));
        }
        Ok(CopyJob {
            lanes: Lanes::new(vec![source, target], LANES)?,
            survey: Survey::new(disk),
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

    /// The next range to copy: at most what a lane holds, never across a multiple of that.
    fn next_range(&mut self) -> Result<Option<GuestRange>> {
        while self.found.is_empty() {
            let Some(piece) = self.survey.next_piece()? else { return Ok(None) };
            self.progress.done = piece.range.start().0;
            if piece.kind.is_data() {
                self.found = piece.range;
            }
        }
        let start = self.found.start().0;
        let range = self.found.take(LANE_BYTES - start % LANE_BYTES);
        self.found = self.found.skip(range.len());
        self.progress.done = start;
        Ok(Some(range))
    }

    /// Gives every idle lane something to read. True: nothing is left to do.
    fn fill(&mut self) -> Result<bool> {
        for lane in 0..LANES {
            if self.failure.is_some() || self.states[usize::from(lane)] != State::Idle {
                continue;
            }
            let Some(range) = self.next_range()? else {
                self.exhausted = true;
                break;
            };
            self.states[usize::from(lane)] = State::Reading(range);
            if let Some(outcome) = self.lanes.read(lane, SOURCE, range) {
                self.advance(lane, outcome);
            }
        }
        let idle = self.states.iter().all(|s| *s == State::Idle);
        Ok(idle && (self.exhausted || self.failure.is_some()))
    }

    /// A request of the lane has ended: on to the next run that is not zeros.
    fn advance(&mut self, lane: u16, mut outcome: Outcome) {
        loop {
            let (range, done) = match (outcome, self.states[usize::from(lane)]) {
                (_, State::Idle) => unreachable!("an end in an idle lane"),
                (Err(f), state) => return self.fail(lane, state, f),
                (Ok(()), State::Reading(range)) => (range, 0),
                (Ok(()), State::Writing { range, done, run }) => (range, done + run),
            };
            let read = usize::try_from(range.len()).expect("inside a lane");
            let Some((skip, run)) = next_run(&self.lanes.bytes(lane)[..read], range.start(), done) else {
                self.states[usize::from(lane)] = State::Idle;
                return;
            };
            self.states[usize::from(lane)] = State::Writing { range, done: skip, run };
            let part = usize::try_from(skip).expect("inside a lane");
            match self.lanes.write(lane, TARGET, part, range.skip(skip).take(run)) {
                Some(o) => outcome = o,
                None => return,
            }
        }
    }

    fn fail(&mut self, lane: u16, state: State, f: Failure) {
        self.states[usize::from(lane)] = State::Idle;
        let e = match state {
            State::Writing { range, done, .. } => {
                let at = range.start().0 + done;
                Error::new(
                    Error::from(f).kind(),
                    format!("cannot write {} of its disk: {f}", GuestOffset(at)),
                )
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
