//! A sync that failed is final (rule O4): the daemon takes no further change, and no other process of this boot opens the
//! image for writing, until a person has decided. Nothing is known of what such a disk holds.

mod daemon_support;

use daemon_support::client::{IOERR, OK, pattern};
use daemon_support::images::{MIB, diff, vdi};
use daemon_support::mounts::{Loop, Mount};
use daemon_support::process::{Daemon, Ended, run, vdblk};
use daemon_support::scratch;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const SIZE: u64 = 8 * MIB;

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("the boot's id")
}

/// The mark of a file, in a folder that stands for the user's own one below /run.
fn mark_of(image: &Path, runtime: &Path) -> PathBuf {
    let meta = fs::metadata(image).expect("the image");
    let folder = runtime.join("vdblk");
    fs::create_dir_all(&folder).expect("a folder");
    folder.join(format!("sync-failed-{:x}-{:x}-{:x}", meta.dev(), meta.ino(), made(&meta)))
}

/// When the file was made, as the mark's name has it.
fn made(meta: &fs::Metadata) -> u128 {
    let made = meta.created().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    made.map_or(0, |t| t.as_nanos())
}

fn try_to_serve(image: &Path, runtime: &Path, options: &[&str]) -> Ended {
    let mut c = vdblk(&["--blk-file"]);
    c.arg(image).args(options).arg("--socket-path").arg(runtime.join("s")).env("XDG_RUNTIME_DIR", runtime);
    run(c)
}

fn serve(image: &Path, runtime: &Path, options: &[&str]) -> Daemon {
    let mut c = vdblk(&["--blk-file"]);
    c.arg(image).args(options).env("XDG_RUNTIME_DIR", runtime);
    Daemon::with_socket(c)
}

#[test]
fn a_mark_of_this_boot_refuses_writing() {
    let dir = scratch();
    let runtime = scratch();
    let image = vdi(&dir.path().join("disk.vdi"), SIZE);
    let mark = mark_of(&image, runtime.path());
    fs::write(&mark, boot_id()).expect("write");
    let before = fs::read(&image).expect("read");
    let name = |p: &Path| p.to_str().expect("text").to_string();
    try_to_serve(&image, runtime.path(), &[]).assert_refused(&[
        &name(&image),
        "sync",
        "failed",
        "restart",
        &name(&mark),
    ]);
    assert!(fs::read(&image).expect("read") == before, "it was written");
    // reading is no harm, nor are changes that go elsewhere
    let daemon = serve(&image, runtime.path(), &["--read-only"]);
    daemon.connect().assert_zero(0);
    daemon.stop();
    let overlay = name(&dir.path().join("overlay.vdi"));
    serve(&image, runtime.path(), &["--overlay", &overlay]).stop();
    let child = diff(&dir.path().join("child.vdi"), &image, None);
    serve(&child, runtime.path(), &[]).stop();
    fs::remove_file(child).expect("remove");
    fs::remove_file(overlay).expect("remove");
    // the advice of the message helps
    fs::remove_file(&mark).expect("remove");
    let daemon = serve(&image, runtime.path(), &[]);
    daemon.connect().mark(0, 1);
    daemon.stop();
}

/// After a restart of the machine the page cache is what the disk holds.
#[test]
fn marks_of_other_boots_and_of_other_files_do_not_matter() {
    let dir = scratch();
    let runtime = scratch();
    let image = vdi(&dir.path().join("disk.vdi"), SIZE);
    let other = vdi(&dir.path().join("other.vdi"), SIZE);
    fs::write(mark_of(&image, runtime.path()), "01234567-89ab-cdef-0123-456789abcdef\n").expect("write");
    fs::write(mark_of(&other, runtime.path()), boot_id()).expect("write");
    let daemon = serve(&image, runtime.path(), &[]);
    daemon.connect().mark(0, 1);
    daemon.stop();
}

/// A disk that takes writes and loses them when they are to be made durable: a loop device whose file has no room.
struct LosingDisk {
    disk: Loop,
    _memory: Mount,
    _dir: tempfile::TempDir,
}

impl LosingDisk {
    fn new() -> Option<LosingDisk> {
        let dir = scratch();
        let memory = Mount::in_memory(dir.path(), 2)?;
        let file = memory.at.join("file");
        fs::File::create(&file).and_then(|f| f.set_len(32 << 20)).expect("a sparse file");
        Some(LosingDisk { disk: Loop::over(&file)?, _memory: memory, _dir: dir })
    }

    /// Its mark, where root leaves it.
    fn mark(&self) -> PathBuf {
        let meta = fs::metadata(&self.disk.device).expect("the device");
        Path::new("/run/vdblk").join(format!("sync-failed-{:x}-0-{:x}", meta.rdev(), made(&meta)))
    }
}

impl Drop for LosingDisk {
    fn drop(&mut self) {
        // the number of the device will be another disk's
        let _ = fs::remove_file(self.mark());
    }
}

#[test]
fn a_sync_that_fails_is_final() {
    for engine in ["io_uring", "threads"] {
        let Some(losing) = LosingDisk::new() else { return };
        let device = &losing.disk.device;
        let _ = fs::remove_file(losing.mark());
        let runtime = scratch();
        let options = ["--format", "raw", "--io-engine", engine];
        let mut daemon = serve(device, runtime.path(), &options);
        let mut guest = daemon.connect();
        guest.mark(0, 1);
        assert_eq!(guest.flush(), OK, "there is room for this");
        for n in 1..1024 {
            guest.mark(n * 16384, n as u8);
        }
        assert_eq!(guest.flush(), IOERR, "{engine}: lost writes were called durable");
        // no second try: it might say that all is well
        assert_eq!(guest.flush(), IOERR);
        assert_eq!(guest.write(0, &pattern(2)), IOERR, "{engine}: a write after a failed sync");
        guest.assert_marked(0, 1);
        assert!(!daemon.has_ended());
        drop(guest);
        daemon.signal(libc::SIGTERM);
        let ended = daemon.wait();
        assert_eq!(ended.status.code(), Some(1), "{engine}: lost writes, and all is well? {ended:?}");
        assert!(ended.err.lines().last().is_some_and(|l| l.contains("a sync of it has failed")), "{ended:?}");
        let mark = losing.mark();
        let refused = try_to_serve(device, runtime.path(), &options);
        refused.assert_refused(&[device.to_str().expect("text"), "sync", mark.to_str().expect("text")]);
        serve(device, runtime.path(), &[&options[..], &["--read-only"]].concat()).stop();
        fs::remove_file(&mark).expect("the mark");
        serve(device, runtime.path(), &options).stop();
    }
}
