//! Which images of a chain a merge is about, and whether it may be.

use super::{Merge, refused};
use crate::error::{Error, ErrorKind, Result};
use crate::job::Selection;
use crate::map::ImageInfo;
use crate::vd::{ImageSpec, OpenDisk, OpenImage, OpenedDisk, open_disk};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use uuid::Uuid;

/// A part of a chain. Images are counted from the top, 0.
pub(super) struct Span {
    pub(super) images: Vec<ImageSpec>,
    pub(super) from: usize,
    pub(super) into: usize,
    pub(super) sizes: Vec<u64>,
    /// What a child may say.
    pub(super) uuids: Vec<Option<Uuid>>,
    pub(super) infos: Vec<ImageInfo>,
    /// Which files each consists of: device and inode.
    pub(super) files: Vec<Vec<(u64, u64)>>,
}

/// An image, and the parent it will name.
pub(super) struct Link {
    pub(super) child: usize,
    pub(super) parent: Option<usize>,
    /// Without it the chain would be another.
    pub(super) needed: bool,
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
        let specs = |i: &OpenImage| ImageSpec { path: i.path.clone(), format: Some(i.format) };
        let images: Vec<_> = opened.images.iter().map(specs).collect();
        let top = images[0].path.display();
        let place = |path: &Path| match identity(path) {
            None => Err(Error::new(ErrorKind::NotFound, "no such file").at(path).hint("check the name")),
            own => Ok(images.iter().position(|i| identity(&i.path) == own)),
        };
        let stranger = |path: &Path| refused(format!("is no image of the chain of {top}")).at(path);
        let from = match how.from.as_deref().map_or(Ok(Some(0)), place)? {
            Some(from) => from,
            None => {
                // It is said that the chain stands without it: that has to be durable.
                opened.images.iter().try_for_each(OpenImage::sync)?;
                let hint = format!(
                    "if a merge of it was interrupted, that is complete, and this file is not needed any more; vdimg info {top} lists the chain"
                );
                return Err(stranger(how.from.as_deref().unwrap_or(&images[0].path)).hint(hint));
            }
        };
        let into = match how.into.as_deref() {
            None => from + 1,
            Some(path) => place(path)?.ok_or_else(|| {
                stranger(path).hint(format!("name the one on top, and an image that vdimg info {top} lists"))
            })?,
        };
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
            sizes: opened.images.iter().map(OpenImage::size_bytes).collect(),
            uuids: opened.images.iter().map(OpenImage::uuid).collect(),
            infos: opened.images.iter().map(|i| i.info.clone()).collect(),
            files: opened.images.iter().map(OpenImage::identities).collect(),
        }
    }

    /// The target lies beneath.
    pub(super) fn is_down(&self) -> bool {
        self.from < self.into
    }

    /// The images that are not needed any more.
    pub(super) fn spent(&self) -> Range<usize> {
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
}
