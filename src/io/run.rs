//! One operation, from start to end, on the calling thread.

use super::aligned::zeros;
use super::sys::{self, SysResult};
use super::{BufSlice, IoKind, IoOp};
use std::os::fd::BorrowedFd;

/// Iovecs of zeros in one write of [`write_zeros`]: 1 MiB.
const ZERO_IOVECS: usize = 4;

/// EINVAL unless the range lies where a file can have bytes. io_uring needs this: there, offset 2^64-1 means
/// something else.
pub(super) fn check_range(op: &IoOp) -> Result<(), i32> {
    op.off.checked_add(op.len).map(drop).ok_or(libc::EINVAL)
}

/// Does it, blocking.
pub(super) fn run(fd: BorrowedFd<'_>, op: &IoOp, bufs: &[BufSlice]) -> SysResult {
    check_range(op)?;
    match op.kind {
        IoKind::Read => sys::preadv(fd, bufs, op.off.0),
        IoKind::Write => sys::pwritev(fd, bufs, op.off.0),
        IoKind::WriteThrough => sys::pwritev_through(fd, bufs, op.off.0),
        IoKind::Sync => sys::fdatasync(fd),
        IoKind::Allocate => sys::fallocate(fd, sys::ALLOCATE, op.off.0, op.len),
        IoKind::Punch => sys::fallocate(fd, sys::PUNCH, op.off.0, op.len),
        IoKind::ZeroRange => zero_range(fd, op),
        IoKind::Truncate => sys::ftruncate(fd, op.off.0),
    }
}

/// Whether zeros have to be written because the file cannot be told to read as zeros: not at all, or, as block
/// devices say, not in a range like this (EINVAL; a range that is wrong as such fails the write as well).
pub(super) fn needs_written_zeros(op: &IoOp, errno: i32) -> bool {
    op.kind == IoKind::ZeroRange && matches!(errno, libc::EOPNOTSUPP | libc::EINVAL)
}

/// Where written zeros end: as with fallocate, the file does not grow.
pub(super) fn zeros_end(fd: BorrowedFd<'_>, op: &IoOp) -> SysResult {
    let end = op.off.checked_add(op.len).ok_or(libc::EINVAL)?;
    Ok(end.0.min(sys::file_len(fd)?))
}

fn zero_range(fd: BorrowedFd<'_>, op: &IoOp) -> SysResult {
    match sys::fallocate(fd, sys::ZERO_RANGE, op.off.0, op.len) {
        Err(e) if needs_written_zeros(op, e) => write_zeros(fd, op.off.0, zeros_end(fd, op)?),
        done => done,
    }
}

fn write_zeros(fd: BorrowedFd<'_>, mut at: u64, end: u64) -> SysResult {
    while at < end {
        let mut bufs = [zeros().part(0, 0); ZERO_IOVECS];
        let mut left = end - at;
        for b in &mut bufs {
            *b = zeros().part(0, usize::try_from(left).unwrap_or(usize::MAX));
            left -= b.len() as u64;
        }
        match sys::pwritev(fd, &bufs, at)? {
            0 => return Err(libc::EIO),
            n => at += n,
        }
    }
    Ok(0)
}
