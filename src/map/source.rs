//! How a format sees the bytes of a file while it is being opened.

use super::HostOffset;
use crate::error::{Error, ErrorKind, Result};

/// Bytes to open an image from: a file in production, a slice in tests and fuzzers.
pub trait ByteSource {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// True for a file without a byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `off`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the file ends before `buf` is full; [`ErrorKind::Io`] and
    /// friends from the operating system.
    fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()>;
}

impl ByteSource for [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
        let piece = usize::try_from(off.0)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buf.len())?))
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("the file ends before {off}")))?;
        buf.copy_from_slice(piece);
        Ok(())
    }
}

impl<T: ByteSource + ?Sized> ByteSource for &T {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
        (**self).read_at(off, buf)
    }
}

impl ByteSource for Vec<u8> {
    fn len(&self) -> u64 {
        self.as_slice().len() as u64
    }

    fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.as_slice().read_at(off, buf)
    }
}
