//! Random requests against a model, on every kind of image, with one queue and four, both engines and all cache modes: no
//! byte is wrong while it is served, nor in the image afterwards, and parents stay as they were.
//!
//! `VDBLK_VERIFY_SECONDS` makes the runs longer.

mod daemon_support;

use daemon_support::images::{
    MIB, assert_checked_by_qemu, assert_dense, contents, contents_by_qemu, diff, first_difference, raw, vdi,
};
use daemon_support::process::Daemon;
use daemon_support::scratch;
use daemon_support::vubench::{number, vubench};
use std::fs;
use std::path::{Path, PathBuf};

/// The last block is not a whole one.
const DISK: u64 = 12 * MIB + 520 * 1024;
const CACHES: [&str; 4] = ["none", "writeback", "writethrough", "unsafe"];
const ENGINES: [&str; 2] = ["io_uring", "threads"];
const QUEUES: [&str; 2] = ["1", "4"];

/// One way to serve an image.
#[derive(Clone, Copy, Debug)]
struct Way {
    queues: &'static str,
    engine: &'static str,
    cache: &'static str,
}

impl Way {
    fn all() -> impl Iterator<Item = Way> {
        let pairs = QUEUES.into_iter().flat_map(|queues| ENGINES.map(|engine| (queues, engine)));
        pairs.flat_map(|(queues, engine)| CACHES.map(|cache| Way { queues, engine, cache }))
    }

    fn serve(self, image: &Path) -> Daemon {
        let options = ["--num-queues", self.queues, "--io-engine", self.engine, "--cache", self.cache];
        Daemon::serve(image, &options)
    }
}

fn seconds() -> f64 {
    let said = std::env::var("VDBLK_VERIFY_SECONDS").ok();
    said.map_or(0.4, |s| s.parse().expect("VDBLK_VERIFY_SECONDS is a number"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// Loads the image and checks every answer; `shadow` is the model of what is there already, and of what is then.
/// The model comes back as the bytes of the disk.
fn load(way: Way, image: &Path, shadow: &Path) -> Vec<u8> {
    let daemon = way.serve(image);
    let model = shadow.with_extension("model");
    // a machine that is busy with other things gets little done in a moment: then it is given a longer one
    let enough = [1.0, 4.0, 16.0].iter().any(|times| {
        let time = (times * seconds()).to_string();
        let (ended, result) = vubench(
            &daemon.socket,
            &[
                &["--verify", "--assume-zero", "--iodepth", "12", "--runtime", &time][..],
                &["--queues", way.queues, "--shadow", text(shadow), "--dump-model", text(&model)],
            ]
            .concat(),
        );
        assert!(ended.status.success(), "{way:?}: {ended:?}");
        for key in ["mismatches", "errors", "bad_used_len", "lost", "duplicates", "unsupp"] {
            assert_eq!(number(&result, key), 0, "{way:?}: {key} in {result}");
        }
        let least = [("writes", 20), ("reads", 1), ("write_zeroes", 1), ("discards", 1), ("flushes", 1)];
        least.iter().all(|(key, n)| number(&result, key) >= *n)
    });
    assert!(enough, "{way:?}: too little was done");
    daemon.stop();
    let bytes = fs::read(&model).expect("the model");
    fs::remove_file(&model).expect("remove");
    bytes
}

#[track_caller]
fn assert_same(seen: &[u8], model: &[u8], way: Way) {
    assert!(model.iter().any(|b| *b != 0), "{way:?}: an empty model proves nothing");
    assert_eq!(first_difference(seen, model), None, "{way:?}: the image is not what was written");
}

#[test]
fn raw_images() {
    for way in Way::all() {
        let dir = scratch();
        let image = raw(&dir.path().join("disk.raw"), DISK);
        let model = load(way, &image, &dir.path().join("shadow"));
        assert_same(&fs::read(&image).expect("read"), &model, way);
    }
}

#[test]
fn vdi_images() {
    for way in Way::all() {
        let dir = scratch();
        let image = vdi(&dir.path().join("disk.vdi"), DISK);
        let model = load(way, &image, &dir.path().join("shadow"));
        assert_same(&contents(std::slice::from_ref(&image)), &model, way);
        if let Some(seen) = contents_by_qemu(&image, "vdi") {
            assert_same(&seen, &model, way);
        }
        assert_dense(&image);
        assert_checked_by_qemu(&image);
    }
}

/// Three images with data in each, top first, and the model of what they show together.
fn three_layers(dir: &Path) -> (Vec<PathBuf>, PathBuf) {
    let shadow = dir.join("shadow");
    let way = Way { queues: "1", engine: "threads", cache: "writeback" };
    let mut chain = vec![vdi(&dir.join("0.vdi"), DISK)];
    load(way, &chain[0], &shadow);
    for n in 1..3 {
        chain.insert(0, diff(&dir.join(format!("{n}.vdi")), &chain[0], None));
        load(way, &chain[0], &shadow);
    }
    (chain, shadow)
}

#[test]
fn chains_of_four_vdis() {
    let dir = scratch();
    let (parents, shadow) = three_layers(dir.path());
    let before: Vec<_> = parents.iter().map(|p| fs::read(p).expect("read")).collect();
    for way in Way::all() {
        let here = tempfile::tempdir_in(dir.path()).expect("a folder");
        let own_shadow = here.path().join("shadow");
        fs::copy(&shadow, &own_shadow).expect("copy");
        let top = diff(&dir.path().join("top.vdi"), &parents[0], None);
        let model = load(way, &top, &own_shadow);
        let chain: Vec<_> = [top.clone()].iter().chain(&parents).cloned().collect();
        assert_same(&contents(&chain), &model, way);
        assert_dense(&top);
        for (path, bytes) in parents.iter().zip(&before) {
            assert!(fs::read(path).expect("read") == *bytes, "{way:?}: {} was changed", path.display());
        }
        fs::remove_file(&top).expect("remove");
    }
}

#[test]
fn malformed_chains_are_all_answered() {
    for (engine, cache) in [("io_uring", "writeback"), ("threads", "none")] {
        let dir = scratch();
        let image = vdi(&dir.path().join("disk.vdi"), DISK);
        let daemon = Way { queues: "1", engine, cache }.serve(&image);
        let (ended, result) = vubench(&daemon.socket, &["--fuzz-chain"]);
        let wrong: Vec<_> = ended.out.lines().filter(|l| l.contains("<--")).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert!(number(&result, "cases") >= 78 && number(&result, "skipped") == 0, "{result}");
        for key in
            ["legal_failed", "unanswered", "status_mismatch", "queue_dead", "server_died", "no_reconnect"]
        {
            assert_eq!(number(&result, key), 0, "{key} in {result}");
        }
        daemon.stop();
        assert_dense(&image);
    }
}
