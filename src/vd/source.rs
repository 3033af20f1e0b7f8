//! Files as formats see them while they are opened.

use crate::error::{Error, ErrorKind, Result};
use crate::io::HostFile;
use crate::map::{ByteSource, HostOffset};

/// The bytes of a file, for formats.
#[derive(Debug)]
pub struct FileSource<'a> {
    file: &'a dyn HostFile,
    len: u64,
}

impl<'a> FileSource<'a> {
    /// The bytes the file has now.
    ///
    /// # Errors
    /// From the operating system.
    pub fn new(file: &'a dyn HostFile) -> Result<Self> {
        let len = file.len().map_err(|e| Error::io("find out its length", e).at(file.path()))?;
        Ok(FileSource { file, len })
    }
}

impl ByteSource for FileSource<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
        let mut at = 0;
        while at < buf.len() {
            let n = self
                .file
                .read_at(off.0 + at as u64, &mut buf[at..])
                .map_err(|e| Error::io(format!("read it at {off}"), e).at(self.file.path()))?;
            if n == 0 {
                let what = format!("the file ends before {}", off.plus(buf.len() as u64));
                return Err(Error::new(ErrorKind::Corrupt, what).at(self.file.path()));
            }
            at += n;
        }
        Ok(())
    }
}
