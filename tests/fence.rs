//! The lock as a fence: a process that is killed with I/O in flight keeps the image locked until the kernel has ended
//! that I/O. Also that this test can fail: with a lock on another description it does.
//!
//! A child fills a file with direct writes and is killed. As soon as the lock can be had, /proc/diskstats tells what the
//! device has in flight; samples of the file, then and when everything must have ended, tell whether something arrived
//! in between. (The samples alone are not enough: they queue up behind the writes.)

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vdblk::io::{
    AlignedBuf, BufSlice, EngineKind, HostFile, ImageLock, IoKind, IoOp, OpenHow, OsFile, Tag, make_engine,
};
use vdblk::map::{FileId, HostOffset};

/// Set in the child: the image.
const IMAGE: &str = "VDBLK_FENCE_IMAGE";
/// Set in the child: the file whose lock it holds.
const LOCKED: &str = "VDBLK_FENCE_LOCKED";

const PIECE: usize = 1 << 20;
const PIECES: u64 = 200;
const OLD: u8 = 0xaa;
const NEW: u8 = 0x55;
/// More requests than others are likely to have in flight, and fewer than the child has.
const MANY: u64 = 16;
/// Everything in flight has ended after this time.
const SETTLED: Duration = Duration::from_secs(2);

fn open(path: &Path) -> Arc<dyn HostFile> {
    Arc::new(OsFile::open(path, OpenHow { write: true, direct: true, ..OpenHow::default() }).expect("open"))
}

/// Not a test by itself: the process that is killed. The file that is locked is in the engine's table as all files of a
/// disk are; that makes the fence only if it is the one that is written.
#[test]
fn child() {
    let (Some(image), Some(locked)) = (std::env::var_os(IMAGE), std::env::var_os(LOCKED)) else { return };
    let file = open(Path::new(&image));
    let locked = if locked == image { file.clone() } else { open(Path::new(&locked)) };
    let _lock = ImageLock::exclusive(&*locked, Duration::ZERO).expect("free");
    let mut engine = make_engine(EngineKind::IoUring, 256).expect("an engine").engine;
    engine.attach(FileId(0), &file).expect("attach");
    let mut data = AlignedBuf::new(PIECE);
    data.as_mut_slice().fill(NEW);
    // SAFETY: the buffer lives until the process is killed, and nobody else uses it.
    let buf = unsafe { BufSlice::new(data.as_mut_slice().as_mut_ptr(), PIECE) };
    for n in 0..PIECES {
        let op = IoOp {
            kind: IoKind::Write,
            file: FileId(0),
            off: HostOffset(n * PIECE as u64),
            len: PIECE as u64,
        };
        engine.submit(&op, &[buf], Tag(n)).expect("room");
    }
    engine.enter().expect("hand over");
    println!("\nbegun");
    std::thread::sleep(Duration::from_secs(60));
}

/// Pieces whose last sector has arrived.
fn arrived(file: &dyn HostFile) -> usize {
    let mut buf = AlignedBuf::new(4096);
    (1..=PIECES)
        .filter(|n| {
            let at = n * PIECE as u64 - 4096;
            assert_eq!(file.read_at(at, buf.as_mut_slice()).expect("read"), 4096);
            buf.as_slice()[4095] == NEW
        })
        .count()
}

/// Requests that the device under `path` has in flight; `None` if the kernel counts none for it.
fn device_in_flight(path: &Path) -> Option<u64> {
    let dev = std::fs::metadata(path).ok()?.dev();
    let (major, minor) = (libc::major(dev).to_string(), libc::minor(dev).to_string());
    let stats = std::fs::read_to_string("/proc/diskstats").ok()?;
    let fields = stats.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
    fields.filter(|f| f.len() > 11 && f[0] == major && f[1] == minor).find_map(|f| f[11].parse().ok())
}

/// What was seen after a kill.
struct Seen {
    /// From the kill until the lock could be had.
    locked_for: Duration,
    /// By the device, at that moment.
    in_flight: Option<u64>,
    /// In the file: by the time of the samples, and in the end.
    arrived: usize,
    arrived_late: usize,
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Seen { locked_for, in_flight, arrived, arrived_late } = self;
        write!(
            f,
            "locked for {locked_for:?}; then {in_flight:?} in flight, {arrived} pieces there, {arrived_late} late"
        )
    }
}

/// Kills a child with writes in flight, and looks around once `locked` can be locked.
fn kill_and_lock(image: &Path, locked: &Path) -> Seen {
    std::fs::write(image, vec![OLD; PIECE * PIECES as usize]).expect("fill");
    open(image).sync().expect("sync");
    let exe = std::env::current_exe().expect("this program");
    let mut child = Command::new(exe);
    child.args(["--exact", "child", "--nocapture"]).env(IMAGE, image).env(LOCKED, locked);
    let mut child = child.stdout(Stdio::piped()).spawn().expect("start");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    assert!(lines.any(|l| l.is_ok_and(|l| l == "begun")), "the child did not begin");
    // descriptions of its own, as a restarted process has them
    let (file, lock_file) = (open(image), open(locked));
    child.kill().expect("kill");
    let start = Instant::now();
    let _lock = loop {
        // without the pauses that a daemon makes: every millisecond counts
        match ImageLock::exclusive(&*lock_file, Duration::ZERO) {
            Ok(lock) => break lock,
            Err(e) => assert!(start.elapsed() < Duration::from_secs(30), "{e}"),
        }
    };
    let (locked_for, in_flight) = (start.elapsed(), device_in_flight(image));
    let at_lock = arrived(&*file);
    std::thread::sleep(SETTLED);
    child.wait().expect("reap");
    let arrived_late = arrived(&*file) - at_lock;
    Seen { locked_for, in_flight, arrived: at_lock, arrived_late }
}

fn files() -> Option<(tempfile::TempDir, PathBuf, PathBuf)> {
    if make_engine(EngineKind::IoUring, 1).is_err() {
        eprintln!("skipped: no io_uring");
        return None;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let (image, other) = (dir.path().join("image"), dir.path().join("other"));
    std::fs::write(&other, [0; 4096]).expect("make");
    Some((dir, image, other))
}

#[test]
fn the_lock_is_held_until_the_last_write_has_ended() {
    let Some((_dir, image, other)) = files() else { return };
    let mut least = u64::MAX;
    for _ in 0..3 {
        let seen = kill_and_lock(&image, &image);
        println!("fence: {seen}");
        assert_eq!(seen.arrived_late, 0, "writes of the killed process passed the lock");
        assert!(seen.arrived > 0, "nothing was in flight");
        least = least.min(seen.in_flight.unwrap_or(0));
    }
    // others may use the device too, but hardly at each of these moments
    assert!(least < MANY, "{least} requests in flight when the lock was had");
    // the same with the lock on a file beside: what is in flight there is what the fence keeps off
    let mut most = 0;
    for _ in 0..3 {
        let seen = kill_and_lock(&image, &other);
        println!("no fence: {seen}");
        most = most.max(seen.in_flight.unwrap_or(0)).max(seen.arrived_late as u64);
    }
    if most < MANY {
        println!("inconclusive: this storage is too quick to show what passes a lock on another file");
    }
}
