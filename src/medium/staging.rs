//! A folder of our own beside a file that is to be: filled in peace, and then published at once.
//!
//! Its name is random, so whatever lies in it is ours: a half-made image can be thrown away without a doubt. Publishing makes hard
//! links, which replace nothing, the main file last; that one decides whether it was published.

use crate::error::{Error, ErrorKind, Result};
use crate::io::sync_dir;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;

#[derive(Debug)]
pub(super) struct Staging {
    dir: PathBuf,
    target: PathBuf,
}

impl Staging {
    /// For a file that shall be at `target`. Nothing is made yet.
    pub(super) fn planned(target: &Path) -> Staging {
        let dir = folder_of(target).join(format!(".vdblk-{}", Uuid::new_v4()));
        Staging { dir, target: target.to_path_buf() }
    }

    /// One that was planned before.
    pub(super) fn again(dir: &Path, target: &Path) -> Staging {
        Staging { dir: dir.to_path_buf(), target: target.to_path_buf() }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Makes the folder, and the one the target is in if it is missing.
    pub(super) fn begin(&self) -> Result<()> {
        let failed = |e| Error::io("make a folder beside it", e).at(&self.target);
        fs::create_dir_all(folder_of(&self.target)).map_err(failed)?;
        DirBuilder::new().mode(0o700).create(&self.dir).map_err(failed)
    }

    /// Where the main file is made.
    pub(super) fn main(&self) -> PathBuf {
        self.dir.join(self.target.file_name().unwrap_or_default())
    }

    /// Puts all files where they shall be; none of them may be there. Durable when it returns.
    pub(super) fn publish(&self) -> Result<()> {
        let main = self.target.file_name().unwrap_or_default().to_os_string();
        let mut names: Vec<_> = self.names()?.into_iter().filter(|n| *n != main).collect();
        names.push(main);
        sync_dir(&self.dir)?;
        for name in &names {
            if let Err(e) = link(&self.dir.join(name), &self.at(name)) {
                self.take_back();
                let e = Error::io("put it in its place", e).at(&self.at(name));
                let exists = e.kind() == ErrorKind::Exists;
                return Err(if exists { e.hint("nothing is overwritten: choose another name") } else { e });
            }
        }
        sync_dir(folder_of(&self.target))
    }

    /// Puts the main file in the place of the one that is there, at once. Durable when it returns.
    pub(super) fn replace(&self) -> Result<()> {
        let failed = |e| Error::io("replace it", e).at(&self.target);
        fs::rename(self.main(), &self.target).map_err(failed)?;
        sync_dir(folder_of(&self.target))
    }

    /// It was published: the main file is in its place, and it is ours.
    pub(super) fn is_published(&self) -> bool {
        let target = identity(&self.target);
        match identity(&self.main()) {
            Some(own) => target == Some(own),
            // Where there are no hard links it was moved.
            None => target.is_some() && self.dir.is_dir(),
        }
    }

    /// Removes what was published of it.
    pub(super) fn take_back(&self) {
        for name in self.names().unwrap_or_default() {
            let published = self.at(&name);
            if identity(&published).is_some_and(|p| Some(p) == identity(&self.dir.join(&name))) {
                let _ = fs::remove_file(published);
            }
        }
    }

    /// Removes the folder with all that is in it; what was published stays.
    pub(super) fn clear(&self) -> Result<()> {
        clear(&self.dir)
    }

    fn names(&self) -> Result<Vec<OsString>> {
        let failed = |e| Error::io("list it", e).at(&self.dir);
        let entries = fs::read_dir(&self.dir).map_err(failed)?;
        entries.map(|e| e.map(|e| e.file_name()).map_err(failed)).collect()
    }

    fn at(&self, name: &OsString) -> PathBuf {
        folder_of(&self.target).join(name)
    }
}

/// Removes such a folder. Nothing else is ever removed so.
pub(super) fn clear(dir: &Path) -> Result<()> {
    let ours = dir.file_name().is_some_and(|n| n.to_string_lossy().starts_with(".vdblk-"));
    if !ours {
        return Ok(());
    }
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove it", e).at(dir)),
        _ => Ok(()),
    }
}

/// A second name for a file where that is possible; else it is moved, if nothing is there.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP | libc::EMLINK)) => {
            if fs::symlink_metadata(to).is_ok() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            fs::rename(from, to)
        }
        done => done,
    }
}

/// Device and inode of what is at a path.
pub(super) fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_appear_together_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("new/a.vmdk");
        let s = Staging::planned(&target);
        s.begin().unwrap();
        fs::write(s.main(), "main").unwrap();
        fs::write(s.dir().join("a-s001.vmdk"), "part").unwrap();
        assert!(!s.is_published());
        s.publish().unwrap();
        assert!(s.is_published());
        s.clear().unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "main");
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 2);

        let second = Staging::planned(&target);
        second.begin().unwrap();
        fs::write(second.main(), "other").unwrap();
        fs::write(second.dir().join("b-s001.vmdk"), "part").unwrap();
        assert_eq!(second.publish().unwrap_err().kind(), ErrorKind::Exists);
        assert!(!second.is_published());
        second.clear().unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "main");
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 2, "its part was taken back");
    }

    #[test]
    fn only_folders_of_ours_are_cleared() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x"), "x").unwrap();
        clear(dir.path()).unwrap();
        assert!(dir.path().join("x").exists());
    }
}
