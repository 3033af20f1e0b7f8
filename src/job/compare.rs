//! Comparing what two disks show.

use super::copy::top_path;
use super::lanes::{Ended, Lanes};
use super::survey::{Piece, PieceKind, Survey};
use super::{Job, LANE_BYTES, LANES, Progress, Step, Watch, open_channel};
use crate::error::{Error, Failure, Result};
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{Channel, Disk, Outcome};
use std::sync::Arc;

/// What a comparison has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Offset of the first byte that differs; `None`: the disks are equal, where the longer one goes on it has zeros.
    pub difference: Option<u64>,
    /// Bytes of the first and of the second disk.
    pub sizes: [u64; 2],
}

/// Compares two disks. What both know to be zeros, or have in the same place of the same file, is not read.
pub struct CompareJob {
    /// Each pair has two lanes: its own number and that plus [`LANES`].
    lanes: Lanes,
    pairing: Pairing,
    pairs: Vec<Option<Pair>>,
    difference: Option<u64>,
    ended: Vec<Ended>,
    failure: Option<Error>,
}

impl std::fmt::Debug for CompareJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompareJob").field("pairing", &self.pairing).finish_non_exhaustive()
    }
}

/// Goes through two disks side by side, and passes over what both know to be zeros, or have in the same place of the same file.
#[derive(Debug)]
pub(super) struct Pairing {
    sides: [Side; 2],
    at: u64,
    sizes: [u64; 2],
}

/// One of the disks.
#[derive(Debug)]
struct Side {
    survey: Survey,
    piece: Option<Piece>,
}

/// A range being compared.
#[derive(Clone, Copy, Debug)]
struct Pair {
    range: GuestRange,
    /// Which side has data there; the other is zeros.
    has_data: [bool; 2],
    /// Reads to come.
    pending: u8,
}

impl Side {
    fn new(disk: &Arc<Disk>) -> Self {
        Side { survey: Survey::new(disk.clone()), piece: None }
    }

    /// The rest of the piece around `at`; zeros behind the disk's end, up to `end`.
    fn piece_at(&mut self, at: u64, end: u64) -> Result<Piece> {
        while self.piece.is_none_or(|p| p.range.end().0 <= at) {
            self.piece = self.survey.next_piece()?;
            if self.piece.is_none() {
                let range = GuestRange::between(GuestOffset(at), GuestOffset(end));
                return Ok(Piece { range, depth: 0, kind: PieceKind::Unallocated });
            }
        }
        let piece = self.piece.expect("looked up above");
        let skip = at - piece.range.start().0;
        let kind = match piece.kind {
            PieceKind::Data { file, off } => PieceKind::Data { file, off: off.plus(skip) },
            kind => kind,
        };
        Ok(Piece { range: piece.range.skip(skip), kind, ..piece })
    }

    /// File and place of a piece of data, such that two sides can be compared.
    fn place(&self, p: &Piece) -> Option<((u64, u64), u64)> {
        match p.kind {
            // The other side may have other filters.
            _ if !self.survey.disk().filters().is_empty() => None,
            PieceKind::Data { file, off } => {
                Some((self.survey.disk().host_file(file).traits().identity, off.0))
            }
            _ => None,
        }
    }
}

impl Pairing {
    pub(super) fn new(a: &Arc<Disk>, b: &Arc<Disk>) -> Self {
        Pairing { sides: [Side::new(a), Side::new(b)], at: 0, sizes: [a.size_bytes(), b.size_bytes()] }
    }

    /// Where the longer disk ends.
    pub(super) fn end(&self) -> u64 {
        self.sizes[0].max(self.sizes[1])
    }

    /// How far it has come.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Bytes of the two disks.
    pub(super) fn sizes(&self) -> [u64; 2] {
        self.sizes
    }

    /// Of an error in reading.
    pub(super) fn failed(&self, side: usize, range: GuestRange, f: Failure) -> Error {
        let what = format!("cannot read {} of its disk: {f}", range.start());
        Error::new(Error::from(f).kind(), what).at(top_path(self.sides[side].survey.disk()))
    }

    /// The next range of which at least one side has to be read, inside what a lane holds, and which of them.
    ///
    /// # Errors
    /// As [`Survey::next_piece`].
    pub(super) fn next(&mut self) -> Result<Option<(GuestRange, [bool; 2])>> {
        let end = self.end();
        while self.at < end {
            let a = self.sides[0].piece_at(self.at, end)?;
            let b = self.sides[1].piece_at(self.at, end)?;
            let both = a.range.intersect(b.range);
            let same = self.sides[0].place(&a).is_some_and(|p| self.sides[1].place(&b) == Some(p));
            let must_read = |side: usize, p: &Piece| self.sides[side].survey.must_read(p.kind);
            // Behind a disk's end nothing can be read: it counts as zeros.
            let inside = self.sizes.map(|size| self.at < size);
            let has_data = [inside[0] && must_read(0, &a), inside[1] && must_read(1, &b)];
            if same || has_data == [false, false] {
                self.at = both.end().0;
                continue;
            }
            let range = both.take(LANE_BYTES - self.at % LANE_BYTES);
            self.at = range.end().0;
            return Ok(Some((range, has_data)));
        }
        Ok(None)
    }
}

impl CompareJob {
    /// A comparison over two channels with at least [`Self::slots`] slots each.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn new(a: Channel, b: Channel) -> Result<CompareJob> {
        let pairing = Pairing::new(a.disk(), b.disk());
        Ok(CompareJob {
            lanes: Lanes::new(vec![a, b], Self::slots())?,
            pairing,
            pairs: vec![None; usize::from(LANES)],
            difference: None,
            ended: Vec::new(),
            failure: None,
        })
    }

    /// Slots a channel must have.
    pub const fn slots() -> u16 {
        2 * LANES
    }

    /// What was found, once the job is done.
    pub fn result(&self) -> Comparison {
        Comparison { difference: self.difference, sizes: self.pairing.sizes() }
    }

    fn start(&mut self, n: u16, pair: Pair) {
        let pending = pair.has_data.iter().filter(|d| **d).count();
        self.pairs[usize::from(n)] = Some(Pair { pending: u8::try_from(pending).expect("two"), ..pair });
        for side in 0..2u16 {
            if !pair.has_data[usize::from(side)] {
                continue;
            }
            let lane = n + side * LANES;
            if let Some(outcome) = self.lanes.read(lane, usize::from(side), pair.range) {
                self.read_ended(lane, outcome);
            }
        }
    }

    fn read_ended(&mut self, lane: u16, outcome: Outcome) {
        let (n, side) = (lane % LANES, usize::from(lane / LANES));
        let mut pair = self.pairs[usize::from(n)].take().expect("a pair that reads");
        if let Err(f) = outcome {
            let e = self.pairing.failed(side, pair.range, f);
            self.failure.get_or_insert(e);
        }
        pair.pending -= 1;
        if pair.pending > 0 {
            self.pairs[usize::from(n)] = Some(pair);
        } else if self.failure.is_none()
            && let Some(first) = self.first_difference(n, pair)
        {
            let at = pair.range.start().0 + first;
            self.difference = Some(self.difference.map_or(at, |d| d.min(at)));
        }
    }

    fn first_difference(&self, n: u16, pair: Pair) -> Option<u64> {
        let len = usize::try_from(pair.range.len()).expect("inside a lane");
        let a = || &self.lanes.bytes(n)[..len];
        let b = || &self.lanes.bytes(n + LANES)[..len];
        match pair.has_data {
            [true, true] => first_unequal(a(), b()),
            [true, false] => first_not_zero(a()),
            _ => first_not_zero(b()),
        }
    }
}

/// Comparing memory is fast as long as one does not ask where it differs.
const LOOK_BYTES: usize = 4096;

fn first_unequal(a: &[u8], b: &[u8]) -> Option<u64> {
    let chunk = a.chunks(LOOK_BYTES).zip(b.chunks(LOOK_BYTES)).position(|(a, b)| a != b)?;
    let from = chunk * LOOK_BYTES;
    let within = a[from..].iter().zip(&b[from..]).position(|(a, b)| a != b)?;
    Some((from + within) as u64)
}

fn first_not_zero(a: &[u8]) -> Option<u64> {
    static ZEROS: [u8; LOOK_BYTES] = [0; LOOK_BYTES];
    let chunk = a.chunks(LOOK_BYTES).position(|c| c != &ZEROS[..c.len()])?;
    let from = chunk * LOOK_BYTES;
    a[from..].iter().position(|b| *b != 0).map(|within| (from + within) as u64)
}

impl Job for CompareJob {
    fn step(&mut self) -> Result<Step> {
        for n in 0..LANES {
            // Ranges come in order: behind a difference nothing is started any more, and what runs lies before or
            // around it.
            if self.difference.is_some() || self.failure.is_some() {
                break;
            }
            if self.pairs[usize::from(n)].is_none() {
                let Some((range, has_data)) = self.pairing.next()? else { break };
                self.start(n, Pair { range, has_data, pending: 0 });
            }
        }
        let mut ended = std::mem::take(&mut self.ended);
        self.lanes.wait(&mut ended)?;
        for e in ended.drain(..) {
            self.read_ended(e.lane, e.outcome);
        }
        self.ended = ended;
        if self.pairs.iter().any(Option::is_some) {
            return Ok(Step::More);
        }
        if let Some(e) = self.failure.take() {
            return Err(e);
        }
        let done = self.difference.is_some() || self.pairing.at() >= self.pairing.end();
        Ok(if done { Step::Done } else { Step::More })
    }

    fn progress(&self) -> Progress {
        Progress { done: self.pairing.at(), total: self.pairing.end() }
    }
}

/// Compares two open disks on this thread.
///
/// # Errors
/// Of reading; [`crate::ErrorKind::Cancelled`].
pub fn compare_disks(a: &Arc<Disk>, b: &Arc<Disk>, watch: &mut Watch<'_>) -> Result<Comparison> {
    let slots = CompareJob::slots();
    let mut job = CompareJob::new(open_channel(a, slots)?, open_channel(b, slots)?)?;
    watch.run(&mut job)?;
    Ok(job.result())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_bytes_differ() {
        let mut a = vec![0u8; 10_000];
        let b = a.clone();
        assert_eq!((first_unequal(&a, &b), first_not_zero(&a)), (None, None));
        a[9_999] = 1;
        assert_eq!((first_unequal(&a, &b), first_not_zero(&a)), (Some(9_999), Some(9_999)));
        a[4_096] = 1;
        assert_eq!((first_unequal(&a, &b), first_not_zero(&a)), (Some(4_096), Some(4_096)));
    }
}
