//! Packing what one disk shows into a new image that is written once, from its beginning to its end.

use super::copy::top_path;
use super::lanes::{Ended, Lanes};
use super::survey::Survey;
use super::{Job, LANE_BYTES, LANES, Progress, Step};
use crate::error::{Error, Result};
use crate::format::Sequential;
use crate::io::HostFile;
use crate::limits::MAX_UNIT_BYTES;
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{Channel, Outcome};
use std::collections::VecDeque;
use std::sync::Arc;

/// Reads a chain's whole view ahead, several pieces at a time, and packs them in order, on the thread that steps it. What is known
/// to be zeros is not read, units that are found to be are left out.
pub(super) struct PackJob {
    lanes: Lanes,
    survey: Survey,
    image: Packing,
    /// Windows under way in the order of the disk, and the lane each is read into.
    windows: VecDeque<Window>,
    idle: Vec<u16>,
    /// Data that the survey has found; what lies before [`Self::covered`] is in a window already.
    found: GuestRange,
    covered: u64,
    progress: Progress,
}

/// An image that is written once, and its file, to which it is appended.
pub(super) struct Packing {
    image: Box<dyn Sequential>,
    file: Arc<dyn HostFile>,
    /// Where the next bytes of the file go.
    at: u64,
    packed: Vec<u8>,
}

impl std::fmt::Debug for Packing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packing").field("at", &self.at).finish_non_exhaustive()
    }
}

impl Packing {
    /// Into an empty file.
    pub(super) fn new(image: Box<dyn Sequential>, file: Arc<dyn HostFile>) -> Packing {
        Packing { at: image.begins_at().0, image, file, packed: Vec::new() }
    }

    pub(super) fn unit_bytes(&self) -> u64 {
        self.image.unit_bytes()
    }

    pub(super) fn file(&self) -> &Arc<dyn HostFile> {
        &self.file
    }

    /// Appends units from the one of this number on, but for those of zeros.
    pub(super) fn units(&mut self, first: u64, bytes: &[u8]) -> Result<()> {
        let size = usize::try_from(self.unit_bytes()).expect("inside a lane");
        self.packed.clear();
        for (number, bytes) in (first..).zip(bytes.chunks(size)) {
            if bytes.iter().any(|b| *b != 0) {
                self.image.pack(number, bytes, &mut self.packed)?;
            }
        }
        self.append()
    }

    fn append(&mut self) -> Result<()> {
        self.write(self.at, &self.packed)?;
        self.at += self.packed.len() as u64;
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let failed = |e| Error::io(format!("write {} bytes at {at}", bytes.len()), e).at(self.file.path());
        if bytes.is_empty() { Ok(()) } else { self.file.write_at(at, bytes).map_err(failed) }
    }

    /// Everything but the beginning, durably, then that: until then the file is no image.
    pub(super) fn finish(&mut self) -> Result<()> {
        self.packed.clear();
        let head = self.image.finish(&mut self.packed)?;
        self.append()?;
        let sync = || self.file.sync().map_err(|e| Error::io("sync it", e).at(self.file.path()));
        sync()?;
        self.write(0, &head)?;
        sync()
    }
}

#[derive(Clone, Copy, Debug)]
struct Window {
    lane: u16,
    range: GuestRange,
    outcome: Option<Outcome>,
}

impl std::fmt::Debug for PackJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackJob").field("windows", &self.windows).finish_non_exhaustive()
    }
}

impl PackJob {
    /// From a channel with at least [`super::CopyJob::slots`] slots into an empty file.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub(super) fn new(
        source: Channel,
        image: Box<dyn Sequential>,
        file: Arc<dyn HostFile>,
    ) -> Result<PackJob> {
        let unit = image.unit_bytes();
        assert!(LANE_BYTES.is_multiple_of(unit) && unit <= u64::from(MAX_UNIT_BYTES), "units fill lanes");
        let disk = source.disk().clone();
        let total = disk.size_bytes();
        Ok(PackJob {
            lanes: Lanes::new(vec![source], LANES)?,
            survey: Survey::new(disk),
            image: Packing::new(image, file),
            windows: VecDeque::new(),
            idle: (0..LANES).rev().collect(),
            found: GuestRange::EMPTY,
            covered: 0,
            progress: Progress { done: 0, total },
        })
    }

    /// The next part of the disk with data in it: what a lane holds, from a multiple of that on.
    fn next_window(&mut self) -> Result<Option<GuestRange>> {
        while self.found.end().0 <= self.covered {
            let Some(piece) = self.survey.next_piece()? else { return Ok(None) };
            if self.survey.must_read(piece.kind) {
                self.found = piece.range;
            }
        }
        let start = self.found.start().0.max(self.covered) / LANE_BYTES * LANE_BYTES;
        let end = (start + LANE_BYTES).min(self.progress.total);
        self.covered = end;
        Ok(Some(GuestRange::between(GuestOffset(start), GuestOffset(end))))
    }

    /// Gives every idle lane something to read.
    fn fill(&mut self) -> Result<()> {
        while let Some(lane) = self.idle.pop() {
            let Some(range) = self.next_window()? else {
                self.idle.push(lane);
                break;
            };
            let outcome = self.lanes.read(lane, 0, range);
            self.windows.push_back(Window { lane, range, outcome });
        }
        Ok(())
    }

    /// Packs a window that was read.
    fn pack(&mut self, w: Window) -> Result<()> {
        let len = usize::try_from(w.range.len()).expect("inside a lane");
        let first = w.range.start().0 / self.image.unit_bytes();
        self.image.units(first, &self.lanes.bytes(w.lane)[..len])?;
        self.progress.done = w.range.end().0;
        self.idle.push(w.lane);
        Ok(())
    }
}

impl Job for PackJob {
    fn step(&mut self) -> Result<Step> {
        self.fill()?;
        let Some(head) = self.windows.front().copied() else {
            self.image.finish()?;
            self.progress.done = self.progress.total;
            return Ok(Step::Done);
        };
        match head.outcome {
            Some(Ok(())) => {
                self.windows.pop_front();
                self.pack(head)?;
            }
            Some(Err(f)) => {
                let what = format!("cannot read {} of its disk: {f}", head.range.start());
                return Err(Error::new(Error::from(f).kind(), what).at(top_path(self.survey.disk())));
            }
            None => {
                let mut ended: Vec<Ended> = Vec::new();
                self.lanes.wait(&mut ended)?;
                for e in ended {
                    let window = self.windows.iter_mut().find(|w| w.lane == e.lane);
                    window.expect("only lanes of windows read").outcome = Some(e.outcome);
                }
            }
        }
        Ok(Step::More)
    }

    fn progress(&self) -> Progress {
        self.progress
    }
}
