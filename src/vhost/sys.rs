//! The few calls of the operating system that neither std nor the rust-vmm crates wrap.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The smallest unit the kernel maps in; huge pages are multiples of it.
pub(super) const PAGE_BYTES: u64 = 4096;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A socket's option that is one number.
fn socket_option(fd: impl AsFd, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` and `len` are valid for writing, `len` says how long `value` is; the descriptor is borrowed.
    check(unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    })?;
    Ok(value)
}

/// True if the socket waits for connections, false if it is connected.
///
/// # Errors
/// From the operating system; so for all of the following.
pub(super) fn is_listening(fd: impl AsFd) -> io::Result<bool> {
    socket_option(fd, libc::SO_ACCEPTCONN).map(|v| v != 0)
}

/// True for a stream socket of the unix family, as vhost-user needs it.
pub(super) fn is_unix_stream(fd: impl AsFd) -> io::Result<bool> {
    let fd = fd.as_fd();
    Ok(socket_option(fd, libc::SO_DOMAIN)? == libc::AF_UNIX
        && socket_option(fd, libc::SO_TYPE)? == libc::SOCK_STREAM)
}

/// Copies the first bytes that wait in a socket and leaves them there, descriptors included. 0: the peer has gone.
pub(super) fn peek(fd: impl AsFd, out: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: `out` is valid for writing over the length given.
    let n = unsafe { libc::recv(fd.as_fd().as_raw_fd(), out.as_mut_ptr().cast(), out.len(), flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Bytes that wait in a socket.
pub(super) fn bytes_waiting(fd: impl AsFd) -> io::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, to `n`.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut n) })?;
    usize::try_from(n).map_err(io::Error::other)
}

fn poll_now(fd: impl AsFd, events: libc::c_short) -> io::Result<libc::c_short> {
    let mut p = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events, revents: 0 };
    // SAFETY: one pollfd, valid for reading and writing.
    check(unsafe { libc::poll(&raw mut p, 1, 0) })?;
    Ok(p.revents)
}

/// True if a small write to a socket would not wait.
pub(super) fn is_writable(fd: impl AsFd) -> io::Result<bool> {
    poll_now(fd, libc::POLLOUT).map(|r| r & (libc::POLLOUT | libc::POLLERR | libc::POLLHUP) != 0)
}

/// True if the peer sends nothing more.
pub(super) fn has_hung_up(fd: impl AsFd) -> bool {
    let gone = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;
    poll_now(fd, libc::POLLRDHUP).is_ok_and(|r| r & gone != 0)
}

/// Makes reads and writes of a descriptor return instead of waiting.
pub(super) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: these two take and return flags only.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}

/// Takes over a descriptor that this process was started with, by its number. Whoever calls this is its only user from
/// then on; it is not inherited further.
pub(super) fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD tells whether the descriptor is open and changes nothing.
    let flags = check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: sets a flag of an open descriptor.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and was handed to this process by number for this very use: nothing in it owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn unix_name(path: &Path) -> io::Result<libc::sockaddr_un> {
    // SAFETY: all-zero bytes are a valid sockaddr_un.
    let mut name: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= name.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is too long for a socket"));
    }
    name.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in name.sun_path.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    Ok(name)
}

const NAME_BYTES: libc::socklen_t = size_of::<libc::sockaddr_un>() as libc::socklen_t;

fn unix_socket(flags: libc::c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | flags;
    // SAFETY: takes numbers and returns a new descriptor.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A unix stream socket with a name in the file system, not listening yet: nobody can connect to it.
pub(super) fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    let name = unix_name(path)?;
    let fd = unix_socket(0)?;
    // SAFETY: `name` is a sockaddr_un of that length, its path closed by a NUL.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const name).cast(), NAME_BYTES) })?;
    Ok(fd)
}

/// True if somebody listens on the socket at `path`, who may be too busy to take us in.
pub(super) fn is_served(path: &Path) -> io::Result<bool> {
    let name = unix_name(path)?;
    let fd = unix_socket(libc::SOCK_NONBLOCK)?;
    // SAFETY: as for `bind`.
    match check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const name).cast(), NAME_BYTES) }) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        Err(e) => Err(e),
    }
}

/// Lets front-ends connect.
pub(super) fn listen(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: takes a descriptor and a number.
    check(unsafe { libc::listen(fd.as_fd().as_raw_fd(), 8) }).map(drop)
}

/// A file in memory of `len` zeros whose length can be changed by nobody, us included.
pub(super) fn sealed_memfd(name: &CStr, len: u64) -> io::Result<File> {
    // SAFETY: `name` is a C string; takes flags and returns a new descriptor.
    let fd =
        check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) })?;
    // SAFETY: the descriptor is new and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: sets flags of an open descriptor.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

/// `pages` pages of `page` bytes; `None`, with a word why, where the machine has none to spare.
#[cfg(test)]
pub(super) fn huge_memfd(page: usize, pages: usize) -> Option<File> {
    // SAFETY: the name is a C string; takes flags and returns a new descriptor.
    let fd = unsafe { libc::memfd_create(c"huge".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_HUGETLB) };
    // SAFETY: the descriptor, if it is one, is new and nobody else's.
    let file = check(fd).ok().map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
    let reserved = file.filter(|f| {
        use std::os::unix::fs::MetadataExt;
        let right = f.metadata().is_ok_and(|m| m.blksize() == page as u64);
        let bytes = libc::off_t::try_from(page * pages).expect("a few pages");
        // Mapping alone reserves none.
        // SAFETY: takes numbers.
        right && unsafe { libc::fallocate(f.as_raw_fd(), 0, 0, bytes) } == 0
    });
    if reserved.is_none() {
        println!(
            "skipped: {pages} huge pages of {page} bytes cannot be had (sysctl vm.nr_overcommit_hugepages)"
        );
    }
    reserved
}

/// A duplicate of the first descriptor that waits in a unix socket together with its next bytes; both stay there. A peek
/// installs descriptors as a read does.
pub(super) fn peek_descriptor(socket: impl AsFd) -> io::Result<Option<OwnedFd>> {
    const RIGHTS_BYTES: u32 = size_of::<RawFd>() as u32;
    let mut byte = 0u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // aligned as a cmsghdr; more than one header and one descriptor need
    let mut control = [0u64; 4];
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
    (m.msg_iov, m.msg_iovlen) = (&raw mut part, 1);
    m.msg_control = control.as_mut_ptr().cast();
    // SAFETY: computes a length. It has room for exactly one descriptor: no other is installed.
    m.msg_controllen = unsafe { libc::CMSG_LEN(RIGHTS_BYTES) } as usize;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `m` names one byte and a control buffer, both valid for writing over the lengths given.
    let n = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut m, flags) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `m` is as the kernel left it; the answer is null or points to a whole header inside `control`.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const m).as_ref() };
    // SAFETY: computes a length.
    let whole = unsafe { libc::CMSG_LEN(RIGHTS_BYTES) } as usize;
    let rights = |h: &&libc::cmsghdr| {
        h.cmsg_level == libc::SOL_SOCKET && h.cmsg_type == libc::SCM_RIGHTS && h.cmsg_len >= whole
    };
    Ok(header.filter(rights).map(|h| {
        // SAFETY: the header says that a descriptor follows it, within `control`; the kernel has just made it for us.
        unsafe { OwnedFd::from_raw_fd(libc::CMSG_DATA(h).cast::<RawFd>().read_unaligned()) }
    }))
}

/// Sends bytes if that takes no waiting; a peer that has gone is an error, not a signal.
pub(super) fn send_now(socket: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `bytes` is valid for reading over the length given.
    let n = unsafe { libc::send(socket.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    match usize::try_from(n) {
        Ok(n) if n == bytes.len() => Ok(()),
        Ok(_) => Err(io::Error::from(io::ErrorKind::WriteZero)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
