//! Cache images: what they keep over restarts, when they are not trusted, that they stay within their size, and that whatever
//! is in one no reader gets a wrong byte.

mod daemon_support;

use daemon_support::images::{MIB, contents, diff, first_difference, vdi};
use daemon_support::mounts::Mount;
use daemon_support::process::{Daemon, run, vdblk};
use daemon_support::scratch;
use daemon_support::vubench::{number, vubench};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use vdblk::format::vci::{
    HEADER_BYTES, Header, NO_BLOCK, PAGE_BYTES, PAGE_ENTRIES, TABLE_AT, page_of_bytes, page_to_bytes,
};
use vdblk::job::{Watch, compare_disks, create_cache, inspect_cache};
use vdblk::vd::{CacheCounts, DiskOptions, OpenDisk, OpenedDisk, open_disk};

const DISK: u64 = 8 * MIB;
const BLOCK: u64 = 64 << 10;
/// Room for the whole disk.
const LARGE: u64 = 9 * MIB;

fn vdimg(dir: &Path, words: &str) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_vdimg"));
    c.current_dir(dir).args(words.split(' ')).output().expect("vdimg")
}

#[track_caller]
fn ok(dir: &Path, words: &str) -> String {
    let out = vdimg(dir, words);
    assert!(out.status.success(), "{words}: {out:?}");
    String::from_utf8(out.stdout).expect("text")
}

/// Bytes that repeat nowhere.
fn bytes(len: u64, seed: u64) -> Vec<u8> {
    let word = |n: u64| (n ^ seed << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).to_le_bytes();
    (0..len / 8).flat_map(|n| word(n + 1)).collect()
}

/// A packed base full of data, a diff over it with some of its own, and a cache.
struct Chain {
    dir: tempfile::TempDir,
    top: PathBuf,
    cache: PathBuf,
}

impl Chain {
    fn new(cache_bytes: u64) -> Chain {
        let dir = scratch();
        let d = dir.path();
        fs::write(d.join("data.raw"), bytes(DISK, 1)).expect("write");
        ok(d, "convert --output-format vmdk --variant stream data.raw base.vmdk");
        ok(d, "create --format vdi --parent base.vmdk top.vdi");
        let cache = d.join("base.vci");
        create_cache(&cache, cache_bytes, BLOCK).expect("a new cache");
        Chain { top: d.join("top.vdi"), cache, dir }
    }

    fn open(&self, cache: Option<&Path>, read_only: bool) -> OpenedDisk {
        let options = DiskOptions { read_only, ..DiskOptions::default() };
        let cache_image = cache.map(Path::to_path_buf);
        open_disk(&OpenDisk { cache_image, options, ..OpenDisk::new(&self.top) }).expect("a disk")
    }

    /// A session that reads the whole disk so many times, each time the right bytes; what the cache did, and held at first.
    fn session(&self, times: u32) -> (CacheCounts, u64) {
        self.session_with(&self.cache, times)
    }

    fn session_with(&self, cache: &Path, times: u32) -> (CacheCounts, u64) {
        let cached = self.open(Some(cache), false).disk;
        let plain = self.open(None, true).disk;
        let before = cached.cache_counts().expect("a cache").kept;
        for _ in 0..times {
            let mut watch = Watch { cancelled: &|| false, progress: &mut |_| () };
            let found = compare_disks(&cached, &plain, &mut watch).expect("both can be read");
            assert_eq!(found.difference, None);
        }
        cached.end_cache();
        (cached.cache_counts().expect("a cache"), before)
    }

    /// Sessions until all of the disk is in the cache.
    fn fill(&self) {
        let full = (0..50).any(|_| self.session(2).0.kept == DISK / BLOCK);
        assert!(full, "the cache does not fill");
    }
}

#[test]
fn what_was_read_once_is_read_from_the_cache_after_a_restart() {
    let chain = Chain::new(LARGE);
    let (first, before) = chain.session(1);
    assert!(before == 0 && first.filled > 0 && first.missed_bytes > 0, "{first:?}");
    chain.fill();
    let (again, before) = chain.session(1);
    assert_eq!(before, DISK / BLOCK);
    assert_eq!((again.hit_bytes, again.missed_bytes, again.filled), (DISK, 0, 0), "{again:?}");
}

/// A raw base that is only read, and a copy of it to compare with; what the cache held at first.
fn raw_session(base: &Path, copy: &Path, cache: &Path) -> u64 {
    let with = |path: &Path, cache| open_disk(&OpenDisk { cache_image: cache, ..OpenDisk::new(path) });
    let cached = with(base, Some(cache.to_path_buf())).expect("a disk").disk;
    let plain = with(copy, None).expect("a disk").disk;
    let before = cached.cache_counts().expect("a cache").kept;
    for _ in 0..3 {
        let mut watch = Watch { cancelled: &|| false, progress: &mut |_| () };
        assert_eq!(compare_disks(&cached, &plain, &mut watch).expect("read").difference, None);
    }
    cached.end_cache();
    before
}

#[test]
fn a_base_that_was_changed_is_read_anew_also_if_its_times_are_put_back() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (base, copy, cache) = (at("base.raw"), at("copy.raw"), at("base.vci"));
    fs::write(&base, bytes(DISK, 1)).expect("write");
    fs::copy(&base, &copy).expect("copy");
    create_cache(&cache, LARGE, BLOCK).expect("a new cache");
    let session = || raw_session(&base, &copy, &cache);
    assert_eq!(session(), 0);
    assert!(session() > 0, "the same base is trusted");
    let old = fs::metadata(&base).expect("times").modified().expect("a time");
    for path in [&base, &copy] {
        let file = File::options().write(true).open(path).expect("open");
        (0..DISK / BLOCK).for_each(|b| file.write_all_at(&[0xaa; 512], b * BLOCK).expect("write"));
        file.set_modified(old).expect("put the time back");
    }
    assert_eq!(session(), 0, "blocks of before the change are trusted");
    // Another file with the same bytes is another base as well.
    assert!(session() > 0);
    fs::copy(&base, at("new")).expect("copy");
    fs::rename(at("new"), &base).expect("rename");
    assert_eq!(session(), 0);
}

#[test]
fn a_session_that_was_not_ended_in_order_leaves_nothing() {
    let chain = Chain::new(LARGE);
    chain.fill();
    let copy = chain.dir.path().join("copy.vci");
    let running = chain.open(Some(&chain.cache), false);
    assert_eq!(running.disk.cache_counts().expect("a cache").kept, DISK / BLOCK);
    fs::copy(&chain.cache, &copy).expect("what a crash would leave");
    assert!(inspect_cache(&copy).expect("readable").expect("a cache").kept.is_none());
    drop(running);
    for left in [&copy, &chain.cache] {
        let (counts, before) = chain.session_with(left, 1);
        assert!(before == 0 && counts.filled > 0, "{before} {counts:?}");
    }
}

#[test]
fn a_killed_daemon_leaves_nothing_and_one_that_ends_in_order_all() {
    let chain = Chain::new(LARGE);
    let cache = chain.cache.to_str().expect("text");
    let serve = || Daemon::serve(&chain.top, &["--cache-image", cache, "--num-queues", "1"]);
    let read_all = |daemon: &Daemon| {
        let mut guest = daemon.connect();
        (0..DISK / BLOCK).for_each(|b| drop(guest.read(b * BLOCK, 64 << 10)));
    };
    let daemon = serve();
    (0..3).for_each(|_| read_all(&daemon));
    let log = daemon.stop().err;
    assert!(log.contains("read from this cache"), "{log}");
    let daemon = serve();
    assert!(daemon.log().contains("blocks of 136 are here from before"), "{}", daemon.log());
    read_all(&daemon);
    daemon.signal(libc::SIGKILL);
    assert!(!daemon.wait().status.success());
    let daemon = serve();
    assert!(daemon.log().contains("not ended in order: begins empty"), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn a_small_cache_stays_within_its_size_and_every_byte_is_right() {
    let chain = Chain::new(MIB + 200_000);
    for _ in 0..3 {
        let (counts, _) = chain.session(3);
        assert!(counts.replaced > 0 && counts.kept <= 16, "{counts:?}");
        assert!(fs::metadata(&chain.cache).expect("its length").len() <= MIB + 200_000);
    }
}

/// The table of a cache that was ended in order, changed by `change` with checksums that are right, by page.
fn with_table(from: &Path, to: &Path, change: impl Fn(&mut Vec<u64>)) {
    fs::copy(from, to).expect("copy");
    let file = File::options().read(true).write(true).open(to).expect("open");
    let (mut head, mut page) = ([0; HEADER_BYTES], [0; PAGE_BYTES]);
    file.read_exact_at(&mut head, 0).expect("read");
    file.read_exact_at(&mut page, TABLE_AT).expect("read");
    let header = Header::parse(&head).expect("a header");
    let mut entries: Vec<_> = page_of_bytes(&page, 0, Some(header.generation)).expect("a page").collect();
    change(&mut entries);
    assert_eq!(entries.len() as u64, PAGE_ENTRIES);
    let bytes = page_to_bytes(0, header.generation, entries.into_iter());
    file.write_all_at(&bytes, TABLE_AT).expect("write");
}

#[test]
fn entries_that_cannot_be_are_refused_all_of_them() {
    let chain = Chain::new(LARGE);
    chain.fill();
    let bad = chain.dir.path().join("bad.vci");
    let changes: [fn(&mut Vec<u64>); 5] = [
        |e| e[0] = DISK / BLOCK,
        |e| e[0] = u64::MAX - 1,
        |e| e.swap(0, 1),
        |e| e[17] = e[0],
        |e| e[5] = u64::MAX / BLOCK,
    ];
    for change in changes {
        with_table(&chain.cache, &bad, change);
        assert_eq!(vdimg(chain.dir.path(), "check bad.vci").status.code(), Some(2));
        assert_eq!(chain.session_with(&bad, 2).1, 0, "a wrong table was taken over");
    }
    with_table(&chain.cache, &bad, |e| e[3] = NO_BLOCK);
    assert_eq!(chain.session_with(&bad, 1).1, DISK / BLOCK - 1, "an empty place is nothing wrong");
}

#[test]
fn damaged_cache_images_are_refused_or_begin_empty() {
    let chain = Chain::new(LARGE);
    chain.fill();
    let bad = chain.dir.path().join("bad.vci");
    let good = fs::read(&chain.cache).expect("read");
    let try_it = |what: &str, bytes: &[u8]| {
        fs::write(&bad, bytes).expect("write");
        let how = OpenDisk { cache_image: Some(bad.clone()), ..OpenDisk::new(&chain.top) };
        match open_disk(&how) {
            Ok(opened) => {
                assert_eq!(opened.disk.cache_counts().expect("a cache").kept, 0, "{what}");
                drop(opened);
                chain.session_with(&bad, 1);
            }
            Err(e) => assert!(e.to_string().contains("bad.vci"), "{what}: {e}"),
        }
    };
    let places = [0, 4, 8, 16, 17, 21, 29, 37, 41, 57, 80, 84, 88, 96, 104, 120, 300, 508, 511];
    for at in places.into_iter().chain([4096, 4100, 4104, 4112, 4128, 8191]) {
        for flip in [1, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            try_it(&format!("byte {at} ^ {flip:#x}"), &bytes);
        }
    }
    for len in [0, 3, 512, 1024, 4096, 8192, good.len() - 1] {
        try_it(&format!("cut to {len}"), &good[..len]);
    }
    try_it("longer", &[&good[..], &[0]].concat());
    try_it("another file", &bytes(1 << 20, 3));
}

/// ext4 or a tmpfs of 2 MiB, on which the cache is to have 9.
#[test]
fn a_full_file_system_costs_the_cache_one_warning_and_no_request() {
    let mut chain = Chain::new(LARGE);
    let Some(mount) = Mount::small(chain.dir.path(), 2) else { return };
    chain.cache = mount.at.join("base.vci");
    create_cache(&chain.cache, LARGE, BLOCK).expect("a sparse file");
    let daemon = chain_daemon(&chain);
    let mut guest = daemon.connect();
    let base = fs::read(chain.dir.path().join("data.raw")).expect("read");
    for _ in 0..2 {
        for (n, block) in (0..).zip(base.chunks(64 << 10)) {
            assert!(guest.read(n * BLOCK, 64 << 10) == block, "block {n}");
        }
    }
    drop(guest);
    let log = daemon.stop().err;
    let warnings: Vec<_> = log.lines().filter(|l| l.contains("base.vci") && l.contains("WARN")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    assert!(warnings[0].contains("does without this cache"), "{log}");
    assert!(inspect_cache(&chain.cache).expect("readable").expect("a cache").header.unclean);
}

#[test]
fn what_makes_no_sense_is_refused_with_one_line() {
    let chain = Chain::new(LARGE);
    let d = chain.dir.path();
    ok(d, "create --format vdi --size 8M alone.vdi");
    let text = |name: &str| d.join(name).to_str().expect("text").to_string();
    let refused = |image: &str, cache: &str, more: &[&str], parts: &[&str]| {
        let (image, cache) = (text(image), text(cache));
        let mut c = vdblk(&["--blk-file", &image, "--cache-image", &cache, "--lock-wait", "0"]);
        c.args(["--log-level", "error", "--socket-path", &text("s")]).args(more);
        run(c).assert_refused(parts);
    };
    refused("alone.vdi", "base.vci", &[], &["alone.vdi", "nobody writes", "--overlay", "--read-only"]);
    refused("top.vdi", "alone.vdi", &[], &["alone.vdi", "no cache image"]);
    refused("top.vdi", "none.vci", &[], &["none.vci"]);
    let used = chain_daemon(&chain);
    refused("alone.vdi", "base.vci", &["--read-only"], &["base.vci", "another"]);
    used.stop();
    for (words, part) in [
        ("create-cache --size 8k small.vci", "at least"),
        ("create-cache --size 1G --block 100k odd.vci", "a power of two"),
        ("create-cache --size 1G disk.vdi", "its name says"),
        ("create-cache --size 1G base.vci", "nothing is overwritten"),
        ("convert --output-format raw base.vci x.raw", "it is a cache image and no disk"),
    ] {
        let out = vdimg(d, words);
        let err = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            out.status.code() == Some(1) && err.contains(part) && err.lines().count() == 1,
            "{words}: {err}"
        );
    }
}

fn chain_daemon(chain: &Chain) -> Daemon {
    Daemon::serve(&chain.top, &["--cache-image", chain.cache.to_str().expect("text")])
}

#[test]
fn vdimg_tells_what_a_cache_is() {
    let chain = Chain::new(LARGE);
    let d = chain.dir.path();
    assert!(ok(d, "info base.vci").contains("kept: 0 blocks"));
    assert!(ok(d, "check base.vci").contains("No errors"));
    chain.fill();
    let told = ok(d, "info base.vci");
    assert!(told.contains("kept: 128 blocks") && told.contains("caches: a disk of 8 MiB"), "{told}");
    let json: serde_json::Value = serde_json::from_str(&ok(d, "info --output json base.vci")).expect("JSON");
    assert_eq!(
        (&json["format"], &json["kept_blocks"], &json["unclean"]),
        (&"vci".into(), &128.into(), &false.into())
    );
    assert!(ok(d, "check --output json base.vci").contains("\"clean\""));
    let running = chain.open(Some(&chain.cache), true);
    assert!(ok(d, "info base.vci").contains("in use"));
    drop(running);
    assert_eq!(vdimg(d, "check base.vci").status.code(), Some(0), "an unclean end is no damage");
}

/// Random requests against a model for half a second; then the daemon ends in order, or is killed. What it has told.
fn load(image: &Path, options: &[&str], shadow: &Path, (mix, killed): (&str, bool)) -> String {
    let daemon = Daemon::serve(image, options);
    let (model, shadow) = (shadow.with_extension("model"), shadow.to_str().expect("text"));
    let (ended, result) = vubench(
        &daemon.socket,
        &[
            &["--verify", "--assume-zero", "--iodepth", "12", "--runtime", "0.5", "--shadow", shadow][..],
            &["--queues", "2", "--mix", mix, "--dump-model", model.to_str().expect("text")],
        ]
        .concat(),
    );
    assert!(ended.status.success(), "{ended:?}");
    for key in ["mismatches", "errors", "lost", "duplicates"] {
        assert_eq!(number(&result, key), 0, "{options:?}: {key} in {result}");
    }
    if killed {
        daemon.signal(libc::SIGKILL);
    } else {
        daemon.signal(libc::SIGTERM);
    }
    daemon.wait().err
}

/// On a diff over data, with a cache that is too small for it, over several sessions, two of which are killed.
#[test]
fn no_byte_is_wrong_under_load_with_a_cache() {
    for (engine, cache) in [("io_uring", "writeback"), ("threads", "none")] {
        let dir = scratch();
        let d = dir.path();
        let shadow = d.join("shadow");
        let options = ["--num-queues", "2", "--io-engine", engine, "--cache", cache];
        let base = vdi(&d.join("base.vdi"), 12 * MIB + 520 * 1024);
        load(&base, &options, &shadow, ("90,4,2,2,2", false));
        let top = diff(&d.join("top.vdi"), &base, None);
        ok(d, "create-cache --size 2M --block 16k base.vci");
        let image = d.join("base.vci");
        let options = [&options[..], &["--cache-image", image.to_str().expect("text")]].concat();
        let mut hits = 0;
        for killed in [false, true, false, true, false] {
            // mostly reads: what is written hides the base
            let log = load(&top, &options, &shadow, ("2,95,1,1,1", killed));
            let was_read = log.contains("MiB were read from this cache") && !log.contains(" 0 MiB were read");
            hits += u32::from(was_read);
        }
        assert!(hits > 0, "the cache was never read: that proves nothing");
        let model = fs::read(shadow.with_extension("model")).expect("the model");
        assert_eq!(first_difference(&contents(&[top, base]), &model), None, "{engine} {cache}");
    }
}
