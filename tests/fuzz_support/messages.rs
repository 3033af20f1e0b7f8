//! A front-end that sends anything, in any order, with any descriptors.
//!
//! The case is a program: the first byte says whether the connection is set up as usual, then each message is drawn from
//! the bytes that follow.

use super::{Input, memfd};
use crate::common::hostile::{self, Choices};
use crate::common::ram::Pace;
use crate::common::{Server, shape};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vdblk::vhost::ServeOptions;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Longer cases are no cases.
pub(crate) const MAX_BYTES: usize = 4096;
/// Messages of one case.
const MAX_MESSAGES: usize = 48;
/// A case is over after this, whatever was sent.
const PATIENCE: Duration = Duration::from_secs(5);

/// The server that every case meets.
pub(crate) struct Meeting {
    server: Server,
    /// What was open before the first case.
    open: Vec<PathBuf>,
}

/// Threads of this process that serve a queue.
pub(crate) fn queue_threads() -> usize {
    let names = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(|t| t.path().join("comm"));
    // one may end while we look
    names.filter(|n| std::fs::read_to_string(n).is_ok_and(|n| n.starts_with("queue "))).count()
}

/// Descriptors to send: memory and an event first, then everything that is of no use as either.
fn descriptors() -> Vec<OwnedFd> {
    let event = |value: u64, flags| {
        let e = EventFd::new(flags).unwrap();
        e.write(value).unwrap();
        // SAFETY: a duplicate, which is nobody else's.
        unsafe { OwnedFd::from_raw_fd(libc::dup(e.as_raw_fd())) }
    };
    let (silent, _held) = std::io::pipe().unwrap();
    let (_, broken) = std::io::pipe().unwrap();
    let (held_reader, full) = std::io::pipe().unwrap();
    let (socket, peer) = UnixStream::pair().unwrap();
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let read_only = File::open("/proc/self/exe").unwrap();
    vec![
        memfd(1 << 20).into(),
        event(0, 0),
        silent.into(),
        null.into(),
        memfd(1).into(),
        memfd(1 << 42).into(),
        event(u64::MAX - 1, 0),
        broken.into(),
        held_reader.into(),
        full.into(),
        socket.into(),
        peer.into(),
        read_only.into(),
        File::open("/proc/self").unwrap().into(),
        File::open("/dev/zero").unwrap().into(),
    ]
}

impl Meeting {
    pub(crate) fn new() -> Self {
        let server = Server::with(shape(2), Pace::Deferred, ServeOptions::default());
        hostile::serves(&server);
        let mut meeting = Meeting { server, open: Vec::new() };
        // the first connection is being closed while we look
        std::thread::sleep(Duration::from_millis(200));
        meeting.open = hostile::open_files();
        meeting
    }

    /// Runs a case.
    ///
    /// # Panics
    /// Where a promise is broken.
    pub(crate) fn run(&self, case: &[u8]) {
        if case.len() > MAX_BYTES {
            return;
        }
        let start = Instant::now();
        self.talk(case);
        self.await_closed(start);
        assert_eq!(queue_threads(), 2, "the queues' threads");
        hostile::serves(&self.server);
        self.await_closed(start);
    }

    /// Descriptors of this side are closed by now; those of the other may be just about to be.
    fn await_closed(&self, start: Instant) {
        loop {
            let now = hostile::open_files();
            if now.len() == self.open.len() {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "left open: {now:?}; before: {:?}", self.open);
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn talk(&self, case: &[u8]) {
        let files = descriptors();
        let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let memory = File::from(files[0].try_clone().unwrap());
        let mut input = Input::new(case);
        let mut stream = self.server.stream();
        if input.u8() % 8 != 7 {
            hostile::begin(&stream);
        }
        // the other side takes nothing more while its answers are not read: sending must not wait for that
        stream.set_nonblocking(true).unwrap();
        for _ in 0..MAX_MESSAGES {
            if input.is_empty() || !step(&mut input, &stream, &fds, &memory) {
                break;
            }
        }
        stream.set_nonblocking(false).unwrap();
        let _ = stream.shutdown(Shutdown::Write);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answers = [0; 4096];
        loop {
            match stream.read(&mut answers) {
                Ok(0) => break,
                Ok(_) => {}
                // closed with messages unread
                Err(e) if e.kind() == ErrorKind::ConnectionReset => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => panic!("the connection is not closed in time: {e}"),
            }
        }
    }
}

/// One thing a front-end does; false if the other side has closed.
fn step(input: &mut Input<'_>, stream: &UnixStream, fds: &[RawFd], memory: &File) -> bool {
    match input.u8() % 8 {
        0..=4 => hostile::misbehave(input, stream, fds),
        5 => raw(input, stream, fds),
        6 => {
            let (at, n) = (u64::from(input.u16()) * 16, usize::from(input.u8()));
            memory.write_all_at(input.take(n), at.min((1 << 20) - 256)).unwrap();
            true
        }
        _ => {
            // what was sent so far is looked at first
            std::thread::sleep(Duration::from_micros(100));
            true
        }
    }
}

/// A message of which nothing needs to fit the rest.
fn raw(input: &mut Input<'_>, stream: &UnixStream, fds: &[RawFd]) -> bool {
    let (request, shape, n) = (u32::from(input.u8() % 64), input.u8(), input.u8());
    let count = if shape >> 6 == 0 { 0 } else { input.u8() % 9 };
    let flags = if shape & 1 == 0 { 1 + 8 * u32::from(shape >> 1 & 1) } else { input.u32() };
    let body: Vec<u8> = match shape >> 2 & 3 {
        0..=2 => input.take(usize::from(n)).to_vec(),
        _ => vec![n; 5000],
    };
    let size = match shape >> 4 & 3 {
        0 | 1 => u32::try_from(body.len()).unwrap(),
        2 => u32::from(input.u16()),
        _ => input.u32(),
    };
    let m = [&request.to_ne_bytes()[..], &flags.to_ne_bytes(), &size.to_ne_bytes(), &body].concat();
    let with: Vec<RawFd> = (0..count).map(|_| fds[input.below(fds.len() as u64) as usize]).collect();
    stream.send_with_fds(&[m.as_slice()], &with).is_ok()
}
