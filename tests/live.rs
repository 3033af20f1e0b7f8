//! Live snapshots of a disk that is being served: the real daemon in a process of its own, vubench's verifying load on it, a snapshot every
//! 100 ms, and kill -9 in between. What is served afterwards, and what the images hold, is compared with vubench's model.
//!
//! `VDBLK_LIVE_SNAPSHOTS` says how many snapshots at least each kind of image takes (40; 250 are the most a chain has room for).

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;
use vdblk::ErrorKind;
use vdblk::daemon::{self, Config, Socket};
use vdblk::io::EngineKind;
use vdblk::live::{LiveDisk, Snapshot};
use vdblk::vd::{CacheMode, DiskOptions, ImageSpec, OpenDisk, open_disk};

/// Where the server finds its images; set for its process alone.
const DIR: &str = "VDBLK_LIVE_DIR";
/// The image, and the extension of snapshots.
const IMAGE: &str = "VDBLK_LIVE_IMAGE";
/// Time between two snapshots.
const EVERY: Duration = Duration::from_millis(100);
/// Images that a chain may have, less some.
const MOST: usize = 250;

fn snapshots() -> u32 {
    std::env::var("VDBLK_LIVE_SNAPSHOTS").map_or(40, |n| n.parse().expect("VDBLK_LIVE_SNAPSHOTS is a number"))
}

/// Snapshots until the process ends; each pause goes to a file.
fn keep_snapshotting(live: &LiveDisk, dir: &Path, extension: &str) {
    use std::io::Write;
    let mut pauses = std::fs::File::options().create(true).append(true).open(dir.join("pauses")).unwrap();
    loop {
        std::thread::sleep(EVERY);
        let n = live.chain().len();
        if n >= MOST {
            return;
        }
        // one that a killed process was making may be there in part
        match live.snapshot(&Snapshot::new(dir.join(format!("snap-{n}-{}.{extension}", std::process::id()))))
        {
            Ok(snapped) => {
                let finished = snapped.unfinished.map_or("ok".to_string(), |e| e.to_string());
                writeln!(pauses, "{} {finished}", snapped.pause.as_micros()).unwrap();
            }
            // vubench has ended the server: whatever was being made was taken back
            Err(e) if e.to_string().contains("the disk is not served any more") => return,
            Err(e) => return drop(writeln!(pauses, "failed: {e}")),
        }
    }
}

/// No test: the server's process.
#[test]
fn server() {
    let (Some(dir), Ok(image)) = (std::env::var_os(DIR).map(PathBuf::from), std::env::var(IMAGE)) else {
        return;
    };
    let config = Config {
        socket: Socket::Path { path: dir.join("s"), mode: 0o600, group: None },
        image: ImageSpec { path: dir.join(&image), format: None },
        snapshot: None,
        parents: Vec::new(),
        parent_dirs: Vec::new(),
        allow_parent_mismatch: false,
        allow_write_to_parent: false,
        allow_raw_device: false,
        cache_image: None,
        keys: vdblk::filter::KeyFiles::default(),
        record: Some(dir.join("record")),
        overlay: None,
        read_only: false,
        lock_wait: Duration::from_secs(50),
        num_queues: Some(2),
        queue_size: 256,
        cache: CacheMode::Writeback,
        discard: true,
        serial: None,
        engine: EngineKind::Auto,
        poll: Duration::ZERO,
        once: false,
        flush_on_exit: true,
    };
    let extension = image.rsplit('.').next().filter(|e| *e != "raw").unwrap_or("qcow2").to_string();
    let told = |live: Arc<LiveDisk>| {
        std::thread::spawn(move || keep_snapshotting(&live, &dir, &extension));
    };
    if let Err(e) = daemon::run_with(&config, told) {
        eprintln!("server: {e}");
        std::process::exit(1);
    }
}

fn program(name: &str) -> PathBuf {
    let bins = Path::new(env!("CARGO_BIN_EXE_vdblk")).parent().expect("a folder");
    let found = if name == "vubench" { bins.join("examples/vubench") } else { bins.join(name) };
    assert!(found.exists(), "{} is missing: cargo build --bins --examples", found.display());
    found
}

fn run(dir: &Path, name: &str, args: &str) -> Output {
    Command::new(program(name)).current_dir(dir).args(args.split_whitespace()).output().expect("run it")
}

fn vubench(dir: &Path, image: &str, server: &str, args: &str) -> serde_json::Value {
    let mut c = Command::new(program("vubench"));
    c.current_dir(dir).env(DIR, dir).env(IMAGE, image);
    c.arg("--socket").arg(dir.join("s")).arg("--server-cmd").arg(server);
    c.args(
        "--queues 2 --unit 4k --max-units 16 --seed 7 --size 64m --iodepth 32 --dump-model model.raw"
            .split(' '),
    );
    let done = c.args(args.split_whitespace()).output().expect("run it");
    assert!(done.status.success(), "vubench {args}: {done:?}");
    let text = String::from_utf8_lossy(&done.stdout);
    serde_json::from_str(text.lines().last().unwrap_or("")).expect("its result")
}

/// The image on top, by the record, as `vdimg` wants to be told of its chain.
fn leaf(dir: &Path) -> (PathBuf, usize) {
    let recorded = vdblk::live::record::load(&dir.join("record")).unwrap().expect("a record");
    (recorded.chain[0].path.clone(), recorded.chain.len())
}

fn snapshots_under_load(image: &str, kills: u32) {
    // not in /tmp: that may be memory
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let dir = dir.path();
    let made = run(
        dir,
        "vdimg",
        &format!("create --size 64M {image} --format {}", image.rsplit('.').next().unwrap()),
    );
    assert!(made.status.success(), "{made:?}");
    let server = format!("{} --exact server --nocapture", std::env::current_exe().unwrap().display());
    let seconds = f64::from(snapshots()) * 0.15 + f64::from(kills) * 0.6;
    let load = match kills {
        0 => format!("--verify --assume-zero --mix 45,30,8,12,5 --runtime {seconds}"),
        n => format!(
            "--reconnect-kill {n} --shadow shadow --assume-zero --mix 45,30,8,12,5 --runtime {seconds}"
        ),
    };
    let r = vubench(dir, image, &server, &load);
    for field in ["duplicates", "lost", "mismatches", "errors", "bad_used_len", "stale_after_crash"] {
        assert!(r[field].is_null() || r[field] == 0, "{field} in {r}");
    }
    let pauses = std::fs::read_to_string(dir.join("pauses")).unwrap();
    assert!(!pauses.contains("failed") && pauses.lines().all(|l| l.ends_with(" ok")), "{pauses}");
    let mut pauses: Vec<u64> =
        pauses.lines().map(|l| l.split(' ').next().unwrap().parse().unwrap()).collect();
    pauses.sort_unstable();
    let (top, images) = leaf(dir);
    println!(
        "{image}: {} snapshots, {kills} kills, {images} images, pause {} µs (median), {} µs (99 %), {} µs (longest)",
        pauses.len(),
        pauses[pauses.len() / 2],
        pauses[pauses.len() * 99 / 100],
        pauses[pauses.len() - 1],
    );
    assert!(pauses.len() >= 5 && images > pauses.len(), "{} in {images}", pauses.len());
    let same = run(dir, "vdimg", &format!("compare {} model.raw", top.display()));
    assert!(same.status.success(), "{}: {same:?}", top.display());
    let write = OpenDisk { options: DiskOptions::default(), ..OpenDisk::new(dir.join(image)) };
    assert_eq!(open_disk(&write).unwrap_err().kind(), ErrorKind::ReadOnly, "a parent is written");
}

#[test]
fn snapshots_under_load_lose_nothing() {
    ["a.vdi", "a.qcow2", "a.raw"].into_iter().for_each(|image| snapshots_under_load(image, 0));
}

#[test]
fn snapshots_and_kills_lose_nothing() {
    ["a.vdi", "a.vmdk"].into_iter().for_each(|image| snapshots_under_load(image, 5));
}
