//! Starts, ends, kills and restarts the server under test (`--server-cmd`).
use crate::sys;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long a server may take to listen, and to end when asked to: it may have to wait for the last I/O of one that was killed,
/// on a disk that others keep busy.
const PATIENCE: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_micros(500);

pub(crate) struct Server {
    cmd: String,
    socket: String,
    child: Option<Child>,
}

impl Server {
    pub(crate) fn start(cmd: &str, socket: &str) -> io::Result<Server> {
        let mut s = Server { cmd: cmd.replace("@S", socket), socket: socket.into(), child: None };
        s.respawn()?;
        Ok(s)
    }

    pub(crate) fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(|c| c.id() as i32)
    }

    pub(crate) fn respawn(&mut self) -> io::Result<()> {
        self.kill();
        let _ = std::fs::remove_file(&self.socket);
        let child = Command::new("sh")
            .arg("-c")
            .arg(format!("exec {}", self.cmd))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        self.child = Some(child);
        let t0 = Instant::now();
        // the file appearing is not enough: some servers bind first and listen later; and
        // connecting here would use up the one connection that others accept
        while t0.elapsed() < PATIENCE {
            if listening(&self.socket) {
                return Ok(());
            }
            if let Some(how) = self.exited() {
                return Err(io::Error::other(format!("server ended: {how}")));
            }
            sleep(STEP);
        }
        Err(io::Error::other(format!("server did not come up: {}", self.cmd)))
    }

    /// Some(text) once the process is gone.
    pub(crate) fn exited(&mut self) -> Option<String> {
        match self.child.as_mut()?.try_wait() {
            Ok(Some(st)) => Some(describe(st)),
            _ => None,
        }
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut c) = self.child.take() {
            let _ = c.kill();
            let _ = c.wait();
        }
    }

    /// SIGTERM, so that the image is closed well; an error says what was not clean about the end.
    pub(crate) fn stop(&mut self) -> Result<(), String> {
        let Some(mut c) = self.child.take() else {
            return Ok(());
        };
        sys::terminate(c.id());
        let t0 = Instant::now();
        while t0.elapsed() < PATIENCE {
            if let Ok(Some(st)) = c.try_wait() {
                let asked = st.success() || st.signal() == Some(libc::SIGTERM);
                return if asked { Ok(()) } else { Err(describe(st)) };
            }
            sleep(STEP);
        }
        let _ = c.kill();
        let _ = c.wait();
        Err("did not end on SIGTERM".into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn describe(st: ExitStatus) -> String {
    match st.signal() {
        Some(n) => format!("signal {n}"),
        None => format!("exit {}", st.code().unwrap_or(-1)),
    }
}

/// Looks the path up in /proc/net/unix: flag 00010000 is "listening".
fn listening(path: &str) -> bool {
    let table = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    Path::new(path).exists() && table.lines().any(|l| l.ends_with(path) && l.contains(" 00010000 "))
}
