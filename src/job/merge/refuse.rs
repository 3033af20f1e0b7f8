//! What a merge would lose, or spoil for others: told before anything is written.

use super::Merge;
use super::span::Span;
use crate::error::{Error, ErrorKind, Result};
use crate::map::DeviceType;
use crate::vd::{Sought, any_other_child};
use std::path::Path;

impl Span {
    /// What would lose bytes, or another image its parent.
    ///
    /// # Errors
    /// The first such thing.
    pub(super) fn refuse_loss(&self, how: &Merge) -> Result<()> {
        self.new_size()?;
        let unsupported = |n: usize, what: &str, hint: &str| {
            Err(Error::new(ErrorKind::Unsupported, what).at(&self.images[n].path).hint(hint))
        };
        let target = &self.infos[self.into];
        if target.format == "vhdx" {
            // Its children know it by the state of its contents, which changes with the first byte.
            let what = "merging into VHDX images is not supported";
            return unsupported(self.into, what, "vdimg convert the image on top");
        }
        if target.device == DeviceType::Dvd {
            return unsupported(
                self.into,
                "is an optical medium, and only read",
                "vdimg convert the image on top",
            );
        }
        self.refuse_other_children(how, self.at_stake(how.keep))?;
        self.refuse_snapshots(how.keep)?;
        self.refuse_uncovering()
    }

    /// Images that show something else afterwards, or are gone. The target of a merge downwards shows in those above it, up to
    /// the one that hides it.
    fn at_stake(&self, keep: bool) -> Vec<usize> {
        let changes = if self.is_down() { self.from + 1..self.into + 1 } else { 0..0 };
        let goes = if keep { 0..0 } else { self.spent() };
        (0..self.images.len()).filter(|n| changes.contains(n) || goes.contains(n)).collect()
    }

    /// Other images over some of these.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`].
    pub(super) fn refuse_other_children(&self, how: &Merge, of: Vec<usize>) -> Result<()> {
        if how.chain.allow_write_to_parent {
            return Ok(());
        }
        let own: Vec<&Path> = self.images.iter().map(|i| i.path.as_path()).collect();
        let sought = |n: &usize| Sought {
            path: &self.images[*n].path,
            own: self.infos[*n].uuid,
            named: self.uuids[*n],
        };
        let sought: Vec<_> = of.iter().map(sought).collect();
        let Some((parent, child)) = any_other_child(&sought, &own) else { return Ok(()) };
        let what = format!("is the parent of {} too, which would be lost", child.display());
        Err(Error::new(ErrorKind::ReadOnly, what)
            .at(parent)
            .hint("name that image first if it is on top, or pass --allow-write-to-parent"))
    }

    /// Internal snapshots go with their image, and show what is beneath it.
    fn refuse_snapshots(&self, keep: bool) -> Result<()> {
        let goes = if keep && !self.is_down() { 0..0 } else { self.spent() };
        let (what, hint) = if self.is_down() {
            let what = "has internal snapshots, which would be lost with it, or show something else";
            (what, "convert them with --snapshot first, and delete them")
        } else {
            let what = "has internal snapshots, which would be lost with it";
            (what, "convert them with --snapshot first, or pass --keep")
        };
        let mut cases: Vec<_> = goes.map(|n| (n, what, hint)).collect();
        if !self.is_down() {
            let what = "has internal snapshots, which show what is beneath it, and would show something else";
            cases.push((self.into, what, "convert them with --snapshot first, and delete them"));
        }
        match cases.into_iter().find(|(n, ..)| !self.infos[*n].snapshots.is_empty()) {
            None => Ok(()),
            Some((n, what, hint)) => {
                Err(Error::new(ErrorKind::Unsupported, what).at(&self.images[n].path).hint(hint))
            }
        }
    }

    /// A target that is longer than what hides it from an image that is longer too.
    fn refuse_uncovering(&self) -> Result<()> {
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
}
