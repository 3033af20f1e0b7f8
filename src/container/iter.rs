//! I/O iterators: what a request is about, in blocks or bytes, and what of each block. Header and names are VirtualBox's, which never made
//! them; what they leave open is said here.
//!
//! Blocks are those of the medium: sectors of a disk, and of a CD the numbers of its own blocks, gaps and all. Only a CD has something
//! around the data of its blocks: the bytes in front of it (synchronisation, header and subheader), and those behind it (checksum and parity).
//! Of the latter the checksum, 4 bytes, can be had alone. What is asked for of a block comes in the order of the medium, each byte once.

use super::Container;
use super::dispatch::Part;
use super::flags::{IterFlags, SegmentFlags};
use super::types::sector_bytes;
use crate::error::{Error, ErrorKind, Result, Status};
use crate::format::cue::data_offset;
use crate::io::{BufSlice, sub_slices};
use crate::limits::{MAX_REQUEST_BYTES, SECTOR_BYTES};
use crate::map::{DataForm, GuestOffset, GuestRange, Region};
use crate::vd::Request;
use std::collections::VecDeque;
use std::sync::Arc;

/// Places that an iterator is about, at most: each block of a CD is one.
const MAX_PIECES: usize = 1 << 16;
/// Bytes of the checksum behind the data of a CD's block.
const CHECKSUM_BYTES: u64 = 4;

/// A segment of an iterator (`VDIOITERSEG`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IterSegment {
    /// Where it begins, in blocks or bytes.
    pub start: u64,
    /// How long it is, in blocks or bytes.
    pub size: u64,
    /// What of each block it is about.
    pub flags: SegmentFlags,
}

/// An iterator (`VDIOITER`). Its clones are the same one: VirtualBox's retain and release.
#[derive(Clone, Debug)]
pub struct IoIter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    segments: Vec<IterSegment>,
    flags: IterFlags,
    pieces: Vec<Piece>,
    bytes: u64,
}

/// What a request moves at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    /// What the disk shows.
    Shown(GuestRange),
    /// `len` bytes of the file, which begin so far from what the disk shows at `at`.
    Around { at: GuestOffset, from: i64, len: u64 },
}

impl Piece {
    fn len(self) -> u64 {
        match self {
            Piece::Shown(range) => range.len(),
            Piece::Around { len, .. } => len,
        }
    }
}

impl IoIter {
    /// How many clones there are, this one among them (`VDIoIterRetain` and `VDIoIterRelease` return it).
    pub fn references(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// How many segments (`VDIoIterGetSegmentCount`).
    pub fn segment_count(&self) -> usize {
        self.0.segments.len()
    }

    /// How it counts (`VDIoIterGetFlags`).
    pub fn flags(&self) -> IterFlags {
        self.0.flags
    }

    /// The segment of this number (`VDIoIterQuerySegment`).
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] if there is none.
    pub fn segment(&self, index: usize) -> Result<IterSegment> {
        let missing = || {
            let what = format!("the iterator has no segment {index}: it has {}", self.segment_count());
            Error::new(ErrorKind::OutOfRange, what)
        };
        self.0.segments.get(index).copied().ok_or_else(missing)
    }

    /// Bytes that it is about, all together.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// Its parts as parts of a read, into memory of [`Self::bytes`].
    pub(super) fn reads(&self, memory: &[BufSlice]) -> VecDeque<Part> {
        let mut at = 0;
        let part = |piece: &Piece| {
            let mut bufs = Vec::new();
            sub_slices(memory, at, piece.len(), &mut bufs);
            at += piece.len();
            match *piece {
                Piece::Shown(range) => Part::Io(Request::Read(range), bufs),
                Piece::Around { at, from, .. } => Part::Around { at, from, bufs },
            }
        };
        self.0.pieces.iter().map(part).collect()
    }

    /// The same of other requests.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for anything but data in whole sectors.
    pub(super) fn changes(
        &self,
        memory: &[BufSlice],
        make: impl Fn(GuestRange) -> Request,
    ) -> Result<VecDeque<Part>> {
        let mut at = 0;
        let part = |piece: &Piece| {
            let Piece::Shown(range) = *piece else {
                let what = "only data in whole sectors can be changed";
                return Err(Error::new(ErrorKind::Unsupported, what));
            };
            let mut bufs = Vec::new();
            if !memory.is_empty() {
                sub_slices(memory, at, range.len(), &mut bufs);
            }
            at += range.len();
            Ok(Part::Io(make(range), bufs))
        };
        self.0.pieces.iter().map(part).collect()
    }
}

impl Container {
    /// An iterator over the last image (`VDIoIterCreate`).
    ///
    /// # Errors
    /// [`Status::NotOpened`]; [`ErrorKind::InvalidArgument`] for a segment without flags or length; [`Status::ReadOutOfRange`] for what is not on
    /// the medium; [`ErrorKind::Unsupported`] for what its blocks do not have; [`ErrorKind::Limit`] for more than 1 GiB.
    pub fn io_iter(&self, segments: &[IterSegment], flags: IterFlags) -> Result<IoIter> {
        let live = self.live()?;
        let regions = self.info(super::LAST_IMAGE)?.regions;
        let medium =
            Medium { size: live.disk.size_bytes(), sector: u64::from(sector_bytes(self.device)), regions };
        let mut pieces = Vec::new();
        for s in segments {
            if s.flags.is_empty() || s.size == 0 {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    "a segment of an iterator is about nothing",
                ));
            }
            medium.add(s, flags, &mut pieces)?;
        }
        let bytes = pieces.iter().map(|p| p.len()).sum();
        Ok(IoIter(Arc::new(Inner { segments: segments.to_vec(), flags, pieces, bytes })))
    }
}

/// What segments are on.
struct Medium {
    size: u64,
    sector: u64,
    regions: Vec<Region>,
}

impl Medium {
    fn add(&self, s: &IterSegment, flags: IterFlags, out: &mut Vec<Piece>) -> Result<()> {
        let in_bytes = flags.contains(IterFlags::BYTE_OFFSET_AND_SIZE);
        if !in_bytes && !self.regions.is_empty() {
            return self.add_blocks(s, out);
        }
        if s.flags
            .intersects(SegmentFlags::PRE_METADATA | SegmentFlags::POST_METADATA | SegmentFlags::CHECKSUM)
        {
            let what = "there is nothing around these blocks, or it can only be asked for in blocks";
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let unit = if in_bytes { 1 } else { self.sector };
        let (off, len) = (s.start.checked_mul(unit), s.size.checked_mul(unit));
        let range = off.zip(len).and_then(|(off, len)| GuestRange::new(GuestOffset(off), len));
        let range = range.filter(|r| r.end().0 <= self.size).ok_or_else(|| beyond(s))?;
        if !range.start().0.is_multiple_of(SECTOR_BYTES) || !range.len().is_multiple_of(SECTOR_BYTES) {
            let what = format!("a segment of {} bytes at {} is none of whole sectors", s.size, s.start);
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        push(out, Piece::Shown(range))
    }

    /// Blocks of a CD.
    fn add_blocks(&self, s: &IterSegment, out: &mut Vec<Piece>) -> Result<()> {
        let end = s.start.checked_add(s.size).ok_or_else(|| beyond(s))?;
        let mut next = s.start;
        let mut shown = 0;
        for r in &self.regions {
            let to = end.min(r.start + r.blocks);
            if (r.start..r.start + r.blocks).contains(&next) {
                if r.data_bytes == 0 {
                    let what = format!("block {next} is in a gap that no file has");
                    return Err(Error::of(Status::BlockFree, what));
                }
                for block in next..to {
                    let at = shown + (block - r.start) * u64::from(r.data_bytes);
                    add_block(r, GuestOffset(at), s.flags, out)?;
                }
                next = to;
            }
            shown += r.blocks * u64::from(r.data_bytes);
        }
        if next < end { Err(beyond(s)) } else { Ok(()) }
    }
}

fn beyond(s: &IterSegment) -> Error {
    Error::of(Status::ReadOutOfRange, format!("a segment of {} at {} leaves the medium", s.size, s.start))
}

/// What is asked for of one block, whose data the disk shows at `at`.
fn add_block(r: &Region, at: GuestOffset, flags: SegmentFlags, out: &mut Vec<Piece>) -> Result<()> {
    let (block, data) = (u64::from(r.block_bytes), u64::from(r.data_bytes));
    let before = u64::from(data_offset(r.form));
    let behind = block - before - data;
    let all = flags.contains(SegmentFlags::AVAILABLE);
    let lacks = |what: &str| {
        let what = format!("blocks of {} have no {what}", r.form.name());
        Err(Error::new(ErrorKind::Unsupported, what))
    };
    if flags.contains(SegmentFlags::PRE_METADATA) && before == 0 {
        return lacks("metadata in front of their data");
    }
    let wants_behind = flags.contains(SegmentFlags::POST_METADATA);
    if (wants_behind || flags.contains(SegmentFlags::CHECKSUM)) && behind == 0 {
        return lacks("metadata behind their data");
    }
    if all || flags.contains(SegmentFlags::PRE_METADATA) {
        push(out, Piece::Around { at, from: -(before as i64), len: before })?;
    }
    if all || flags.contains(SegmentFlags::MAIN_DATA) {
        push(out, data_piece(r.form, at, data))?;
    }
    let tail = |len| Piece::Around { at, from: data as i64, len };
    match (all || wants_behind, flags.contains(SegmentFlags::CHECKSUM)) {
        (true, _) => push(out, tail(behind)),
        (false, true) => push(out, tail(CHECKSUM_BYTES)),
        (false, false) => Ok(()),
    }
}

/// Behind the pieces before it, as one with the last if that goes on.
fn push(out: &mut Vec<Piece>, piece: Piece) -> Result<()> {
    if piece.len() == 0 {
        return Ok(());
    }
    let total: u64 = out.iter().map(|p| p.len()).sum::<u64>() + piece.len();
    if total > MAX_REQUEST_BYTES || out.len() >= MAX_PIECES {
        let what = format!("an iterator is about at most {MAX_REQUEST_BYTES} bytes in {MAX_PIECES} places");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    match (out.last_mut(), piece) {
        (Some(Piece::Shown(before)), Piece::Shown(range)) if before.end() == range.start() => {
            *before = GuestRange::between(before.start(), range.end());
        }
        _ => out.push(piece),
    }
    Ok(())
}

fn data_piece(form: DataForm, at: GuestOffset, len: u64) -> Piece {
    let whole = at.0.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
    match GuestRange::new(at, len) {
        Some(range) if whole && form != DataForm::Audio => Piece::Shown(range),
        _ => Piece::Around { at, from: 0, len },
    }
}
