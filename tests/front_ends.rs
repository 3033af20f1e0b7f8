//! Real virtual machine monitors attach: each boots a guest of a few KiB (`scripts/guest/nano`) on a disk of ours, which
//! reads, writes, discards and flushes it. QEMU interprets the guest; the two others need /dev/kvm, and are found on the
//! PATH or named by `CLOUD_HYPERVISOR` and `FIRECRACKER`.

mod daemon_support;

use daemon_support::images::{diff, first_difference, raw};
use daemon_support::process::{Daemon, Guarded, run, vdblk};
use daemon_support::{PATIENCE, comes_true, scratch};
use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const DISK: usize = 16 << 20;
const SECTOR: usize = 512;
/// Where the guest tries things; it leaves zeros there if it may.
const TRIED: usize = 8;
/// Where the guest finds the pattern.
const FOUND: usize = 8192;
/// Where it leaves it: over the second half of what it found.
const LEFT: usize = 8200;
const PATTERN_BYTES: usize = 8192;

/// What the guest writes and expects; as `nano.c` makes it.
fn pattern() -> Vec<u8> {
    (0..PATTERN_BYTES).map(|i| (i * 7 + (i >> 9)) as u8).collect()
}

/// Where tests leave word that they did not run: past the test harness, which shows nothing of a test that passes.
fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}

/// A monitor that can be run here; says so if there is none. One that is named and is not there is a failure.
fn monitor(name: &str, variable: &str) -> Option<PathBuf> {
    if let Some(named) = std::env::var_os(variable) {
        let named = PathBuf::from(named);
        assert!(is_program(&named), "{variable} names no program: {}", named.display());
        return Some(named);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| is_program(p));
    if found.is_none() {
        skipped(&format!("{name} is not on the PATH, nor named by {variable}"));
    }
    found
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// A monitor that needs /dev/kvm.
fn monitor_on_kvm(name: &str, variable: &str) -> Option<PathBuf> {
    let program = monitor(name, variable)?;
    if let Err(e) = File::options().read(true).write(true).open("/dev/kvm") {
        skipped(&format!("{name} needs /dev/kvm: {e}"));
        return None;
    }
    Some(program)
}

/// The guest's program, built for this test; says so where there is no compiler.
fn payload(dir: &Path) -> Option<PathBuf> {
    if !daemon_support::has("gcc") || !daemon_support::has("objcopy") {
        skipped("the guest's program needs gcc and binutils");
        return None;
    }
    let out = dir.join("nano.elf");
    let mut c = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/guest/nano/mk.sh"));
    c.arg(&out).stdin(Stdio::null());
    let ended = run(c);
    assert!(ended.status.success(), "{ended:?}");
    Some(out)
}

/// Everything a monitor has to be told.
struct Boot<'a> {
    program: &'a Path,
    payload: &'a Path,
    socket: &'a Path,
    /// A folder for what it leaves.
    dir: &'a Path,
    /// The payload's command line.
    words: &'a str,
    /// What to do when the guest has said this.
    meanwhile: Option<(&'a str, &'a dyn Fn())>,
}

/// One of those who drive us.
#[derive(Clone, Copy)]
struct Monitor {
    /// Boots the guest until it has turned its machine off; what it said.
    boot: fn(&Boot<'_>) -> String,
    /// Hands discards and write-zeroes on.
    discards: bool,
}

fn qemu(boot: &Boot<'_>) -> String {
    let mut c = Command::new(boot.program);
    c.args(
        "-M q35,memory-backend=mem -accel tcg -m 64M -nodefaults -no-user-config -display none".split(' '),
    )
    .args(["-object", "memory-backend-memfd,id=mem,size=64M,share=on", "-no-reboot", "-serial", "stdio"])
    .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"])
    .arg(boot.payload)
    .args(["-append", &format!("exit=qemu {}", boot.words), "-chardev"])
    .arg(format!("socket,id=c,path={}", boot.socket.display()))
    .args(["-device", "vhost-user-blk-pci,chardev=c,num-queues=1"]);
    said(c, boot)
}

fn cloud_hypervisor(boot: &Boot<'_>) -> String {
    let mut c = Command::new(boot.program);
    c.arg("--kernel")
        .arg(boot.payload)
        .args(["--cmdline", &format!("exit=ch {}", boot.words), "--cpus", "boot=2"])
        .args(["--memory", "size=64M,shared=on", "--console", "off", "--serial", "tty", "--disk"])
        .arg(format!("vhost_user=true,socket={},num_queues=2,queue_size=256", boot.socket.display()));
    said(c, boot)
}

fn firecracker(boot: &Boot<'_>) -> String {
    let config = serde_json::json!({
        "boot-source": {"kernel_image_path": boot.payload, "boot_args": format!("exit=fc {}", boot.words)},
        "drives": [{
            "drive_id": "disk", "is_root_device": false, "cache_type": "Writeback", "socket": boot.socket
        }],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
    });
    let file = boot.dir.join("firecracker.json");
    fs::write(&file, config.to_string()).expect("write the configuration");
    let api = boot.dir.join("api");
    // left behind by the boot before
    let _ = fs::remove_file(&api);
    let mut c = Command::new(boot.program);
    c.args(["--id", "vdblk-test", "--config-file"]).arg(file).arg("--api-sock").arg(&api);
    let Some((when, what)) = boot.meanwhile else { return said(c, boot) };
    let told = || {
        what();
        // it asks for the disk's size when it is told to, and at no other time
        patch(&api, "/drives/disk", r#"{"drive_id": "disk"}"#);
    };
    said(c, &Boot { meanwhile: Some((when, &told)), ..*boot })
}

/// A request to a monitor that is driven by HTTP over a unix socket.
fn patch(socket: &Path, what: &str, body: &str) {
    let mut stream = UnixStream::connect(socket).expect("the monitor's socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("time-out");
    let length = body.len();
    write!(stream, "PATCH {what} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
        .expect("ask");
    let mut answer = [0; 256];
    let n = stream.read(&mut answer).expect("an answer");
    let answer = String::from_utf8_lossy(&answer[..n]);
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
}

/// What the guest says on its console, which is the monitor's standard output. The guest's last words end the wait as well
/// as the monitor's end, which is not the same in each of them.
fn said(mut command: Command, boot: &Boot<'_>) -> String {
    let (console, errors) = (boot.dir.join("console"), boot.dir.join("errors"));
    let create = |path: &Path| File::create(path).expect("a file for what it says");
    command.stdin(Stdio::null()).stdout(create(&console)).stderr(create(&errors));
    let mut running = Guarded(command.spawn().expect("start the monitor"));
    let text = |path: &Path| String::from_utf8_lossy(&fs::read(path).expect("what it said")).into_owned();
    let mut meanwhile = boot.meanwhile;
    let ended = comes_true(|| {
        if let Some((_, what)) = meanwhile.take_if(|(when, _)| text(&console).contains(*when)) {
            what();
        }
        running.0.try_wait().expect("wait").is_some()
    });
    let said = text(&console);
    assert!(ended, "the monitor does not end: {said}{}", text(&errors));
    assert!(meanwhile.is_none(), "the words to wait for never came: {said}");
    assert!(said.contains("NANO-OK"), "{said}{}", text(&errors));
    said
}

/// An image to serve.
struct Served {
    image: PathBuf,
    read_only: bool,
}

/// One of each kind, with the pattern where the guest looks for it; the diff has it from its parent.
fn images(dir: &Path) -> Vec<Served> {
    let source = dir.join("source.raw");
    let mut bytes = vec![0; DISK];
    put_pattern(&mut bytes, FOUND);
    fs::write(&source, bytes).expect("write the source");
    let copy = |name: &str, format: &str| {
        vdimg(&["convert", "--output-format", format], &[&source, &dir.join(name)]);
        dir.join(name)
    };
    let base = copy("base.vdi", "vdi");
    let served = |image: PathBuf, read_only| Served { image, read_only };
    vec![
        served(copy("disk.raw", "raw"), false),
        served(copy("disk.vdi", "vdi"), false),
        served(diff(&dir.join("diff.vdi"), &base, None), false),
        served(base, true),
    ]
}

fn put_pattern(disk: &mut [u8], sector: usize) {
    disk[sector * SECTOR..][..PATTERN_BYTES].copy_from_slice(&pattern());
}

fn vdimg(args: &[&str], files: &[&Path]) {
    let mut c = Command::new(env!("CARGO_BIN_EXE_vdimg"));
    c.args(args).args(files).stdin(Stdio::null());
    let ended = run(c);
    assert!(ended.status.success(), "{args:?}: {ended:?}");
}

/// The guest has used the disk, everything it left is in the image, and the image is in order.
fn serve_to(monitor: Monitor, program: &Path, payload: &Path, served: &Served, dir: &Path) {
    let Served { image, read_only } = served;
    let options = ["--num-queues", "2", "--read-only"];
    let daemon = Daemon::serve(image, if *read_only { &options } else { &options[..2] });
    let words =
        if *read_only { format!("has={FOUND}") } else { format!("has={FOUND} keep={LEFT} loops=200 qd=8") };
    let said = (monitor.boot)(&Boot {
        program,
        payload,
        socket: &daemon.socket,
        dir,
        words: &words,
        meanwhile: None,
    });
    daemon.wait_for_log("front-end disconnected");
    let log = daemon.stop().err;
    assert_eq!(log.matches("front-end connected").count(), 1, "{log}");
    for bad in ["WARN", "ERROR", "panicked"] {
        assert!(!log.contains(bad), "{log}\n{said}");
    }
    assert!(said.contains(&format!(" sectors=0x{:x}", DISK / SECTOR)), "{said}");
    let mut wanted = vec![0; DISK];
    put_pattern(&mut wanted, FOUND);
    if !read_only {
        put_pattern(&mut wanted, LEFT);
        assert_eq!(said.contains("\nwrite zeroes status=0x0"), monitor.discards, "{said}");
        if !monitor.discards {
            put_pattern(&mut wanted, TRIED);
        }
    }
    let copy = dir.join("copy.raw");
    vdimg(&["convert", "--output-format", "raw"], &[image, &copy]);
    let found = fs::read(&copy).expect("the copy");
    fs::remove_file(&copy).expect("remove");
    assert_eq!(first_difference(&found, &wanted), None, "{}: {said}", image.display());
    vdimg(&["check"], &[image]);
}

fn attaches(monitor: Monitor, program: Option<PathBuf>) {
    let Some(program) = program else { return };
    let dir = scratch();
    let Some(payload) = payload(dir.path()) else { return };
    for served in images(dir.path()) {
        serve_to(monitor, &program, &payload, &served, dir.path());
    }
}

/// The disk grows while the guest looks: it sees the new size, and what it writes at the new end is in the image.
fn sees_growth(monitor: Monitor, program: Option<PathBuf>) {
    let Some(program) = program else { return };
    let dir = scratch();
    let Some(payload) = payload(dir.path()) else { return };
    let image = raw(&dir.path().join("disk.raw"), DISK as u64);
    let daemon = Daemon::serve(&image, &[]);
    let grow = || {
        let file = File::options().write(true).open(&image).expect("open");
        file.set_len(2 * DISK as u64).expect("lengthen");
        daemon.signal(libc::SIGHUP);
        daemon.wait_for_log("the disk has grown");
    };
    let (socket, words) = (&daemon.socket, "grows=20");
    let meanwhile = Some(("waiting for growth", &grow as &dyn Fn()));
    let boot = Boot { program: &program, payload: &payload, socket, dir: dir.path(), words, meanwhile };
    let said = (monitor.boot)(&boot);
    assert!(said.contains(&format!(" sectors=0x{:x}", 2 * DISK / SECTOR)), "{said}");
    let log = daemon.stop().err;
    assert!(!log.contains("WARN"), "{log}");
    let (at, bytes) = (2 * DISK - PATTERN_BYTES, fs::read(&image).expect("the image"));
    assert_eq!(first_difference(&bytes[at..], &pattern()), None);
}

/// Of the kills of a daemon, the part that has to meet requests in flight: one in so many.
const MEET_ONE_IN: usize = 3;
const KILLS: usize = 3;

/// The daemon is killed again and again while requests are in flight, and another takes its place: the guest gets every
/// answer.
fn survives_a_kill(monitor: Monitor, program: Option<PathBuf>) {
    let Some(program) = program else { return };
    let dir = scratch();
    let Some(payload) = payload(dir.path()) else { return };
    let image = dir.path().join("disk.raw");
    // what a hole or the page cache has is answered too soon to be met
    fs::write(&image, vec![0; DISK]).expect("an image");
    File::open(&image).and_then(|f| f.sync_all()).expect("on the disk");
    let socket = dir.path().join("s");
    let start = || {
        let mut c = vdblk(&["--num-queues", "2", "--cache", "none", "--blk-file"]);
        c.arg(&image).arg("--socket-path").arg(&socket);
        let daemon = Daemon::spawn(c, socket.clone(), scratch());
        daemon.wait_until_serving();
        daemon
    };
    let (daemon, met) = (RefCell::new(start()), Cell::new(0));
    let kill = || {
        // into the reads that follow
        let found = comes_true(|| daemon.borrow().is_stopped_with_requests());
        let said = || fs::read_to_string(dir.path().join("errors"));
        assert!(found, "nothing is ever in flight: {}{:?}", daemon.borrow().log(), said());
        // cloud-hypervisor 53 gives up if it gets through to the socket of the process that is just dying
        fs::remove_file(&socket).expect("remove the socket's name");
        daemon.borrow().signal(libc::SIGKILL);
        daemon.replace(start());
        daemon.borrow().wait_for_log("front-end connected");
        let repeats = || daemon.borrow().log().contains(" requests in flight are repeated");
        met.update(|n| n + usize::from(repeats_soon(&repeats)));
    };
    let kills = || (0..KILLS).for_each(|_| kill());
    let words = format!("loops=20000 qd=8 keep={LEFT}");
    let meanwhile = Some(("unknown type status=0x2", &kills as &dyn Fn()));
    (monitor.boot)(&Boot {
        program: &program,
        payload: &payload,
        socket: &socket,
        dir: dir.path(),
        words: &words,
        meanwhile,
    });
    let log = daemon.into_inner().stop().err;
    assert_eq!(log.matches("front-end connected").count(), 1, "it came back: {log}");
    println!("{} of {KILLS} kills met requests in flight", met.get());
    assert!(met.get() * MEET_ONE_IN >= KILLS, "{} of {KILLS} kills met requests in flight", met.get());
    let mut wanted = vec![0; DISK];
    put_pattern(&mut wanted, LEFT);
    assert_eq!(first_difference(&fs::read(&image).expect("the image"), &wanted), None, "{log}");
}

/// A ring that finds requests in flight says so when it is started: with the others, soon after the connection.
fn repeats_soon(says_so: &dyn Fn() -> bool) -> bool {
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until {
        if says_so() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    says_so()
}

#[test]
fn a_guest_of_cloud_hypervisor_survives_a_kill_of_the_daemon() {
    let program = monitor_on_kvm("cloud-hypervisor", "CLOUD_HYPERVISOR");
    survives_a_kill(Monitor { boot: cloud_hypervisor, discards: true }, program);
}

/// From this version on QEMU tells its guest.
const QEMU_TELLS: u32 = 10;

#[test]
fn a_guest_of_qemu_sees_the_disk_grow() {
    let Some(program) = monitor("qemu-system-x86_64", "QEMU") else { return };
    let mut c = Command::new(&program);
    c.arg("--version").stdin(Stdio::null());
    let version = run(c).out;
    let major = version.split("version ").nth(1).and_then(|v| v.split('.').next()?.parse::<u32>().ok());
    if major.expect("a version") < QEMU_TELLS {
        return skipped(&format!(
            "QEMU tells its guest of a new size from version {QEMU_TELLS} on; QEMU names another"
        ));
    }
    sees_growth(Monitor { boot: qemu, discards: true }, Some(program));
}

#[test]
fn a_guest_of_firecracker_sees_the_disk_grow() {
    sees_growth(Monitor { boot: firecracker, discards: false }, monitor_on_kvm("firecracker", "FIRECRACKER"));
}

#[test]
fn qemu_attaches() {
    attaches(Monitor { boot: qemu, discards: true }, monitor("qemu-system-x86_64", "QEMU"));
}

#[test]
fn cloud_hypervisor_attaches() {
    attaches(
        Monitor { boot: cloud_hypervisor, discards: true },
        monitor_on_kvm("cloud-hypervisor", "CLOUD_HYPERVISOR"),
    );
}

#[test]
fn firecracker_attaches() {
    attaches(Monitor { boot: firecracker, discards: false }, monitor_on_kvm("firecracker", "FIRECRACKER"));
}
