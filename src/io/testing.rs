//! What the tests of several modules share.

use tempfile::TempDir;

/// A directory on the file system the program was built on: a real one, where /tmp may be in memory.
pub(crate) fn scratch_dir() -> TempDir {
    let exe = std::env::current_exe().expect("own path");
    tempfile::tempdir_in(exe.parent().expect("a directory")).expect("temporary directory")
}
