//! All images of the chain under their locks, from before the first byte until the last file is removed.

use super::Merge;
use super::span::Span;
use crate::error::{Error, ErrorKind, Result};
use crate::format::OpenHow;
use crate::io::HostFile;
use crate::map::FileId;
use crate::vd::ImageFiles;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Images that are open under their locks, from the top.
pub(super) struct Locked {
    pub(super) images: Vec<ImageFiles>,
    /// What was seen of those that we do not change, file by file; `None`: one that we do.
    seen: Vec<Option<Vec<Seen>>>,
}

/// What shows that a file was written to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen {
    bytes: u64,
    changed: (i64, i64),
}

impl Locked {
    /// Locks all images of the chain: those that change or go against everybody else, the others against changes.
    ///
    /// # Errors
    /// Of opening and locking.
    pub(super) fn take(span: &Span, how: &Merge) -> Result<Locked> {
        let (wait, raw) = (Some(how.chain.lock_wait.unwrap_or(Duration::ZERO)), how.chain.allow_raw_device);
        let links = span.links(how.keep);
        let is_needed = |n: usize| {
            let goes = !how.keep && span.spent().contains(&n);
            goes || n == span.into || links.iter().any(|l| l.child == n && l.needed)
        };
        let is_linked = |n: usize| links.iter().any(|l| l.child == n);
        let mut images = Vec::new();
        for (n, spec) in span.images.iter().enumerate() {
            let open = |write| ImageFiles::open_with(&spec.path, spec.format, write, wait, raw);
            images.push(match (is_needed(n), is_linked(n)) {
                (true, _) => open(true)?,
                // It may be that it cannot be written: then it is told so when that is tried.
                (false, true) => open(true).or_else(|_| open(false))?,
                (false, false) => open(false)?,
            });
        }
        let changes = |n: usize| n == span.into || is_linked(n);
        let seen = |(n, image): (usize, &ImageFiles)| {
            if changes(n) {
                return Ok(None);
            }
            image.files().iter().map(|f| look(&**f)).collect::<Result<Vec<_>>>().map(Some)
        };
        let seen = images.iter().enumerate().map(seen).collect::<Result<Vec<_>>>()?;
        Ok(Locked { images, seen })
    }

    /// The chain, found again under the locks, is no longer the one that was locked.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`].
    pub(super) fn refuse_another(&self, span: &Span) -> Result<()> {
        let own = |i: &ImageFiles| i.files().iter().map(|f| f.traits().identity).collect::<Vec<_>>();
        let locked: Vec<_> = self.images.iter().map(own).collect();
        if locked == span.files {
            return self.refuse_changed();
        }
        let what = "its chain has changed while it was being locked";
        Err(Error::new(ErrorKind::Locked, what).at(&span.images[0].path).hint("try again"))
    }

    /// Somebody who heeds no locks was here: a path leads to another file than the one that is locked, or one that we do not
    /// change has changed.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`]; from the operating system.
    pub(super) fn refuse_changed(&self) -> Result<()> {
        for (image, seen) in self.images.iter().zip(&self.seen) {
            for (n, file) in image.files().iter().enumerate() {
                let now = look(&**file)?;
                if seen.as_ref().is_some_and(|s| s[n] != now) {
                    let what = "was written to while it was being merged; no file was removed";
                    return Err(Error::new(ErrorKind::Locked, what).at(file.path()).hint("merge it again"));
                }
            }
        }
        Ok(())
    }

    /// What the disk holds of an image is not known after a failed sync, neither of one that is written nor of one that is read
    /// and removed.
    ///
    /// # Errors
    /// [`ErrorKind::SyncFailed`].
    pub(super) fn refuse_failed_syncs(&self, span: &Span) -> Result<()> {
        let first = span.from.min(span.into).saturating_sub(1);
        for image in &self.images[first..=span.from.max(span.into)] {
            let info = image.map(FileId(0), OpenHow { read_only: true, info_only: true })?.info();
            image.refuse_to_write(&info, true)?;
        }
        Ok(())
    }
}

/// What is seen of a file, at its path; that has to lead to the one that is open.
fn look(file: &dyn HostFile) -> Result<Seen> {
    let (path, traits): (&Path, _) = (file.path(), file.traits());
    let meta = fs::metadata(path).map_err(|e| Error::io("look at it again", e).at(path))?;
    let identity = if traits.is_device { (meta.rdev(), 0) } else { (meta.dev(), meta.ino()) };
    if identity != traits.identity {
        let what = "was replaced by another file while it was being merged; no file was removed";
        return Err(Error::new(ErrorKind::Locked, what).at(path).hint("merge it again"));
    }
    // Of a device they say nothing.
    let changed = if traits.is_device { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) };
    Ok(Seen { bytes: meta.len(), changed })
}
