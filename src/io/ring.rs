//! Setting up an io_uring ring: what is asked for, what is required, what it may do.

use io_uring::register::{Probe, Restriction};
use io_uring::{Builder, IoUring, opcode, squeue};
use std::io;

use super::sys;
use crate::limits::MAX_FILES;

/// A ring, not yet enabled, with an empty table of files.
pub(super) struct Ring {
    pub(super) io: IoUring,
    /// Numbers the table of files has.
    pub(super) files: u32,
    /// The kernel has the opcode for ftruncate (6.9).
    pub(super) can_truncate: bool,
}

/// Makes a ring for `depth` operations in flight. The error says in a line why there can be none.
///
/// It starts disabled: whoever enables it is its single issuer, so it can be made by one thread and used by
/// another; and restrictions can only be set on a disabled ring.
pub(super) fn make(depth: u32) -> Result<Ring, String> {
    let io = build(depth).map_err(|e| why_refused(&e))?;
    let p = io.params();
    if !p.is_feature_nodrop() || !p.is_feature_ext_arg() || !p.is_feature_submit_stable() {
        return Err("the io_uring of this kernel is too old (5.11 is needed)".into());
    }
    let mut probe = Probe::new();
    io.submitter().register_probe(&mut probe).map_err(|e| format!("io_uring cannot be probed: {e}"))?;
    if let Some(code) = REQUIRED.iter().find(|c| !probe.is_supported(**c)) {
        return Err(format!("the io_uring of this kernel lacks operation {code}"));
    }
    let can_truncate = probe.is_supported(opcode::Ftruncate::CODE);
    let files = register_files(&io).map_err(|e| format!("io_uring takes no table of files: {e}"))?;
    restrict(&io, can_truncate).map_err(|e| format!("io_uring takes no restrictions: {e}"))?;
    Ok(Ring { io, files, can_truncate })
}

const REQUIRED: [u8; 7] = [
    opcode::Nop::CODE,
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// Newest options first: each falls away where the kernel answers EINVAL.
fn build(depth: u32) -> io::Result<IoUring> {
    let options: [fn(&mut Builder); 3] = [
        |b| {
            // Completions are worked through when the thread enters the kernel anyway, rather than by
            // interrupting it (5.19); one issuer spares locks (6.0).
            b.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
        },
        |b| {
            b.setup_submit_all();
        },
        |_| {},
    ];
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    for option in options {
        let mut b = IoUring::builder();
        // Twice as many completions as operations fit anyway; a child process must not share the ring.
        b.setup_r_disabled().dontfork();
        option(&mut b);
        match b.build(depth) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => last = e,
            built => return built,
        }
    }
    Err(last)
}

fn why_refused(e: &io::Error) -> String {
    let why = match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "not permitted: sysctl kernel.io_uring_disabled, or a seccomp filter"
        }
        Some(libc::ENOSYS) => "not in this kernel, or hidden by a seccomp filter",
        Some(libc::ENOMEM) => "not enough memory that may be locked (ulimit -l)",
        Some(libc::EINVAL) => "too old: 5.11 is needed",
        Some(libc::EMFILE | libc::ENFILE) => "too many open files",
        _ => return format!("io_uring: {e}"),
    };
    format!("io_uring: {why}")
}

/// A table with room for every file of a chain, as far as the limit on open files allows it.
fn register_files(io: &IoUring) -> io::Result<u32> {
    let max = u64::try_from(MAX_FILES).unwrap_or(u64::MAX).min(sys::max_open_files());
    let n = u32::try_from(max).unwrap_or(u32::MAX);
    let s = io.submitter();
    match s.register_files_sparse(n) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            // before 5.19
            let none = vec![-1; usize::try_from(n).unwrap_or(0)];
            s.register_files(&none).map(|()| n)
        }
        done => done.map(|()| n),
    }
}

/// IORING_REGISTER_FILES_UPDATE: part of the kernel's ABI; the crate keeps its constant to itself.
const REGISTER_FILES_UPDATE: u8 = 6;

/// A seccomp filter does not see what a ring does. So the ring itself is bound to the operations of an engine,
/// on files of its table only: nothing in this process can open, connect or send through it.
fn restrict(io: &IoUring, can_truncate: bool) -> io::Result<()> {
    let mut list: Vec<Restriction> = REQUIRED.into_iter().map(Restriction::sqe_op).collect();
    if can_truncate {
        list.push(Restriction::sqe_op(opcode::Ftruncate::CODE));
    }
    list.push(Restriction::register_op(REGISTER_FILES_UPDATE));
    list.push(Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()));
    io.submitter().register_restrictions(&mut list)
}
