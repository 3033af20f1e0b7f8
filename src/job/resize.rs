//! Changing the size of an image's disk.

use super::{LANE_BYTES, PieceKind, Survey, Watch, change};
use crate::error::{Error, ErrorKind, Result};
use crate::format::OpenHow;
use crate::limits::{MAX_DISK_BYTES, SECTOR_BYTES};
use crate::map::{FileId, GuestOffset, HostOffset};
use crate::vd::{Disk, ImageFiles, OpenDisk, open_disk};
use std::sync::Arc;

/// What size a disk shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So many bytes.
    To(u64),
    /// So many bytes more than now.
    By(u64),
}

/// A change of size.
#[derive(Clone, Debug)]
pub struct Resize {
    /// The image, and where its parents are. Of the options the locks, and whether a parent may be written, matter.
    pub image: OpenDisk,
    /// The size: a multiple of 512 bytes above 0.
    pub size: NewSize,
    /// Data behind a smaller end may be lost.
    pub shrink: bool,
}

/// Changes the size of an image's disk, under an exclusive lock. Bytes that are added read as zeros. A differencing image may
/// become larger than its parent; it reads as zeros there. Cancelled, or stopped in any other way, at any moment, the disk has the old
/// size or the new one and has lost nothing; the same call completes it. (The size of a raw disk is its file's length, and
/// may be one in between.) Returns the sizes before and after, in bytes.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for an impossible size, and where data would be lost without [`Resize::shrink`];
/// [`ErrorKind::Unsupported`] where format or image keep their size; of opening, locking, reading and writing;
/// [`ErrorKind::Cancelled`].
pub fn resize_image(how: &Resize, watch: &mut Watch<'_>) -> Result<(u64, u64)> {
    let spec = &how.image.image;
    let image = ImageFiles::open(&spec.path, spec.format, true, how.image.lock_wait)?;
    let map = image.map(FileId(0), OpenHow { read_only: true, info_only: false })?;
    image.refuse_to_write(&map.info(), how.image.allow_write_to_parent)?;
    let (old, is_diff) = (map.limits().size_bytes, map.limits().is_diff);
    let new = checked_size(how.size, old).map_err(|e| e.at(&spec.path))?;
    drop(map);
    if new > old && is_diff {
        refuse_larger_parent(how, old)?;
    }
    if new < old && !how.shrink {
        refuse_loss(&image.alone()?, new, watch).map_err(|e| e.at(&spec.path))?;
    }
    let steps = image.resize(new)?;
    change(&image, steps, watch)?;
    let now = image.map(FileId(0), OpenHow { read_only: true, info_only: false })?.limits().size_bytes;
    if now != new {
        let what = format!("has {now} bytes after its size was set to {new}");
        return Err(Error::new(ErrorKind::Io, what).at(&spec.path));
    }
    Ok((old, new))
}

fn checked_size(size: NewSize, old: u64) -> Result<u64> {
    let (size, refused) = match size {
        NewSize::To(size) => (Some(size), "a disk"),
        NewSize::By(more) => (old.checked_add(more), "a disk so much larger"),
    };
    let refused = |what: String| Err(Error::new(ErrorKind::InvalidArgument, format!("{refused} {what}")));
    match size.filter(|s| *s <= MAX_DISK_BYTES) {
        None => refused(format!("would have more than {MAX_DISK_BYTES} bytes")),
        Some(0) => refused("would have 0 bytes".into()),
        Some(s) if !s.is_multiple_of(SECTOR_BYTES) => {
            refused(format!("would have {s} bytes: the size must be a multiple of {SECTOR_BYTES}"))
        }
        Some(s) => Ok(s),
    }
}

/// Behind the end of a differencing image its parent would come to light.
fn refuse_larger_parent(how: &Resize, old: u64) -> Result<()> {
    // Its own lock is held by us; parents are looked at alone.
    let opened = open_disk(&OpenDisk { lock_wait: None, ..how.image.clone() })?;
    let Some(parent) = opened.images.get(1).filter(|p| p.size_bytes() > old) else { return Ok(()) };
    let what = format!(
        "its parent {} is larger than it, so that the parent's bytes would be seen in what is added",
        parent.path.display()
    );
    Err(Error::new(ErrorKind::Unsupported, what)
        .at(&how.image.image.path)
        .hint("vdimg convert it, and resize the copy"))
}

/// Looks for bytes other than zeros behind the new end, in this image alone.
fn refuse_loss(disk: &Arc<Disk>, new: u64, watch: &Watch<'_>) -> Result<()> {
    let mut survey = Survey::behind(disk.clone(), GuestOffset(new));
    while let Some(piece) = survey.next_piece()? {
        watch.stop_if_cancelled()?;
        let lost = match piece.kind {
            PieceKind::Data { file, off } => first_byte(disk, file, off, piece.range.len(), watch)?,
            PieceKind::Packed { .. } => Some(0),
            PieceKind::Hole { .. } | PieceKind::Zero | PieceKind::Unallocated => None,
        };
        if let Some(into) = lost {
            let at = piece.range.start().0 + into;
            let what = format!("has data behind the new end, the first at byte {at} of its disk");
            return Err(Error::new(ErrorKind::InvalidArgument, what).hint("pass --shrink to give it up"));
        }
    }
    Ok(())
}

/// How far into a range of a file the first byte is that is not zero.
fn first_byte(
    disk: &Disk,
    file: FileId,
    off: HostOffset,
    len: u64,
    watch: &Watch<'_>,
) -> Result<Option<u64>> {
    let host = disk.host_file(file);
    let mut piece = vec![0; usize::try_from(len.min(LANE_BYTES)).expect("1 MiB at most")];
    let mut done = 0;
    while done < len {
        watch.stop_if_cancelled()?;
        let n = usize::try_from(len - done).map_or(piece.len(), |left| left.min(piece.len()));
        let at = off.plus(done);
        let got = host
            .read_at(at.0, &mut piece[..n])
            .map_err(|e| Error::io(format!("read it at {at}"), e).at(host.path()))?;
        match piece[..got].iter().position(|b| *b != 0) {
            Some(into) => return Ok(Some(done + into as u64)),
            None if got == 0 => return Ok(None),
            None => done += got as u64,
        }
    }
    Ok(None)
}
