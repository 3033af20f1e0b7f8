//! Synchronous reads, writes, flushes and discards.

use super::Container;
use super::flags::OpenFlags;
use super::live::Live;
use crate::error::{Error, Result, Status};
use crate::job::{PieceKind, Survey};
use crate::map::{DeviceType, GuestRange};
use crate::vd::Request;

/// What is on a floppy disk behind its end.
const FLOPPY_FILLER: u8 = 0xf6;

/// What a read has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadStatus {
    /// Bytes. Also where nothing is allocated, unless [`OpenFlags::INFORM_ABOUT_ZERO_BLOCKS`] was asked for.
    Data,
    /// Zeros, because no image has anything anywhere in the range ([`Status::NewZeroedBlock`]).
    NewZeroedBlock,
}

impl Container {
    /// Fills `buf` from `off` on, both in bytes, multiples of 512 (`VDRead`). Floppy disks read as 0xf6 behind their end.
    ///
    /// # Errors
    /// [`Status::NotOpened`]; [`Status::ReadOutOfRange`]; [`crate::ErrorKind::InvalidArgument`] for parts of sectors; of reading.
    pub fn read(&self, off: u64, buf: &mut [u8]) -> Result<ReadStatus> {
        let live = self.live()?;
        let buf = match self.device {
            DeviceType::Floppy if off >= live.disk.size_bytes() => {
                buf.fill(FLOPPY_FILLER);
                return Ok(ReadStatus::Data);
            }
            DeviceType::Floppy => before_end(live, off, buf),
            _ => buf,
        };
        let range = live.range(off, buf.len() as u64)?;
        live.read(range, buf)?;
        let is_asked = self.images.last().is_some_and(|i| i.has(OpenFlags::INFORM_ABOUT_ZERO_BLOCKS));
        Ok(if is_asked && is_free(live, range)? { ReadStatus::NewZeroedBlock } else { ReadStatus::Data })
    }

    /// Writes `data` to `off`, both in bytes, multiples of 512 (`VDWrite`). Into an image that is made with [`OpenFlags::SEQUENTIAL`] each write goes to the
    /// unit of the one before, or behind it.
    ///
    /// # Errors
    /// As [`Self::read`]; [`Status::ImageReadOnly`]; [`Status::VmdkInvalidWrite`] for a write that comes too late; of writing.
    pub fn write(&self, off: u64, data: &[u8]) -> Result<()> {
        if let Some(stream) = &self.stream {
            return stream.lock().expect("stream lock").write(off, data);
        }
        let live = self.live()?;
        let range = live.range(off, data.len() as u64)?;
        self.writable()?;
        live.write(range, data)
    }

    /// Makes durable what was written (`VDFlush`).
    ///
    /// # Errors
    /// [`Status::NotOpened`]; of syncing, after which no write is taken any more.
    pub fn flush(&self) -> Result<()> {
        match self.stream {
            // It is no image before it is complete: its close makes it durable.
            Some(_) => Ok(()),
            None => self.live()?.plain(Request::Flush, "make durable"),
        }
    }

    /// Gives up ranges of bytes, multiples of 512: offset and length each (`VDDiscardRanges`). They read as zeros, or as before; never as what
    /// lies beneath what was written.
    ///
    /// # Errors
    /// [`Status::DiscardNotSupported`] without [`OpenFlags::DISCARD`]; otherwise as [`Self::write`].
    pub fn discard(&self, ranges: &[(u64, u64)]) -> Result<()> {
        let live = self.live()?;
        let ranges = self.to_discard(live, ranges)?;
        ranges.into_iter().try_for_each(|r| live.plain(Request::Discard(r), "discard"))
    }

    /// The ranges, if the container takes discards.
    pub(super) fn to_discard(&self, live: &Live, ranges: &[(u64, u64)]) -> Result<Vec<GuestRange>> {
        self.writable()?;
        if !self.images.last().is_some_and(|i| i.has(OpenFlags::DISCARD)) {
            let what = "the last image was not opened for discards";
            return Err(Error::of(Status::DiscardNotSupported, what).hint("open it with DISCARD"));
        }
        ranges.iter().map(|(off, len)| live.range(*off, *len)).collect()
    }

    /// # Errors
    /// [`Status::ImageReadOnly`].
    pub(super) fn writable(&self) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::of(Status::ImageReadOnly, "the container is open for reading only"));
        }
        Ok(())
    }
}

/// The part of `buf` before the disk's end; what is behind it is filled.
fn before_end<'a>(live: &Live, off: u64, buf: &'a mut [u8]) -> &'a mut [u8] {
    let there = live.disk.size_bytes().saturating_sub(off);
    let there = usize::try_from(there).unwrap_or(usize::MAX).min(buf.len());
    let (before, behind) = buf.split_at_mut(there);
    behind.fill(FLOPPY_FILLER);
    before
}

/// No image has anything in the range.
fn is_free(live: &Live, range: GuestRange) -> Result<bool> {
    if range.is_empty() {
        return Ok(false);
    }
    let piece = Survey::behind(live.disk.clone(), range.start()).next_piece()?;
    Ok(piece.is_some_and(|p| p.kind == PieceKind::Unallocated && p.range.end() >= range.end()))
}
