//! kill -9 and restart under load: what was acknowledged is there, what was in flight is completed exactly once.
//!
//! The daemon is killed again and again under vubench's verifying load, which keeps rings, memory and inflight region as
//! a VMM does. `VDBLK_KILLS` says how many times in all (54); `scripts/soak-kill.sh` is the long form.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};
use tempfile::TempDir;

/// Kinds of images times ways through the page cache.
const CONFIGURATIONS: u32 = 6;
/// Longest time from the end of the killed process's last I/O to its successor's first answer: the promise, and for half of
/// them in any build.
const RESUME_MS: f64 = 1000.0;
/// What a debug build is allowed at most: it is run on machines that do much else.
const RESUME_DEBUG_MS: f64 = 5000.0;

/// How `vdimg check` ends for an image with nothing but leaks.
const LEAKS: i32 = 3;

/// Time between two kills.
const PAUSE_S: f64 = 0.6;

/// How long the kernel may take to end the last I/O of a killed process, which holds the image's lock until then: more than
/// the usual 10 s on a disk that others keep busy.
const LOCK_WAIT_S: u32 = 50;

/// What must never be counted.
const WRONG: [&str; 6] = ["duplicates", "lost", "mismatches", "errors", "bad_used_len", "stale_after_crash"];

/// One load at a time: each wants the CPUs for itself.
static TURN: Mutex<()> = Mutex::new(());

/// A folder for images. If the test fails it stays, with a log of all programs that ran.
struct Folder(Option<TempDir>);

impl Folder {
    fn new() -> Folder {
        // not in /tmp: that may be memory, which has no O_DIRECT
        Folder(Some(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")))
    }

    fn path(&self) -> &Path {
        self.0.as_ref().expect("only drop takes it").path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let kept = self.0.take().expect("only drop takes it").keep();
            eprintln!("the images, and all that was run and said ({LOG}), are in {}", kept.display());
        }
    }
}

/// In the folder of the images.
const LOG: &str = "log";

/// Runs a program in the folder, and keeps what it said.
fn run(dir: &Path, c: &mut Command) -> Output {
    let done = c.current_dir(dir).output().expect("run it");
    let mut log = File::options().create(true).append(true).open(dir.join(LOG)).expect("open the log");
    writeln!(log, "{c:?}: {}", done.status).expect("write the log");
    log.write_all(&[&done.stdout[..], &done.stderr].concat()).expect("write the log");
    done
}

fn kills() -> u32 {
    let all: u32 = std::env::var("VDBLK_KILLS").map_or(54, |n| n.parse().expect("VDBLK_KILLS is a number"));
    all.div_ceil(CONFIGURATIONS)
}

fn program(name: &str) -> PathBuf {
    let bins = Path::new(env!("CARGO_BIN_EXE_vdblk")).parent().expect("a folder");
    let found = if name == "vubench" { bins.join("examples/vubench") } else { bins.join(name) };
    assert!(found.exists(), "{} is missing: cargo build --bins --examples", found.display());
    found
}

fn vdimg(dir: &Path, args: &str) {
    let mut c = Command::new(program("vdimg"));
    let done = run(dir, c.args(args.split_whitespace()));
    assert!(done.status.success(), "vdimg {args}: {done:?}");
}

/// Of what the killed ones had prepared something may be left, if nothing was written after the last of them; a session
/// that writes and ends in order leaves nothing.
fn assert_sound(dir: &Path, image: &str, cache: &str) {
    let check = run(dir, Command::new(program("vdimg")).args(["check", image]));
    assert!([Some(0), Some(LEAKS)].contains(&check.status.code()), "{check:?}");
    vubench(dir, image, cache, "--verify --runtime 0.5 --dump-model model.raw");
    vdimg(dir, &format!("check {image}"));
    vdimg(dir, &format!("compare {image} model.raw"));
}

/// Runs vubench with a daemon on `image`; its result.
fn try_vubench(dir: &Path, image: &str, cache: &str, args: &str) -> (Output, serde_json::Value) {
    let daemon = format!(
        "{} --socket-path @S --blk-file {} --num-queues 2 --cache {cache} --log-level warn --lock-wait {LOCK_WAIT_S}",
        program("vdblk").display(),
        dir.join(image).display()
    );
    let mut c = Command::new(program("vubench"));
    c.arg("--socket").arg(dir.join("s")).arg("--server-cmd").arg(daemon);
    c.args("--queues 2 --unit 4k --max-units 16 --seed 7 --size 128m --shadow model".split_whitespace());
    let done = run(dir, c.args(args.split_whitespace()));
    let text = String::from_utf8_lossy(&done.stdout);
    let result = serde_json::from_str(text.lines().last().unwrap_or("")).unwrap_or_default();
    (done, result)
}

/// As [`try_vubench`], and nothing is found to be wrong.
fn vubench(dir: &Path, image: &str, cache: &str, args: &str) -> serde_json::Value {
    let (done, result) = try_vubench(dir, image, cache, args);
    assert!(done.status.success(), "vubench {args}: {done:?}");
    result
}

/// Makes the image, and the model of what is in it; returns its name.
fn make(dir: &Path, kind: &str) -> &'static str {
    match kind {
        "raw" => {
            std::fs::File::create(dir.join("a.raw")).and_then(|f| f.set_len(128 << 20)).expect("make it");
            "a.raw"
        }
        "vdi" => {
            vdimg(dir, "create --format vdi --size 128M --option AllocationBlockSize=64k a.vdi");
            "a.vdi"
        }
        _ => {
            vdimg(dir, "create --format vdi --size 128M --option AllocationBlockSize=64k base.vdi");
            vubench(dir, "base.vdi", "writeback", "--verify --assume-zero --runtime 1");
            vdimg(dir, "create --format vdi --parent base.vdi top.vdi");
            "top.vdi"
        }
    }
}

fn kill_and_restart(kind: &str, cache: &str) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = Folder::new();
    let image = make(dir.path(), kind);
    let n = kills();
    let run = format!(
        "--reconnect-kill {n} --assume-zero --iodepth 32 --mix 45,30,8,12,5 --runtime {} --dump-model model.raw --image {image}",
        f64::from(n + 1) * PAUSE_S
    );
    let r = vubench(dir.path(), image, cache, &run);
    WRONG.iter().for_each(|field| assert_eq!(r[*field], 0, "{field} in {r}"));
    assert_eq!((&r["kills"], &r["inflight"]), (&n.into(), &true.into()), "{r}");
    assert!(r["in_flight_at_kills"].as_u64() > Some(0), "{r}");
    println!(
        "{kind} {cache}: {n} kills, {} in flight, resumed in {} ms (median), {} ms (longest)",
        r["in_flight_at_kills"], r["resume_ms"]["p50"], r["resume_ms"]["max"]
    );
    let at_most = if cfg!(debug_assertions) { RESUME_DEBUG_MS } else { RESUME_MS };
    for (field, limit) in [("p50", RESUME_MS), ("max", at_most)] {
        assert!(r["resume_ms"][field].as_f64().is_some_and(|ms: f64| ms <= limit), "{field} in {r}");
    }
    vdimg(dir.path(), &format!("compare {image} model.raw"));
    if image.ends_with(".vdi") {
        assert_sound(dir.path(), image, cache);
    }
}

#[test]
fn a_raw_disk_survives_kills() {
    ["writeback", "none"].iter().for_each(|cache| kill_and_restart("raw", cache));
}

#[test]
fn a_vdi_survives_kills_while_it_grows() {
    ["writeback", "none"].iter().for_each(|cache| kill_and_restart("vdi", cache));
}

#[test]
fn a_diff_survives_kills_while_it_grows() {
    ["writeback", "none"].iter().for_each(|cache| kill_and_restart("diff", cache));
}

/// The check itself: one request missing in the record of what was in flight, or one too many, is noticed. As what depends on
/// the moment: one too many whose head the driver has used again in between shows as a wrong answer to the later one.
#[test]
fn a_lost_and_a_doubled_request_are_noticed() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for spoil in ["lose", "double"] {
        let dir = Folder::new();
        let image = make(dir.path(), "raw");
        let run = "--reconnect-kill 4 --assume-zero --iodepth 32 --runtime 2 --stall 2 --spoil-inflight";
        let (done, r) = try_vubench(dir.path(), image, "none", &format!("{run} {spoil}"));
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        assert!(WRONG.iter().any(|field| r[*field].as_u64() > Some(0)), "{spoil}: {r}");
        println!("{spoil}: {} lost, {} doubled in {} kills", r["lost"], r["duplicates"], r["kills"]);
    }
}
