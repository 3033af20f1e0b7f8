//! Messages no front-end should send. The connection may be closed for them; the daemon serves the next front-end, and no
//! descriptor is left behind. One test in this file: it counts the descriptors of the process.

mod common;

use common::hostile::{Choices, Random, begin, body, descriptors, message, nonsense, serves};
use common::ram::Pace;
use common::{Server, shape};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};
use vdblk::vhost::ServeOptions;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Memory that a process may take more or less of without anybody having lost it.
const SLACK_KB: u64 = 4096;

/// Each message with 0 to 8 descriptors, on a connection that is set up; `true` while there is a next one.
fn descriptors_round(server: &Server, r: &mut Random, round: u64, files: &[RawFd]) {
    let (request, n) = (u32::try_from(round / 9 % 46).unwrap(), round % 9);
    let stream = server.stream();
    begin(&stream);
    let m = message(request, 1 + 8 * (round & 1) as u32, &body(r, request));
    let files: Vec<RawFd> = (0..n).map(|_| files[r.below(files.len() as u64) as usize]).collect();
    let _ = stream.send_with_fds(&[m.as_slice()], &files);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = std::io::copy(&mut &stream, &mut std::io::sink());
}

fn resident_kb() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4
}

/// Rounds of connect, misbehave, disconnect: `VDBLK_ROUNDS`, 10,000 in the long form.
fn rounds() -> u64 {
    std::env::var("VDBLK_ROUNDS").map_or(1000, |n| n.parse().expect("VDBLK_ROUNDS is a number"))
}

#[test]
fn nonsense_ends_a_connection_at_most() {
    let server = Server::with(shape(2), Pace::Deferred, ServeOptions::default());
    serves(&server);
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(1 << 20).unwrap();
    let event = EventFd::new(0).unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    let null = File::open("/dev/null").unwrap();
    let files = [memory.as_raw_fd(), event.as_raw_fd(), reader.as_raw_fd(), null.as_raw_fd()];
    // the first connection is being closed while we look
    std::thread::sleep(Duration::from_millis(200));
    let before = descriptors();
    let mut resident = u64::MAX;
    let mut r = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..rounds() {
        descriptors_round(&server, &mut r, round, &files);
        let stream = server.stream();
        if round % 8 != 0 {
            begin(&stream);
        }
        nonsense(&mut r, &stream, &files);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        // until the other side has closed too; without that its replies would find nobody and end the talk
        let _ = std::io::copy(&mut &stream, &mut std::io::sink());
        if round % 100 == 0 {
            serves(&server);
        }
        if round == rounds() / 4 {
            // by then all that is kept for later use is there
            resident = resident_kb();
        }
    }
    serves(&server);
    // the last connection is being closed while we look
    let start = Instant::now();
    while descriptors() != before {
        assert!(start.elapsed() < Duration::from_secs(5), "{} descriptors, {before} before", descriptors());
        std::thread::sleep(Duration::from_millis(5));
    }
    let now = resident_kb();
    assert!(now <= resident.saturating_add(SLACK_KB), "{now} KiB resident, {resident} before");
    // a front-end that stops in the middle of a message holds up neither shutdown ...
    let mut half = server.stream();
    half.write_all(&message(1, 1, &[])[..7]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let start = Instant::now();
    server.tell_to_end();
    server.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
}
