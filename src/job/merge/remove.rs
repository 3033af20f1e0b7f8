//! The files of images that are not needed any more. What may be somebody else's stays, and is told.

use super::Merged;
use super::locked::Locked;
use super::span::Span;
use crate::error::{Error, Result};
use crate::format::{OpenHow, signature};
use crate::io::{HostFile, sync_dir};
use crate::job::create::folder_of;
use crate::map::FileId;
use crate::vd::{FileSource, ImageFiles};
use std::collections::BTreeSet;
use std::fs;

/// Removes them, the uppermost image first, of each its own file first: whatever is left is a chain. Says in `merged` what was done.
///
/// # Errors
/// From the operating system.
pub(super) fn remove(span: &Span, locked: &Locked, merged: &mut Merged) -> Result<()> {
    let stays = |n: &usize| !span.spent().contains(n);
    let kept: BTreeSet<_> = (0..locked.images.len())
        .filter(stays)
        .flat_map(|n| locked.images[n].files())
        .map(|f| f.traits().identity)
        .collect();
    let mut goes = Vec::new();
    for image in &locked.images[span.spent()] {
        for (n, file) in image.files().iter().enumerate() {
            let path = file.path().to_path_buf();
            let shared = kept.contains(&file.traits().identity);
            let why = if shared { Some("an image that stays needs it") } else { reason(image, n, &**file) };
            match why {
                Some(why) => merged.left.push((path, why.to_string())),
                None => goes.push(path),
            }
        }
    }
    let folders: BTreeSet<_> = goes.iter().map(|p| folder_of(p).to_path_buf()).collect();
    for path in goes {
        fs::remove_file(&path).map_err(|e| {
            let e = Error::io("remove it", e).at(&path);
            e.hint("the merge is complete, and neither it nor what is beneath it is needed any more")
        })?;
        merged.removed.push(path);
    }
    folders.iter().try_for_each(|d| sync_dir(d))
}

/// Why the `n`th file of an image stays.
pub(in crate::job) fn reason(image: &ImageFiles, n: usize, file: &dyn HostFile) -> Option<&'static str> {
    let traits = file.traits();
    if traits.is_device {
        return Some("it is a device");
    }
    if !fs::symlink_metadata(file.path()).is_ok_and(|m| m.is_file()) {
        return Some("its name is a link");
    }
    if n == 0 {
        return None;
    }
    if !traits.writable {
        return Some("the image only read it: it may belong to others too");
    }
    match is_image(image, file) {
        Ok(false) => None,
        Ok(true) => Some("it looks like an image of its own"),
        Err(_) => Some("it cannot be read"),
    }
}

/// A part of an image that is one itself, by its signature. Sparse extents bear their format's, but open only with their descriptor.
fn is_image(image: &ImageFiles, file: &dyn HostFile) -> Result<bool> {
    let Some(format) = signature(&FileSource::new(file)?)? else { return Ok(false) };
    if format != image.format() {
        return Ok(true);
    }
    let how = OpenHow { read_only: true, info_only: true };
    let alone = ImageFiles::open(file.path(), Some(format), false, None);
    Ok(alone.and_then(|i| i.map(FileId(0), how)).is_ok())
}
