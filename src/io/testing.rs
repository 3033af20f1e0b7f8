//! What the tests of several modules share.

use tempfile::TempDir;

/// A directory on the file system the program was built on: a real one, where /tmp may be in memory.
pub(crate) fn scratch_dir() -> TempDir {
    let exe = std::env::current_exe().expect("own path");
    tempfile::tempdir_in(exe.parent().expect("a directory")).expect("temporary directory")
}

/// Random numbers that are the same for the same seed (splitmix64).
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// A number below `n`, which is not 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}
