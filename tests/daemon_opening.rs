//! What the daemon opens, and what it refuses: locks, parents, overlays, formats, files that are none. Every refusal is
//! one line that names the file, and leaves everything as it was.

mod daemon_support;

use daemon_support::client::{OK, pattern};
use daemon_support::images::{
    MIB, assert_dense, contents, diff, info, raw, set_parent_uuid, set_uuid, uuid, vdi,
};
use daemon_support::process::{Daemon, Ended, run, vdblk};
use daemon_support::{has, is_root, scratch};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const SIZE: u64 = 8 * MIB;

/// Starts the daemon where it is to be refused: at once, without waiting for locks.
fn try_to_serve(image: &Path, options: &[&str]) -> Ended {
    let sockets = scratch();
    let mut c = vdblk(&["--lock-wait", "0", "--blk-file"]);
    c.arg(image).args(options).arg("--socket-path").arg(sockets.path().join("s"));
    let ended = run(c);
    assert!(!sockets.path().join("s").exists());
    ended
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// Serves an image for as long as it takes to leave a mark on it.
fn mark(image: &Path, options: &[&str], offset: u64, seed: u8) {
    let daemon = Daemon::serve(image, options);
    daemon.connect().mark(offset, seed);
    daemon.stop();
}

/// A base with a mark of 1 at 0, and a diff with a mark of 2 at 1 MiB.
fn pair(base: &Path, top: &Path) {
    vdi(base, SIZE);
    mark(base, &[], 0, 1);
    diff(top, base, None);
    mark(top, &["--parent", text(base)], MIB, 2);
}

#[track_caller]
fn assert_pair_is_served(top: &Path, options: &[&str]) {
    let daemon = Daemon::serve(top, options);
    let mut guest = daemon.connect();
    guest.assert_marked(0, 1);
    guest.assert_marked(MIB, 2);
    guest.assert_zero(2 * MIB);
    drop(guest);
    daemon.stop();
}

// Locks.

#[test]
fn a_second_daemon_is_refused() {
    let dir = scratch();
    let image = vdi(&dir.path().join("disk.vdi"), SIZE);
    let daemon = Daemon::serve(&image, &[]);
    for (options, part) in [
        (&[][..], "is using it"),
        (&["--read-only"], "has it open for writing"),
        (&["--format", "raw"], "is using it"),
    ] {
        try_to_serve(&image, options).assert_refused(&[text(&image), part, "--lock-wait"]);
    }
    daemon.connect().mark(0, 1);
    daemon.stop();
    mark(&image, &["--lock-wait", "0"], 0, 2);
}

fn qemu(program: &str, args: &[&str], image: &Path) -> Ended {
    let mut c = Command::new(program);
    c.args(args).arg(image).stdin(Stdio::null());
    run(c)
}

#[test]
fn qemus_tools_keep_off_a_served_image() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let dir = scratch();
    let image = vdi(&dir.path().join("disk.vdi"), SIZE);
    let daemon = Daemon::serve(&image, &[]);
    for (program, args) in [
        ("qemu-img", &["check", "-f", "vdi"][..]),
        ("qemu-img", &["info"]),
        ("qemu-io", &["-f", "vdi", "-c", "write 0 4k"]),
        ("qemu-io", &["-f", "raw", "-c", "write 0 4k"]),
    ] {
        let ended = qemu(program, args, &image);
        assert!(!ended.status.success() && ended.err.contains("lock"), "{program} {args:?}: {ended:?}");
    }
    let looked = qemu("qemu-img", &["info", "-U"], &image);
    assert!(looked.status.success() && looked.out.contains("vdi"), "{looked:?}");
    daemon.connect().mark(0, 1);
    daemon.stop();
    let checked = qemu("qemu-img", &["check", "-f", "vdi"], &image);
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn a_lock_is_waited_for() {
    let dir = scratch();
    let image = vdi(&dir.path().join("disk.vdi"), SIZE);
    let holder = Daemon::serve(&image, &[]);
    let mut c = vdblk(&["--lock-wait", "25", "--blk-file"]);
    c.arg(&image);
    let mut waiter = Daemon::begin(c);
    holder.connect().mark(0, 1);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!waiter.has_ended() && !waiter.log().contains("serving"), "{}", waiter.log());
    holder.stop();
    waiter.wait_until_serving();
    waiter.connect().assert_marked(0, 1);
    waiter.stop();
}

#[test]
fn the_wait_for_a_lock_ends() {
    let dir = scratch();
    let image = vdi(&dir.path().join("disk.vdi"), SIZE);
    let holder = Daemon::serve(&image, &[]);
    let mut c = vdblk(&["--lock-wait", "1", "--blk-file"]);
    c.arg(&image).arg("--socket-path").arg(dir.path().join("s"));
    let ended = run(c);
    let (waits, refused) = ended.err.split_once('\n').expect("a line on the wait");
    assert!(waits.contains(text(&image)) && waits.contains("waiting for up to 1 s"), "{waits}");
    assert!(refused.starts_with("vdblk: ") && refused.contains("for 1 s"), "{refused}");
    assert_eq!((ended.status.code(), refused.lines().count()), (Some(1), 1), "{refused}");
    assert!(ended.took >= Duration::from_secs(1), "{ended:?}");
    holder.stop();
}

#[test]
fn readers_and_parents_are_shared() {
    let dir = scratch();
    let base = dir.path().join("base.vdi");
    let (a, b) = (dir.path().join("a.vdi"), dir.path().join("b.vdi"));
    pair(&base, &a);
    diff(&b, &base, None);
    let daemons = [
        Daemon::serve(&a, &[]),
        Daemon::serve(&b, &[]),
        Daemon::serve(&base, &["--read-only"]),
        Daemon::serve(&base, &["--read-only"]),
    ];
    for d in &daemons {
        d.connect().assert_marked(0, 1);
    }
    try_to_serve(&base, &["--allow-write-to-parent"]).assert_refused(&[text(&base), "is using it"]);
    daemons.into_iter().for_each(|d| drop(d.stop()));
    mark(&base, &["--allow-write-to-parent"], 4 * MIB, 4);
}

// Parents.

#[test]
fn parents_are_found_in_the_images_own_folder() {
    let dir = scratch();
    let (base, top) = (dir.path().join("some name.vdi"), dir.path().join("top.vdi"));
    pair(&base, &top);
    assert_pair_is_served(&top, &[]);
    // by a relative name too
    let mut c = vdblk(&["--blk-file", "top.vdi"]);
    c.current_dir(dir.path());
    let daemon = Daemon::with_socket(c);
    daemon.connect().assert_marked(0, 1);
    daemon.stop();
}

/// As VirtualBox lays a machine out: the base in the machine's folder, diffs below it in `Snapshots`.
#[test]
fn parents_are_found_as_virtualbox_lays_them_out() {
    let dir = scratch();
    let vm = dir.path().join("My VM");
    let snapshots = vm.join("Snapshots");
    fs::create_dir_all(&snapshots).expect("folders");
    let base = vm.join("My VM.vdi");
    let first = snapshots.join("{11111111-2222-3333-4444-555555555555}.vdi");
    let second = snapshots.join("{66666666-7777-8888-9999-aaaaaaaaaaaa}.vdi");
    pair(&base, &first);
    diff(&second, &first, None);
    assert_pair_is_served(&second, &[]);
    mark(&second, &[], 3 * MIB, 3);
    let all = contents(&[second.clone(), first.clone(), base.clone()]);
    for (at, seed) in [(0, 1), (MIB, 2), (3 * MIB, 3)] {
        assert!(all[at as usize..][..4096] == pattern(seed), "the mark {seed}");
    }
    // and neither of the parents may be written
    try_to_serve(&first, &[]).assert_refused(&[text(&first), text(&second)]);
    try_to_serve(&base, &[]).assert_refused(&[text(&base), text(&first)]);
}

#[test]
fn parents_are_found_below_a_given_folder() {
    let dir = scratch();
    let deep = dir.path().join("images/2024/a");
    let other = dir.path().join("other");
    fs::create_dir_all(&deep).expect("folders");
    fs::create_dir_all(&other).expect("folders");
    let (base, top) = (deep.join("base.vdi"), other.join("top.vdi"));
    pair(&base, &top);
    try_to_serve(&top, &[]).assert_refused(&[text(&top), &uuid(&base).to_string(), "--parent-dir"]);
    let images = dir.path().join("images");
    assert_pair_is_served(&top, &["--parent-dir", text(&images)]);
    assert_pair_is_served(&top, &["--parent-dir", text(&other), "--parent-dir", text(&deep)]);
}

#[test]
fn the_search_goes_only_so_deep() {
    let dir = scratch();
    let deep = dir.path().join("1/2/3/4");
    fs::create_dir_all(deep.join("5")).expect("folders");
    let (base, top) = (deep.join("base.vdi"), dir.path().join("top.vdi"));
    pair(&base, &top);
    assert_pair_is_served(&top, &[]);
    fs::rename(&base, deep.join("5/base.vdi")).expect("rename");
    try_to_serve(&top, &[]).assert_refused(&[text(&top), "was not found"]);
}

#[test]
fn links_out_of_the_folder_are_not_followed() {
    let dir = scratch();
    let (inside, outside) = (dir.path().join("inside"), dir.path().join("outside"));
    fs::create_dir_all(&inside).expect("folders");
    fs::create_dir_all(&outside).expect("folders");
    let (base, top) = (outside.join("base.vdi"), inside.join("top.vdi"));
    pair(&base, &top);
    symlink(&outside, inside.join("folder")).expect("link");
    symlink(&base, inside.join("base.vdi")).expect("link");
    symlink(&inside, inside.join("round")).expect("link");
    try_to_serve(&top, &[]).assert_refused(&[text(&top), "was not found"]);
    // a link the user names is the user's will
    assert_pair_is_served(&top, &["--parent", text(&inside.join("base.vdi"))]);
}

#[test]
fn two_files_with_the_parents_uuid_are_refused() {
    let dir = scratch();
    let (base, top) = (dir.path().join("base.vdi"), dir.path().join("top.vdi"));
    let copy = dir.path().join("copy.vdi");
    pair(&base, &top);
    fs::copy(&base, &copy).expect("copy");
    try_to_serve(&top, &[]).assert_refused(&[text(&top), text(&base), text(&copy), "--parent"]);
    assert_pair_is_served(&top, &["--parent", text(&copy)]);
    // one file under two names is one file
    fs::remove_file(&copy).expect("remove");
    fs::hard_link(&base, &copy).expect("link");
    assert_pair_is_served(&top, &[]);
}

#[test]
fn missing_parents_are_named() {
    let dir = scratch();
    let (base, top) = (dir.path().join("base.vdi"), dir.path().join("top.vdi"));
    pair(&base, &top);
    let wanted = uuid(&base).to_string();
    fs::write(dir.path().join("junk.vdi"), "no image").expect("write");
    fs::remove_file(&base).expect("remove");
    let before = fs::read(&top).expect("read");
    try_to_serve(&top, &[]).assert_refused(&[text(&top), &wanted, "--parent FILE", "--parent-dir"]);
    try_to_serve(&top, &["--parent", "gone.vdi"]).assert_refused(&["gone.vdi"]);
    assert!(fs::read(&top).expect("read") == before);
}

#[test]
fn wrong_parents_are_refused() {
    let dir = scratch();
    let (base, top) = (dir.path().join("base.vdi"), dir.path().join("top.vdi"));
    pair(&base, &top);
    let wrong = vdi(&dir.path().join("wrong.vdi"), SIZE);
    let before = fs::read(&top).expect("read");
    let refused = try_to_serve(&top, &["--parent", text(&wrong)]);
    refused.assert_refused(&[text(&top), text(&wrong), &uuid(&base).to_string(), "--allow-parent-mismatch"]);
    try_to_serve(&base, &["--allow-write-to-parent", "--parent", text(&wrong)]).assert_refused(&[
        text(&base),
        "base image",
        "leave --parent out",
    ]);
    assert!(fs::read(&top).expect("read") == before);
    let waived = Daemon::serve(&top, &["--parent", text(&wrong), "--allow-parent-mismatch"]);
    waived.connect().assert_zero(0);
    assert!(waived.stop().err.contains(&uuid(&wrong).to_string()), "it is warned of");
}

#[test]
fn parents_are_named_base_first() {
    let dir = scratch();
    let [base, middle, top] = ["base.vdi", "middle.vdi", "top.vdi"].map(|n| dir.path().join(n));
    pair(&base, &middle);
    diff(&top, &middle, None);
    let (b, m) = (text(&base), text(&middle));
    assert_pair_is_served(&top, &["--parent", b, "--parent", m]);
    try_to_serve(&top, &["--parent", m, "--parent", b]).assert_refused(&[text(&top), b, "base first"]);
    try_to_serve(&top, &["--parent", m]).assert_refused(&[m, &uuid(&base).to_string(), "--parent"]);
}

#[test]
fn circles_are_refused() {
    let dir = scratch();
    let (base, top) = (dir.path().join("base.vdi"), dir.path().join("top.vdi"));
    let [one, two] = ["one.vdi", "two.vdi"].map(|n| dir.path().join(n));
    vdi(&base, SIZE);
    diff(&one, &base, None);
    diff(&two, &one, None);
    set_parent_uuid(&one, uuid(&two));
    diff(&top, &two, None);
    for options in [&[][..], &["--read-only"]] {
        for image in [&one, &two, &top] {
            let refused = try_to_serve(image, options);
            refused.assert_refused(&["twice in its own chain"]);
        }
    }
    try_to_serve(&top, &["--parent", text(&top)]).assert_refused(&[text(&top), "twice in its own chain"]);
    fs::create_dir(dir.path().join("alone")).expect("a folder");
    let own = vdi(&dir.path().join("alone/own.vdi"), SIZE);
    set_parent_uuid(&own, uuid(&own));
    try_to_serve(&own, &[]).assert_refused(&[text(&own)]);
}

#[test]
fn a_smaller_base_has_zeros_beyond_its_end() {
    let dir = scratch();
    // not a whole number of the diff's blocks, so that one block lies across the end
    let base = vdi(&dir.path().join("base.vdi"), 3 * MIB + 8192);
    mark(&base, &[], 3 * MIB + 4096, 1);
    let top = diff(&dir.path().join("top.vdi"), &base, Some(SIZE));
    let daemon = Daemon::serve(&top, &[]);
    let mut guest = daemon.connect();
    assert_eq!(guest.size_bytes(), SIZE);
    let across = guest.read(3 * MIB, 16384);
    assert!(across[4096..8192] == pattern(1) && across[8192..].iter().all(|b| *b == 0));
    guest.assert_zero(5 * MIB);
    // a write beyond fills up its block from both sides of the base's end
    guest.mark(3 * MIB + 65536, 2);
    guest.assert_marked(3 * MIB + 4096, 1);
    guest.assert_zero(3 * MIB + 8192);
    drop(guest);
    daemon.stop();
    let all = contents(&[top, base]);
    assert!(all[(3 * MIB + 4096) as usize..][..4096] == pattern(1));
    assert!(all[(3 * MIB + 65536) as usize..][..4096] == pattern(2));
}

// Images that others are based on.

#[test]
fn an_image_that_others_are_based_on_is_not_written() {
    let dir = scratch();
    let (base, top) = (dir.path().join("base.vdi"), dir.path().join("top.vdi"));
    pair(&base, &top);
    let before = fs::read(&base).expect("read");
    let advice = ["--overlay", "--read-only", "--allow-write-to-parent"];
    try_to_serve(&base, &[]).assert_refused(&[&[text(&base), text(&top)][..], &advice].concat());
    let daemon = Daemon::serve(&base, &["--read-only"]);
    daemon.connect().assert_marked(0, 1);
    daemon.stop();
    assert!(fs::read(&base).expect("read") == before);
    mark(&base, &["--allow-write-to-parent"], 6 * MIB, 6);
    let warned = Daemon::serve(&top, &[]);
    warned.connect().assert_marked(6 * MIB, 6);
    assert!(warned.stop().err.contains("was changed since"), "the child was told nothing");
    fs::remove_file(&top).expect("remove");
    mark(&base, &[], 6 * MIB, 7);
}

// Overlays.

fn overlay_of(image: &Path, chain_below: &[PathBuf], options: &[&str]) {
    let dir = scratch();
    let overlay = dir.path().join("overlay.vdi");
    let below: Vec<_> = chain_below.iter().map(|p| fs::read(p).expect("read")).collect();
    let mut all = contents(chain_below);
    let daemon = Daemon::serve(image, &[&["--overlay", text(&overlay)], options].concat());
    let mut guest = daemon.connect();
    assert!(guest.read(0, 4096) == all[..4096]);
    for (offset, seed) in [(0, 11), (MIB + 512, 12), (7 * MIB, 13)] {
        guest.mark(offset, seed);
        all[offset as usize..][..4096].copy_from_slice(&pattern(seed));
    }
    assert_eq!(guest.flush(), OK);
    drop(guest);
    daemon.stop();
    for (path, bytes) in chain_below.iter().zip(below) {
        assert!(fs::read(path).expect("read") == bytes, "{} was changed", path.display());
    }
    assert_eq!(info(&overlay).variant, "diff");
    assert_dense(&overlay);
    let chain: Vec<_> = [overlay.clone()].iter().chain(chain_below).cloned().collect();
    assert!(contents(&chain) == all, "the overlay does not show what was written");
    // The same command once more goes on with it.
    let again = Daemon::serve(image, &[&["--overlay", text(&overlay)], options].concat());
    let mut guest = again.connect();
    assert!(guest.read(MIB, 4096) == all[MIB as usize..][..4096]);
    guest.assert_marked(7 * MIB, 13);
    guest.mark(5 * MIB, 14);
    all[5 * MIB as usize..][..4096].copy_from_slice(&pattern(14));
    drop(guest);
    let said = again.stop().err;
    assert!(said.contains(text(&overlay)) && said.contains("its contents are kept"), "{said}");
    assert!(contents(&chain) == all, "the overlay does not show what was written to it later");
}

#[test]
fn an_overlay_takes_the_writes() {
    let dir = scratch();
    let (base, top) = (dir.path().join("base.vdi"), dir.path().join("top.vdi"));
    pair(&base, &top);
    overlay_of(&base, std::slice::from_ref(&base), &[]);
    overlay_of(&top, &[top.clone(), base.clone()], &[]);
    overlay_of(&top, &[top.clone(), base.clone()], &["--parent", text(&base), "--cache", "none"]);
    let disk = raw(&dir.path().join("disk.raw"), SIZE);
    mark(&disk, &[], 0, 5);
    overlay_of(&disk, std::slice::from_ref(&disk), &[]);
    // a raw file that ends within a sector
    let odd = dir.path().join("odd.raw");
    fs::write(&odd, [&vec![7; SIZE as usize - 512][..], &[9; 100]].concat()).expect("write");
    overlay_of(&odd, std::slice::from_ref(&odd), &[]);
    // neither a file without permission to write nor one that is in use for reading is in the way
    fs::set_permissions(&base, fs::Permissions::from_mode(0o444)).expect("permissions");
    let reader = Daemon::serve(&base, &["--read-only"]);
    overlay_of(&base, std::slice::from_ref(&base), &[]);
    reader.stop();
}

#[test]
fn an_overlay_is_served_again_as_any_diff() {
    let dir = scratch();
    let base = vdi(&dir.path().join("base.vdi"), SIZE);
    mark(&base, &[], 0, 1);
    let overlay = dir.path().join("overlay.vdi");
    mark(&base, &["--overlay", text(&overlay)], MIB, 2);
    assert_pair_is_served(&overlay, &[]);
    let disk = raw(&dir.path().join("disk.img.raw"), SIZE);
    mark(&disk, &[], 0, 1);
    let over_raw = dir.path().join("over-raw.vdi");
    mark(&disk, &["--overlay", text(&over_raw)], MIB, 2);
    assert_pair_is_served(&over_raw, &["--parent", text(&disk)]);
}

/// A crash is no reason to begin anew: what was flushed into the overlay is there after the same command.
#[test]
fn an_overlay_outlives_a_kill() {
    let dir = scratch();
    let base = vdi(&dir.path().join("base.vdi"), SIZE);
    mark(&base, &[], 0, 1);
    let overlay = dir.path().join("o.vdi");
    let options = ["--overlay", text(&overlay), "--lock-wait", "20"];
    let daemon = Daemon::serve(&base, &options);
    let mut guest = daemon.connect();
    guest.mark(MIB, 2);
    assert_eq!(guest.flush(), OK);
    daemon.signal(libc::SIGKILL);
    drop((guest, daemon));
    assert_pair_is_served(&base, &options);
}

#[test]
fn only_an_overlay_of_this_image_is_gone_on_with() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let [base, other] = ["base.vdi", "other.vdi"].map(|n| vdi(&at(n), SIZE));
    let [disk, second] = ["disk.raw", "second.raw"].map(|n| raw(&at(n), SIZE));
    mark(&other, &["--overlay", text(&at("others.vdi"))], 0, 1);
    mark(&disk, &["--overlay", text(&at("disks.vdi"))], 0, 1);
    fs::write(at("text.img"), "something precious").expect("write");
    fs::write(at("empty.vdi"), "").expect("write");
    let cases = [
        (&base, "others.vdi", uuid(&other).to_string()),
        (&base, "disks.vdi", uuid(&base).to_string()),
        (&base, "other.vdi", "not a differencing image".into()),
        (&base, "text.img", "no readable VDI".into()),
        (&base, "empty.vdi", "no readable VDI".into()),
        (&disk, "others.vdi", format!("--blk-file {} --parent {}", text(&at("others.vdi")), text(&disk))),
        (&second, "disks.vdi", "--parent".into()),
    ];
    for (image, name, part) in cases {
        let before = fs::read(at(name)).expect("read");
        let refused = try_to_serve(image, &["--overlay", text(&at(name))]);
        refused.assert_refused(&[text(&at(name)), "exists", &part]);
        for advice in ["remove", "delete"] {
            assert!(!refused.err.contains(advice), "{}", refused.err);
        }
        assert!(fs::read(at(name)).expect("read") == before, "{name} was changed");
    }
    // A raw file of that name which is another one than it was.
    fs::rename(&second, &disk).expect("rename");
    try_to_serve(&disk, &["--overlay", text(&at("disks.vdi"))])
        .assert_refused(&["nothing shows", "--parent"]);
    // The same file, but somebody has written to it since.
    let [rewritten, written] = [raw(&at("rewritten.raw"), SIZE), vdi(&at("written.vdi"), SIZE)];
    for (base, overlay) in [(&rewritten, "a.vdi"), (&written, "b.vdi")] {
        mark(base, &["--overlay", text(&at(overlay))], 0, 1);
        try_to_serve(base, &[]).assert_refused(&["is the parent of", overlay]);
        mark(base, &["--allow-write-to-parent"], MIB, 4);
    }
    try_to_serve(&rewritten, &["--overlay", text(&at("a.vdi"))])
        .assert_refused(&["nothing shows", "--parent"]);
    try_to_serve(&written, &["--overlay", text(&at("b.vdi"))]).assert_refused(&["was written to since"]);
    // The user may know better, but not make a base image an overlay.
    mark(&base, &["--overlay", text(&at("others.vdi")), "--allow-parent-mismatch"], MIB, 2);
    try_to_serve(&base, &["--overlay", text(&other), "--allow-parent-mismatch"])
        .assert_refused(&["not a differencing image"]);
    // Another daemon at work on it.
    let busy = Daemon::serve(&base, &["--overlay", text(&at("busy.vdi"))]);
    try_to_serve(&base, &["--overlay", text(&at("busy.vdi"))]).assert_refused(&["busy.vdi", "is using it"]);
    busy.connect().mark(0, 3);
    busy.stop();
}

#[test]
fn overlays_that_cannot_be_leave_nothing() {
    let dir = scratch();
    let base = vdi(&dir.path().join("base.vdi"), SIZE);
    let before = fs::read(&base).expect("read");
    try_to_serve(&base, &["--overlay", text(&base)]).assert_refused(&[text(&base), "exists"]);
    let nowhere = dir.path().join("no/folder/o.vdi");
    try_to_serve(&base, &["--overlay", text(&nowhere)]).assert_refused(&[text(&nowhere)]);
    let misnamed = dir.path().join("o.raw");
    try_to_serve(&base, &["--overlay", text(&misnamed)]).assert_refused(&[text(&misnamed), "o.vdi"]);
    assert!(!misnamed.exists());
    let overlay = dir.path().join("o.vdi");
    let missing = dir.path().join("missing.vdi");
    try_to_serve(&missing, &["--overlay", text(&overlay)]).assert_refused(&[text(&missing)]);
    let writer = Daemon::serve(&base, &[]);
    try_to_serve(&base, &["--overlay", text(&overlay)]).assert_refused(&[text(&base), "open for writing"]);
    writer.stop();
    assert!(!overlay.exists(), "half an overlay was left");
    assert!(fs::read(&base).expect("read") == before);
}

// Formats.

#[test]
fn raw_is_never_probed() {
    let dir = scratch();
    let image = vdi(&dir.path().join("real.vdi"), SIZE);
    mark(&image, &[], 0, 1);
    let bytes = fs::read(&image).expect("read");
    let as_raw = dir.path().join("copy.raw");
    fs::copy(&image, &as_raw).expect("copy");
    for (path, options) in [(&as_raw, &[][..]), (&image, &["--format", "raw"])] {
        let daemon = Daemon::serve(path, options);
        let mut guest = daemon.connect();
        assert_eq!(guest.size_bytes(), bytes.len() as u64);
        assert!(guest.read(0, 4096) == bytes[..4096], "{}", path.display());
        drop(guest);
        daemon.stop();
    }
    // a guest that makes its raw disk look like a VDI, with a parent of its choice
    let disk = raw(&dir.path().join("disk.raw"), SIZE);
    let daemon = Daemon::serve(&disk, &[]);
    assert_eq!(daemon.connect().write(0, &bytes[..4096]), OK);
    daemon.stop();
    let daemon = Daemon::serve(&disk, &[]);
    let mut guest = daemon.connect();
    assert!(guest.size_bytes() == SIZE && guest.read(0, 4096) == bytes[..4096]);
    drop(guest);
    daemon.stop();
}

#[test]
fn names_that_do_not_tell_the_format_are_refused() {
    let dir = scratch();
    let image = vdi(&dir.path().join("real.vdi"), SIZE);
    let at = |name: &str| dir.path().join(name);
    raw(&at("zeros.img"), SIZE);
    fs::copy(&image, at("vdi.img")).expect("copy");
    fs::copy(&image, at("plain")).expect("copy");
    fs::copy(&image, at("vdi.vmdk")).expect("copy");
    fs::write(at("text.vdi"), [b'x'; 4096]).expect("write");
    fs::write(at("empty.vdi"), "").expect("write");
    for (name, part) in [
        ("zeros.img", "--format raw"),
        ("vdi.img", "--format vdi"),
        ("plain", "--format vdi"),
        ("vdi.vmdk", "--format"),
        ("text.vdi", "--format raw"),
        ("empty.vdi", "is empty"),
    ] {
        try_to_serve(&at(name), &[]).assert_refused(&[name, part]);
    }
    try_to_serve(&at("text.vdi"), &["--format", "vdi"]).assert_refused(&["text.vdi"]);
    try_to_serve(&at("vdi.vmdk"), &["--format", "vmdk"]).assert_refused(&["vdi.vmdk", "VMDK descriptor"]);
    try_to_serve(&at("vdi.vmdk"), &["--format", "dmg"]).assert_refused(&["vdi.vmdk", "DMG"]);
    mark(&at("zeros.img"), &["--format", "raw"], 0, 1);
    mark(&at("plain"), &["--format", "vdi"], 0, 1);
    // the same for parents
    let top = diff(&at("top.vdi"), &image, None);
    let unclear = text(&at("plain")).to_string();
    try_to_serve(&top, &["--parent", &unclear]).assert_refused(&[&unclear, "FILE,format=vdi"]);
    mark(&top, &["--parent", &format!("{unclear},format=vdi")], MIB, 1);
}

// Files that are none.

#[test]
fn files_that_cannot_be_served_are_named() {
    let dir = scratch();
    let missing = dir.path().join("missing.vdi");
    try_to_serve(&missing, &[]).assert_refused(&[text(&missing), "No such file", "("]);
    let folder = dir.path().join("folder.vdi");
    fs::create_dir(&folder).expect("a folder");
    try_to_serve(&folder, &[]).assert_refused(&[text(&folder), "is a directory"]);
    try_to_serve(&missing.join("below"), &[]).assert_refused(&["missing.vdi/below"]);
    try_to_serve(Path::new("/dev/null"), &["--format", "raw"])
        .assert_refused(&["/dev/null", "character device"]);
    let socket = dir.path().join("socket.raw");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("bind");
    try_to_serve(&socket, &[]).assert_refused(&[text(&socket), "is a socket"]);
}

/// Opening a FIFO waits for its other end, unless one is careful.
#[test]
fn a_fifo_makes_nobody_hang() {
    let dir = scratch();
    let fifo = dir.path().join("fifo.vdi");
    let made = Command::new("mkfifo").arg(&fifo).status();
    if !made.is_ok_and(|s| s.success()) {
        println!("skipped: mkfifo is not here");
        return;
    }
    try_to_serve(&fifo, &[]).assert_refused(&[text(&fifo), "FIFO"]);
    let (base, top) = (dir.path().join("base.vdi"), dir.path().join("top.vdi"));
    pair(&base, &top);
    assert_pair_is_served(&top, &[]);
    try_to_serve(&top, &["--parent", text(&fifo)]).assert_refused(&[text(&fifo), "FIFO"]);
}

#[test]
fn files_without_permission_are_named() {
    const NOBODY: u32 = 65534;
    let dir = scratch();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("permissions");
    let as_nobody = |args: &[&str]| {
        let mut c = vdblk(args);
        if is_root() {
            c.uid(NOBODY).gid(NOBODY);
        }
        c
    };
    if as_nobody(&["--version"]).stdout(Stdio::null()).spawn().is_err() {
        println!("skipped: the program is not within reach of another user");
        return;
    }
    let image = vdi(&dir.path().join("disk.vdi"), SIZE);
    for (mode, advice) in [(0o000, "permi"), (0o444, "--read-only")] {
        fs::set_permissions(&image, fs::Permissions::from_mode(mode)).expect("permissions");
        let refused = run(as_nobody(&["--blk-file", text(&image), "--socket-path", "/tmp/vdblk-never"]));
        refused.assert_refused(&[text(&image), "Permission denied", advice]);
    }
    let mut c = as_nobody(&["--read-only", "--blk-file"]);
    let sockets = scratch();
    fs::set_permissions(sockets.path(), fs::Permissions::from_mode(0o777)).expect("permissions");
    c.arg(&image).arg("--socket-path").arg(sockets.path().join("s"));
    let daemon = Daemon::spawn(c, sockets.path().join("s"), sockets);
    daemon.connect().assert_zero(0);
    daemon.stop();
}

/// A copy of the image itself, with its own UUID, is neither its parent nor its child.
#[test]
fn backups_beside_an_image_are_not_in_the_way() {
    let dir = scratch();
    let (base, top) = (dir.path().join("base.vdi"), dir.path().join("top.vdi"));
    pair(&base, &top);
    fs::copy(&top, dir.path().join("top (backup).vdi")).expect("copy");
    assert_pair_is_served(&top, &[]);
    let alone = vdi(&dir.path().join("alone.vdi"), SIZE);
    let renamed = dir.path().join("renamed.vdi");
    fs::copy(&alone, &renamed).expect("copy");
    set_uuid(&renamed, uuid(&base).to_string().replace(|c| c != '-', "7").parse().expect("a UUID"));
    mark(&alone, &[], 0, 1);
    mark(&renamed, &[], 0, 1);
}
