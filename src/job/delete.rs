//! Removing an image with all of its files.

use super::create::folder_of;
use super::merge::remove::reason;
use crate::error::{Error, Result};
use crate::io::sync_dir;
use crate::vd::{ImageFiles, ImageSpec};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Removes an image that nobody uses, its own file first; durable when this returns. Files that may be somebody else's stay: devices, links,
/// parts that are only read or that are images of their own.
///
/// # Errors
/// Of opening and locking it, before anything is removed; from the operating system.
pub fn delete_image(spec: &ImageSpec, lock_wait: Duration) -> Result<()> {
    let image = ImageFiles::open_with(&spec.path, spec.format, true, Some(lock_wait), true)?;
    let mut goes: Vec<PathBuf> = Vec::new();
    for (n, file) in image.files().iter().enumerate() {
        match reason(&image, n, &**file) {
            Some(why) => tracing::warn!("{}: stays where it is: {why}", file.path().display()),
            None => goes.push(file.path().to_path_buf()),
        }
    }
    for path in &goes {
        fs::remove_file(path).map_err(|e| Error::io("remove it", e).at(path))?;
    }
    sync_dir(folder_of(&spec.path))
}
