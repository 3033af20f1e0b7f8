//! The container over files of the operating system.

mod capabilities;
mod filters;
mod jobs;
mod later;
mod lives;
mod open_flags;
mod scenarios;

use super::*;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A folder that goes away.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The names of its files.
    fn files(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.0.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn hard_disk() -> Container {
    Container::new(DeviceType::HardDisk)
}

/// A container with a new base.
fn with_base(folder: &Folder, backend: &str, name: &str, size: u64) -> Container {
    let mut c = hard_disk();
    c.create_base(backend, &folder.path(name), size, &CreateBase::default(), OpenFlags::NONE).unwrap();
    c
}

fn diff(c: &mut Container, backend: &str, path: &Path) {
    c.create_diff(backend, path, &CreateBase::default(), OpenFlags::NONE).unwrap();
}

fn bytes(c: &Container, off: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    c.read(off, &mut buf).unwrap();
    buf
}

fn open(path: &Path, backend: &str, flags: OpenFlags) -> Container {
    let mut c = hard_disk();
    c.open(backend, path, flags).unwrap();
    c
}

/// Blocks that an image has places for.
fn allocated(c: &Container, image: u32) -> u64 {
    c.info(image).unwrap().allocated_blocks.unwrap()
}

/// Bytes that no two places have alike.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = crate::sim::Rng(seed);
    (0..len.div_ceil(8)).flat_map(|_| rng.draw().to_le_bytes()).take(len).collect()
}

/// Nobody watches.
macro_rules! unwatched {
    () => {
        &mut crate::job::Watch { cancelled: &|| false, progress: &mut |_| () }
    };
}
use unwatched;

fn status<T: std::fmt::Debug>(r: Result<T>) -> Status {
    let e = r.unwrap_err();
    e.status().unwrap_or_else(|| panic!("{e:?} has no code"))
}
