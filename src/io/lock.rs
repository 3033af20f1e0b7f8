//! Locks on images, in the way QEMU takes them, so that its tools, its machines and every vdblk keep out of each
//! other's way.
//!
//! QEMU gives each permission a number and two bytes of the file, which need not exist: a read lock on 100 + n
//! says "I use n", one on 200 + n "I do not share n". Whoever wants n therefore looks for a lock of another on
//! 200 + n, and whoever will not share it, on 100 + n. All locks are read locks, so that many can hold the same;
//! the look is F_OFD_GETLK for a write lock. Measured with QEMU 7.2: an image open for writing holds 100, 101,
//! 103, 201, 203; one open for reading 100, 201, 203; `-U` 100 alone; a raw image open for writing 100, 101.
//!
//! The locks belong to the open file description, and are gone when its last holder is. That makes them the fence
//! between a process that was killed and its successor:
//!
//! - io_uring: requests go on in the kernel after the process has ended. The description that does the I/O, the locked
//!   one, is in the table of files of *every* ring, and a ring lets go of its table when its last request has ended. So
//!   the lock is free only then. (A lock on another description, of a lock file say, is free at once: measured with
//!   hundreds of writes still under way. `tests/fence.rs` shows both.)
//! - Threads, and the few calls made directly (tables at opening, buffered writes of a queue's own thread): a call of
//!   pread, pwrite, fallocate or fsync holds the description while it lasts, and a process that is killed ends when
//!   its threads have left their calls. Direct I/O on local file systems and devices is waited for uninterruptibly, so
//!   when the thread has left, the I/O has ended. Not so on file systems whose waits a kill breaks off (NFS, FUSE):
//!   there a request on its way to the server may still be carried out after the lock is free. Their locks are the
//!   server's, and what they promise is its business.
//! - What is in the page cache is common to all processes: writing it back is nobody's request.
//!
//! So whoever opens an image takes the lock before the first byte is read, and repeats nothing before.

use super::sys::OfdLock;
use super::{HostFile, sys};
use crate::error::{Error, ErrorKind, Result};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Where "I use n" begins.
const USED_BASE: u16 = 100;
/// Where "I do not share n" begins.
const UNSHARED_BASE: u16 = 200;
/// QEMU's number for reading what is consistent.
const CONSISTENT_READ: u16 = 0;
/// For writing.
const WRITE: u16 = 1;
/// For changing the length.
const RESIZE: u16 = 3;
/// Held by whoever writes.
pub(super) const WRITING: u16 = USED_BASE + WRITE;
/// Held by whoever does not want it to be written.
pub(super) const KEPT_FROM_WRITING: u16 = UNSHARED_BASE + WRITE;
/// Time between two looks at a lock another holds.
const RETRY_EVERY: Duration = Duration::from_millis(50);

/// What a lock allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// We read, and nobody may write: parents, and disks served read-only.
    Shared,
    /// We write. Others neither write nor count on what they read.
    Exclusive,
    /// We write, and others may too: images whose metadata and length never change.
    Sharing,
}

impl LockMode {
    fn used(self) -> &'static [u16] {
        match self {
            LockMode::Shared => &[CONSISTENT_READ],
            LockMode::Exclusive => &[CONSISTENT_READ, WRITE, RESIZE],
            LockMode::Sharing => &[CONSISTENT_READ, WRITE],
        }
    }

    fn unshared(self) -> &'static [u16] {
        // CONSISTENT_READ stays shared: `qemu-img info -U` may look at a running disk.
        match self {
            LockMode::Shared | LockMode::Exclusive => &[WRITE, RESIZE],
            LockMode::Sharing => &[RESIZE],
        }
    }

    /// Bytes this mode holds.
    fn held_bytes(self) -> impl Iterator<Item = u16> {
        let used = self.used().iter().map(|n| USED_BASE + n);
        used.chain(self.unshared().iter().map(|n| UNSHARED_BASE + n))
    }

    /// Bytes that nobody else may hold.
    fn wanted_free(self) -> impl Iterator<Item = u16> {
        let used = self.used().iter().map(|n| UNSHARED_BASE + n);
        used.chain(self.unshared().iter().map(|n| USED_BASE + n))
    }
}

/// A lock on an image, held until dropped.
#[derive(Debug)]
pub struct ImageLock {
    /// A second descriptor of the description that does the I/O; `None` for files that are not the operating
    /// system's: nobody else can reach those.
    fd: Option<OwnedFd>,
    mode: LockMode,
}

impl ImageLock {
    /// Locks an image we write. While another holds it, tries again every 50 ms for as long as `wait`.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another still holds it; [`ErrorKind::Unsupported`] where the file system has no
    /// such locks.
    pub fn exclusive(file: &dyn HostFile, wait: Duration) -> Result<ImageLock> {
        Self::take(file, LockMode::Exclusive, wait)
    }

    /// Locks an image we only read; many may do so.
    ///
    /// # Errors
    /// As [`Self::exclusive`].
    pub fn shared(file: &dyn HostFile, wait: Duration) -> Result<ImageLock> {
        Self::take(file, LockMode::Shared, wait)
    }

    /// Locks an image in either mode.
    ///
    /// # Errors
    /// As [`Self::exclusive`].
    pub fn take(file: &dyn HostFile, mode: LockMode, wait: Duration) -> Result<ImageLock> {
        let named = |e: Error| e.at(file.path());
        let Some(fd) = file.fd() else {
            return Ok(ImageLock { fd: None, mode });
        };
        let dup = fd.try_clone_to_owned().map_err(|e| named(Error::io("lock it", e)))?;
        let until = Instant::now().checked_add(wait);
        let mut told = false;
        loop {
            match try_lock(fd, None, mode) {
                Ok(()) => return Ok(ImageLock { fd: Some(dup), mode }),
                Err(Refused::Held(held)) if until.is_none_or(|u| Instant::now() < u) => {
                    if !told {
                        let (path, most) = (file.path().display(), wait.as_secs());
                        tracing::info!("{path}: {}; waiting for up to {most} s", held.describe());
                        told = true;
                    }
                    thread::sleep(RETRY_EVERY)
                }
                Err(refused) => return Err(refused.into_error(file.path(), wait)),
            }
        }
    }

    /// The mode it is held in.
    pub fn mode(&self) -> LockMode {
        self.mode
    }

    /// Changes the mode without ever letting go, as when a leaf becomes a parent; `path` is for the message. On
    /// an error the old mode stays.
    ///
    /// # Errors
    /// As [`Self::exclusive`], without waiting.
    pub fn change(&mut self, mode: LockMode, path: &Path) -> Result<()> {
        if let Some(fd) = &self.fd {
            try_lock(fd.as_fd(), Some(self.mode), mode).map_err(|r| r.into_error(path, Duration::ZERO))?;
        }
        self.mode = mode;
        Ok(())
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        if let Some(fd) = &self.fd {
            unlock(fd.as_fd(), self.mode, None);
        }
    }
}

/// Why a lock was not given.
enum Refused {
    /// Another holds the byte; its process, if it uses locks that tell.
    Held(Held),
    /// From the operating system.
    Os(i32),
}

#[derive(Clone, Copy)]
struct Held {
    byte: u16,
    pid: Option<i32>,
}

impl Held {
    /// Who has what.
    fn describe(&self) -> String {
        let how = if self.byte < UNSHARED_BASE { "has it open for writing" } else { "is using it" };
        let who = self.pid.map_or_else(|| "another process".into(), |p| format!("process {p}"));
        format!("{who} {how}")
    }
}

impl Refused {
    fn into_error(self, path: &Path, waited: Duration) -> Error {
        let held = match self {
            Refused::Held(h) => h,
            Refused::Os(e @ (libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS)) => {
                let e = io::Error::from_raw_os_error(e);
                let e = Error::new(ErrorKind::Unsupported, format!("cannot be locked: {e}"));
                return e.hint("its file system has no byte-range locks").at(path);
            }
            Refused::Os(e) => return Error::io("lock it", io::Error::from_raw_os_error(e)).at(path),
        };
        let after = match waited.as_secs() {
            0 => String::new(),
            s => format!(", for {s} s by now"),
        };
        Error::new(ErrorKind::Locked, format!("{}{after}", held.describe()))
            .hint("QEMU, one of its tools or another vdblk; end that, or wait for it with --lock-wait")
            .at(path)
    }
}

/// Goes from `old` to `new` without waiting, or changes nothing.
///
/// A look comes before as well as after placing: while another holds the image, a waiting vdblk places nothing
/// that a third process could stumble over. Two that come at the same moment may both be refused, as with QEMU.
fn try_lock(fd: BorrowedFd<'_>, old: Option<LockMode>, new: LockMode) -> std::result::Result<(), Refused> {
    look(fd, new)?;
    let placed = place(fd, new).and_then(|()| look(fd, new));
    match placed {
        Ok(()) => {
            if let Some(old) = old {
                unlock(fd, old, Some(new));
            }
            Ok(())
        }
        Err(e) => {
            unlock(fd, new, old);
            Err(e)
        }
    }
}

fn look(fd: BorrowedFd<'_>, mode: LockMode) -> std::result::Result<(), Refused> {
    for byte in mode.wanted_free() {
        match sys::ofd_test(fd, OfdLock::Write, byte) {
            Ok(None) => {}
            Ok(Some(pid)) => return Err(Refused::Held(Held { byte, pid: (pid > 0).then_some(pid) })),
            Err(e) => return Err(Refused::Os(e)),
        }
    }
    Ok(())
}

fn place(fd: BorrowedFd<'_>, mode: LockMode) -> std::result::Result<(), Refused> {
    for byte in mode.held_bytes() {
        match sys::ofd_set(fd, OfdLock::Read, byte) {
            Ok(()) => {}
            // Only a write lock is in the way of a read lock: a program of another kind.
            Err(libc::EAGAIN | libc::EACCES) => return Err(Refused::Held(Held { byte, pid: None })),
            Err(e) => return Err(Refused::Os(e)),
        }
    }
    Ok(())
}

/// Gives up the bytes of `mode` that `keep` does not hold. It cannot fail in a way that helps to know.
fn unlock(fd: BorrowedFd<'_>, mode: LockMode, keep: Option<LockMode>) {
    let kept = |b: u16| keep.is_some_and(|k| k.held_bytes().any(|x| x == b));
    for byte in mode.held_bytes().filter(|b| !kept(*b)) {
        let _ = sys::ofd_set(fd, OfdLock::None, byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::testing::scratch_dir;
    use crate::io::{MemFile, OpenHow, OsFile};
    use std::path::PathBuf;
    use std::process::{Child, Command, Stdio};

    const NOW: Duration = Duration::ZERO;

    fn open(path: &Path) -> OsFile {
        OsFile::open(path, OpenHow { write: true, ..OpenHow::default() }).expect("open")
    }

    fn kind(r: Result<ImageLock>) -> Option<ErrorKind> {
        r.err().map(|e| e.kind())
    }

    #[test]
    fn writers_exclude_everybody_and_readers_share() {
        let dir = scratch_dir();
        let path = dir.path().join("a");
        std::fs::write(&path, [0; 4096]).expect("write");
        let (a, b, c) = (open(&path), open(&path), open(&path));

        let writer = ImageLock::exclusive(&a, NOW).expect("free");
        assert_eq!(kind(ImageLock::exclusive(&b, NOW)), Some(ErrorKind::Locked));
        let e = ImageLock::shared(&b, NOW).expect_err("held").to_string();
        assert!(e.contains("another process has it open for writing"), "{e}");
        drop(writer);

        let r1 = ImageLock::shared(&b, NOW).expect("unlocked when dropped");
        let r2 = ImageLock::shared(&c, NOW).expect("readers share");
        let e = ImageLock::exclusive(&a, NOW).expect_err("held").to_string();
        assert!(e.contains("another process is using it"), "{e}");
        drop((r1, r2));
        ImageLock::exclusive(&a, NOW).expect("free again");
    }

    #[test]
    fn the_mode_changes_without_letting_go() {
        let dir = scratch_dir();
        let path = dir.path().join("a");
        std::fs::write(&path, [0; 4096]).expect("write");
        let (a, b) = (open(&path), open(&path));
        let mut l = ImageLock::exclusive(&a, NOW).expect("free");
        l.change(LockMode::Shared, &path).expect("downgrade");
        let other = ImageLock::shared(&b, NOW).expect("shared now");
        assert_eq!(l.change(LockMode::Exclusive, &path).expect_err("used").kind(), ErrorKind::Locked);
        assert_eq!(l.mode(), LockMode::Shared);
        assert_eq!(kind(ImageLock::exclusive(&b, NOW)), Some(ErrorKind::Locked), "the old mode stayed");
        drop(other);
        l.change(LockMode::Exclusive, &path).expect("alone");
        assert_eq!(kind(ImageLock::shared(&b, NOW)), Some(ErrorKind::Locked));
    }

    #[test]
    fn waiting_ends_when_the_holder_lets_go_and_at_the_deadline() {
        let dir = scratch_dir();
        let path = dir.path().join("a");
        std::fs::write(&path, [0; 4096]).expect("write");
        let (a, b) = (open(&path), open(&path));
        let held = ImageLock::exclusive(&a, NOW).expect("free");
        let t = Instant::now();
        assert!(ImageLock::exclusive(&b, Duration::from_millis(120)).is_err());
        assert!(t.elapsed() >= Duration::from_millis(120));
        thread::scope(|s| {
            s.spawn(|| {
                thread::sleep(Duration::from_millis(100));
                drop(held);
            });
            ImageLock::exclusive(&b, Duration::from_secs(20)).expect("given up meanwhile");
        });
    }

    #[test]
    fn files_in_memory_need_no_lock() {
        let m = MemFile::new("m", vec![]);
        let _a = ImageLock::exclusive(&m, NOW).expect("alone");
    }

    // With QEMU's own programs, where they are installed.

    fn qemu_image(dir: &Path) -> Option<PathBuf> {
        let path = dir.join("q.vdi");
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "vdi"]).arg(&path).arg("8M").status();
        if made.is_ok_and(|s| s.success()) {
            return Some(path);
        }
        eprintln!("skipped: qemu-img is not here");
        None
    }

    fn succeeds(program: &str, args: &[&str], path: &Path) -> bool {
        let mut c = Command::new(program);
        c.args(args).arg(path).stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null());
        c.status().expect("start").success()
    }

    /// qemu-io that holds the image until its standard input closes, or it has been waited for.
    struct Holder(Child);

    impl Holder {
        fn new(args: &[&str], path: &Path) -> Holder {
            let mut c = Command::new("qemu-io");
            c.args(args).arg(path).stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::piped());
            Holder(c.spawn().expect("start qemu-io"))
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            drop(self.0.stdin.take());
            let _ = self.0.wait();
        }
    }

    /// True once the lock is refused; qemu-io needs a moment to take it.
    fn becomes_refused(path: &Path, mode: LockMode) -> bool {
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            if kind(ImageLock::take(&open(path), mode, NOW)) == Some(ErrorKind::Locked) {
                return true;
            }
            thread::sleep(Duration::from_millis(20));
        }
        false
    }

    #[test]
    fn qemu_keeps_off_what_we_hold() {
        let dir = scratch_dir();
        let Some(path) = qemu_image(dir.path()) else { return };
        let ours = open(&path);
        let lock = ImageLock::exclusive(&ours, NOW).expect("free");
        assert!(!succeeds("qemu-img", &["info"], &path));
        assert!(!succeeds("qemu-img", &["check"], &path));
        assert!(!succeeds("qemu-io", &["-f", "vdi", "-c", "w 0 4k"], &path));
        assert!(!succeeds("qemu-io", &["-f", "raw", "-c", "w 0 4k"], &path));
        assert!(succeeds("qemu-img", &["info", "-U"], &path));
        drop(lock);
        let _lock = ImageLock::shared(&ours, NOW).expect("free");
        assert!(succeeds("qemu-img", &["info"], &path));
        assert!(succeeds("qemu-io", &["-r", "-f", "vdi", "-c", "r 0 4k"], &path));
        assert!(!succeeds("qemu-io", &["-f", "vdi", "-c", "w 0 4k"], &path));
        assert!(!succeeds("qemu-io", &["-f", "raw", "-c", "w 0 4k"], &path));
        drop(_lock);
        assert!(succeeds("qemu-io", &["-f", "vdi", "-c", "w 0 4k"], &path));
    }

    #[test]
    fn we_keep_off_what_qemu_holds() {
        let dir = scratch_dir();
        let Some(path) = qemu_image(dir.path()) else { return };
        for writer in [["-f", "vdi"], ["-f", "raw"]] {
            let qemu = Holder::new(&writer, &path);
            assert!(becomes_refused(&path, LockMode::Exclusive));
            assert_eq!(kind(ImageLock::shared(&open(&path), NOW)), Some(ErrorKind::Locked));
            drop(qemu);
            ImageLock::exclusive(&open(&path), NOW).expect("free again");
        }
        let qemu = Holder::new(&["-r", "-f", "vdi"], &path);
        assert!(becomes_refused(&path, LockMode::Exclusive));
        ImageLock::shared(&open(&path), NOW).expect("readers share");
        drop(qemu);
    }
}
