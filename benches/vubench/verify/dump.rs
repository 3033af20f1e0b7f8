//! The expected content of the disk as a sparse raw file, to compare an image with.
use super::pattern::SECTOR;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub(super) struct Dump {
    file: File,
}

impl Dump {
    /// A new file as long as the disk, all hole.
    pub(super) fn create(path: &str, disk: u64) -> io::Result<Dump> {
        let file = File::create(path)?;
        file.set_len(disk)?;
        Ok(Dump { file })
    }

    /// Puts `data` at its place on the disk, sectors of zeroes excepted: those stay holes.
    pub(super) fn put(&self, off: u64, data: &[u8]) -> io::Result<()> {
        let zero = |s: &[u8]| s.iter().all(|b| *b == 0);
        let mut at = off;
        for run in data.chunks(SECTOR).collect::<Vec<_>>().chunk_by(|a, b| zero(a) == zero(b)) {
            if !zero(run[0]) {
                self.file.write_all_at(&run.concat(), at)?;
            }
            at += run.iter().map(|s| s.len() as u64).sum::<u64>();
        }
        Ok(())
    }
}
