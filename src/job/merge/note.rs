//! A note beside the image that is merged, for as long as parents get their names and files are removed: the same command finds
//! there what is left to do, also when its own image has gone already.

use super::refused;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{HostFile, ImageLock, LockMode, OpenHow, OsFile, sync_dir};
use crate::job::create::folder_of;
use crate::vd::ImageSpec;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longer notes are none.
const MAX_BYTES: u64 = 16 << 20;

/// What is left to do. Paths are absolute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Note {
    /// The image that has taken the others in, as it was named.
    pub(super) into: PathBuf,
    /// The others, as they were found.
    pub(super) spent: Vec<PathBuf>,
    pub(super) links: Vec<Link>,
    pub(super) remove: Vec<Spent>,
}

/// An image, and the parent it shall name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Link {
    pub(super) child: PathBuf,
    pub(super) format: String,
    pub(super) parent: Option<(PathBuf, String)>,
    pub(super) needed: bool,
}

/// A file that goes, as it was when its bytes were somewhere else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Spent {
    pub(super) path: PathBuf,
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

fn spec(path: &Path, format: &str) -> Result<ImageSpec> {
    Ok(ImageSpec { path: path.to_path_buf(), format: Some(format.parse()?) })
}

impl Link {
    pub(super) fn child(&self) -> Result<ImageSpec> {
        spec(&self.child, &self.format)
    }

    pub(super) fn parent(&self) -> Result<Option<ImageSpec>> {
        self.parent.as_ref().map(|(path, format)| spec(path, format)).transpose()
    }
}

impl Spent {
    /// The file as it is now.
    ///
    /// # Errors
    /// From the operating system.
    pub(super) fn of(path: &Path) -> Result<Spent> {
        let meta = fs::symlink_metadata(path).map_err(|e| Error::io("look at it", e).at(path))?;
        let changed = (meta.mtime(), meta.mtime_nsec());
        Ok(Spent { path: path.to_path_buf(), inode: meta.ino(), bytes: meta.len(), changed })
    }

    /// It is what it was, or gone.
    fn is_unchanged(&self) -> bool {
        match Spent::of(&self.path) {
            Ok(now) => now == *self,
            Err(e) => e.kind() == ErrorKind::NotFound,
        }
    }

    /// Removes the file, if nobody uses it and it is what it was.
    ///
    /// # Errors
    /// From the operating system; if somebody has it locked, or has written to it.
    pub(super) fn remove(&self, wait: Duration) -> Result<()> {
        let file = match OsFile::open(&self.path, OpenHow { write: true, ..OpenHow::default() }) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        let _lock = ImageLock::take(&file, LockMode::Exclusive, wait)?;
        if !self.is_unchanged() {
            let what = "was written to since it was merged, and stays";
            return Err(Error::new(ErrorKind::Locked, what).at(&self.path).hint("merge it again"));
        }
        fs::remove_file(file.path()).map_err(|e| Error::io("remove it", e).at(&self.path))
    }
}

impl Note {
    fn path(from: &Path) -> PathBuf {
        let mut name = from.file_name().unwrap_or_default().to_os_string();
        name.push(".vdimg-merge");
        folder_of(from).join(name)
    }

    /// Leaves it beside `from`, durable.
    ///
    /// # Errors
    /// From the operating system; for names that cannot be written down.
    pub(super) fn write(&self, from: &Path) -> Result<()> {
        let path = Self::path(from);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|_| refused("a file's name is not UTF-8: it cannot be noted for a restart").at(from))?;
        let write = || -> std::io::Result<()> {
            let how = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            let mut file = how?;
            file.write_all(&text)?;
            file.sync_all()
        };
        write().map_err(|e| Error::io("write it", e).at(&path))?;
        sync_dir(folder_of(&path))
    }

    /// The note an interrupted merge of `from` has left. One that is not whole, of files that are others by now, or by
    /// somebody else, is none: nothing but what we have written ourselves decides what is removed.
    ///
    /// # Errors
    /// From the operating system.
    pub(super) fn left_by(from: &Path) -> Result<Option<Note>> {
        let path = Self::path(from);
        let opened =
            fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
        let mut file = match opened {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|e| Error::io("open it", e).at(&path))?,
        };
        let meta = file.metadata().map_err(|e| Error::io("look at it", e).at(&path))?;
        if !meta.is_file() || meta.uid() != own_user()? || meta.mode() & 0o022 != 0 || meta.len() > MAX_BYTES
        {
            let what = "is no note of a merge by this user";
            return Err(Error::new(ErrorKind::PermissionDenied, what).at(&path).hint("remove it"));
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(|e| Error::io("read it", e).at(&path))?;
        let note = serde_json::from_slice::<Note>(&text).ok();
        let Some(note) = note.filter(|n| n.remove.iter().all(Spent::is_unchanged)) else {
            tracing::warn!(
                "{}: of an interrupted merge, and not valid any more: it begins anew",
                path.display()
            );
            Self::remove(from)?;
            return Ok(None);
        };
        Ok(Some(note))
    }

    /// It has served.
    ///
    /// # Errors
    /// From the operating system.
    pub(super) fn remove(from: &Path) -> Result<()> {
        let path = Self::path(from);
        match fs::remove_file(&path) {
            // somebody else was faster
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove it", e).at(&path));
            }
            _ => {}
        }
        sync_dir(folder_of(&path))
    }
}

/// Whose files we make: the owner of our own entry in /proc.
fn own_user() -> Result<u32> {
    fs::metadata("/proc/self").map(|m| m.uid()).map_err(|e| Error::io("find out who we are", e))
}
