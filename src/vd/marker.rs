//! A mark that outlives the process: a sync of this image has failed since the machine was started (rule O4).
//!
//! After a failed sync the kernel may have dropped what it could not write, and say so only once. A second process would
//! be told that all is well. So the mark is kept where it lives exactly as long as that kernel: in a folder that is emptied at
//! boot, with the boot's id inside.

use crate::error::{Error, ErrorKind, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The mark of one image.
#[derive(Clone, Debug)]
pub(super) struct SyncFailureMarker {
    name: String,
}

impl SyncFailureMarker {
    /// The mark of the file at `path`, with this device and inode number. The time it was made is in the name where the file
    /// system knows it: an inode's number is used again.
    pub(super) fn of(identity: (u64, u64), path: &Path) -> Self {
        let made = fs::metadata(path).and_then(|m| m.created()).ok();
        let made = made.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |t| t.as_nanos());
        SyncFailureMarker { name: format!("sync-failed-{:x}-{:x}-{made:x}", identity.0, identity.1) }
    }

    /// # Errors
    /// [`ErrorKind::SyncFailed`] if the mark is there.
    pub(super) fn refuse_if_set(&self) -> Result<()> {
        let Some(boot) = boot_id() else { return Ok(()) };
        for path in folders().map(|d| d.join(&self.name)) {
            if fs::read_to_string(&path).is_ok_and(|s| s.trim() == boot) {
                let what = "a sync of this image failed since the machine was started: what the disk holds is unknown";
                return Err(Error::new(ErrorKind::SyncFailed, what).hint(format!(
                    "check the disk, restart the machine, then run vdimg check; to go on regardless remove {}",
                    path.display()
                )));
            }
        }
        Ok(())
    }

    /// Leaves the mark where it can be left.
    pub(super) fn set(&self) {
        let boot = boot_id().unwrap_or_default();
        let left =
            folders().any(|d| fs::create_dir_all(&d).is_ok() && fs::write(d.join(&self.name), &boot).is_ok());
        if !left {
            tracing::error!(
                "cannot leave a mark of the failed sync under /run: do not open this image before a restart"
            );
        }
    }
}

/// Folders that do not outlive the boot: the system's, else the user's.
fn folders() -> impl Iterator<Item = PathBuf> {
    let user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    [Some(PathBuf::from("/run")), user].into_iter().flatten().map(|d| d.join("vdblk"))
}

fn boot_id() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|s| s.trim().to_string())
}
