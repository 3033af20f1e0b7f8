//! Taking from an image what it need not keep: places of blocks that are zeros, or equal to what the parent shows, and holes.

use super::lanes::Lanes;
use super::{Job, LANE_BYTES, Piece, PieceKind, Progress, Step, Survey, Watch, change, open_channel};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::Filters;
use crate::format::{OpenHow, Spare};
use crate::map::{FileId, GuestOffset, GuestRange, ImageMap};
use crate::vd::{Channel, Disk, ImageFiles, ImageSpec, OpenDisk, OpenImage, open_disk};
use std::sync::Arc;

/// What was gained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes of the image's files before.
    pub before: u64,
    /// Bytes of the image's files now.
    pub after: u64,
}

/// Compacts an image, under an exclusive lock, its parents locked against changes. What the disk shows stays the same at every
/// moment: cancelled, or stopped in any other way, the image has lost nothing, and the same call completes it.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for formats without it; [`ErrorKind::Corrupt`] for a damaged image; of opening, locking,
/// reading and writing; [`ErrorKind::Cancelled`].
pub fn compact_image(how: &OpenDisk, watch: &mut Watch<'_>) -> Result<Compacted> {
    let image = ImageFiles::open(&how.image.path, how.image.format, true, how.lock_wait)?;
    // Before everything is read: formats without it, and damage, are told at once.
    image.compact(&Spare::default())?;
    let map = image.map(FileId(0), OpenHow { read_only: true, info_only: false })?;
    // Children see the same as before.
    image.refuse_to_write(&map.info(), true)?;
    // What is encrypted is compared as it is: all images of a chain share the key.
    let how = &OpenDisk { filters: Filters::default(), ..how.clone() };
    let beneath = if map.limits().is_diff { Some(open_beneath(how)?) } else { None };
    drop(map);
    let before = bytes_of(&image)?;
    let mut search = SpareJob::new(&image.alone()?, beneath.as_ref())?;
    watch.run(&mut search)?;
    let steps = image.compact(&search.into_spare()).map_err(|e| e.at(&how.image.path))?;
    change(&image, steps, watch)?;
    Ok(Compacted { before, after: bytes_of(&image)? })
}

fn bytes_of(image: &ImageFiles) -> Result<u64> {
    image.files().iter().try_fold(0u64, |sum, f| {
        let bytes = f.len().map_err(|e| Error::io("find out its length", e).at(f.path()))?;
        Ok(sum.saturating_add(bytes))
    })
}

/// What is beneath an image that is locked by us: its parents as a disk of their own.
fn open_beneath(how: &OpenDisk) -> Result<Arc<Disk>> {
    let chain = open_disk(&OpenDisk { lock_wait: None, ..how.clone() })?;
    let spec = |i: &OpenImage| ImageSpec { path: i.path.clone(), format: Some(i.format) };
    let Some((parent, below)) = chain.images[1..].split_first() else {
        // Of a format whose diffs do not say that they are: zeros that hide a parent would be lost.
        let what = "may be a differencing image: its format does not say whether there is a parent";
        return Err(Error::new(ErrorKind::NotFound, what)
            .at(&how.image.path)
            .hint("name it with --parent FILE; of a base image vdimg convert leaves out what is zeros"));
    };
    let parents =
        OpenDisk { image: spec(parent), parents: below.iter().rev().map(spec).collect(), ..how.clone() };
    drop(chain);
    Ok(open_disk(&parents)?.disk)
}

/// The unit that is being looked at.
#[derive(Clone, Copy, Debug)]
struct Unit {
    range: GuestRange,
    number: u64,
    /// Some of it has a place.
    placed: bool,
    /// All of it has.
    whole: bool,
    same: bool,
    zero: bool,
}

/// Finds out what an image need not keep, by what it and the disk beneath it show. Reads what has a place, and of the disk beneath
/// what is under that.
pub struct SpareJob {
    lanes: Lanes,
    survey: Survey,
    map: Arc<dyn ImageMap>,
    /// Size of the disk beneath.
    beneath: Option<u64>,
    /// What of the survey's last piece is to be looked at.
    piece: Option<Piece>,
    unit: Option<Unit>,
    spare: Spare,
    progress: Progress,
}

impl std::fmt::Debug for SpareJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpareJob").field("unit", &self.unit).finish_non_exhaustive()
    }
}

const OWN: usize = 0;
const BENEATH: usize = 1;
/// A lane for each.
const SPARE_LANES: u16 = 2;

impl SpareJob {
    /// A search in the one image of `alone`, over `beneath`.
    ///
    /// # Errors
    /// If there is no engine, or no descriptor left.
    pub fn new(alone: &Arc<Disk>, beneath: Option<&Arc<Disk>>) -> Result<Self> {
        let own = open_channel(alone, SPARE_LANES)?;
        let channel = beneath.map(|d| open_channel(d, SPARE_LANES)).transpose()?;
        Self::over(own, channel)
    }

    /// The same over channels with two slots each.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn over(own: Channel, beneath: Option<Channel>) -> Result<Self> {
        let alone = own.disk().clone();
        let size = beneath.as_ref().map(|c| c.disk().size_bytes());
        let channels = std::iter::once(own).chain(beneath).collect();
        Ok(SpareJob {
            lanes: Lanes::new(channels, SPARE_LANES)?,
            map: alone.chain().layer(0).map.clone(),
            survey: Survey::new(alone.clone()),
            beneath: size,
            piece: None,
            unit: None,
            spare: Spare::default(),
            progress: Progress { done: 0, total: alone.size_bytes() },
        })
    }

    /// What was found, once the job is done.
    pub fn into_spare(self) -> Spare {
        self.spare
    }

    /// The unit is done: what came of it.
    fn close_unit(&mut self) {
        let Some(u) = self.unit.take().filter(|u| u.placed) else { return };
        // Formats with more units than that have no use for so many bits.
        let Ok(number) = u32::try_from(u.number) else { return };
        if u.same {
            self.spare.same.insert(number);
        } else if u.zero && u.whole {
            self.spare.zero.insert(number);
        }
    }

    /// The unit around `at`.
    fn unit_at(&mut self, at: GuestOffset) -> Unit {
        if let Some(unit) = self.unit.filter(|u| at < u.range.end()) {
            return unit;
        }
        self.close_unit();
        let (range, number) = (self.map.unit(at), self.map.claim_of(at).0);
        Unit { range, number, placed: false, whole: true, same: true, zero: true }
    }

    /// Looks at a part of one unit that is all of one kind.
    fn look(&mut self, kind: PieceKind, part: GuestRange, unit: &mut Unit) -> Result<()> {
        if matches!(kind, PieceKind::Zero | PieceKind::Unallocated) {
            unit.whole = false;
            return Ok(());
        }
        unit.placed = true;
        if !unit.same && !unit.zero {
            return Ok(());
        }
        let n = usize::try_from(part.len()).expect("inside a lane");
        let is_hole = matches!(kind, PieceKind::Hole { .. });
        if is_hole {
            self.lanes.bytes_mut(0)[..n].fill(0);
        } else {
            self.read(OWN, part)?;
        }
        let zero = is_hole || self.lanes.bytes(0)[..n].iter().all(|b| *b == 0);
        unit.zero &= zero;
        if unit.same {
            unit.same = self.shows_beneath(part, zero)?;
        }
        Ok(())
    }

    /// The bytes in the first lane are those that show through at `part`.
    fn shows_beneath(&mut self, part: GuestRange, zero: bool) -> Result<bool> {
        let there = self.beneath.unwrap_or(0).saturating_sub(part.start().0).min(part.len());
        if there > 0 {
            self.read(BENEATH, part.take(there))?;
        }
        let n = usize::try_from(there).expect("inside a lane");
        let len = usize::try_from(part.len()).expect("inside a lane");
        let own = &self.lanes.bytes(0)[..len];
        Ok(if there == 0 {
            zero
        } else {
            own[..n] == self.lanes.bytes(1)[..n] && own[n..].iter().all(|b| *b == 0)
        })
    }

    /// Reads into the lane of that disk.
    fn read(&mut self, side: usize, range: GuestRange) -> Result<()> {
        let lane = u16::try_from(side).expect("two lanes");
        let started = self.lanes.read(lane, side, range);
        self.lanes.finish(started)?.map_err(|f| {
            let what = format!("cannot read {} of its disk: {f}", range.start());
            Error::new(Error::from(f).kind(), what).at(super::copy::top_path(self.survey.disk()))
        })
    }
}

impl Job for SpareJob {
    fn step(&mut self) -> Result<Step> {
        if self.piece.is_none() {
            self.piece = self.survey.next_piece()?;
        }
        let Some(piece) = self.piece.take() else {
            self.close_unit();
            self.progress.done = self.progress.total;
            return Ok(Step::Done);
        };
        let start = piece.range.start();
        let mut unit = self.unit_at(start);
        let rest = unit.range.end().0 - start.0;
        let has_place = !matches!(piece.kind, PieceKind::Zero | PieceKind::Unallocated);
        // What has no place is passed over as it is, up to the unit it ends in.
        let last = self.map.unit(GuestOffset(piece.range.end().0 - 1)).start().0;
        let len = if has_place { rest.min(LANE_BYTES) } else { rest.max(last.saturating_sub(start.0)) };
        let part = piece.range.take(len.min(piece.range.len()));
        self.look(piece.kind, part, &mut unit)?;
        self.unit = Some(unit);
        let left = piece.range.skip(part.len());
        let kind = match piece.kind {
            PieceKind::Data { file, off } => PieceKind::Data { file, off: off.plus(part.len()) },
            kind => kind,
        };
        self.piece = (!left.is_empty()).then_some(Piece { range: left, kind, ..piece });
        self.progress.done = part.end().0;
        Ok(Step::More)
    }

    fn progress(&self) -> Progress {
        self.progress
    }
}
