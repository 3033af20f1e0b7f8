//! No room for the image to grow: the guest's writes fail, and nothing else does. What was acknowledged stays, the daemon
//! goes on and takes writes again when there is room, and the image is good afterwards.

mod daemon_support;

use daemon_support::client::{Guest, IOERR, OK, pattern};
use daemon_support::images::{
    MIB, assert_checked_by_qemu, assert_dense, contents, diff, first_difference, raw, vdi,
};
use daemon_support::mounts::Mount;
use daemon_support::process::{Daemon, run, vdblk, vdblk_by_shell};
use daemon_support::scratch;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

const DISK: u64 = 64 * MIB;
const ROOM_MIB: u64 = 24;
/// Removed in the middle of a test.
const BALLAST: usize = 6 << 20;
/// Bytes of each of the writes: more than one block of a VDI every few of them.
const STEP: u64 = 256 << 10;
const ENGINES: [&str; 2] = ["io_uring", "threads"];

/// What the disk must hold, as far as the guest was told that it does.
struct Expected {
    bytes: Vec<u8>,
    /// Writes that failed: their bytes may be old or new.
    unsure: Vec<u64>,
}

impl Expected {
    fn write(&mut self, guest: &mut Guest, offset: u64, seed: u8) -> u8 {
        let status = guest.write(offset, &pattern(seed));
        match status {
            OK => self.bytes[offset as usize..][..4096].copy_from_slice(&pattern(seed)),
            _ => self.unsure.push(offset),
        }
        status
    }

    #[track_caller]
    fn assert_is(&self, mut seen: Vec<u8>) {
        for offset in &self.unsure {
            let place = *offset as usize..*offset as usize + 4096;
            seen[place.clone()].copy_from_slice(&self.bytes[place]);
        }
        assert_eq!(first_difference(&seen, &self.bytes), None, "the disk is not what the guest was told");
    }
}

/// Writes all over the disk until one fails: how many did not.
fn fill(guest: &mut Guest, expected: &mut Expected) -> u64 {
    for n in 0..DISK / STEP {
        match expected.write(guest, n * STEP, n as u8) {
            OK => {}
            status => {
                assert_eq!(status, IOERR, "a full disk is an I/O error to the guest");
                return n;
            }
        }
    }
    panic!("the file system is not full");
}

/// Fills the file system through the daemon, makes room, goes on, ends.
fn run_out_of_room(chain: &[PathBuf], ballast: &Path, options: &[&str]) {
    let mut expected = Expected { bytes: contents(chain), unsure: Vec::new() };
    let mut daemon = Daemon::serve(&chain[0], options);
    let mut guest = daemon.connect();
    let good = fill(&mut guest, &mut expected);
    assert!(good > 8, "only {good} writes went well");
    // what is there can be read and overwritten, and the rest still fails
    for n in [0, good / 2, good - 1] {
        assert!(guest.read(n * STEP, 4096) == pattern(n as u8), "write {n} is gone");
    }
    assert_eq!(expected.write(&mut guest, 0, 201), OK, "nothing new is needed for it");
    assert_eq!(expected.write(&mut guest, DISK - STEP, 202), IOERR);
    assert!(!daemon.has_ended());
    fs::remove_file(ballast).expect("remove");
    for (n, seed) in [(good + 4, 203), (good + 8, 204)] {
        assert_eq!(expected.write(&mut guest, n * STEP + 8192, seed), OK, "there is room again");
    }
    assert_eq!(guest.flush(), OK);
    drop(guest);
    daemon.stop();
    expected.assert_is(contents(chain));
}

/// A full file system for each engine, and what `make` puts into it.
fn on_small_file_systems(make: impl Fn(&Path) -> Vec<PathBuf>, options: &[&str], check: impl Fn(&Path)) {
    for engine in ENGINES {
        let dir = scratch();
        let Some(mount) = Mount::small(dir.path(), ROOM_MIB) else { return };
        let ballast = mount.at.join("ballast");
        fs::write(&ballast, vec![1; BALLAST]).expect("ballast");
        let chain = make(&mount.at);
        run_out_of_room(&chain, &ballast, &[&["--io-engine", engine], options].concat());
        check(&chain[0]);
    }
}

fn is_good(image: &Path) {
    assert_dense(image);
    assert_checked_by_qemu(image);
}

#[test]
fn a_growing_vdi() {
    on_small_file_systems(|at| vec![vdi(&at.join("disk.vdi"), DISK)], &[], is_good);
}

#[test]
fn a_growing_vdi_past_the_cache() {
    on_small_file_systems(|at| vec![vdi(&at.join("disk.vdi"), DISK)], &["--cache", "none"], is_good);
}

/// Its first writes copy what lies beneath.
#[test]
fn a_growing_diff() {
    let make = |at: &Path| {
        let base = vdi(&at.join("base.vdi"), DISK);
        let daemon = Daemon::serve(&base, &[]);
        let mut guest = daemon.connect();
        (0..4).for_each(|n| guest.mark(n * MIB + 65536, n as u8));
        drop(guest);
        daemon.stop();
        vec![diff(&at.join("top.vdi"), &base, None), base]
    };
    on_small_file_systems(make, &[], assert_dense);
}

#[test]
fn a_sparse_raw_file() {
    let dir = scratch();
    let Some(mount) = Mount::small(dir.path(), 8) else { return };
    let disk = raw(&mount.at.join("disk.raw"), DISK);
    let daemon = Daemon::serve(&disk, &["--cache", "none"]);
    let mut guest = daemon.connect();
    let mut expected = Expected { bytes: vec![0; DISK as usize], unsure: Vec::new() };
    let mut offset = 0;
    while expected.write(&mut guest, offset, 7) == OK {
        offset += 8192;
        assert!(offset < DISK, "the file system is not full");
    }
    assert_eq!(expected.write(&mut guest, 0, 8), OK);
    assert!(guest.read(offset - 8192, 4096) == pattern(7));
    drop(guest);
    daemon.stop();
    expected.assert_is(contents(&[disk]));
}

/// The same without a file system of one's own: the process may not make files longer than this.
#[test]
fn a_limit_on_the_length_of_files() {
    for engine in ENGINES {
        let dir = scratch();
        let image = vdi(&dir.path().join("disk.vdi"), DISK);
        let blocks_of_512 = 8 * MIB / 512;
        let mut c = vdblk_by_shell(&format!("ulimit -f {blocks_of_512}"));
        c.args(["--io-engine", engine, "--blk-file"]).arg(&image);
        let mut daemon = Daemon::with_socket(c);
        let mut guest = daemon.connect();
        let mut expected = Expected { bytes: vec![0; DISK as usize], unsure: Vec::new() };
        let good = fill(&mut guest, &mut expected);
        assert!(good > 8, "only {good} writes went well");
        assert_eq!(expected.write(&mut guest, 0, 201), OK);
        assert!(!daemon.has_ended());
        drop(guest);
        daemon.stop();
        is_good(&image);
        expected.assert_is(contents(&[image]));
    }
}

/// Takes all room. More than once: what a file system had put by for itself is free once it has written.
fn fill_up(path: &Path) {
    let mut file = fs::File::create(path).expect("create");
    for _ in 0..3 {
        while file.write_all(&[1; 1024]).is_ok() {}
        file.sync_all().expect("sync");
    }
}

#[test]
fn an_overlay_there_is_no_room_for() {
    let dir = scratch();
    let Some(mount) = Mount::small(dir.path(), 4) else { return };
    let base = vdi(&dir.path().join("base.vdi"), 64 << 30);
    fill_up(&mount.at.join("ballast"));
    let overlay = mount.at.join("overlay.vdi");
    let mut c = vdblk(&["--blk-file"]);
    c.arg(&base).arg("--overlay").arg(&overlay).arg("--socket-path").arg(dir.path().join("s"));
    run(c).assert_refused(&[overlay.to_str().expect("text"), "No space left"]);
    assert!(!overlay.exists(), "half an overlay was left");
}
