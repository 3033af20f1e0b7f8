//! What the daemon takes of the host's memory for a large disk, and how soon it serves it. One test in this file: what
//! else runs on the machine shall not stand in its measurements.

mod daemon_support;

use daemon_support::client::Guest;
use daemon_support::images::{MIB, vdi};
use daemon_support::process::{Daemon, vdblk};
use daemon_support::scratch;
use daemon_support::vubench::{number, vubench};
use std::time::Instant;

const DISK: u64 = 2 << 40;
/// The promise.
const LIMIT_KIB: u64 = 40 << 10;

/// A value of `/proc/PID/status` in KiB.
fn kib(pid: u32, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix(key)).expect("the key");
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Its resident memory. What it shares with the guest is the guest's.
#[track_caller]
fn assert_small(daemon: &Daemon, when: &str) {
    let (all, shared) = (kib(daemon.pid(), "VmRSS"), kib(daemon.pid(), "RssShmem"));
    println!("resident {when}: {all} KiB, of these {shared} KiB the guest's memory");
    assert!(all - shared <= LIMIT_KIB, "{when}: {} KiB", all - shared);
}

#[test]
fn a_sparse_disk_of_2_tib_takes_little() {
    let dir = scratch();
    let image = vdi(&dir.path().join("large.vdi"), DISK);
    for engine in ["io_uring", "threads"] {
        let start = Instant::now();
        let mut c = vdblk(&["--num-queues", "2", "--io-engine", engine, "--blk-file"]);
        c.arg(&image);
        let daemon = Daemon::begin(c);
        let mut guest = Guest::connect(&daemon.socket, 2);
        guest.assert_zero(DISK - 4096);
        println!("{engine}: first read served after {:?}", start.elapsed());
        assert_eq!(guest.size_bytes(), DISK);
        assert_small(&daemon, "idle");
        drop(guest);
        let reads = ["--queues", "2", "--iodepth", "32", "--runtime", "0.5", "--ramp", "0"];
        let (ended, result) = vubench(&daemon.socket, &[&reads[..], &["--rw", "randread"]].concat());
        assert!(ended.status.success() && number(&result, "ios") > 1000, "{ended:?}");
        assert_small(&daemon, "after random reads");
        let mut guest = daemon.connect();
        for n in 0..64 {
            guest.mark(n * (DISK / 64) + MIB / 2, n as u8);
        }
        guest.assert_marked(DISK / 2 + MIB / 2, 32);
        assert_small(&daemon, "after writes all over the disk");
        println!("at its most: {} KiB", kib(daemon.pid(), "VmHWM"));
        assert!(kib(daemon.pid(), "VmHWM") <= LIMIT_KIB);
        drop(guest);
        daemon.stop();
    }
}
