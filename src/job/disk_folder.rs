//! A disk and its partitions as the files of a folder: what `vdimg mount` shows, without a file system.

use super::DiskBytes;
use crate::error::{Error, ErrorKind, Result};
use crate::format::partitions::PartitionTable;
use crate::limits::SECTOR_BYTES;
use crate::vd::Disk;
use std::sync::Arc;

/// A file of the folder: a range of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderFile {
    /// `disk`, or `partition` and its number as Linux counts it.
    pub name: String,
    /// Its first byte on the disk.
    pub start: u64,
    /// Its length in bytes, which never changes.
    pub len: u64,
}

/// The files of a disk. They share its bytes: what is written to a partition is written to the disk.
#[derive(Debug)]
pub struct DiskFolder {
    disk: DiskBytes,
    files: Vec<FolderFile>,
    read_only: bool,
}

impl DiskFolder {
    /// The disk, and the partitions that its table names now. A disk without table, or with one that makes no sense, has none; the latter is
    /// told as a warning.
    ///
    /// # Errors
    /// Of reading the table; if there is no engine.
    pub fn new(disk: &Arc<Disk>) -> Result<DiskFolder> {
        let bytes = DiskBytes::new(disk)?;
        let len = bytes.size_bytes();
        let table = match PartitionTable::read(&bytes) {
            Ok(table) => table,
            Err(e) if e.kind() == ErrorKind::NotFound => PartitionTable::default(),
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                tracing::warn!("its partitions are not shown: {e}");
                PartitionTable::default()
            }
            Err(e) => return Err(e),
        };
        let mut files = vec![FolderFile { name: "disk".into(), start: 0, len }];
        for (number, sectors) in table.partitions {
            let (start, bytes) = (sectors.start * SECTOR_BYTES, sectors.len * SECTOR_BYTES);
            files.push(FolderFile { name: format!("partition{number}"), start, len: bytes });
        }
        Ok(DiskFolder { disk: bytes, files, read_only: disk.is_read_only() })
    }

    /// Its files, the disk first.
    pub fn files(&self) -> &[FolderFile] {
        &self.files
    }

    /// Nothing can be written.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What of `len` bytes at `off` is in a file, and where on the disk that begins.
    fn part(&self, file: usize, off: u64, len: usize) -> Result<(u64, usize)> {
        let f =
            self.files.get(file).ok_or_else(|| Error::new(ErrorKind::NotFound, "there is no such file"))?;
        let left = usize::try_from(f.len.saturating_sub(off)).unwrap_or(usize::MAX);
        Ok((f.start.saturating_add(off), len.min(left)))
    }

    /// Bytes of a file, by its place in the list; fewer than `len` at its end, as a file has them.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a file that is not there; of reading.
    pub fn read(&self, file: usize, off: u64, len: usize) -> Result<Vec<u8>> {
        let (at, len) = self.part(file, off, len)?;
        let mut bytes = vec![0; len];
        if len > 0 {
            self.disk.read(at, &mut bytes)?;
        }
        Ok(bytes)
    }

    /// Writes to a file, all of it or nothing.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`]; [`ErrorKind::NoSpace`] behind its end, for files keep their length; of writing.
    pub fn write(&self, file: usize, off: u64, bytes: &[u8]) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the disk is open for reading only"));
        }
        let (at, fits) = self.part(file, off, bytes.len())?;
        if fits < bytes.len() {
            let what = format!("{} bytes at {off} reach behind the end of the file", bytes.len());
            return Err(Error::new(ErrorKind::NoSpace, what));
        }
        self.disk.write(at, bytes)
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// As [`DiskBytes::flush`].
    pub fn flush(&self) -> Result<()> {
        if self.read_only { Ok(()) } else { self.disk.flush() }
    }

    /// Leaves the images as a clean close does, and durable.
    ///
    /// # Errors
    /// If that could not be written.
    pub fn close(self) -> Result<()> {
        self.disk.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::testing::scratch_dir;
    use crate::vd::{DiskOptions, OpenDisk, open_disk};

    /// A raw disk of 4 MiB with a table of these partitions (first sector, sectors), for reading or writing.
    fn folder(partitions: &[(u32, u32)], read_only: bool) -> Result<(tempfile::TempDir, DiskFolder)> {
        let dir = scratch_dir();
        let mut disk: Vec<u8> = (0..4u32 << 20).map(|i| (i / 512 % 251) as u8).collect();
        disk[446..512].fill(0);
        for (n, (start, len)) in partitions.iter().enumerate() {
            let entry = &mut disk[446 + 16 * n..462 + 16 * n];
            entry[4] = 0x83;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..].copy_from_slice(&len.to_le_bytes());
        }
        if !partitions.is_empty() {
            disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        }
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, disk).unwrap();
        let options = DiskOptions { read_only, ..DiskOptions::default() };
        let opened = open_disk(&OpenDisk { options, ..OpenDisk::new(&path) }).unwrap();
        Ok((dir, DiskFolder::new(&opened.disk)?))
    }

    #[test]
    fn partitions_are_windows_on_the_disk() {
        let (_dir, f) = folder(&[(100, 10), (4096, 4096)], false).unwrap();
        let told: Vec<_> = f.files().iter().map(|x| (x.name.as_str(), x.start, x.len)).collect();
        assert_eq!(
            told,
            [("disk", 0, 4 << 20), ("partition1", 51_200, 5120), ("partition2", 2 << 20, 2 << 20)]
        );
        assert_eq!(f.read(1, 5119, 100).unwrap(), [109], "a file ends");
        assert_eq!((f.read(1, 5120, 8).unwrap(), f.read(1, u64::MAX, 8).unwrap()), (vec![], vec![]));
        f.write(1, 510, &[1, 2, 3]).unwrap();
        assert_eq!(f.read(0, 51_200 + 509, 5).unwrap(), [100, 1, 2, 3, 101]);
        for (off, len) in [(5119, 2), (5120, 1), (u64::MAX, 1)] {
            assert_eq!(f.write(1, off, &vec![0; len]).unwrap_err().kind(), ErrorKind::NoSpace, "{off}");
        }
        assert_eq!(f.read(0, 51_200 + 5120, 1).unwrap(), [110], "what is behind it stays");
        assert_eq!(f.read(3, 0, 1).unwrap_err().kind(), ErrorKind::NotFound);
        f.flush().unwrap();
        f.close().unwrap();
    }

    #[test]
    fn a_disk_without_partitions_or_for_reading() {
        let (_dir, f) = folder(&[], true).unwrap();
        assert_eq!((f.files().len(), f.is_read_only()), (1, true));
        assert_eq!(f.write(0, 0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
        f.flush().unwrap();
        // One that makes no sense: overlapping, or behind the end.
        for table in [[(100, 10), (105, 10)], [(100, 10), (8000, 4000)]] {
            let (_dir, f) = folder(&table, true).unwrap();
            assert_eq!(f.files().len(), 1, "{table:?}");
        }
    }
}
