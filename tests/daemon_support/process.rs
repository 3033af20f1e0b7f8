//! The daemon as a process: started, asked to end, waited for with a deadline, never left behind.

use super::client::Guest;
use super::guest::GuestRegion;
use super::{PATIENCE, comes_true};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The daemon with nothing but these arguments, and none of the environment it reacts to.
pub fn vdblk(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_vdblk"));
    c.args(args);
    clean(c)
}

/// `sh` that carries out `prepare` and becomes the daemon with the arguments added to the command. Its standard input
/// is at hand in `prepare`: that is how a test passes a socket on.
pub fn vdblk_by_shell(prepare: &str) -> Command {
    let mut c = Command::new("sh");
    c.arg("-c").arg(format!("{prepare}\nexec \"$0\" \"$@\"")).arg(env!("CARGO_BIN_EXE_vdblk"));
    clean(c)
}

fn clean(mut c: Command) -> Command {
    for name in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "RUST_LOG"] {
        c.env_remove(name);
    }
    c.stdin(Stdio::null());
    c
}

/// A process that is killed at the latest when the test ends.
pub struct Guarded(pub Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a signal to a child that has not been waited for.
pub fn signal(child: &Child, number: i32) {
    let pid = i32::try_from(child.id()).expect("a process id");
    // SAFETY: kill touches no memory; the child is not reaped yet, so the id is its own.
    assert_eq!(unsafe { libc::kill(pid, number) }, 0, "the process is gone already");
}

/// Waits for the end; kills the process and fails if it does not come in time.
pub fn wait(child: &mut Child, at_most: Duration) -> ExitStatus {
    let until = Instant::now() + at_most;
    loop {
        if let Some(status) = child.try_wait().expect("wait") {
            return status;
        }
        if Instant::now() > until {
            child.kill().expect("kill");
            child.wait().expect("wait");
            panic!("process {} did not end within {at_most:?}", child.id());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a program that has ended left.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
    pub took: Duration,
}

impl Ended {
    /// It was refused as users are to be refused: status 1, one line that holds all of `parts`.
    #[track_caller]
    pub fn assert_refused(&self, parts: &[&str]) {
        assert_eq!(self.status.code(), Some(1), "{self:?}");
        assert_eq!(self.err.lines().count(), 1, "one line, not {}", self.err);
        assert!(self.err.starts_with("vdblk: "), "{}", self.err);
        for p in parts {
            assert!(self.err.contains(p), "'{p}' is missing: {}", self.err);
        }
    }
}

/// Runs a command to its end.
pub fn run(mut command: Command) -> Ended {
    let start = Instant::now();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start");
    let out = Collected::new(child.stdout.take().expect("piped"));
    let err = Collected::new(child.stderr.take().expect("piped"));
    let status = wait(&mut child, PATIENCE);
    Ended { status, took: start.elapsed(), out: out.all(), err: err.all() }
}

/// Text that a thread takes out of a pipe, so that nobody waits to get rid of it.
struct Collected {
    text: Arc<Mutex<String>>,
    thread: JoinHandle<()>,
}

impl Collected {
    fn new(mut from: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let shared = Arc::clone(&text);
        let thread = std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buf) {
                shared.lock().unwrap().push_str(&String::from_utf8_lossy(&buf[..n]));
            }
        });
        Collected { text, thread }
    }

    fn so_far(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    fn all(self) -> String {
        self.thread.join().expect("reader");
        self.text.lock().unwrap().clone()
    }
}

/// A daemon at work. Killed if the test does not end it.
pub struct Daemon {
    child: Child,
    pub socket: PathBuf,
    log: Option<Collected>,
    _dir: TempDir,
}

impl Daemon {
    /// Serves `image` on a socket of its own.
    pub fn serve(image: &Path, options: &[&str]) -> Daemon {
        let mut command = vdblk(&["--blk-file"]);
        command.arg(image).args(options);
        Self::with_socket(command)
    }

    /// Starts a command that lacks only `--socket-path`, and waits until it serves.
    pub fn with_socket(command: Command) -> Daemon {
        let daemon = Self::begin(command);
        daemon.wait_until_serving();
        daemon
    }

    /// Starts a command that lacks only `--socket-path`.
    pub fn begin(mut command: Command) -> Daemon {
        let dir = tempfile::tempdir().expect("temporary folder");
        let socket = dir.path().join("s");
        command.arg("--socket-path").arg(&socket);
        Self::spawn(command, socket, dir)
    }

    /// Starts a command that reaches its front-ends in a way of its own.
    pub fn spawn(mut command: Command, socket: PathBuf, dir: TempDir) -> Daemon {
        let mut child =
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start the daemon");
        let log = Collected::new(child.stderr.take().expect("piped"));
        Daemon { child, socket, log: Some(log), _dir: dir }
    }

    pub fn wait_until_serving(&self) {
        self.wait_for_log("serving ");
    }

    pub fn wait_for_log(&self, text: &str) {
        assert!(comes_true(|| self.log().contains(text)), "no '{text}' in the log: {}", self.log());
    }

    pub fn log(&self) -> String {
        self.log.as_ref().expect("running").so_far()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_some()
    }

    pub fn connect(&self) -> Guest {
        Guest::connect(&self.socket, 1)
    }

    pub fn connect_in(&self, region: &Arc<GuestRegion>) -> Guest {
        Guest::connect_in(&self.socket, region)
    }

    pub fn signal(&self, number: i32) {
        signal(&self.child, number);
    }

    /// Stops it for a moment to look whether requests are in flight; true: they are, and it stays stopped.
    pub fn is_stopped_with_requests(&self) -> bool {
        self.signal(libc::SIGSTOP);
        let stat = format!("/proc/{}/stat", self.pid());
        // behind the name, which is in parentheses
        let is_stopped = || std::fs::read_to_string(&stat).expect("its state").contains(") T ");
        assert!(comes_true(is_stopped), "the daemon does not stop");
        let found = self.has_requests();
        if !found {
            self.signal(libc::SIGCONT);
        }
        found
    }

    /// Whether its record of what is in flight has a mark (vhost-user's inflight region, which it maps).
    fn has_requests(&self) -> bool {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).expect("its memory map");
        let memory = File::open(format!("/proc/{}/mem", self.pid())).expect("its memory");
        maps.lines().filter(|l| l.contains("/memfd:vdblk-inflight")).any(|line| {
            let (from, rest) = line.split_once('-').expect("a range");
            let to = rest.split(' ').next().expect("its end");
            let [from, to] = [from, to].map(|x| u64::from_str_radix(x, 16).expect("an address"));
            let mut bytes = vec![0; usize::try_from(to - from).expect("small")];
            memory.read_exact_at(&mut bytes, from).expect("mapped memory");
            has_marks(&bytes)
        })
    }

    /// Waits until it has ended by itself.
    pub fn wait(mut self) -> Ended {
        let start = Instant::now();
        let status = wait(&mut self.child, PATIENCE);
        let err = self.log.take().expect("running").all();
        Ended { status, out: String::new(), err, took: start.elapsed() }
    }

    /// Asks it to end, and sees that it does so well.
    #[track_caller]
    pub fn stop(self) -> Ended {
        self.signal(libc::SIGTERM);
        let ended = self.wait();
        assert!(ended.status.success(), "{ended:?}");
        ended
    }
}

/// Looks through the parts of all queues: a header of 16 bytes, which says how many entries of 16 bytes follow, each with a
/// mark in its first byte; the next part begins at a multiple of 64.
fn has_marks(mut region: &[u8]) -> bool {
    while let Some(header) = region.get(..16) {
        let entries = usize::from(u16::from_ne_bytes([header[10], header[11]]));
        let part = (16 + 16 * entries).next_multiple_of(64);
        if entries == 0 || part > region.len() {
            return false;
        }
        if region[16..16 + 16 * entries].chunks_exact(16).any(|entry| entry[0] != 0) {
            return true;
        }
        region = &region[part..];
    }
    false
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
