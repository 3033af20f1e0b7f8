//! The system calls that the standard library does not offer, each as a safe function. All `unsafe` of the file
//! side of [`crate::io`] is here. Errors are plain error numbers: they travel through completions.

use super::BufSlice;
use crate::limits::MAX_IOVECS;
use std::io;
use std::mem::{MaybeUninit, align_of, offset_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Bytes moved, or the error number.
pub(super) type SysResult = Result<u64, i32>;

// Slices go to the kernel as they are; `BufSlice` promises this layout.
const _: () = {
    assert!(size_of::<BufSlice>() == size_of::<libc::iovec>());
    assert!(align_of::<BufSlice>() == align_of::<libc::iovec>());
    assert!(offset_of!(libc::iovec, iov_base) == 0);
};

/// The error number the last call on this thread left behind.
fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Runs a call until no signal interrupts it. Negative results are errors.
fn retry(mut call: impl FnMut() -> i64) -> SysResult {
    loop {
        match u64::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => match errno() {
                libc::EINTR => {}
                e => return Err(e),
            },
        }
    }
}

/// An offset or length as the kernel takes it: at most 2^63-1.
fn signed(v: u64) -> Result<i64, i32> {
    i64::try_from(v).map_err(|_| libc::EINVAL)
}

/// The slices as iovecs, as many as one call takes: a longer list moves fewer bytes, as any call may.
pub(super) fn iovecs(bufs: &[BufSlice]) -> (*const libc::iovec, u16) {
    let n = bufs.len().min(MAX_IOVECS);
    (bufs.as_ptr().cast(), u16::try_from(n).unwrap_or(u16::MAX))
}

/// Reads into the slices; may move less than they hold, 0 at the end of the file.
pub(super) fn preadv(fd: BorrowedFd<'_>, bufs: &[BufSlice], off: u64) -> SysResult {
    preadv2(fd, bufs, off, 0)
}

/// Like [`preadv`], but only what is in the page cache: EAGAIN where nothing is, EOPNOTSUPP where the file
/// system does not know the question.
pub(super) fn preadv_nowait(fd: BorrowedFd<'_>, bufs: &[BufSlice], off: u64) -> SysResult {
    preadv2(fd, bufs, off, libc::RWF_NOWAIT)
}

fn preadv2(fd: BorrowedFd<'_>, bufs: &[BufSlice], off: u64, flags: i32) -> SysResult {
    let off = signed(off)?;
    let (iov, n) = iovecs(bufs);
    retry(|| {
        // SAFETY: `iov` points at `n` iovecs (layout checked above); whoever made the slices promised that their
        // memory is mapped and writable (`BufSlice::new`).
        let r = unsafe { libc::preadv2(fd.as_raw_fd(), iov, i32::from(n), off, flags) };
        i64::try_from(r).unwrap_or(-1)
    })
}

/// Writes the slices; may move less than they hold.
pub(super) fn pwritev(fd: BorrowedFd<'_>, bufs: &[BufSlice], off: u64) -> SysResult {
    pwritev2(fd, bufs, off, 0)
}

/// Has the kernel begin to write the dirty pages of a file to its disk. A hint.
pub(super) fn start_writeback(fd: BorrowedFd<'_>) {
    // SAFETY: takes no memory; 0 bytes from 0 on means all of the file.
    let _ = unsafe { libc::sync_file_range(fd.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Flag of a write that is durable when it returns, with all that is needed to read it back: the length of the file if the write
/// reaches its end, too. Other dirty pages of the file stay where they are, which is what makes it cheap.
pub(super) const THROUGH: i32 = libc::RWF_DSYNC;

/// As [`pwritev`], durable. See [`THROUGH`].
pub(super) fn pwritev_through(fd: BorrowedFd<'_>, bufs: &[BufSlice], off: u64) -> SysResult {
    pwritev2(fd, bufs, off, THROUGH)
}

fn pwritev2(fd: BorrowedFd<'_>, bufs: &[BufSlice], off: u64, flags: i32) -> SysResult {
    let off = signed(off)?;
    let (iov, n) = iovecs(bufs);
    retry(|| {
        // SAFETY: as in `preadv2`; the kernel only reads the memory.
        let r = unsafe { libc::pwritev2(fd.as_raw_fd(), iov, i32::from(n), off, flags) };
        i64::try_from(r).unwrap_or(-1)
    })
}

/// Mode of fallocate for [`super::IoKind::Allocate`]: the file grows.
pub(super) const ALLOCATE: i32 = 0;
/// Mode of fallocate for space that is about to be filled: the file's length stays.
pub(super) const RESERVE: i32 = libc::FALLOC_FL_KEEP_SIZE;
/// Mode of fallocate for [`super::IoKind::Punch`].
pub(super) const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// Mode of fallocate for [`super::IoKind::ZeroRange`].
pub(super) const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// fallocate(2) in one of the modes above.
pub(super) fn fallocate(fd: BorrowedFd<'_>, mode: i32, off: u64, len: u64) -> SysResult {
    let (off, len) = (signed(off)?, signed(len)?);
    // SAFETY: no memory is involved; a wrong range is refused by the kernel.
    retry(|| i64::from(unsafe { libc::fallocate64(fd.as_raw_fd(), mode, off, len) }))
}

/// Makes completed writes durable, sizes and extents included.
///
/// fdatasync is enough for that: it leaves out only metadata that is not needed to read the data back, in
/// practice time stamps. A size that grew or shrank, blocks given out or taken back by fallocate and unwritten
/// extents turned into written ones are needed, so file systems commit them (ext4 notes the transaction of each
/// such change for fdatasync, XFS logs all of the inode but its times, btrfs makes no difference). fsync would
/// add a journal commit per sync for the modification time alone.
pub(super) fn fdatasync(fd: BorrowedFd<'_>) -> SysResult {
    // SAFETY: no memory is involved.
    retry(|| i64::from(unsafe { libc::fdatasync(fd.as_raw_fd()) }))
}

/// The file ends at `len`.
pub(super) fn ftruncate(fd: BorrowedFd<'_>, len: u64) -> SysResult {
    let len = signed(len)?;
    // SAFETY: no memory is involved.
    retry(|| i64::from(unsafe { libc::ftruncate64(fd.as_raw_fd(), len) }))
}

/// lseek(2). The descriptor's position is used by nobody.
pub(super) fn lseek(fd: BorrowedFd<'_>, off: u64, whence: i32) -> SysResult {
    let off = signed(off)?;
    // SAFETY: no memory is involved.
    retry(|| unsafe { libc::lseek64(fd.as_raw_fd(), off, whence) })
}

/// Length in bytes of a regular file or a block device.
pub(super) fn file_len(fd: BorrowedFd<'_>) -> SysResult {
    let mut st = MaybeUninit::<libc::stat64>::zeroed();
    // SAFETY: `st` is writable memory of the right size.
    retry(|| i64::from(unsafe { libc::fstat64(fd.as_raw_fd(), st.as_mut_ptr()) }))?;
    // SAFETY: the structure is plain numbers, zeroed above and filled by the call.
    let st = unsafe { st.assume_init() };
    if st.st_mode & libc::S_IFMT == libc::S_IFBLK {
        return lseek(fd, 0, libc::SEEK_END);
    }
    u64::try_from(st.st_size).map_err(|_| libc::EIO)
}

/// Logical sector size of a block device, in bytes.
pub(super) fn sector_bytes(fd: BorrowedFd<'_>) -> Result<u32, i32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int.
    retry(|| i64::from(unsafe { libc::ioctl(fd.as_raw_fd(), libc::BLKSSZGET, &raw mut size) }))?;
    u32::try_from(size).map_err(|_| libc::EIO)
}

/// What unbuffered I/O demands of (memory addresses, offsets) in bytes, if the kernel can tell; zeros if the
/// file has none.
pub(super) fn direct_alignment(fd: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let mut sx = MaybeUninit::<libc::statx>::zeroed();
    let call = || {
        // SAFETY: the empty path with AT_EMPTY_PATH means the descriptor; `sx` is writable memory of the right
        // size.
        i64::from(unsafe {
            libc::statx(
                fd.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                libc::STATX_DIOALIGN,
                sx.as_mut_ptr(),
            )
        })
    };
    retry(call).ok()?;
    // SAFETY: the structure is plain numbers, zeroed above and filled by the call.
    let sx = unsafe { sx.assume_init() };
    (sx.stx_mask & libc::STATX_DIOALIGN != 0).then_some((sx.stx_dio_mem_align, sx.stx_dio_offset_align))
}

/// True on tmpfs: everything is in memory, nothing there waits for a device. Not to be asked of a device node:
/// those live on a tmpfs themselves.
pub(super) fn is_tmpfs(fd: BorrowedFd<'_>) -> bool {
    is_on(fd, i128::from(libc::TMPFS_MAGIC))
}

/// True on ext4 (and its elders, which have the same number).
pub(super) fn is_ext4(fd: BorrowedFd<'_>) -> bool {
    is_on(fd, i128::from(libc::EXT4_SUPER_MAGIC))
}

/// The file is on a file system of this number.
fn is_on(fd: BorrowedFd<'_>, magic: i128) -> bool {
    let mut fs = MaybeUninit::<libc::statfs64>::zeroed();
    // SAFETY: `fs` is writable memory of the right size.
    let done = retry(|| i64::from(unsafe { libc::fstatfs64(fd.as_raw_fd(), fs.as_mut_ptr()) }));
    // SAFETY: the structure is plain numbers, zeroed above.
    let fs = unsafe { fs.assume_init() };
    done.is_ok() && i128::from(fs.f_type) == magic
}

/// The file status flags (`O_…`).
pub(super) fn status_flags(fd: BorrowedFd<'_>) -> Result<i32, i32> {
    // SAFETY: no memory is involved.
    let flags = retry(|| i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }))?;
    i32::try_from(flags).map_err(|_| libc::EIO)
}

/// Sets the file status flags.
pub(super) fn set_status_flags(fd: BorrowedFd<'_>, flags: i32) -> Result<(), i32> {
    // SAFETY: no memory is involved.
    retry(|| i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) })).map(drop)
}

/// A byte-range lock of an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OfdLock {
    /// Others may read-lock it too.
    Read,
    /// Nobody else may lock it.
    Write,
    /// No lock.
    None,
}

fn flock(lock: OfdLock, byte: u16) -> libc::flock64 {
    // SAFETY: the structure is plain numbers; l_pid has to be 0 for these locks.
    let mut fl: libc::flock64 = unsafe { MaybeUninit::zeroed().assume_init() };
    let kind = match lock {
        OfdLock::Read => libc::F_RDLCK,
        OfdLock::Write => libc::F_WRLCK,
        OfdLock::None => libc::F_UNLCK,
    };
    fl.l_type = i16::try_from(kind).expect("lock types are small");
    fl.l_whence = i16::try_from(libc::SEEK_SET).expect("lock types are small");
    fl.l_start = i64::from(byte);
    fl.l_len = 1;
    fl
}

/// Locks or unlocks one byte; EAGAIN or EACCES if another description holds it.
pub(super) fn ofd_set(fd: BorrowedFd<'_>, lock: OfdLock, byte: u16) -> Result<(), i32> {
    let fl = flock(lock, byte);
    // SAFETY: `fl` lives through the call.
    retry(|| i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const fl) })).map(drop)
}

/// Whether another description's lock would be in the way of `lock` on the byte: its process, where the kernel
/// says it (-1 for locks like these).
pub(super) fn ofd_test(fd: BorrowedFd<'_>, lock: OfdLock, byte: u16) -> Result<Option<i32>, i32> {
    let mut fl = flock(lock, byte);
    // SAFETY: `fl` lives through the call and is writable.
    retry(|| i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut fl) }))?;
    let free = i32::from(fl.l_type) == libc::F_UNLCK;
    Ok((!free).then_some(fl.l_pid))
}

/// Waits until the descriptor is readable: true, or false after `at_most` or a signal.
pub(super) fn poll_readable(fd: BorrowedFd<'_>, at_most: Duration) -> Result<bool, i32> {
    let mut p = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let ms = i32::try_from(at_most.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
    // SAFETY: `p` is one pollfd and lives through the call.
    match unsafe { libc::poll(&raw mut p, 1, ms) } {
        r if r >= 0 => Ok(r > 0),
        _ if errno() == libc::EINTR => Ok(false),
        _ => Err(errno()),
    }
}

/// Descriptors this process may have open.
pub(super) fn max_open_files() -> u64 {
    let mut lim = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `lim` is writable memory of the right size.
    match unsafe { libc::getrlimit64(libc::RLIMIT_NOFILE, &raw mut lim) } {
        0 => lim.rlim_cur,
        _ => 0,
    }
}
