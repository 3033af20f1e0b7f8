//! Another parent for an image, or none: what the image would show otherwise over it is copied before.

use super::merge::described;
use super::{DiffJob, Watch, change, open_channel, open_channel_over};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::Filters;
use crate::format::{FileStep, OpenHow};
use crate::io::{EngineKind, sync_dir};
use crate::map::FileId;
use crate::vd::{Disk, DiskOptions, ImageFiles, ImageSpec, OpenDisk, OpenImage, OpenedDisk, open_disk};
use std::sync::Arc;
use std::time::Duration;

/// A change of parent.
#[derive(Clone, Debug)]
pub struct Rebase {
    /// The image, and where its present parents are. Of the options the locks, and whether a parent may be written, matter.
    pub image: OpenDisk,
    /// The new parent, and where its own parents are; `None`: the image shall stand alone.
    pub onto: Option<OpenDisk>,
    /// Only the name of the parent changes: the user vouches for the new one showing the same. The present parents need not be there.
    pub only_name: bool,
}

/// Gives an image another parent, or none. Unless only the name is to change, the image shows the same before, after and at any moment
/// between: what the new parent shows otherwise is copied into the image, durable, before that is named. Cancelled, or stopped in any
/// other way, the image has its old parent, and the same call completes it.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] where the new parent stands on the image itself; [`ErrorKind::Unsupported`] where the format cannot
/// name another parent or be written, or internal snapshots show what is beneath; [`ErrorKind::ReadOnly`] where a diff in the folder has the
/// image as its parent: all of them before anything is written; of opening, locking, reading and writing; [`ErrorKind::Cancelled`].
pub fn rebase_image(how: &Rebase, watch: &mut Watch<'_>) -> Result<()> {
    // The images themselves are copied between: all have the same key, and what filters make of them stays what it is.
    let plain = |disk: &OpenDisk| OpenDisk { filters: Filters::default(), ..disk.clone() };
    let how =
        &Rebase { image: plain(&how.image), onto: how.onto.as_ref().map(plain), only_name: how.only_name };
    let (spec, wait) = (&how.image.image, how.image.lock_wait.unwrap_or(Duration::ZERO));
    let raw = how.image.allow_raw_device;
    let image = ImageFiles::open_with(&spec.path, spec.format, true, Some(wait), raw)?;
    let info = image.map(FileId(0), OpenHow { read_only: true, info_only: true })?.info();
    image.refuse_to_write(&info, how.image.allow_write_to_parent)?;
    let onto = how.onto.as_ref().map(look).transpose()?;
    let locked = onto.as_ref().map_or_else(|| Ok(Vec::new()), |o| lock(o, &image, wait, raw))?;
    let steps = plan(&image, locked.first())?;
    if !how.only_name {
        if !info.snapshots.is_empty() {
            let what = "has internal snapshots, which show what is beneath it, and would show something else";
            let e = Error::new(ErrorKind::Unsupported, what).at(&spec.path);
            return Err(e.hint("convert them with --snapshot first, and delete them"));
        }
        let old = look(&how.image)?;
        let _old = lock_all(&specs(&old)[1..], wait, raw)?;
        copy(how, &old, onto.as_ref(), watch)?;
    }
    watch.stop_if_cancelled()?;
    // What will be seen through the image has to be durable, too.
    onto.iter().flat_map(|o| &o.images).try_for_each(OpenImage::sync)?;
    // The copy has changed the image: what is planned for it now is another plan.
    let steps = if how.only_name { steps } else { plan(&image, locked.first())? };
    change(&image, steps, watch)?;
    sync_dir(super::create::folder_of(&spec.path))
}

/// The images of an open disk, the top first.
fn specs(opened: &OpenedDisk) -> Vec<ImageSpec> {
    let spec = |i: &OpenImage| ImageSpec { path: i.path.clone(), format: Some(i.format) };
    opened.images.iter().map(spec).collect()
}

/// Opens a chain for looking: it is locked by other means.
fn look(how: &OpenDisk) -> Result<OpenedDisk> {
    open_disk(&OpenDisk {
        lock_wait: None,
        options: DiskOptions { read_only: true, ..DiskOptions::default() },
        ..how.clone()
    })
}

/// Locks images against changes; none of them carries the mark of a failed sync.
fn lock_all(specs: &[ImageSpec], wait: Duration, raw: bool) -> Result<Vec<ImageFiles>> {
    let open = |s: &ImageSpec| {
        let image = ImageFiles::open_with(&s.path, s.format, false, Some(wait), raw)?;
        image.refuse_after_failed_sync()?;
        Ok(image)
    };
    specs.iter().map(open).collect()
}

/// Locks the new parent and its parents against changes. What was opened before is what is locked now.
fn lock(onto: &OpenedDisk, image: &ImageFiles, wait: Duration, raw: bool) -> Result<Vec<ImageFiles>> {
    let own = image.files()[0].traits().identity;
    if onto.images.iter().any(|i| i.identities().contains(&own)) {
        let what = format!("stands on {} itself", image.files()[0].path().display());
        return Err(Error::new(ErrorKind::InvalidArgument, what).at(&onto.images[0].path));
    }
    let locked = lock_all(&specs(onto), wait, raw)?;
    let same = |(l, o): (&ImageFiles, &OpenImage)| {
        l.files().iter().map(|f| f.traits().identity).collect::<Vec<_>>() == o.identities()
    };
    if !locked.iter().zip(&onto.images).all(same) {
        let what = "was replaced while it was being locked";
        return Err(Error::new(ErrorKind::Locked, what).at(&onto.images[0].path).hint("try again"));
    }
    Ok(locked)
}

/// The steps that give the image its new parent.
fn plan(image: &ImageFiles, parent: Option<&ImageFiles>) -> Result<Vec<FileStep>> {
    let child = image.files()[0].path();
    let parent = parent.map(|p| described(child, p)).transpose()?;
    image.relink(parent.as_ref())
}

/// Writes to the image what it shows now where it would show something else over the new parent.
fn copy(how: &Rebase, old: &OpenedDisk, onto: Option<&OpenedDisk>, watch: &mut Watch<'_>) -> Result<()> {
    let chain = specs(old);
    let (spec, below) = chain.split_first().expect("the image itself");
    let path = &spec.path;
    let looked = DiskOptions { read_only: true, ..DiskOptions::default() };
    let now = over(how, spec, below, looked)?;
    let then = match onto {
        Some(onto) => over(how, spec, &specs(onto), looked)?,
        None => ImageFiles::open_with(path, spec.format, false, None, how.image.allow_raw_device)?.alone()?,
    };
    // What equals what is beneath is written too: that will not be beneath it any more.
    let written = DiskOptions { read_only: false, write_same: true, ..DiskOptions::default() };
    let target = over(how, spec, below, written)?;
    if let Some(range) = target.chain().top().map.unwritten() {
        let what = format!("takes no writes at {}, or forgets them", range.start());
        return Err(Error::new(ErrorKind::Unsupported, what).at(path));
    }
    target.chain().top().map.keep_content_id();
    let slots = DiffJob::slots();
    // The locks are on other descriptions than those that are written through here: see the merge.
    let target = open_channel_over(EngineKind::Threads, &target, slots)?;
    let mut job = DiffJob::writing(open_channel(&now, slots)?, open_channel(&then, slots)?, target)?;
    let done = watch.run(&mut job);
    let closed = job.close_target();
    done.and(closed).map_err(|e| e.at(path))
}

/// The image over these, the uppermost first; we hold the locks.
fn over(how: &Rebase, image: &ImageSpec, below: &[ImageSpec], options: DiskOptions) -> Result<Arc<Disk>> {
    let part = OpenDisk {
        image: image.clone(),
        parents: below.iter().rev().cloned().collect(),
        parent_dirs: Vec::new(),
        lock_wait: None,
        allow_write_to_parent: true,
        // It names the one, and is opened over the other too.
        allow_parent_mismatch: true,
        quiet: true,
        options,
        ..how.image.clone()
    };
    Ok(open_disk(&part)?.disk)
}
