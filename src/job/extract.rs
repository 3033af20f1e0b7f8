//! A range of a disk as a new image.

use super::convert::Unfinished;
use super::create::create_files;
use super::{CreateImage, DiskBytes, LANE_BYTES, Progress, Watch};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::limits::SECTOR_BYTES;
use crate::vd::{DiskOptions, ImageSpec, OpenDisk, open_disk};
use std::path::PathBuf;
use std::time::Duration;

/// Runs of zeros are looked for in pieces of this.
const ZERO_UNIT: usize = 64 << 10;

/// A range that is to become an image.
#[derive(Clone, Debug)]
pub struct Extract {
    /// What is read, parents and all. Opened read-only.
    pub source: OpenDisk,
    /// The first byte.
    pub from: u64,
    /// Bytes, at most those there are; `None`: up to the disk's end.
    pub len: Option<u64>,
    /// The new file; nothing may be there yet.
    pub target: PathBuf,
    /// Its format.
    pub format: Format,
}

/// Makes an image of a part of a disk. It is complete and durable when this returns; its disk ends at a multiple of 512 bytes, with
/// zeros. After an error, or when cancelled, no file is left.
///
/// # Errors
/// [`ErrorKind::OutOfRange`] for a range behind the disk's end; as [`super::convert`].
pub fn extract(how: &Extract, watch: &mut Watch<'_>) -> Result<()> {
    let source = open_disk(&how.source)?;
    let disk = DiskBytes::new(&source.disk)?;
    let left = disk.size_bytes().checked_sub(how.from).filter(|left| *left > 0).ok_or_else(|| {
        let what = format!("has {} bytes: none is left behind {}", disk.size_bytes(), how.from);
        Error::new(ErrorKind::OutOfRange, what).at(&how.source.image.path)
    })?;
    let len = how.len.map_or(left, |len| len.min(left));
    if len == 0 {
        return Err(Error::new(ErrorKind::InvalidArgument, "0 bytes make no image"));
    }
    watch.stop_if_cancelled()?;
    let size = len.next_multiple_of(SECTOR_BYTES);
    let unfinished = Unfinished(create_files(&CreateImage::new(&how.target, how.format, size))?);
    let target = open_disk(&OpenDisk {
        image: ImageSpec { path: how.target.clone(), format: Some(how.format) },
        lock_wait: Some(Duration::ZERO),
        allow_write_to_parent: true,
        write_optical: true,
        options: DiskOptions { read_only: false, skip_syncs: true, ..DiskOptions::default() },
        ..OpenDisk::new(&how.target)
    })?;
    let target = DiskBytes::new(&target.disk)?;
    let done = copy(&disk, &target, (how.from, len), watch);
    done.and_then(|()| target.close()).map_err(|e| e.at(&how.target))?;
    watch.stop_if_cancelled()?;
    unfinished.keep();
    Ok(())
}

fn copy(from: &DiskBytes, to: &DiskBytes, (start, len): (u64, u64), watch: &mut Watch<'_>) -> Result<()> {
    let mut piece = vec![0; usize::try_from(LANE_BYTES).expect("a lane fits memory")];
    let mut done = 0;
    while done < len {
        watch.stop_if_cancelled()?;
        let n = usize::try_from(len - done).map_or(piece.len(), |left| left.min(piece.len()));
        from.read(start + done, &mut piece[..n])?;
        for (i, part) in piece[..n].chunks(ZERO_UNIT).enumerate() {
            if part.iter().any(|b| *b != 0) {
                to.write(done + (i * ZERO_UNIT) as u64, part)?;
            }
        }
        done += n as u64;
        (watch.progress)(Progress { done, total: len });
    }
    Ok(())
}
