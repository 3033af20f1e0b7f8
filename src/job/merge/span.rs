//! Which images of a chain a merge is about, and whether it may be.

use super::note::{Note, Spent};
use super::{Merge, refused};
use crate::error::{Error, ErrorKind, Result};
use crate::job::Selection;
use crate::map::ImageInfo;
use crate::vd::{ImageFiles, ImageSpec, OpenDisk, OpenedDisk, open_disk, other_child};
use std::collections::BTreeSet;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// A part of a chain. Images are counted from the top, 0.
pub(super) struct Span {
    pub(super) images: Vec<ImageSpec>,
    pub(super) from: usize,
    pub(super) into: usize,
    sizes: Vec<u64>,
    uuids: Vec<Option<Uuid>>,
    infos: Vec<ImageInfo>,
}

/// An image, and the parent it will name.
pub(super) struct Link {
    pub(super) child: usize,
    pub(super) parent: Option<usize>,
    /// Without it the chain would be another.
    pub(super) needed: bool,
}

/// All images of the chain, open under their locks.
pub(super) struct Locked {
    pub(super) images: Vec<ImageFiles>,
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

impl Span {
    /// Finds the chain, and the images in it.
    ///
    /// # Errors
    /// Of opening; where one of them is not of the chain.
    pub(super) fn find(how: &Merge) -> Result<Span> {
        let opened = open_disk(&OpenDisk { lock_wait: None, ..how.chain.clone() })?;
        let specs = |i: &crate::vd::OpenImage| ImageSpec { path: i.path.clone(), format: Some(i.format) };
        let images: Vec<_> = opened.images.iter().map(specs).collect();
        let place = |path: &Path| {
            let own = identity(path);
            if own.is_none() {
                return Err(Error::new(ErrorKind::NotFound, "no such file").at(path).hint("check the name"));
            }
            images.iter().position(|i| identity(&i.path) == own).ok_or_else(|| {
                let top = images[0].path.display();
                refused(format!("is no image of the chain of {top}")).at(path).hint(
                    "vdimg info lists a chain's images; name the one on top, and parents that are not found",
                )
            })
        };
        let from = how.from.as_deref().map_or(Ok(0), place)?;
        let into = how.into.as_deref().map_or(Ok(from + 1), place)?;
        if into >= images.len() {
            let e = refused("has no parent that it could be merged into").at(&images[from].path);
            return Err(e.hint("name an image above it with --into"));
        }
        if from == into {
            return Err(refused("cannot be merged into itself").at(&images[from].path));
        }
        Ok(Self::of(&opened, images, from, into))
    }

    fn of(opened: &OpenedDisk, images: Vec<ImageSpec>, from: usize, into: usize) -> Span {
        Span {
            images,
            from,
            into,
            sizes: opened.images.iter().map(crate::vd::OpenImage::size_bytes).collect(),
            uuids: opened.images.iter().map(crate::vd::OpenImage::uuid).collect(),
            infos: opened.images.iter().map(|i| i.info.clone()).collect(),
        }
    }

    /// The target lies beneath.
    pub(super) fn is_down(&self) -> bool {
        self.from < self.into
    }

    /// The images that are not needed any more.
    fn spent(&self) -> Range<usize> {
        if self.is_down() { self.from..self.into } else { self.into + 1..self.from + 1 }
    }

    /// The image whose disk is read, and what of it.
    pub(super) fn source(&self) -> (usize, Selection) {
        Selection::of_merge(self.from, self.into, self.images.len())
    }

    /// Which images name another parent afterwards, or the same one, which has changed.
    pub(super) fn links(&self, keep: bool) -> Vec<Link> {
        let link = |child, parent, needed| Link { child, parent, needed };
        let above = |n: usize| n.checked_sub(1);
        if self.is_down() {
            let child = above(self.from).map(|child| link(child, Some(self.into), true));
            let kept = keep.then(|| link(self.into - 1, Some(self.into), false));
            return child.into_iter().chain(kept).collect();
        }
        let parent = Some(self.from + 1).filter(|p| *p < self.images.len());
        let child = above(self.into).map(|child| link(child, Some(self.into), false));
        std::iter::once(link(self.into, parent, true)).chain(child).collect()
    }

    /// The size that the target needs, if it is another.
    ///
    /// # Errors
    /// Where that would show what nobody has seen so far.
    pub(super) fn new_size(&self) -> Result<Option<u64>> {
        let (from, into) = (self.sizes[self.from], self.sizes[self.into]);
        if !self.is_down() || from <= into {
            return Ok(None);
        }
        if let Some(parent) = self.sizes.get(self.into + 1).filter(|p| **p > into) {
            let what = format!("has {into} bytes and would need {from}, but its own parent has {parent}");
            return Err(Error::new(ErrorKind::Unsupported, what)
                .at(&self.images[self.into].path)
                .hint("merge into that parent, or vdimg convert the one on top"));
        }
        Ok(Some(from))
    }

    /// Locks all images of the chain: those that change or go against everybody else, the others against changes.
    ///
    /// # Errors
    /// Of locking; where the chain has become another meanwhile.
    pub(super) fn lock(&self, how: &Merge) -> Result<Locked> {
        let mut changed: BTreeSet<usize> = self.links(how.keep).iter().map(|l| l.child).collect();
        changed.insert(self.into);
        changed.extend(self.spent().filter(|_| !how.keep));
        let (wait, raw) = (Some(how.lock_wait()), how.chain.allow_raw_device);
        let open = |(n, spec): (usize, &ImageSpec)| {
            ImageFiles::open_with(&spec.path, spec.format, changed.contains(&n), wait, raw)
        };
        let images = self.images.iter().enumerate().map(open).collect::<Result<Vec<_>>>()?;
        let now = Span::find(how)?;
        let same = |(a, b): (&ImageSpec, &ImageSpec)| identity(&a.path) == identity(&b.path);
        if now.images.len() != self.images.len() || !now.images.iter().zip(&self.images).all(same) {
            let what = "its chain was changed while it was being locked";
            return Err(Error::new(ErrorKind::Locked, what).at(&self.images[0].path).hint("try again"));
        }
        Ok(Locked { images })
    }

    /// What would lose bytes, or another image its parent.
    ///
    /// # Errors
    /// The first such thing.
    pub(super) fn refuse_loss(&self, how: &Merge) -> Result<()> {
        self.new_size()?;
        if self.infos[self.into].format == "vhdx" {
            // Its children know it by the state of its contents, which changes with the first byte.
            let what = "merging into VHDX images is not supported";
            return Err(Error::new(ErrorKind::Unsupported, what)
                .at(&self.images[self.into].path)
                .hint("vdimg convert the image on top"));
        }
        let own: Vec<&Path> = self.images.iter().map(|i| i.path.as_path()).collect();
        let goes = self.spent().filter(|_| !how.keep);
        let changes = self.is_down().then_some(self.into);
        for n in goes.clone().chain(changes).filter(|_| !how.chain.allow_write_to_parent) {
            if let Some(child) = other_child(&self.images[n].path, self.uuids[n], &own) {
                let what = format!("is the parent of {} too, which would be lost", child.display());
                return Err(Error::new(ErrorKind::ReadOnly, what)
                    .at(&self.images[n].path)
                    .hint("name that image first if it is on top, or pass --allow-write-to-parent"));
            }
        }
        for n in goes {
            if !self.infos[n].snapshots.is_empty() {
                let what = "has internal snapshots, which would be lost with it";
                return Err(Error::new(ErrorKind::Unsupported, what)
                    .at(&self.images[n].path)
                    .hint("convert them with --snapshot first, or pass --keep"));
            }
        }
        if !self.is_down() && !self.infos[self.into].snapshots.is_empty() {
            let what = "has internal snapshots, which show what is beneath it, and would show something else";
            return Err(Error::new(ErrorKind::Unsupported, what)
                .at(&self.images[self.into].path)
                .hint("convert them with --snapshot first, and delete them"));
        }
        let above = self.from.checked_sub(1).filter(|_| self.is_down()).map_or(0, |n| self.sizes[n]);
        if above > self.sizes[self.from] && self.sizes[self.into] > self.sizes[self.from] {
            let what = format!(
                "is longer than {}, which is shorter than what it goes into: bytes that nothing shows so far would be seen",
                self.images[self.from].path.display()
            );
            return Err(Error::new(ErrorKind::Unsupported, what).at(&self.images[self.from - 1].path));
        }
        Ok(())
    }

    /// What is left to do once the bytes are durable.
    ///
    /// # Errors
    /// From the operating system.
    pub(super) fn note(&self, how: &Merge) -> Result<Note> {
        let full =
            |path: &Path| std::fs::canonicalize(path).map_err(|e| Error::io("find its folder", e).at(path));
        let name = |n: usize| -> Result<(PathBuf, String)> {
            let spec = &self.images[n];
            Ok((full(&spec.path)?, spec.format.expect("an open image's").name().to_string()))
        };
        let mut note = Note { into: self.images[self.into].path.clone(), ..Note::default() };
        for link in self.links(how.keep) {
            let (child, format) = name(link.child)?;
            let parent = link.parent.map(name).transpose()?;
            note.links.push(super::note::Link { child, format, parent, needed: link.needed });
        }
        for spec in &self.images[self.spent()] {
            note.spent.push(spec.path.clone());
            if how.keep {
                continue;
            }
            let raw = how.chain.allow_raw_device;
            let image = ImageFiles::open_with(&spec.path, spec.format, false, None, raw)?;
            for file in image.files().iter().filter(|f| !f.traits().is_device) {
                note.remove.push(Spent::of(&full(file.path())?)?);
            }
        }
        Ok(note)
    }
}
