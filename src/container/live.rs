//! The disk of a container that is open, and synchronous requests to it.

use crate::error::{Error, ErrorKind, Result, Status};
use crate::job::{LANE_BYTES, Lanes, open_shared_channel};
use crate::limits::SECTOR_BYTES;
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{Disk, OpenImage, OpenedDisk, Outcome, Request};
use std::sync::{Arc, Mutex};

/// An open disk.
pub(super) struct Live {
    pub(super) disk: Arc<Disk>,
    /// Base first.
    pub(super) images: Vec<OpenImage>,
    lanes: Mutex<Lanes>,
}

/// The one lane, and the one channel.
const LANE: u16 = 0;
const CHANNEL: usize = 0;

impl Live {
    pub(super) fn new(opened: OpenedDisk) -> Result<Live> {
        let OpenedDisk { disk, mut images } = opened;
        images.reverse();
        let lanes = Lanes::new(vec![open_shared_channel(&disk, 1)?], 1)?;
        Ok(Live { disk, images, lanes: Mutex::new(lanes) })
    }

    /// A range of the disk, if it is one of whole sectors.
    pub(super) fn range(&self, off: u64, len: u64) -> Result<GuestRange> {
        let size = self.disk.size_bytes();
        if !off.is_multiple_of(SECTOR_BYTES) || !len.is_multiple_of(SECTOR_BYTES) {
            let what = format!("{len} bytes at {off} are no whole sectors of {SECTOR_BYTES} bytes");
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        match GuestRange::new(GuestOffset(off), len) {
            Some(range) if range.end().0 <= size => Ok(range),
            _ => {
                let what = format!("{len} bytes at {off} are not all on the disk of {size} bytes");
                Err(Error::of(Status::ReadOutOfRange, what))
            }
        }
    }

    pub(super) fn read(&self, range: GuestRange, buf: &mut [u8]) -> Result<()> {
        let mut lanes = self.lanes.lock().expect("lanes lock");
        let mut rest = range;
        for piece in buf.chunks_mut(LANE_BYTES as usize) {
            let part = rest.take(piece.len() as u64);
            let started = lanes.read(LANE, CHANNEL, part);
            end(&mut lanes, started)?.map_err(|f| failed("read", part, f))?;
            piece.copy_from_slice(&lanes.bytes(LANE)[..piece.len()]);
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    pub(super) fn write(&self, range: GuestRange, data: &[u8]) -> Result<()> {
        let mut lanes = self.lanes.lock().expect("lanes lock");
        let mut rest = range;
        for piece in data.chunks(LANE_BYTES as usize) {
            let part = rest.take(piece.len() as u64);
            lanes.bytes_mut(LANE)[..piece.len()].copy_from_slice(piece);
            let started = lanes.write(LANE, CHANNEL, 0, part);
            end(&mut lanes, started)?.map_err(|f| failed("write", part, f))?;
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    /// A request without bytes.
    pub(super) fn plain(&self, request: Request, tried: &str) -> Result<()> {
        let mut lanes = self.lanes.lock().expect("lanes lock");
        let started = lanes.start(LANE, CHANNEL, request, &[]);
        let range = match request {
            Request::Discard(r) | Request::WriteZeroes { range: r, .. } => r,
            _ => GuestRange::EMPTY,
        };
        end(&mut lanes, started)?.map_err(|f| failed(tried, range, f))
    }

    /// Leaves the images as a clean close does; with `sync`, durable. Nobody else may be using the disk.
    pub(super) fn close(self, sync: bool) -> Result<()> {
        self.lanes.into_inner().expect("lanes lock").close_disk(CHANNEL, sync)
    }
}

/// Waits for a request, and for what it has set off: nobody looks at this channel afterwards, and a sync that others have joined, or an extension of the file
/// that they wait for, would end unseen.
fn end(lanes: &mut Lanes, started: Option<Outcome>) -> Result<Outcome> {
    let outcome = lanes.finish(started)?;
    lanes.settle()?;
    Ok(outcome)
}

/// Why a request failed, for callers who want an error rather than a failure.
fn failed(tried: &str, range: GuestRange, f: crate::error::Failure) -> Error {
    let kind = Error::from(f).kind();
    Error::new(kind, format!("cannot {tried} {} bytes at {}: {f}", range.len(), range.start()))
}
