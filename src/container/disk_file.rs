//! The disk as a file: any offset and any length, where the disk itself has sectors.

use super::flags::DiskFileFlags;
use super::{Container, LAST_IMAGE};
use crate::error::{Error, Result};
use crate::limits::SECTOR_BYTES;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Mutex;

/// A container's disk as a file of fixed length (`VDCreateVfsFileFromDisk`). Parts of sectors are read, changed and written: not at once with what others
/// write to the same sector through the container itself.
#[derive(Debug)]
pub struct DiskFile {
    /// Taken back by [`Self::release`].
    container: Option<Container>,
    flags: DiskFileFlags,
    at: u64,
    /// Parts of sectors, one at a time.
    parts: Mutex<()>,
}

impl Container {
    /// The disk as a file. With [`DiskFileFlags::DESTROY_ON_RELEASE`] the container is closed with it; otherwise [`DiskFile::release`] gives it
    /// back.
    ///
    /// # Errors
    /// [`crate::Status::NotOpened`], with the container.
    pub fn into_file(self, flags: DiskFileFlags) -> std::result::Result<DiskFile, (Box<Container>, Error)> {
        match self.live() {
            Ok(_) => Ok(DiskFile { container: Some(self), flags, at: 0, parts: Mutex::default() }),
            Err(e) => Err((Box::new(self), e)),
        }
    }
}

impl DiskFile {
    fn container(&self) -> &Container {
        self.container.as_ref().expect("only release takes it")
    }

    /// Bytes of the disk.
    ///
    /// # Errors
    /// As [`Container::size`].
    pub fn size(&self) -> Result<u64> {
        self.container().size(LAST_IMAGE)
    }

    /// Bytes of the files of all images.
    ///
    /// # Errors
    /// As [`Container::file_size`].
    pub fn allocated(&self) -> Result<u64> {
        let numbers = 0..u32::try_from(self.container().count()).expect("limits::MAX_CHAIN_IMAGES");
        numbers.map(|n| self.container().file_size(n)).sum()
    }

    /// Ends the file: the container is closed if that was asked for, and given back otherwise.
    ///
    /// # Errors
    /// Of closing.
    pub fn release(mut self) -> Result<Option<Container>> {
        let mut container = self.container.take().expect("only release takes it");
        if self.flags.contains(DiskFileFlags::DESTROY_ON_RELEASE) {
            container.close_all()?;
            return Ok(None);
        }
        Ok(Some(container))
    }

    /// Reads from `off` on, up to the end of the disk; says how many bytes.
    ///
    /// # Errors
    /// As [`Container::read`].
    pub fn read_at(&self, off: u64, buf: &mut [u8]) -> Result<usize> {
        let n = self.before_end(off, buf.len())?;
        self.pieces(off, n, |at, part, whole| {
            let part = &mut buf[part];
            if whole {
                return self.container().read(at, part).map(drop);
            }
            let (sector, into) = (at / SECTOR_BYTES * SECTOR_BYTES, (at % SECTOR_BYTES) as usize);
            let mut bytes = [0; SECTOR_BYTES as usize];
            self.container().read(sector, &mut bytes)?;
            part.copy_from_slice(&bytes[into..into + part.len()]);
            Ok(())
        })?;
        Ok(n)
    }

    /// Writes to `off`, up to the end of the disk; says how many bytes.
    ///
    /// # Errors
    /// As [`Container::write`].
    pub fn write_at(&self, off: u64, data: &[u8]) -> Result<usize> {
        let n = self.before_end(off, data.len())?;
        self.pieces(off, n, |at, part, whole| {
            let part = &data[part];
            if whole {
                return self.container().write(at, part);
            }
            let _alone = self.parts.lock().expect("parts lock");
            let (sector, into) = (at / SECTOR_BYTES * SECTOR_BYTES, (at % SECTOR_BYTES) as usize);
            let mut bytes = [0; SECTOR_BYTES as usize];
            self.container().read(sector, &mut bytes)?;
            bytes[into..into + part.len()].copy_from_slice(part);
            self.container().write(sector, &bytes)
        })?;
        Ok(n)
    }

    fn before_end(&self, off: u64, len: usize) -> Result<usize> {
        let left = self.size()?.saturating_sub(off);
        Ok(usize::try_from(left).unwrap_or(usize::MAX).min(len))
    }

    /// Cuts a range into what lies before the first whole sector, the whole ones, and what is behind them.
    fn pieces(
        &self,
        off: u64,
        len: usize,
        mut each: impl FnMut(u64, std::ops::Range<usize>, bool) -> Result<()>,
    ) -> Result<()> {
        let sector = SECTOR_BYTES as usize;
        let head = (off.next_multiple_of(SECTOR_BYTES) - off) as usize;
        let head = head.min(len);
        let whole = (len - head) / sector * sector;
        for (part, is_whole) in [(0..head, false), (head..head + whole, true), (head + whole..len, false)] {
            if !part.is_empty() {
                each(off + part.start as u64, part, is_whole)?;
            }
        }
        Ok(())
    }
}

fn other(e: Error) -> io::Error {
    let kind = match e.kind() {
        crate::ErrorKind::ReadOnly => io::ErrorKind::PermissionDenied,
        crate::ErrorKind::NoSpace => io::ErrorKind::StorageFull,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, e)
}

impl Read for DiskFile {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.read_at(self.at, buf).map_err(other)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Write for DiskFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let n = self.write_at(self.at, data).map_err(other)?;
        if n == 0 && !data.is_empty() {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the disk ends here, and keeps its size"));
        }
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.container().flush().map_err(other)
    }
}

impl Seek for DiskFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let size = self.size().map_err(other)?;
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => size.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "before the disk's start"))?;
        Ok(self.at)
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        // Without a release a container that is not to be closed has no owner any more: it is closed all the same, by its own drop.
        drop(self.container.take());
    }
}
