//! Moving an image: all its files, and what other images call it.

use super::create::folder_of;
use super::merge::{described, named_from};
use super::{LANE_BYTES, Progress, Watch, change};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{NewParent, OpenHow, extension_format};
use crate::io::{HostFile, sync_dir};
use crate::map::{FileId, ImageInfo};
use crate::vd::{DiskOptions, ImageFiles, OpenDisk, Sought, any_other_child, open_disk, stand_in};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A move of an image.
#[derive(Clone, Debug)]
pub struct MoveImage {
    /// The image, and where its parents are. Of the options the locks matter.
    pub image: OpenDisk,
    /// Its new name, or a folder that it goes to.
    pub target: PathBuf,
}

/// Moves an image: its own file and, into another folder, the files it consists of, which keep their names. Images in its folder that
/// name it as their parent, and it itself if it names one, are told. The new names exist, durable, before the old ones go: stopped in
/// any way the image is at the old place, at the new one, or at both; the same call completes it, unless the new place is on another
/// file system: then there are two equal images, of which either may go. After an error before the old names go, nothing of the new
/// ones is left. Returns where it is now.
///
/// # Errors
/// [`ErrorKind::Exists`] where something is at the new place; [`ErrorKind::InvalidArgument`] for an extension of another format;
/// [`ErrorKind::Unsupported`] for devices, links, files that may belong to others, and children that cannot be told: all before
/// anything is written; of opening, locking, reading and writing; [`ErrorKind::Cancelled`].
pub fn move_image(how: &MoveImage, watch: &mut Watch<'_>) -> Result<PathBuf> {
    let (spec, wait) = (&how.image.image, how.image.lock_wait.unwrap_or(Duration::ZERO));
    let image = ImageFiles::open(&spec.path, spec.format, true, Some(wait))?;
    let moving = Moving::new(how, image)?;
    let children = moving.children(wait)?;
    moving.refuse_unspeakable(&children)?;
    let mut made = Made(Vec::new());
    moving.make(&mut made, watch)?;
    if let Err(e) = moving.tell(&children, &moving.target, watch) {
        // What was told is taken back as far as it can be; the old names were there all the time.
        let _ = moving.tell(&children, &moving.old, watch);
        return Err(e);
    }
    made.0.clear();
    moving.warn_of_uuids(&children)?;
    moving.remove_old()?;
    Ok(moving.target)
}

/// An image on its way.
struct Moving {
    image: ImageFiles,
    info: ImageInfo,
    old: PathBuf,
    target: PathBuf,
    /// Each file that moves by its number, its old and its new name; the image's own last.
    names: Vec<(usize, PathBuf, PathBuf)>,
    /// It goes to another folder.
    elsewhere: bool,
    /// Its parent, if it moves to another folder and names one.
    parent: Option<ImageFiles>,
}

/// Files that go away again unless they are kept.
struct Made(Vec<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        self.0.iter().for_each(|p| drop(fs::remove_file(p)));
    }
}

fn unsupported(what: impl Into<String>, path: &Path) -> Error {
    Error::new(ErrorKind::Unsupported, what).at(path)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

impl Moving {
    fn new(how: &MoveImage, image: ImageFiles) -> Result<Self> {
        let old = how.image.image.path.clone();
        let name = old.file_name().ok_or_else(|| unsupported("has no name", &old))?;
        let target = if how.target.is_dir() { how.target.join(name) } else { how.target.clone() };
        if extension_format(&target).is_some_and(|f| f != image.format()) {
            let what = format!("its extension is not one of {}", image.format());
            return Err(Error::new(ErrorKind::InvalidArgument, what).at(&target));
        }
        let canonical = |p: &Path| {
            fs::canonicalize(folder_of(p)).map_err(|e| Error::io("find its folder", e).at(folder_of(p)))
        };
        let elsewhere = canonical(&old)? != canonical(&target)?;
        if !elsewhere && target.file_name() == old.file_name() {
            return Err(Error::new(ErrorKind::InvalidArgument, "is there already").at(&target));
        }
        let mut names = Vec::new();
        for (n, file) in image.files().iter().enumerate().rev() {
            let path = file.path().to_path_buf();
            if file.traits().is_device || !fs::symlink_metadata(&path).is_ok_and(|m| m.is_file()) {
                return Err(unsupported("is a device or a link, and is not moved", &path));
            }
            if n == 0 {
                names.push((n, path, target.clone()));
            } else if elsewhere {
                if canonical(&path)? != canonical(&old)? || !file.traits().writable {
                    let what = "belongs to the image, and may belong to others too: it is not moved";
                    return Err(unsupported(what, &path));
                }
                let own = path.file_name().expect("a file's name");
                names.push((n, path.clone(), folder_of(&target).join(own)));
            }
        }
        for (_, from, to) in &names {
            if identity(to).is_some_and(|there| Some(there) != identity(from)) {
                return Err(Error::new(ErrorKind::Exists, "something is there already").at(to));
            }
        }
        let info = image.map(FileId(0), OpenHow { read_only: true, info_only: true })?.info();
        let parent = if elsewhere && !info.parent_names.is_empty() { Self::parent(how)? } else { None };
        Ok(Moving { image, info, old, target, names, elsewhere, parent })
    }

    fn parent(how: &MoveImage) -> Result<Option<ImageFiles>> {
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        let opened = open_disk(&OpenDisk { lock_wait: None, options, ..how.image.clone() })?;
        let Some(parent) = opened.images.get(1) else { return Ok(None) };
        ImageFiles::open(&parent.path, Some(parent.format), false, None).map(Some)
    }

    /// Images in the folder that have this one as their parent, locked.
    fn children(&self, wait: Duration) -> Result<Vec<ImageFiles>> {
        let named = self.info.uuid.or_else(|| stand_in(&self.old));
        let sought = [Sought { path: &self.old, own: self.info.uuid, named }];
        let mut found: Vec<PathBuf> = Vec::new();
        loop {
            let but: Vec<&Path> = found.iter().map(PathBuf::as_path).chain([self.old.as_path()]).collect();
            let Some((_, child)) = any_other_child(&sought, &but) else { break };
            found.push(child);
        }
        found.iter().map(|p| ImageFiles::open(p, None, true, Some(wait))).collect()
    }

    /// A child, or the image itself, that could not be told where its parent is now.
    fn refuse_unspeakable(&self, children: &[ImageFiles]) -> Result<()> {
        for child in children {
            child.relink(Some(&self.as_parent(child, &self.image, &self.target)?))?;
        }
        if let Some(parent) = &self.parent {
            self.image.relink(Some(&described(&self.target, parent)?))?;
        }
        Ok(())
    }

    /// The image at one of its places in the words of a child.
    fn as_parent(&self, child: &ImageFiles, image: &ImageFiles, at: &Path) -> Result<NewParent> {
        let words = described(child.files()[0].path(), image)?;
        Ok(NewParent { path: named_from(child.files()[0].path(), at), ..words })
    }

    /// Makes the new names, durable.
    fn make(&self, made: &mut Made, watch: &mut Watch<'_>) -> Result<()> {
        for (n, _, to) in &self.names {
            if identity(to).is_some() {
                continue;
            }
            link_or_copy(&*self.image.files()[*n], to, watch)?;
            made.0.push(to.clone());
        }
        sync_dir(folder_of(&self.target))
    }

    /// Tells children, and the image itself, that it is at `at`.
    fn tell(&self, children: &[ImageFiles], at: &Path, watch: &mut Watch<'_>) -> Result<()> {
        // Under our lock, or a copy that nobody knows yet.
        let there = ImageFiles::open(at, Some(self.image.format()), true, None)?;
        if let Some(parent) = &self.parent {
            change(&there, there.relink(Some(&described(at, parent)?))?, watch)?;
        }
        for child in children {
            let steps = child.relink(Some(&self.as_parent(child, &there, at)?))?;
            change(child, steps, watch)?;
        }
        Ok(())
    }

    /// Children that know their parent by its UUID alone do not find it in another folder.
    fn warn_of_uuids(&self, children: &[ImageFiles]) -> Result<()> {
        for child in children.iter().filter(|_| self.elsewhere) {
            let info = child.map(FileId(0), OpenHow { read_only: true, info_only: true })?.info();
            if info.parent_names.is_empty() {
                let (child, target) = (child.files()[0].path().display(), self.target.display());
                tracing::warn!(
                    "{child}: has no word for where its parent is: name it with --parent {target}"
                );
            }
        }
        Ok(())
    }

    /// The old names go, the image's own first: what is left then is no image any more.
    fn remove_old(&self) -> Result<()> {
        for (_, from, to) in self.names.iter().rev() {
            let remove =
                |e| Error::io("remove it", e).at(from).hint(format!("it is at {} now", to.display()));
            fs::remove_file(from).map_err(remove)?;
        }
        sync_dir(folder_of(&self.old))
    }
}

/// Another name for a file, or where that cannot be, on another file system, a copy of it.
pub(crate) fn link_or_copy(file: &dyn HostFile, to: &Path, watch: &mut Watch<'_>) -> Result<()> {
    watch.stop_if_cancelled()?;
    if fs::hard_link(file.path(), to).is_ok() { Ok(()) } else { copy(file, to, watch) }
}

/// A copy of a file under another name, complete and durable when that name appears.
fn copy(file: &dyn HostFile, to: &Path, watch: &mut Watch<'_>) -> Result<()> {
    let name = to.file_name().expect("a file's name").to_string_lossy().into_owned();
    let unfinished = to.with_file_name(format!(".{name}.moving"));
    let failed = |tried: &str, e| Error::io(tried, e).at(&unfinished);
    let new = File::create_new(&unfinished).map_err(|e| failed("make it", e))?;
    let _made = Made(vec![unfinished.clone()]);
    let len = file.len().map_err(|e| Error::io("find out its length", e).at(file.path()))?;
    new.set_len(len).map_err(|e| failed("set its length", e))?;
    let mut piece = vec![0; usize::try_from(LANE_BYTES).expect("a lane fits memory")];
    let mut at = 0;
    let next = |at| file.next_data(at).map_err(|e| Error::io("look for its data", e).at(file.path()));
    while let Some(from) = next(at)?.filter(|from| *from < len) {
        watch.stop_if_cancelled()?;
        let end = file.next_hole(from).map_err(|e| Error::io("look for its holes", e).at(file.path()))?;
        let n = end.min(len).saturating_sub(from).clamp(1, LANE_BYTES);
        let part = &mut piece[..usize::try_from(n).expect("inside a lane")];
        let got = file.read_at(from, part).map_err(|e| Error::io("read it", e).at(file.path()))?;
        if got == 0 {
            break;
        }
        new.write_all_at(&part[..got], from).map_err(|e| failed("write it", e))?;
        at = from + got as u64;
        (watch.progress)(Progress { done: at, total: len.max(1) });
    }
    let mode = fs::metadata(file.path()).map(|m| m.permissions());
    mode.and_then(|m| new.set_permissions(m)).map_err(|e| failed("set its permissions", e))?;
    new.sync_all().map_err(|e| failed("make it durable", e))?;
    let named = match fs::hard_link(&unfinished, to) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => fs::rename(&unfinished, to),
        done => done,
    };
    named.map_err(|e| Error::io("give it its name", e).at(to))
}
