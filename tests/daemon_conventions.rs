//! The daemon behaves as QEMU's conventions for back-ends and as systemd expect it to.

mod daemon_support;

use daemon_support::client::Guest;
use daemon_support::images::{MIB, assert_checked_by_qemu, assert_dense, info, raw, vdi};
use daemon_support::process::{Daemon, Ended, Guarded, run, signal, vdblk, vdblk_by_shell, wait};
use daemon_support::{PATIENCE, comes_true, scratch, vubench};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vhost::VhostBackend;

/// What the daemon may take from SIGTERM to its end, by its promise.
const END: Duration = Duration::from_secs(1);
/// With --flush-on-exit it also waits for the disk, which others may keep busy.
const DISK: Duration = PATIENCE;
/// How long a load runs before it is cut off.
const LOADED: Duration = Duration::from_millis(300);

fn image(dir: &Path) -> PathBuf {
    vdi(&dir.join("disk.vdi"), 16 * MIB)
}

/// A daemon whose command has all but `--blk-file`.
fn on_own_socket(mut command: Command, image: &Path) -> Command {
    command.arg("--blk-file").arg(image);
    command
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
}

#[test]
fn capabilities_are_printed_whatever_else_is_said() {
    let wanted: Value = serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]});
    for args in [
        &["--print-capabilities"][..],
        &["--print-capabilities", "--no-such-option", "--num-queues", "many"],
        &["--blk-file", "/no/such/file", "--socket-path", "/no/such/dir/s", "--print-capabilities"],
        &["--fd", "3", "--socket-path", "x", "--print-capabilities", "--help"],
    ] {
        let ended = run(vdblk(args));
        assert_eq!(ended.status.code(), Some(0), "{args:?}: {ended:?}");
        assert_eq!(serde_json::from_str::<Value>(&ended.out).expect("JSON"), wanted);
        assert_eq!(ended.err, "");
    }
}

#[test]
fn capabilities_that_cannot_be_printed_are_a_plain_failure() {
    let mut c = vdblk(&["--print-capabilities"]);
    c.stdout(fs::File::options().write(true).open("/dev/full").expect("/dev/full"));
    let mut child = c.stderr(Stdio::piped()).spawn().expect("start");
    let mut err = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().expect("piped"), &mut err).expect("read");
    assert_eq!(wait(&mut child, PATIENCE).code(), Some(1));
    assert!(err.lines().count() == 1 && err.contains("No space left"), "{err}");
}

#[test]
fn a_socket_of_its_own_making() {
    let dir = scratch();
    for (options, mode) in
        [(&[][..], 0o600), (&["--socket-mode", "0660"], 0o660), (&["--socket-mode", "666"], 0o666)]
    {
        let daemon = Daemon::serve(&image_named(dir.path(), mode), options);
        let meta = fs::metadata(&daemon.socket).expect("the socket");
        assert_eq!(meta.permissions().mode() & 0o777, mode, "{options:?}");
        daemon.connect().mark(0, 1);
        let socket = daemon.socket.clone();
        daemon.stop();
        assert!(!socket.exists(), "the socket's name is left behind");
    }
}

fn image_named(dir: &Path, number: u32) -> PathBuf {
    vdi(&dir.join(format!("{number}.vdi")), 16 * MIB)
}

#[test]
fn the_sockets_group_is_as_asked_for() {
    let dir = scratch();
    let image = image(dir.path());
    let own = fs::metadata("/proc/self").expect("own process").gid();
    let daemon = Daemon::serve(&image, &["--socket-group", &own.to_string()]);
    assert_eq!(fs::metadata(&daemon.socket).expect("the socket").gid(), own);
    daemon.stop();
    let mut c = on_own_socket(vdblk(&["--socket-group", "no-such-group"]), &image);
    c.arg("--socket-path").arg(dir.path().join("s"));
    run(c).assert_refused(&["no-such-group", "--socket-group"]);
    assert!(!dir.path().join("s").exists());
    if daemon_support::is_root() {
        let daemon = Daemon::serve(&image, &["--socket-group", "daemon"]);
        assert_ne!(fs::metadata(&daemon.socket).expect("the socket").gid(), own);
        daemon.stop();
    } else {
        println!("skipped: only root can give a socket to any group");
    }
}

/// cloud-hypervisor connects again at once, and gives its disk up if it reaches one who is about to go.
#[test]
fn who_sees_the_end_of_a_connection_reaches_nobody_who_is_about_to_end() {
    let dir = scratch();
    let image = image(dir.path());
    for _ in 0..20 {
        let daemon = Daemon::serve(&image, &[]);
        let mut front_end = UnixStream::connect(&daemon.socket).expect("connect");
        daemon.wait_for_log("front-end connected");
        daemon.signal(libc::SIGTERM);
        assert_eq!(std::io::Read::read(&mut front_end, &mut [0]).expect("the end"), 0);
        assert!(UnixStream::connect(&daemon.socket).is_err(), "somebody listens");
        assert!(daemon.wait().status.success());
    }
}

/// A connection to a back-end is served once and ends the daemon when it goes.
#[test]
fn a_connected_descriptor() {
    let dir = scratch();
    let image = image(dir.path());
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let mut c = on_own_socket(vdblk_by_shell("exec 7<&0 0</dev/null"), &image);
    c.args(["--fd", "7"]).stdin(Stdio::from(OwnedFd::from(theirs)));
    let mut daemon = Daemon::spawn(c, PathBuf::new(), scratch());
    let mut guest = Guest::over(ours, 1);
    guest.mark(8192, 3);
    guest.assert_marked(8192, 3);
    assert!(!daemon.has_ended());
    drop(guest);
    let ended = daemon.wait();
    assert!(ended.status.success(), "{ended:?}");
    assert_dense(&image);
}

#[test]
fn a_listening_descriptor() {
    let dir = scratch();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).expect("bind");
    let mut c = on_own_socket(vdblk_by_shell("exec 9<&0 0</dev/null"), &image(dir.path()));
    c.args(["--fd", "9"]).stdin(Stdio::from(OwnedFd::from(listener)));
    let daemon = Daemon::spawn(c, socket.clone(), scratch());
    for seed in 1..4 {
        daemon.connect().mark(4096, seed);
        daemon.connect().assert_marked(4096, seed);
    }
    daemon.stop();
    assert!(is_socket(&socket), "it is not ours to remove");
}

#[test]
fn a_socket_from_systemd() {
    let dir = scratch();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).expect("bind");
    let prepare = "exec 3<&0 0</dev/null; export LISTEN_FDS=1 LISTEN_PID=$$";
    let mut c = on_own_socket(vdblk_by_shell(prepare), &image(dir.path()));
    c.stdin(Stdio::from(OwnedFd::from(listener)));
    let daemon = Daemon::spawn(c, socket.clone(), scratch());
    daemon.connect().mark(0, 1);
    daemon.connect().assert_marked(0, 1);
    daemon.stop();
    assert!(is_socket(&socket));
}

#[test]
fn descriptors_that_are_none_are_refused() {
    let dir = scratch();
    let image = image(dir.path());
    for (prepare, number, part) in [
        ("", "55", "descriptor 55 is not open"),
        ("", "1", "standard stream"),
        ("exec 6</dev/null", "6", "not a unix stream socket"),
    ] {
        let mut c = on_own_socket(vdblk_by_shell(prepare), &image);
        c.args(["--fd", number]);
        run(c).assert_refused(&[part]);
    }
}

#[test]
fn sockets_from_systemd_that_do_not_fit_are_refused() {
    let dir = scratch();
    let image = image(dir.path());
    for (prepare, part) in [
        ("exec 3<&0 4<&0; export LISTEN_FDS=2 LISTEN_PID=$$", "2 sockets"),
        ("export LISTEN_FDS=1 LISTEN_PID=1", "no socket was given"),
        ("exec 3</dev/null; export LISTEN_FDS=1 LISTEN_PID=$$", "systemd's socket"),
    ] {
        let listener = UnixListener::bind(dir.path().join("s")).expect("bind");
        let mut c = on_own_socket(vdblk_by_shell(prepare), &image);
        c.stdin(Stdio::from(OwnedFd::from(listener)));
        run(c).assert_refused(&[part]);
        fs::remove_file(dir.path().join("s")).expect("remove");
    }
}

#[test]
fn it_stays_in_the_foreground() {
    let dir = scratch();
    let daemon = Daemon::serve(&image(dir.path()), &[]);
    // The process that was started is the one that listens: its own descriptors hold the socket.
    let table = fs::read_to_string("/proc/net/unix").expect("sockets");
    let line =
        table.lines().find(|l| l.ends_with(daemon.socket.to_str().expect("text"))).expect("the socket");
    let wanted = format!("socket:[{}]", line.split_whitespace().nth(6).expect("an inode"));
    let fds = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("descriptors");
    let held = fds.flatten().filter_map(|e| fs::read_link(e.path()).ok());
    assert!(held.into_iter().any(|l| l.to_str() == Some(&wanted)), "{wanted} is another process's");
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.pid()));
    assert_eq!(children.unwrap_or_default().trim(), "");
    daemon.stop();
}

#[test]
fn a_stale_socket_is_replaced() {
    let dir = scratch();
    let image = image(dir.path());
    let mut daemon = Daemon::serve(&image, &[]);
    let left = dir.path().join("left");
    fs::rename(&daemon.socket, &left).expect("rename");
    daemon.signal(libc::SIGKILL);
    assert!(comes_true(|| daemon.has_ended()));
    assert!(is_socket(&left));
    let mut c = on_own_socket(vdblk(&[]), &image);
    c.arg("--socket-path").arg(&left);
    let second = Daemon::spawn(c, left.clone(), scratch());
    second.connect().mark(0, 7);
    second.stop();
    assert!(!left.exists());
}

#[test]
fn a_live_socket_and_other_things_are_left_alone() {
    let dir = scratch();
    let (a, b) = (image_named(dir.path(), 1), image_named(dir.path(), 2));
    let daemon = Daemon::serve(&a, &[]);
    let start_at = |path: &Path| {
        let mut c = vdblk(&["--socket-path"]);
        c.arg(path).arg("--blk-file").arg(&b);
        run(c)
    };
    let name = daemon.socket.to_str().expect("text").to_string();
    start_at(&daemon.socket).assert_refused(&[&name, "another process listens", "another path"]);
    daemon.connect().mark(0, 1);
    daemon.stop();

    let file = dir.path().join("precious");
    fs::write(&file, "text").expect("write");
    start_at(&file).assert_refused(&["precious", "not a socket", "another path"]);
    assert_eq!(fs::read_to_string(&file).expect("still there"), "text");
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).expect("a folder");
    start_at(&folder).assert_refused(&["folder", "not a socket"]);
    assert!(folder.is_dir());
    start_at(&dir.path().join("no/such/folder/s")).assert_refused(&["no/such/folder/s"]);
    start_at(&dir.path().join("x".repeat(120))).assert_refused(&["xxx", "too long"]);
}

/// Whoever took the name meanwhile keeps it.
#[test]
fn only_its_own_socket_is_removed_at_the_end() {
    let dir = scratch();
    let mut daemon = Daemon::serve(&image(dir.path()), &[]);
    let path = daemon.socket.clone();
    fs::remove_file(&path).expect("remove");
    let _other = UnixListener::bind(&path).expect("bind");
    daemon.signal(libc::SIGTERM);
    assert!(comes_true(|| daemon.has_ended()));
    assert!(is_socket(&path), "another's socket was removed");
}

#[test]
fn systemd_is_told_when_front_ends_can_be_served() {
    let dir = scratch();
    let sockets = tempfile::tempdir().expect("temporary folder");
    let notify = sockets.path().join("notify");
    let receiver = UnixDatagram::bind(&notify).expect("bind");
    receiver.set_read_timeout(Some(PATIENCE)).expect("time-out");
    let mut c = on_own_socket(vdblk(&[]), &image(dir.path()));
    c.env("NOTIFY_SOCKET", &notify);
    let daemon = Daemon::begin(c);
    let mut buf = [0; 256];
    let n = receiver.recv(&mut buf).expect("a message");
    assert!(String::from_utf8_lossy(&buf[..n]).lines().any(|l| l == "READY=1"));
    // ready is ready: no second try is needed
    Guest::over(UnixStream::connect(&daemon.socket).expect("it listens"), 1).mark(0, 1);
    daemon.stop();
}

#[track_caller]
fn assert_ends_well(daemon: Daemon, number: i32, at_most: Duration) -> Ended {
    let socket = daemon.socket.clone();
    let start = Instant::now();
    daemon.signal(number);
    let ended = daemon.wait();
    assert!(start.elapsed() <= at_most, "it took {:?}", start.elapsed());
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(!socket.exists());
    ended
}

#[test]
fn signals_end_an_idle_daemon() {
    let dir = scratch();
    for number in [libc::SIGTERM, libc::SIGINT] {
        assert_ends_well(Daemon::serve(&image_named(dir.path(), number as u32), &[]), number, END);
        let connected = Daemon::serve(&image_named(dir.path(), 100 + number as u32), &["--flush-on-exit"]);
        let mut guest = connected.connect();
        guest.mark(0, 1);
        assert_ends_well(connected, number, DISK);
    }
}

/// A burst of signals is no more than one.
#[test]
fn impatient_users_do_no_harm() {
    let dir = scratch();
    let image = image(dir.path());
    let daemon = Daemon::serve(&image, &[]);
    daemon.connect().mark(3 * MIB, 1);
    daemon.signal(libc::SIGINT);
    daemon.signal(libc::SIGTERM);
    assert_ends_well(daemon, libc::SIGINT, END);
    assert_dense(&image);
}

#[test]
fn signals_under_load_leave_the_image_clean_and_dense() {
    let dir = scratch();
    for (n, number, options) in [
        (1, libc::SIGTERM, &["--num-queues", "2"][..]),
        (2, libc::SIGINT, &["--num-queues", "2", "--io-engine", "threads"]),
        (3, libc::SIGTERM, &["--num-queues", "2", "--flush-on-exit", "--cache", "none"]),
    ] {
        let at_most = if options.contains(&"--flush-on-exit") { DISK } else { END };
        let image = vdi(&dir.path().join(format!("{n}.vdi")), 64 * MIB);
        let daemon = Daemon::serve(&image, options);
        let before = fs::metadata(&image).expect("the image").blocks();
        let args = ["--queues", "2", "--rw", "randrw", "--iodepth", "16", "--runtime", "60", "--ramp", "0"];
        let mut load = vubench::command(&daemon.socket, &args);
        let load = load.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start the load");
        let load = Guarded(load);
        let grows = comes_true(|| fs::metadata(&image).is_ok_and(|m| m.blocks() > before + 2048));
        std::thread::sleep(LOADED);
        assert!(grows, "the load does not write");
        let ended = assert_ends_well(daemon, number, at_most);
        drop(load);
        assert!(ended.err.contains("front-end connected"), "{ended:?}");
        assert!(info(&image).allocated_blocks >= Some(8), "{:?}", info(&image));
        assert_dense(&image);
        assert_checked_by_qemu(&image);
    }
}

/// Waiting for a lock is no reason to stay.
#[test]
fn signals_end_a_daemon_that_waits_for_a_lock() {
    let dir = scratch();
    let image = image(dir.path());
    let holder = Daemon::serve(&image, &[]);
    for number in [libc::SIGTERM, libc::SIGINT] {
        let waiter = Daemon::begin(on_own_socket(vdblk(&["--lock-wait", "60"]), &image));
        // it has been started when it has its signal handlers, the only ones of this program
        let status = format!("/proc/{}/status", waiter.pid());
        assert!(comes_true(|| fs::read_to_string(&status).is_ok_and(|s| catches(&s, number))));
        assert_ends_well(waiter, number, END);
    }
    holder.connect().mark(0, 1);
    holder.stop();
}

/// Whether a process catches a signal, by what /proc says of it.
fn catches(status: &str, number: i32) -> bool {
    let line = status.lines().find_map(|l| l.strip_prefix("SigCgt:"));
    let mask = line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (number - 1)) != 0
}

#[test]
fn once_serves_one_front_end_and_ends() {
    let dir = scratch();
    let image = image(dir.path());
    let mut daemon = Daemon::serve(&image, &["--once"]);
    // one that says nothing, as a look whether somebody listens, does not count
    drop(UnixStream::connect(&daemon.socket).expect("it listens"));
    let mut guest = daemon.connect();
    guest.mark(0, 9);
    assert!(!daemon.has_ended());
    drop(guest);
    let socket = daemon.socket.clone();
    let ended = daemon.wait();
    assert!(ended.status.success() && !socket.exists(), "{ended:?}");
    assert_dense(&image);
}

#[test]
fn it_listens_again_when_a_front_end_went() {
    let dir = scratch();
    let daemon = Daemon::serve(&image(dir.path()), &["--num-queues", "2"]);
    for seed in 1..6u8 {
        let mut guest = Guest::connect(&daemon.socket, 1 + usize::from(seed % 2));
        guest.mark(u64::from(seed) * MIB, seed);
        // some go without a word, with a request in flight
        drop(guest);
    }
    let mut guest = daemon.connect();
    for seed in 1..6u8 {
        guest.assert_marked(u64::from(seed) * MIB, seed);
    }
    drop(guest);
    let ended = daemon.stop();
    assert_eq!(ended.err.matches("front-end disconnected").count(), 6, "{}", ended.err);
}

#[test]
fn the_options_reach_the_guest() {
    let dir = scratch();
    let image = image(dir.path());
    let discard = 1 << 13;
    let read_only = 1 << 5;
    let daemon = Daemon::serve(&image, &["--serial", "disk-4711", "--num-queues", "3"]);
    let mut guest = daemon.connect();
    assert_eq!(guest.serial(), "disk-4711");
    assert_eq!(guest.config(34, 2), [3, 0]);
    assert_eq!(guest.size_bytes(), 16 * MIB);
    assert!(guest.has(discard) && !guest.has(read_only));
    drop(guest);
    daemon.stop();
    let daemon = Daemon::serve(&image, &["--discard", "ignore"]);
    assert!(!daemon.connect().has(discard));
    daemon.stop();
    let before = fs::read(&image).expect("read");
    let daemon = Daemon::serve(&image, &["--read-only"]);
    let mut guest = daemon.connect();
    assert!(guest.has(read_only) && !guest.has(discard));
    assert_ne!(guest.write(0, &[1; 512]), 0);
    drop(guest);
    daemon.stop();
    assert!(fs::read(&image).expect("read") == before, "a read-only disk was changed");
}

#[test]
fn the_log_is_for_machines_or_for_people() {
    let dir = scratch();
    let image = image(dir.path());
    let served = |options: &[&str]| {
        let daemon = Daemon::serve(&image, options);
        drop(daemon.connect());
        daemon.wait_for_log("front-end disconnected");
        daemon.stop().err
    };
    let text = served(&["--num-queues", "2"]);
    assert!(!text.contains('\x1b'), "colour in a pipe: {text:?}");
    assert!(text.lines().all(|l| l.contains("INFO")), "{text}");
    let has_time = |l: &str| l.starts_with("20") && l[..30].contains('T') && l[..30].contains('Z');
    assert!(text.lines().all(has_time), "{text}");
    for part in [
        "disk.vdi: vdi 1.1, dynamic; 16 MiB (16777216 bytes); 1 image; 2 queues of up to 1024; ",
        "; cache writeback; discard unmap; ",
        "; socket /",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.contains("; io_uring; ") || text.contains("; threads, not io_uring: "), "{text}");
    let json = served(&["--log-format", "json"]);
    assert!(json.lines().count() >= 3, "{json}");
    for line in json.lines() {
        let v: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(v["level"].is_string() && v["fields"]["message"].is_string(), "{line}");
    }
    let quiet = Daemon::begin(on_own_socket(vdblk(&["--log-level", "error"]), &image));
    quiet.connect().mark(0, 1);
    assert_eq!(quiet.stop().err, "");
}

/// A guest whose memory is not shared has regions without descriptors: a message nobody can do anything with.
#[test]
fn memory_that_is_not_shared_is_told_of() {
    let dir = scratch();
    let daemon = Daemon::serve(&image(dir.path()), &[]);
    let mut front_end = UnixStream::connect(&daemon.socket).expect("connect");
    // SET_MEM_TABLE, version 1, 40 bytes: one region of 1 MiB
    let header = [5u32, 1, 40, 1, 0].map(u32::to_ne_bytes).concat();
    let region = [0u64, MIB, 0x7000_0000, 0].map(u64::to_ne_bytes).concat();
    front_end.write_all(&[header, region].concat()).expect("send");
    daemon.wait_for_log("share=on");
    daemon.connect().mark(0, 1);
    daemon.stop();
}

/// A log that nobody reads any more, or that has no room, is no reason to end a disk.
#[test]
fn a_log_that_cannot_be_written_does_no_harm() {
    let dir = scratch();
    let (reader, pipe) = std::io::pipe().expect("a pipe");
    drop(reader);
    let full = fs::File::options().write(true).open("/dev/full").expect("/dev/full");
    for (n, log) in [Stdio::from(pipe), Stdio::from(full)].into_iter().enumerate() {
        let image = image_named(dir.path(), n as u32);
        let socket = dir.path().join(format!("{n}.s"));
        let mut c = on_own_socket(vdblk(&["--log-level", "trace"]), &image);
        let child = c.arg("--socket-path").arg(&socket).stderr(log).spawn().expect("start");
        let mut daemon = Guarded(child);
        for seed in 1..4 {
            let mut guest = Guest::connect(&socket, 1);
            guest.mark(u64::from(seed) * MIB, seed);
            // what front-ends say wrongly is logged
            guest.front_end.set_vring_num(60000, 1).expect_err("no such queue");
        }
        signal(&daemon.0, libc::SIGTERM);
        assert_eq!(wait(&mut daemon.0, PATIENCE).code(), Some(0));
        assert_dense(&image);
        assert_eq!(info(&image).allocated_blocks, Some(3));
    }
    let mut c = vdblk(&["--socket-path", "s", "--blk-file", "/no/such/file"]);
    let (reader, pipe) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut child = c.stderr(pipe).spawn().expect("start");
    assert_eq!(wait(&mut child, PATIENCE).code(), Some(1));
}

#[track_caller]
fn assert_wrong_usage(args: &[&str], part: &str) {
    let ended = run(vdblk(args));
    assert_eq!(ended.status.code(), Some(2), "{args:?}: {ended:?}");
    assert_eq!(ended.err.lines().count(), 1, "{args:?}: {}", ended.err);
    assert!(ended.err.contains(part), "{args:?}: {}", ended.err);
    assert!(ended.err.starts_with("vdblk: ") && ended.err.contains("--help"), "{}", ended.err);
}

#[test]
fn wrong_usage_is_told_in_one_line_with_status_2() {
    for (options, part) in [
        (&["--no-such-option"][..], "--no-such-option"),
        (&["--read-onyl"], "--read-only"),
        (&["--fd", "3"], "--fd"),
        (&["--overlay", "o.vdi", "--read-only"], "--overlay"),
        (&["--num-queues", "0"], "--num-queues"),
        (&["--num-queues", "65"], "64"),
        (&["--queue-size", "100"], "power of two"),
        (&["--queue-size", "2048"], "1024"),
        (&["--cache", "fast"], "writeback"),
        (&["--io-engine", "aio"], "io_uring"),
        (&["--format", "floppy"], "floppy"),
        (&["--parent", "p.vdi,format=floppy"], "floppy"),
        (&["--socket-mode", "999"], "octal"),
        (&["--serial", "123456789012345678901"], "20 bytes"),
        (&["--lock-wait=-1"], "--lock-wait"),
        (&["stray.vdi"], "stray.vdi"),
    ] {
        let both = ["--socket-path", "s", "--blk-file", "a.vdi"];
        assert_wrong_usage(&[&both, options].concat(), part);
    }
    assert_wrong_usage(&[], "--blk-file");
    assert_wrong_usage(&["--socket-path", "s"], "--blk-file");
    assert_wrong_usage(&["--blk-file", "a.vdi"], "--socket-path");
}

#[test]
fn help_and_version_are_no_errors() {
    let help = run(vdblk(&["--help"]));
    assert!(help.status.success() && help.out.contains("--print-capabilities"), "{help:?}");
    let version = run(vdblk(&["--version"]));
    assert!(version.status.success() && version.out.starts_with("vdblk "), "{version:?}");
}

#[test]
fn raw_disks_are_served_as_well() {
    let dir = scratch();
    let image = raw(&dir.path().join("disk.raw"), 8 * MIB);
    let daemon = Daemon::serve(&image, &[]);
    daemon.connect().mark(4096, 5);
    assert_ends_well(daemon, libc::SIGTERM, END);
    let bytes = fs::read(&image).expect("read");
    assert_eq!(bytes.len() as u64, 8 * MIB);
    assert!(bytes[4096..8192] == daemon_support::client::pattern(5));
}
