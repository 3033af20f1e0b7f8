//! A disk as bytes, for programs that want ranges of any length.

use super::lanes::Lanes;
use super::{LANE_BYTES, open_shared_channel};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, GuestOffset, GuestRange, HostOffset};
use crate::vd::{Disk, Request};
use std::sync::{Arc, Mutex, MutexGuard};

/// An open disk that is read and written at any byte, a call at a time, by any thread.
pub struct DiskBytes {
    lanes: Mutex<Lanes>,
    disk: Arc<Disk>,
}

impl std::fmt::Debug for DiskBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskBytes").finish_non_exhaustive()
    }
}

/// A piece of a range: the sectors to move, and which of their bytes are meant.
struct Part {
    sectors: GuestRange,
    skip: usize,
    len: usize,
}

/// `tried` completes the sentence "cannot …".
fn failed(f: Failure, tried: &str, range: GuestRange) -> Error {
    Error::new(Error::from(f).kind(), format!("cannot {tried} {range}: {f}"))
}

impl DiskBytes {
    /// The bytes of `disk`.
    ///
    /// # Errors
    /// If no channel can be opened.
    pub fn new(disk: &Arc<Disk>) -> Result<DiskBytes> {
        let lanes = Lanes::new(vec![open_shared_channel(disk, 1)?], 1)?;
        Ok(DiskBytes { lanes: Mutex::new(lanes), disk: disk.clone() })
    }

    /// Bytes of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().expect("nobody panics with it")
    }

    /// What can be moved at once of `len` bytes from `off` on.
    fn part(off: u64, len: usize) -> Part {
        let start = off - off % SECTOR_BYTES;
        let skip = off - start;
        let bytes = (len as u64).min(LANE_BYTES - skip);
        let end = (off + bytes).next_multiple_of(SECTOR_BYTES);
        let small = |n: u64| usize::try_from(n).expect("inside a lane");
        let sectors = GuestRange::between(GuestOffset(start), GuestOffset(end));
        Part { sectors, skip: small(skip), len: small(bytes) }
    }

    fn inside(&self, off: u64, len: usize) -> Result<()> {
        let size = self.size_bytes();
        if off.checked_add(len as u64).is_some_and(|end| end <= size) {
            return Ok(());
        }
        let what = format!("{len} bytes at {off} reach behind the disk's end at {size}");
        Err(Error::new(ErrorKind::OutOfRange, what))
    }

    /// Fills `buf` from byte `off` of the disk on.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] behind the disk's end; of reading.
    pub fn read(&self, off: u64, buf: &mut [u8]) -> Result<()> {
        self.inside(off, buf.len())?;
        let mut lanes = self.lanes();
        let mut done = 0;
        while done < buf.len() {
            let part = Self::part(off + done as u64, buf.len() - done);
            let started = lanes.read(0, 0, part.sectors);
            lanes.finish(started)?.map_err(|f| failed(f, "read", part.sectors))?;
            buf[done..done + part.len].copy_from_slice(&lanes.bytes(0)[part.skip..part.skip + part.len]);
            done += part.len;
        }
        Ok(())
    }

    /// Writes bytes from byte `off` of the disk on. Of a sector that is written in part the rest is read first; calls that write
    /// follow each other.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] behind the disk's end; of reading and writing; [`ErrorKind::ReadOnly`].
    pub fn write(&self, off: u64, bytes: &[u8]) -> Result<()> {
        self.inside(off, bytes.len())?;
        let mut lanes = self.lanes();
        let mut done = 0;
        while done < bytes.len() {
            let part = Self::part(off + done as u64, bytes.len() - done);
            if part.len as u64 != part.sectors.len() {
                let started = lanes.read(0, 0, part.sectors);
                lanes.finish(started)?.map_err(|f| failed(f, "read", part.sectors))?;
            }
            lanes.bytes_mut(0)[part.skip..part.skip + part.len]
                .copy_from_slice(&bytes[done..done + part.len]);
            let started = lanes.write(0, 0, 0, part.sectors);
            lanes.finish(started)?.map_err(|f| failed(f, "write", part.sectors))?;
            done += part.len;
        }
        Ok(())
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// [`ErrorKind::SyncFailed`]; of writing.
    pub fn flush(&self) -> Result<()> {
        let mut lanes = self.lanes();
        let started = lanes.start(0, 0, Request::Flush, &[]);
        lanes.finish(started)?.map_err(|f| Error::new(Error::from(f).kind(), format!("cannot flush: {f}")))
    }

    /// Leaves the image as a clean close does, and durable.
    ///
    /// # Errors
    /// If that could not be written.
    pub fn close(self) -> Result<()> {
        let sync = !self.disk.options().read_only;
        self.lanes().close_disk(0, sync)
    }
}

impl ByteSource for DiskBytes {
    fn len(&self) -> u64 {
        self.size_bytes()
    }

    fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.read(off.0, buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_sectors_around_what_is_meant() {
        for (off, len) in [(0, 512), (1, 1), (511, 2), (513, 5000), (100, 3 << 20), (512, 1 << 20)] {
            let p = DiskBytes::part(off, len);
            assert_eq!(p.sectors.start().0 + p.skip as u64, off);
            assert!(p.len > 0 && p.len <= len && p.sectors.len() <= LANE_BYTES);
            assert!(p.sectors.start().0.is_multiple_of(512) && p.sectors.len().is_multiple_of(512));
            assert!(p.sectors.end().0 >= off + p.len as u64);
        }
    }
}
