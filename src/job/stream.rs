//! Writing an image that is written once, from its start to its end, as its writer goes.

use super::CreateImage;
use super::create::{begin_sequential, folder_of, remove_files};
use super::pack::Packing;
use crate::error::{Error, ErrorKind, Result, Status};
use crate::io::{HostFile, ImageLock, LockMode, sync_dir};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A new image that takes writes in the order of its disk. Until it is finished its file is no image, and dropped before that it is
/// removed.
#[derive(Debug)]
pub struct StreamWriter {
    image: Packing,
    _lock: ImageLock,
    /// Removed unless the image is finished.
    path: Option<PathBuf>,
    size: u64,
    /// The unit that is being written, and its bytes so far.
    number: u64,
    unit: Vec<u8>,
    failed: bool,
}

impl StreamWriter {
    /// Begins with an image; `None` for the kinds that [`super::create_image`] makes.
    ///
    /// # Errors
    /// As [`super::create_image`].
    pub fn begin(new: &CreateImage) -> Result<Option<StreamWriter>> {
        let Some((image, file)) = begin_sequential(new)? else { return Ok(None) };
        let file: Arc<dyn HostFile> = Arc::new(file);
        // Nobody shall take it for an image before it is one.
        let lock = ImageLock::take(&*file, LockMode::Exclusive, Duration::ZERO).inspect_err(|_| {
            remove_files(std::slice::from_ref(&new.path));
        })?;
        let image = Packing::new(image, file);
        let unit = vec![0; usize::try_from(image.unit_bytes()).expect("a unit fits memory")];
        let path = Some(new.path.clone());
        Ok(Some(StreamWriter {
            image,
            _lock: lock,
            path,
            size: new.size_bytes,
            number: 0,
            unit,
            failed: false,
        }))
    }

    /// Bytes of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size
    }

    /// Writes to byte `off` of the disk. What is left out reads as zeros.
    ///
    /// # Errors
    /// [`Status::VmdkInvalidWrite`] before the unit (64 KiB of a VMDK) that was written last; [`ErrorKind::OutOfRange`] behind the disk's end; of
    /// writing, after which nothing is taken any more.
    pub fn write(&mut self, off: u64, data: &[u8]) -> Result<()> {
        if self.failed {
            return Err(Error::new(
                ErrorKind::State,
                "an earlier write failed: the image cannot be completed",
            ));
        }
        if off.checked_add(data.len() as u64).is_none_or(|end| end > self.size) {
            let what =
                format!("{} bytes at {off} are not all on the disk of {} bytes", data.len(), self.size);
            return Err(Error::of(Status::ReadOutOfRange, what));
        }
        let unit = self.image.unit_bytes();
        if off / unit < self.number && !data.is_empty() {
            let what = format!("byte {off} lies before what was written last, and the image is written once");
            return Err(Error::of(Status::VmdkInvalidWrite, what).hint("write from the start to the end"));
        }
        let written = self.put(off, data);
        self.failed = written.is_err();
        written
    }

    fn put(&mut self, mut off: u64, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            let (number, into) = (off / self.image.unit_bytes(), off % self.image.unit_bytes());
            if number > self.number {
                self.end_unit()?;
                self.number = number;
            }
            let into = usize::try_from(into).expect("inside a unit");
            let (now, rest) = data.split_at(data.len().min(self.unit.len() - into));
            self.unit[into..into + now.len()].copy_from_slice(now);
            (off, data) = (off + now.len() as u64, rest);
        }
        Ok(())
    }

    fn end_unit(&mut self) -> Result<()> {
        let left = self.size.saturating_sub(self.number * self.image.unit_bytes());
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(self.unit.len());
        self.image.units(self.number, &self.unit[..len])?;
        self.unit.fill(0);
        Ok(())
    }

    /// Completes the image, durably.
    ///
    /// # Errors
    /// Of writing, now or before; no file is left then.
    pub fn finish(mut self) -> Result<()> {
        if self.failed {
            return Err(Error::new(ErrorKind::State, "an earlier write failed: the image is removed"));
        }
        self.end_unit()?;
        self.image.finish()?;
        sync_dir(folder_of(self.image.file().path()))?;
        self.path = None;
        Ok(())
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        remove_files(self.path.as_slice());
    }
}
