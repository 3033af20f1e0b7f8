//! Merging images of a chain: what some of them decide goes into another, and they are not needed any more.
//!
//! Downwards an ancestor takes in what the images above it say; the last of those hides it until nothing is missing. Upwards a child
//! takes in what it would otherwise lack. Either way the top shows the same at every moment: bytes first, durable, then the names of
//! parents, durable, and only then are files removed. All of it under the same locks.

mod locked;
mod refuse;
pub(super) mod remove;
mod span;

use super::{CopyJob, Watch, change, open_channel, open_channel_over};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::Filters;
use crate::format::{FileStep, NewParent, OpenHow};
use crate::io::{EngineKind, sync_dir};
use crate::map::FileId;
use crate::vd::{Disk, DiskOptions, ImageFiles, OpenDisk, open_disk, stand_in};
use locked::Locked;
use span::{Link, Span};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A merge.
#[derive(Clone, Debug)]
pub struct Merge {
    /// The image on top, and where its parents are. Of the options the locks, and whether a parent may be written, matter.
    pub chain: OpenDisk,
    /// The image of the chain that goes into the other one, with those between them; `None`: the one on top.
    pub from: Option<PathBuf>,
    /// The one that takes it in, beneath or above; `None`: the parent.
    pub into: Option<PathBuf>,
    /// The files of the images that are not needed any more stay.
    pub keep: bool,
}

/// What has become of a merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The image that has taken the others in.
    pub into: PathBuf,
    /// The images that are not needed any more.
    pub spent: Vec<PathBuf>,
    /// Their files that were removed.
    pub removed: Vec<PathBuf>,
    /// Their files that were not although they were not to be kept, each with why.
    pub left: Vec<(PathBuf, String)>,
}

/// Merges images of a chain, under locks. What the top shows stays the same; where the top itself goes, the one that has taken it
/// in shows that. Cancelled, or stopped in any other way, at any moment, nothing is lost, and what the chain still has of it the
/// same call completes: it begins anew. Once the chain has done without them, images are removed last; stopped then, files are left
/// that nothing needs, and the same call says that they are not of the chain.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for images that are not of the chain; [`ErrorKind::ReadOnly`] where another image has one of
/// those that change or go as its parent; [`ErrorKind::Unsupported`] where a format cannot be written, or its parent's name not be
/// changed: all of them before anything is written; [`ErrorKind::Locked`] where somebody without locks has changed or replaced a
/// file meanwhile: nothing is removed then; of opening, locking, reading and writing; [`ErrorKind::Cancelled`].
pub fn merge_images(how: &Merge, watch: &mut Watch<'_>) -> Result<Merged> {
    let locked = Locked::take(&Span::find(how)?, how)?;
    // Only what is seen under the locks counts.
    let span = Span::find(how)?;
    locked.refuse_another(&span)?;
    span.refuse_loss(how)?;
    locked.refuse_failed_syncs(&span)?;
    let links = span.links(how.keep);
    for link in links.iter().filter(|l| l.needed) {
        plan(&locked, link)?;
    }
    refuse_unfit(&span, how)?;
    grow(&span, &locked, watch)?;
    copy(&span, how, watch)?;
    locked.refuse_changed()?;
    for link in &links {
        watch.stop_if_cancelled()?;
        relink(&locked, link, watch)?;
    }
    let mut merged = Merged {
        into: span.images[span.into].path.clone(),
        spent: span.images[span.spent()].iter().map(|i| i.path.clone()).collect(),
        removed: Vec::new(),
        left: Vec::new(),
    };
    if !how.keep {
        watch.stop_if_cancelled()?;
        // One that was made meanwhile would be lost.
        span.refuse_other_children(how, span.spent().collect())?;
        locked.refuse_changed()?;
        remove::remove(&span, &locked, &mut merged)?;
    }
    Ok(merged)
}

/// The steps that give an image its new parent.
fn plan(locked: &Locked, link: &Link) -> Result<Vec<FileStep>> {
    let child = &locked.images[link.child];
    let parent = link.parent.map(|p| described(child.files()[0].path(), &locked.images[p])).transpose()?;
    child.relink(parent.as_ref())
}

/// An image in the words of those that name it as their parent.
pub(super) fn described(child: &Path, parent: &ImageFiles) -> Result<NewParent> {
    let path = parent.files()[0].path();
    let mut info = parent.map(FileId(0), OpenHow { read_only: true, info_only: false })?.info();
    info.uuid = info.uuid.or_else(|| stand_in(path));
    Ok(NewParent { info, path: named_from(child, path) })
}

/// What an image calls its parent: the bare name in the same folder, otherwise where it is. The name itself is never followed: a
/// link that is named stays a link.
pub fn named_from(image: &Path, parent: &Path) -> Option<String> {
    let folder = |p: &Path| fs::canonicalize(super::create::folder_of(p)).ok();
    let (own, parents) = (folder(image), folder(parent));
    let name = PathBuf::from(parent.file_name()?);
    let name = if own == parents { name } else { parents?.join(name) };
    name.to_str().map(str::to_string)
}

/// The one that takes in the others cannot be written as it would have to be: told before anything is.
fn refuse_unfit(span: &Span, how: &Merge) -> Result<()> {
    let path = &span.images[span.into].path;
    let target = open(span, how, span.into, DiskOptions { read_only: false, ..DiskOptions::default() })?;
    if let Some(range) = target.chain().top().map.unwritten() {
        let what = format!("takes no writes at {}, or forgets them", range.start());
        return Err(Error::new(ErrorKind::Unsupported, what).at(path).hint("vdimg convert the image on top"));
    }
    Ok(())
}

/// The one that takes in a longer disk becomes as long. Its children read zeros there as before.
fn grow(span: &Span, locked: &Locked, watch: &mut Watch<'_>) -> Result<()> {
    let Some(size) = span.new_size()? else { return Ok(()) };
    let image = &locked.images[span.into];
    change(image, image.resize(size)?, watch)
}

/// The bytes, durable when this returns.
fn copy(span: &Span, how: &Merge, watch: &mut Watch<'_>) -> Result<()> {
    let (source, selection) = span.source();
    let source = open(span, how, source, DiskOptions { read_only: true, ..DiskOptions::default() })?;
    let options = DiskOptions { read_only: false, write_same: !span.is_down(), ..DiskOptions::default() };
    let target = open(span, how, span.into, options)?;
    target.chain().top().map.keep_content_id();
    let path = &span.images[span.into].path;
    let slots = CopyJob::slots();
    // The locks are on other descriptions than those that are written through here. Requests of a ring would outlive a killed
    // process, and its locks; calls of threads do not.
    let written = open_channel_over(EngineKind::Threads, &target, slots)?;
    let mut job = CopyJob::of(open_channel(&source, slots)?, written, selection)?;
    // Also after a failure: an image is left as a clean close leaves it.
    let done = watch.run(&mut job);
    let closed = job.close_target();
    done.and(closed).map_err(|e| e.at(path))
}

/// The part of the chain from an image downwards; we hold the locks.
fn open(span: &Span, how: &Merge, top: usize, options: DiskOptions) -> Result<Arc<Disk>> {
    let (image, below) = span.images[top..].split_first().expect("the image itself");
    let part = OpenDisk {
        image: image.clone(),
        parents: below.iter().rev().cloned().collect(),
        parent_dirs: Vec::new(),
        lock_wait: None,
        allow_write_to_parent: true,
        // What is encrypted stays so: all images of a chain share the key.
        filters: Filters::default(),
        options,
        ..how.chain.clone()
    };
    Ok(open_disk(&part)?.disk)
}

/// Gives an image its new parent, durable when this returns. What would only be nice to have is no reason to fail.
fn relink(locked: &Locked, link: &Link, watch: &mut Watch<'_>) -> Result<()> {
    let child = &locked.images[link.child];
    let path = child.files()[0].path();
    let done = plan(locked, link)
        .and_then(|steps| change(child, steps, watch))
        .and_then(|()| sync_dir(super::create::folder_of(path)));
    match done {
        Err(e) if link.needed || e.kind() == ErrorKind::Cancelled => Err(e),
        // It says when its parent was changed last, or does not: it stays readable.
        Err(e) => {
            tracing::warn!("{}: does not say that its parent was changed by us: {e}", path.display());
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Of a command that names images that are not of one chain.
fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}
