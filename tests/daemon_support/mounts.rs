//! Small file systems and broken disks, for root alone; gone with the value.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn quietly(program: &str, args: &[&str], path: &[&Path]) -> Option<String> {
    let mut c = Command::new(program);
    c.args(args).args(path).stdin(Stdio::null()).stderr(Stdio::null());
    let out = c.output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&out.stdout).trim().to_string())
}

/// A mounted file system.
pub struct Mount {
    pub at: PathBuf,
}

impl Mount {
    /// An ext4 of `mib` MiB in a file, else a tmpfs; `None`, with a word why, where neither can be had.
    pub fn small(dir: &Path, mib: u64) -> Option<Mount> {
        let at = dir.join("mount");
        std::fs::create_dir(&at).expect("a folder");
        let file = dir.join("ext4.img");
        std::fs::File::create(&file).and_then(|f| f.set_len(mib << 20)).expect("a file");
        let made = quietly("mkfs.ext4", &["-q", "-m", "0", "-O", "^has_journal"], &[&file]).is_some()
            && quietly("mount", &["-o", "loop"], &[&file, &at]).is_some();
        if made || Self::mount_tmpfs(&at, mib) {
            return Some(Mount { at });
        }
        println!("skipped: no small file system can be mounted here");
        None
    }

    /// A file system in memory of `mib` MiB.
    pub fn in_memory(dir: &Path, mib: u64) -> Option<Mount> {
        let at = dir.join("memory");
        std::fs::create_dir(&at).expect("a folder");
        if Self::mount_tmpfs(&at, mib) {
            return Some(Mount { at });
        }
        println!("skipped: no file system in memory can be mounted here");
        None
    }

    fn mount_tmpfs(at: &Path, mib: u64) -> bool {
        let size = format!("size={mib}m");
        quietly("mount", &["-t", "tmpfs", "-o", &size, "vdblk-test"], &[at]).is_some()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = quietly("umount", &["-l"], &[&self.at]);
    }
}

/// A block device over a file.
pub struct Loop {
    pub device: PathBuf,
}

impl Loop {
    pub fn over(file: &Path) -> Option<Loop> {
        let device = quietly("losetup", &["-f", "--show"], &[file]);
        if device.is_none() {
            println!("skipped: no loop device can be had here");
        }
        device.map(|d| Loop { device: d.into() })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = quietly("losetup", &["-d"], &[&self.device]);
    }
}
