//! A front-end that takes its memory away while the daemon works on it: its queue ends, the daemon and the disk go on.

mod daemon_support;

use daemon_support::client::{Guest, IOERR, MOST};
use daemon_support::guest::{GuestRegion, HUGE_PAGE, T_OUT};
use daemon_support::images::{MIB, assert_checked_by_qemu, diff, raw, vdi};
use daemon_support::process::Daemon;
use daemon_support::{PATIENCE, comes_true, scratch};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

const ENGINES: [&str; 2] = ["io_uring", "threads"];
const GONE: &str = "guest memory has gone";

/// A raw image, a VDI, a diff.
fn images(dir: &Path) -> [PathBuf; 3] {
    let base = vdi(&dir.join("base.vdi"), 8 * MIB);
    [
        raw(&dir.join("a.raw"), 8 * MIB),
        vdi(&dir.join("a.vdi"), 8 * MIB),
        diff(&dir.join("b.vdi"), &base, None),
    ]
}

fn is_told_of_a_broken_ring(guest: &mut Guest) -> bool {
    comes_true(|| guest.queue().err.read().is_ok())
}

/// The next front-end finds what was written before.
fn assert_serves(daemon: &Daemon) {
    let mut next = daemon.connect();
    next.assert_marked(0, 1);
    next.mark(4096, 2);
    next.assert_marked(4096, 2);
}

#[test]
fn rings_that_are_taken_away_end_their_queue_only() {
    let dir = scratch();
    for image in images(dir.path()) {
        for engine in ENGINES {
            let daemon = Daemon::serve(&image, &["--io-engine", engine]);
            let mut guest = daemon.connect();
            guest.mark(0, 1);
            let q = guest.queue();
            q.region.shorten(0);
            q.kick();
            assert!(is_told_of_a_broken_ring(&mut guest), "{}", daemon.log());
            daemon.wait_for_log(GONE);
            drop(guest);
            assert_serves(&daemon);
            assert_eq!(daemon.log().matches(GONE).count(), 1, "{}", daemon.log());
            daemon.stop();
        }
    }
    assert_checked_by_qemu(&dir.path().join("a.vdi"));
}

#[test]
fn a_write_whose_data_is_taken_away_fails() {
    let dir = scratch();
    for image in images(dir.path()) {
        for engine in ENGINES {
            let daemon = Daemon::serve(&image, &["--io-engine", engine]);
            let mut guest = daemon.connect();
            guest.mark(0, 1);
            let q = guest.queue();
            // a block that is not allocated, of which the data decides what happens
            q.post(15, T_OUT, 3 * MIB / 512, &[7; MOST], 0);
            q.region.shorten(q.data_at(15));
            q.kick();
            assert!(q.wait(PATIENCE).is_some(), "{engine}: no answer; {}", daemon.log());
            assert_eq!(q.status(15), IOERR, "{engine}, {}", image.display());
            drop(guest);
            assert_serves(&daemon);
            daemon.stop();
        }
    }
}

/// Huge pages go as a whole: one of two, with a write's data in it, and then the one with the ring.
#[test]
fn huge_pages_that_are_taken_away_end_their_queue_only() {
    let dir = scratch();
    let image = vdi(&dir.path().join("a.vdi"), 8 * MIB);
    for engine in ENGINES {
        let Some(region) = GuestRegion::huge(2) else { return };
        let daemon = Daemon::serve(&image, &["--io-engine", engine]);
        let mut guest = daemon.connect_in(&region);
        guest.mark(0, 1);
        let q = guest.queue();
        region.put(HUGE_PAGE, &[7; 8192]);
        let (header, status) = (q.data_at(0), q.data_at(0) + 16);
        region.put(
            header,
            &[&T_OUT.to_le_bytes()[..], &[0; 4], &(3 * MIB / 512).to_le_bytes(), &[0xee]].concat(),
        );
        q.push(&[(header, 16, false), (HUGE_PAGE + 0x5000, 8192, false), (status, 1, true)]);
        region.shorten(HUGE_PAGE);
        q.kick();
        assert!(q.wait(PATIENCE).is_some(), "{engine}: no answer; {}", daemon.log());
        assert_eq!(region.get(status, 1), [IOERR], "{engine}: {}", daemon.log());
        drop(guest);
        assert_serves(&daemon);

        let Some(region) = GuestRegion::huge(1) else { return };
        let mut guest = daemon.connect_in(&region);
        guest.mark(0, 1);
        region.shorten(0);
        guest.queue().kick();
        assert!(is_told_of_a_broken_ring(&mut guest), "{engine}: {}", daemon.log());
        daemon.wait_for_log(GONE);
        drop(guest);
        assert_serves(&daemon);
        daemon.stop();
    }
}

/// Whatever else sends the signal finds the process as any other.
#[test]
fn other_bus_errors_end_the_daemon_and_its_locks() {
    let dir = scratch();
    let image = raw(&dir.path().join("a.raw"), MIB);
    let daemon = Daemon::serve(&image, &[]);
    daemon.connect().mark(0, 1);
    daemon.signal(libc::SIGBUS);
    assert_eq!(daemon.wait().status.signal(), Some(libc::SIGBUS));
    let daemon = Daemon::serve(&image, &[]);
    assert_serves(&daemon);
    daemon.stop();
}
