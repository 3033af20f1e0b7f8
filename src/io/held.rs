//! Locks that say "I am alive", and a look at those of others: the kernel drops them with the process, however it ends.

use super::HostFile;
use super::sys::{self, OfdLock};
use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A byte of a file, held against everybody else until dropped. The file's contents do not matter.
#[derive(Debug)]
pub struct HeldByte {
    /// The lock belongs to this description and goes with it.
    _file: File,
    byte: u16,
}

impl HeldByte {
    /// Takes a byte of the file at `path`, which is made if it is not there; `None`: another holds it.
    ///
    /// # Errors
    /// From the operating system.
    pub fn take(path: &Path, byte: u16) -> Result<Option<HeldByte>> {
        let file = open(path)?;
        match sys::ofd_set(file.as_fd(), OfdLock::Write, byte) {
            Ok(()) => Ok(Some(HeldByte { _file: file, byte })),
            Err(libc::EAGAIN | libc::EACCES) => Ok(None),
            Err(e) => Err(Error::io("lock it", io::Error::from_raw_os_error(e)).at(path)),
        }
    }

    /// Its number.
    pub fn byte(&self) -> u16 {
        self.byte
    }

    /// Whether anybody holds a byte of the file at `path`, this process included.
    ///
    /// # Errors
    /// From the operating system.
    pub fn is_held(path: &Path, byte: u16) -> Result<bool> {
        let held = sys::ofd_test(open(path)?.as_fd(), OfdLock::Write, byte);
        held.map(|h| h.is_some())
            .map_err(|e| Error::io("look at its locks", io::Error::from_raw_os_error(e)).at(path))
    }
}

fn open(path: &Path) -> Result<File> {
    let mut how = OpenOptions::new();
    how.read(true).write(true).create(true).truncate(false).mode(0o600);
    how.open(path).map_err(|e| Error::io("open it", e).at(path))
}

/// What others do with an image, by the locks that QEMU, its tools and vdblk take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileUse {
    /// Somebody reads it and does not want it to be written.
    Reading,
    /// Somebody writes it.
    Writing,
}

/// Looks at the locks on an open image. Nothing is taken.
///
/// # Errors
/// From the operating system; on file systems without such locks.
pub fn use_by_others(file: &dyn HostFile) -> Result<Option<FileUse>> {
    let Some(fd) = file.fd() else { return Ok(None) };
    for (byte, found) in
        [(super::lock::WRITING, FileUse::Writing), (super::lock::KEPT_FROM_WRITING, FileUse::Reading)]
    {
        let held = sys::ofd_test(fd, OfdLock::Write, byte);
        let held = held.map_err(|e| Error::io("look at its locks", io::Error::from_raw_os_error(e)));
        if held.map_err(|e| e.at(file.path()))?.is_some() {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{ImageLock, OpenHow, OsFile};
    use std::time::Duration;

    #[test]
    fn a_byte_is_held_by_one_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("holders");
        let held = HeldByte::take(&path, 7).unwrap().expect("free");
        assert!(HeldByte::take(&path, 7).unwrap().is_none());
        assert!(HeldByte::is_held(&path, 7).unwrap() && !HeldByte::is_held(&path, 8).unwrap());
        drop(held);
        assert!(!HeldByte::is_held(&path, 7).unwrap());
        assert_eq!(HeldByte::take(&path, 7).unwrap().expect("free again").byte(), 7);
    }

    #[test]
    fn image_locks_tell_what_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, [0; 4096]).unwrap();
        let open = |write| OsFile::open(&path, OpenHow { write, ..OpenHow::default() }).unwrap();
        let looking = open(false);
        assert_eq!(use_by_others(&looking).unwrap(), None);
        let writer = open(true);
        let lock = ImageLock::exclusive(&writer, Duration::ZERO).unwrap();
        assert_eq!(use_by_others(&looking).unwrap(), Some(FileUse::Writing));
        drop(lock);
        let _lock = ImageLock::shared(&writer, Duration::ZERO).unwrap();
        assert_eq!(use_by_others(&looking).unwrap(), Some(FileUse::Reading));
    }
}
