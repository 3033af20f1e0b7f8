//! What a file is to the container: synchronous calls, for opening, creating and checking. The data path goes
//! through an engine.

use super::BufSlice;
use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// What unbuffered I/O on a file demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of memory addresses, in bytes.
    pub memory: u32,
    /// Of offsets and lengths, in bytes.
    pub offset: u32,
}

impl Alignment {
    /// No demand: buffered I/O.
    pub const NONE: Alignment = Alignment { memory: 1, offset: 1 };

    /// True if these can go to the file as they are.
    pub fn fits(self, off: u64, bufs: &[BufSlice]) -> bool {
        let mem = self.memory as usize;
        off.is_multiple_of(u64::from(self.offset))
            && bufs.iter().all(|b| {
                (b.as_ptr() as usize).is_multiple_of(mem) && b.len().is_multiple_of(self.offset as usize)
            })
    }
}

/// Facts about an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileTraits {
    /// Opened for writing.
    pub writable: bool,
    /// Opened past the page cache.
    pub direct: bool,
    /// What I/O has to be aligned to.
    pub alignment: Alignment,
    /// A block device, not a regular file.
    pub is_device: bool,
    /// Device and inode number, or the like: equal if two handles are on the same file.
    pub identity: (u64, u64),
}

/// An open file.
pub trait HostFile: Send + Sync + Debug {
    /// The name it was opened under.
    fn path(&self) -> &Path;

    /// Facts that do not change while it is open.
    fn traits(&self) -> FileTraits;

    /// Length in bytes.
    ///
    /// # Errors
    /// From the operating system; so for all of the following.
    fn len(&self) -> io::Result<u64>;

    /// True for a file without a byte.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads what is there, up to the length of `buf`. Any alignment is served.
    fn read_at(&self, off: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// Writes all of `buf`. Any alignment is served.
    fn write_at(&self, off: u64, buf: &[u8]) -> io::Result<()>;

    /// See [`super::IoKind::Truncate`]; also grows, by space that may hold anything after a crash.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// See [`super::IoKind::Allocate`].
    fn allocate(&self, off: u64, len: u64) -> io::Result<()>;

    /// Gives the space of a range back: it reads as zeros, and the file keeps its length. EOPNOTSUPP where the file system
    /// cannot.
    fn punch(&self, off: u64, len: u64) -> io::Result<()>;

    /// See [`super::IoKind::Sync`].
    fn sync(&self) -> io::Result<()>;

    /// Start of the next data at or behind `off`; `None` if only a hole follows. A file system that cannot tell
    /// answers `off`.
    fn next_data(&self, off: u64) -> io::Result<Option<u64>>;

    /// Start of the next hole at or behind `off` (the end of the file counts as one).
    fn next_hole(&self, off: u64) -> io::Result<u64>;

    /// Bytes of storage the file takes.
    fn allocated(&self) -> io::Result<u64>;

    /// The descriptor, for engines of the operating system.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
}

/// A file in memory, for tests.
#[derive(Debug, Default)]
pub struct MemFile {
    bytes: Mutex<Vec<u8>>,
    name: PathBuf,
}

impl MemFile {
    /// A file with these bytes.
    pub fn new(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Self {
        MemFile { bytes: Mutex::new(bytes), name: name.into() }
    }

    /// A copy of the bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().expect("memory file lock")
    }
}

fn too_large() -> io::Error {
    io::Error::from_raw_os_error(libc::EFBIG)
}

impl HostFile for MemFile {
    fn path(&self) -> &Path {
        &self.name
    }

    fn traits(&self) -> FileTraits {
        let me = std::ptr::from_ref(self) as usize as u64;
        FileTraits {
            writable: true,
            direct: false,
            alignment: Alignment::NONE,
            is_device: false,
            identity: (0, me),
        }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().len() as u64)
    }

    fn read_at(&self, off: u64, buf: &mut [u8]) -> io::Result<usize> {
        let b = self.lock();
        let start = usize::try_from(off).map_or(b.len(), |o| o.min(b.len()));
        let n = buf.len().min(b.len() - start);
        buf[..n].copy_from_slice(&b[start..start + n]);
        Ok(n)
    }

    fn write_at(&self, off: u64, buf: &[u8]) -> io::Result<()> {
        let mut b = self.lock();
        let start = usize::try_from(off).map_err(|_| too_large())?;
        let end = start.checked_add(buf.len()).ok_or_else(too_large)?;
        if b.len() < end {
            b.resize(end, 0);
        }
        b[start..end].copy_from_slice(buf);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.lock().resize(usize::try_from(len).map_err(|_| too_large())?, 0);
        Ok(())
    }

    fn allocate(&self, off: u64, len: u64) -> io::Result<()> {
        let end = off.checked_add(len).ok_or_else(too_large)?;
        if self.len()? < end { self.set_len(end) } else { Ok(()) }
    }

    fn punch(&self, off: u64, len: u64) -> io::Result<()> {
        let mut bytes = self.lock();
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
        let (from, to) = (place(off), place(off.saturating_add(len)));
        bytes[from..to].fill(0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, off: u64) -> io::Result<Option<u64>> {
        Ok((off < self.len()?).then_some(off))
    }

    fn next_hole(&self, _off: u64) -> io::Result<u64> {
        self.len()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
