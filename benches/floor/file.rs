//! The file, the buffers, and the plain system calls on them.
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Number of buffers that the accesses go round in.
pub(crate) const SLOTS: usize = 64;

pub(crate) struct Target {
    pub(crate) file: File,
    pub(crate) bs: usize,
    pub(crate) blocks: u64,
}

impl Target {
    pub(crate) fn open(path: &Path, direct: bool, read_only: bool, bs: usize) -> io::Result<Target> {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)?;
        let blocks = file.metadata()?.len().checked_div(bs as u64).unwrap_or(0);
        if blocks == 0 {
            return Err(io::Error::other("the file is smaller than one block"));
        }
        Ok(Target { file, bs, blocks })
    }

    pub(crate) fn pread(&self, b: &mut Buffers, block: u64) -> io::Result<u64> {
        self.file.read_exact_at(b.next(), block * self.bs as u64)?;
        Ok(1)
    }

    pub(crate) fn pwrite(&self, b: &Buffers, block: u64) -> io::Result<u64> {
        self.file.write_all_at(b.first(), block * self.bs as u64)?;
        Ok(1)
    }

    /// True if all of it came from the page cache.
    pub(crate) fn pread_nowait(&self, b: &mut Buffers, block: u64) -> bool {
        let buf = b.next();
        let v = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        let at = (block * self.bs as u64) as i64;
        // SAFETY: the vector names one buffer, borrowed mutably until after the call.
        let n = unsafe { libc::preadv2(self.file.as_raw_fd(), &v, 1, at, libc::RWF_NOWAIT) };
        n == self.bs as isize
    }
}

/// Page aligned memory, one mapping of it.
pub(crate) struct Buffers {
    ptr: *mut u8,
    bs: usize,
    at: usize,
}

impl Buffers {
    pub(crate) fn new(bs: usize) -> io::Result<Buffers> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        let ptr = map(bs * SLOTS, libc::PROT_READ | libc::PROT_WRITE, flags, -1)?;
        Ok(Buffers { ptr, bs, at: 0 })
    }

    pub(crate) fn next(&mut self) -> &mut [u8] {
        self.at = (self.at + 1) % SLOTS;
        // SAFETY: the slot lies in the mapping, which is initialised, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(self.at * self.bs), self.bs) }
    }

    fn first(&self) -> &[u8] {
        // SAFETY: as in `next`; `self` is borrowed, so nobody writes.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bs) }
    }

    /// Where a slot begins, for the kernel to write to.
    pub(crate) fn slot(&self, i: usize) -> *mut u8 {
        assert!(i < SLOTS);
        // SAFETY: in the mapping, by the line above.
        unsafe { self.ptr.add(i * self.bs) }
    }

    pub(crate) fn iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.ptr.cast(), iov_len: self.bs * SLOTS }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`.
        unsafe { libc::munmap(self.ptr.cast(), self.bs * SLOTS) };
    }
}

/// The whole file mapped for reading.
pub(crate) struct Mapping {
    ptr: *const u8,
    bs: usize,
    len: usize,
}

impl Mapping {
    pub(crate) fn new(t: &Target) -> io::Result<Mapping> {
        let len = t.blocks as usize * t.bs;
        let ptr = map(len, libc::PROT_READ, libc::MAP_SHARED | libc::MAP_POPULATE, t.file.as_raw_fd())?;
        Ok(Mapping { ptr, bs: t.bs, len })
    }

    pub(crate) fn copy(&self, b: &mut Buffers, block: u64) {
        let at = block as usize * self.bs;
        assert!(at + self.bs <= self.len);
        let to = b.next();
        // SAFETY: source inside the mapping, target a buffer of `bs` bytes, and they are apart. The
        // file must not be truncated meanwhile: this program is its only user.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr.add(at), to.as_mut_ptr(), self.bs) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`.
        unsafe { libc::munmap(self.ptr.cast_mut().cast(), self.len) };
    }
}

fn map(len: usize, prot: i32, flags: i32, fd: i32) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) };
    if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p.cast()) }
}

/// CPU seconds of this process so far.
pub(crate) fn process_cpu() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid place for the time.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}
