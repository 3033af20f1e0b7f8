//! Merging images of a chain: what some of them decide goes into another, and they are not needed any more.
//!
//! Downwards an ancestor takes in what the images above it say; the last of those hides it until nothing is missing. Upwards a child
//! takes in what it would otherwise lack. Either way the top shows the same at every moment: bytes first, durable, then the names of
//! parents, durable, and only then are files removed.

mod note;
mod span;

use super::{CopyJob, StepsJob, Watch, open_channel};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{NewParent, OpenHow};
use crate::io::sync_dir;
use crate::map::FileId;
use crate::vd::{Disk, DiskOptions, ImageFiles, ImageSpec, OpenDisk, open_disk, stand_in};
use note::{Link, Note};
use span::{Locked, Span};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

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

impl Merge {
    /// How long to wait for each lock: there is always one.
    fn lock_wait(&self) -> Duration {
        self.chain.lock_wait.unwrap_or(Duration::ZERO)
    }
}

/// What has become of a merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The image that has taken the others in.
    pub into: PathBuf,
    /// The images that are not needed any more, removed unless they were to be kept.
    pub spent: Vec<PathBuf>,
}

/// Merges images of a chain, under locks. What the top shows stays the same; where the top itself goes, the one that has taken it
/// in shows that. Cancelled, or stopped in any other way, at any moment, nothing is lost, and the same call completes it.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for images that are not of the chain; [`ErrorKind::ReadOnly`] where another image has one of
/// those that change or go as its parent; [`ErrorKind::Unsupported`] where a format cannot be written, or its parent's name not be
/// changed: all of them before anything is written; of opening, locking, reading and writing; [`ErrorKind::Cancelled`].
pub fn merge_images(how: &Merge, watch: &mut Watch<'_>) -> Result<Merged> {
    let from = how.from.as_deref().unwrap_or(&how.chain.image.path);
    if let Some(mut note) = Note::left_by(from)? {
        if how.keep {
            note.remove.clear();
        }
        return finish(&note, how, watch);
    }
    let span = Span::find(how)?;
    let locked = span.lock(how)?;
    span.refuse_loss(how)?;
    for link in span.links(how.keep).iter().filter(|l| l.needed) {
        plan(&locked, link)?;
    }
    grow(&span, &locked, watch)?;
    copy(&span, how, watch)?;
    watch.stop_if_cancelled()?;
    let note = span.note(how)?;
    note.write(from)?;
    // Each file is locked again for what is done to it; one that is written to in between stays.
    drop(locked);
    finish(&note, how, watch)
}

/// The steps that give an image its new parent.
fn plan(locked: &Locked, link: &span::Link) -> Result<Vec<crate::format::FileStep>> {
    let child = &locked.images[link.child];
    let parent = link.parent.map(|p| described(child.files()[0].path(), &locked.images[p])).transpose()?;
    child.relink(parent.as_ref())
}

/// An image in the words of those that name it as their parent.
fn described(child: &Path, parent: &ImageFiles) -> Result<NewParent> {
    let path = parent.files()[0].path();
    let mut info = parent.map(FileId(0), OpenHow { read_only: true, info_only: false })?.info();
    info.uuid = info.uuid.or_else(|| stand_in(path));
    Ok(NewParent { info, path: named_from(child, path) })
}

/// What an image calls its parent: the bare name in the same folder, otherwise where it is.
pub fn named_from(image: &Path, parent: &Path) -> Option<String> {
    let folder = |p: &Path| fs::canonicalize(super::create::folder_of(p)).ok();
    let name = if folder(image) == folder(parent) {
        PathBuf::from(parent.file_name()?)
    } else {
        fs::canonicalize(parent).ok()?
    };
    name.to_str().map(str::to_string)
}

/// The one that takes in a longer disk becomes as long. Its children read zeros there as before.
fn grow(span: &Span, locked: &Locked, watch: &mut Watch<'_>) -> Result<()> {
    let Some(size) = span.new_size()? else { return Ok(()) };
    let image = &locked.images[span.into];
    let steps = image.resize(size)?;
    let files: Vec<_> = image.files().iter().map(|f| &**f).collect();
    watch.run(&mut StepsJob::new(files, steps))
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
    let channels = (open_channel(&source, slots)?, open_channel(&target, slots)?);
    let mut job = CopyJob::of(channels.0, channels.1, selection)?;
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
        options,
        ..how.chain.clone()
    };
    Ok(open_disk(&part)?.disk)
}

/// What is left when the bytes are durable: the names of parents, and the files that go.
fn finish(note: &Note, how: &Merge, watch: &mut Watch<'_>) -> Result<Merged> {
    let from = how.from.as_deref().unwrap_or(&how.chain.image.path);
    for link in &note.links {
        watch.stop_if_cancelled()?;
        relink(link, how, watch)?;
    }
    for file in &note.remove {
        watch.stop_if_cancelled()?;
        file.remove(how.lock_wait())?;
    }
    for file in &note.remove {
        sync_dir(super::create::folder_of(&file.path))?;
    }
    Note::remove(from)?;
    Ok(Merged { into: note.into.clone(), spent: note.spent.clone() })
}

fn relink(link: &Link, how: &Merge, watch: &mut Watch<'_>) -> Result<()> {
    let (wait, raw) = (Some(how.lock_wait()), how.chain.allow_raw_device);
    let open = |spec: &ImageSpec, write| ImageFiles::open_with(&spec.path, spec.format, write, wait, raw);
    let child = open(&link.child()?, true)?;
    let parent = match link.parent()? {
        Some(spec) => Some(
            described(&spec.path, &open(&spec, false)?)
                .map(|p| NewParent { path: named_from(&link.child, &spec.path), ..p })?,
        ),
        None => None,
    };
    let steps = match child.relink(parent.as_ref()) {
        // It says when its parent was changed last, or does not: it stays readable.
        Err(e) if !link.needed && e.kind() == ErrorKind::Unsupported => return Ok(()),
        steps => steps?,
    };
    let files: Vec<_> = child.files().iter().map(|f| &**f).collect();
    watch.run(&mut StepsJob::new(files, steps))
}

/// Of a command that names images that are not of one chain.
fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}
