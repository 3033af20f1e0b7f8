//! The few system calls that neither std nor a safe crate offers.
use std::os::fd::AsRawFd;

/// Waits until `fd` shows one of `events`; gives what it shows, 0 on time-out.
pub(crate) fn poll_fd(fd: &impl AsRawFd, events: i16, ms: i32) -> i16 {
    let mut p = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: `p` is one valid pollfd for the length of the call; whatever the number in it, poll
    // only looks at it.
    let n = unsafe { libc::poll(&mut p, 1, ms) };
    if n > 0 { p.revents } else { 0 }
}

/// CPU seconds of a whole process, threads that have ended included; 0 if there is none such.
pub(crate) fn process_cpu(pid: Option<i32>) -> f64 {
    let mut id = libc::CLOCK_PROCESS_CPUTIME_ID;
    if let Some(pid) = pid {
        // SAFETY: `id` is a valid place for the clock id; any pid may be asked for.
        if unsafe { libc::clock_getcpuclockid(pid, &mut id) } != 0 {
            return 0.0;
        }
    }
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid place for the time; an id gone stale only gives an error.
    if unsafe { libc::clock_gettime(id, &mut t) } != 0 {
        return 0.0;
    }
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

/// Asks a process to end. `pid` must be a child that has not been waited for.
pub(crate) fn terminate(pid: u32) {
    // SAFETY: kill touches no memory of ours; the caller holds the unreaped child, so the id is its.
    unsafe { libc::kill(pid as i32, libc::SIGTERM) };
}

/// Does anybody hold the lock that QEMU and vdblk take on an image they write (a read lock on byte 201)?
pub(crate) fn image_is_locked(file: &impl AsRawFd) -> bool {
    // SAFETY: all-zero bytes are a valid flock.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    (l.l_type, l.l_whence) = (libc::F_WRLCK as i16, libc::SEEK_SET as i16);
    (l.l_start, l.l_len) = (201, 1);
    // SAFETY: `l` is a valid flock for the length of the call; nothing is locked by asking.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut l) };
    asked == 0 && l.l_type != libc::F_UNLCK as i16
}
