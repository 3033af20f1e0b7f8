//! A disk that grows while a guest uses it: SIGHUP, and what the front-end and the guest see of it.

mod daemon_support;

use daemon_support::client::{Guest, IOERR};
use daemon_support::images::{MIB, raw, vdi};
use daemon_support::process::Daemon;
use daemon_support::{PATIENCE, comes_true, scratch};
use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use vhost::vhost_user::VhostUserFrontend;

/// CONFIG_CHANGE as vhost-user defines it: request 2, version 1, no body.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// Gives the back-end a way to tell us something.
fn back_channel(guest: &mut Guest) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    guest.front_end.set_backend_request_fd(&theirs).expect("a back channel");
    ours.set_read_timeout(Some(PATIENCE)).expect("time-out");
    ours
}

fn told(channel: &mut UnixStream) -> Vec<u32> {
    let mut message = [0; 12];
    channel.read_exact(&mut message).expect("a message");
    message.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().expect("4 bytes"))).collect()
}

fn set_length(file: &Path, length: u64) {
    File::options().write(true).open(file).and_then(|f| f.set_len(length)).expect("another length");
}

#[test]
fn a_raw_image_grows_under_its_guest() {
    let dir = scratch();
    let image = raw(&dir.path().join("disk.raw"), 4 * MIB);
    let daemon = Daemon::serve(&image, &[]);
    let mut guest = daemon.connect();
    let mut channel = back_channel(&mut guest);
    guest.mark(4 * MIB - 4096, 1);
    assert_eq!(guest.try_read(4 * MIB, 4096).0, IOERR, "there is nothing behind the end");
    for (round, size) in [(2, 8 * MIB), (3, 8 * MIB + 4096)] {
        set_length(&image, size);
        daemon.signal(libc::SIGHUP);
        assert_eq!(told(&mut channel), CONFIG_CHANGE);
        assert_eq!(guest.size_bytes(), size);
        guest.mark(size - 4096, round);
        assert_eq!(guest.try_read(size, 4096).0, IOERR, "there is nothing behind the new end");
    }
    guest.assert_marked(4 * MIB - 4096, 1);
    guest.assert_marked(8 * MIB - 4096, 2);
    drop(guest);
    let mut next = daemon.connect();
    assert_eq!(next.size_bytes(), 8 * MIB + 4096, "the next front-end sees the last size");
    next.assert_marked(8 * MIB, 3);
    drop(next);
    daemon.stop();
}

#[test]
fn a_front_end_without_an_ear_sees_the_size_when_it_asks() {
    let dir = scratch();
    let image = raw(&dir.path().join("disk.raw"), 4 * MIB);
    let daemon = Daemon::serve(&image, &[]);
    let mut guest = daemon.connect();
    set_length(&image, 5 * MIB);
    daemon.signal(libc::SIGHUP);
    assert!(comes_true(|| guest.size_bytes() == 5 * MIB), "{}", daemon.log());
    guest.mark(5 * MIB - 4096, 1);
    drop(guest);
    daemon.stop();
}

/// There is no way to tell a driver in time that a part of its disk is gone.
#[test]
fn an_image_that_shrinks_is_served_as_it_was() {
    let dir = scratch();
    let image = raw(&dir.path().join("disk.raw"), 4 * MIB);
    let daemon = Daemon::serve(&image, &[]);
    let mut guest = daemon.connect();
    set_length(&image, MIB);
    daemon.signal(libc::SIGHUP);
    daemon.wait_for_log("the disk's size stays");
    assert_eq!(guest.size_bytes(), 4 * MIB);
    guest.mark(4 * MIB - 4096, 1);
    guest.assert_marked(4 * MIB - 4096, 1);
    drop(guest);
    daemon.stop();
}

#[test]
fn a_vdi_keeps_its_size_and_says_so() {
    let dir = scratch();
    let image = vdi(&dir.path().join("disk.vdi"), 4 * MIB);
    let daemon = Daemon::serve(&image, &[]);
    let mut guest = daemon.connect();
    daemon.signal(libc::SIGHUP);
    daemon.wait_for_log("only a raw image can grow while it is served");
    assert_eq!(guest.size_bytes(), 4 * MIB);
    guest.mark(4 * MIB - 4096, 1);
    drop(guest);
    daemon.stop();
}
