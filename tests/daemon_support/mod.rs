//! What the tests of the daemon share: the program itself with a deadline on everything it does, images, and a guest.
#![allow(dead_code, missing_docs, unreachable_pub)] // each test program uses its part

pub mod client;
#[path = "../common/guest.rs"]
pub mod guest;
pub mod images;
pub mod mounts;
pub mod process;
pub mod vubench;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than anything here may take on a busy machine; a test that reaches it has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A folder on the file system the program was built on: a real one, where /tmp may be in memory.
pub fn scratch() -> TempDir {
    let exe = std::env::current_exe().expect("own path");
    tempfile::tempdir_in(exe.parent().expect("a folder")).expect("temporary folder")
}

/// Waits until `is_so`; false if it does not come about in time.
pub fn comes_true(mut is_so: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        if is_so() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    is_so()
}

/// Whether a foreign program can be run; says so if not.
pub fn has(program: &str) -> bool {
    let mut c = Command::new(program);
    c.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let here = c.status().is_ok();
    if !here {
        println!("skipped: {program} is not installed");
    }
    here
}

pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}
