//! Where front-ends come from: a socket of our own making, or a descriptor we were started with.

use super::sys;
use crate::error::{Error, ErrorKind, Result};
use std::fs;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A way for front-ends to reach us.
#[derive(Debug)]
pub enum Endpoint {
    /// Front-ends connect, one after the other.
    Listener(UnixListener),
    /// One front-end is connected already.
    Connected(UnixStream),
}

impl Endpoint {
    /// Asks a descriptor which of both it is: virtiofsd's `--fd` is a listening socket, crosvm's a connected one.
    ///
    /// # Errors
    /// `InvalidArgument` if it is not a unix stream socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        if !sys::is_unix_stream(&fd).unwrap_or(false) {
            let what = "the descriptor is not a unix stream socket";
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        match sys::is_listening(&fd) {
            Ok(true) => Ok(Endpoint::Listener(fd.into())),
            Ok(false) => Ok(Endpoint::Connected(fd.into())),
            Err(e) => Err(Error::io("ask the socket whether it is listening", e)),
        }
    }

    /// As [`Self::from_fd`], for the number of a descriptor this process was started with. It is ours from then on:
    /// to be called once a number, for one above 2 that nothing else in this process uses.
    ///
    /// # Errors
    /// `InvalidArgument` also if the descriptor is not open or is a standard stream.
    pub fn from_number(number: RawFd) -> Result<Self> {
        let bad = |what: String| Error::new(ErrorKind::InvalidArgument, what);
        if number <= libc::STDERR_FILENO {
            return Err(bad(format!("descriptor {number} is a standard stream")));
        }
        let fd = sys::adopt(number).map_err(|_| bad(format!("descriptor {number} is not open")))?;
        Self::from_fd(fd)
    }
}

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// Permission bits.
    pub mode: u32,
    /// Group number, if not the process's own.
    pub group: Option<u32>,
}

impl Default for SocketOptions {
    fn default() -> Self {
        SocketOptions { mode: 0o600, group: None }
    }
}

/// The name of a listening socket; taken away when this is dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode number: whoever takes the name later keeps it.
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    /// Listens at `path`. A socket file that nobody listens on is replaced. The name appears with its permissions set:
    /// there is no moment in which others could connect.
    ///
    /// # Errors
    /// `Exists` if somebody listens there or it is something else than a socket; or from the operating system.
    pub fn bind(path: &Path, options: &SocketOptions) -> Result<(Self, Endpoint)> {
        if is_stale(path).map_err(|e| e.at(path))? {
            fs::remove_file(path).map_err(|e| Error::io("remove the stale socket", e).at(path))?;
        }
        let listener = Self::make(path, options).map_err(|e| Error::io("make the socket", e).at(path))?;
        let file = SocketFile { path: path.to_path_buf(), identity: identity(path) };
        Ok((file, Endpoint::Listener(listener)))
    }

    /// Between `bind` and `listen` nobody can connect: by then owner and permissions are set.
    fn make(path: &Path, options: &SocketOptions) -> io::Result<UnixListener> {
        let socket = sys::bind_unix(path)?;
        let set_up = chown(path, None, options.group)
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(options.mode)))
            .and_then(|()| sys::listen(&socket));
        if let Err(e) = set_up {
            // what is left of the attempt
            let _ = fs::remove_file(path);
            return Err(e);
        }
        Ok(socket.into())
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // it may have been taken away already; nothing depends on it
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// True for a socket file that nobody listens on, false if nothing is there.
fn is_stale(path: &Path) -> Result<bool> {
    let exists = |what, hint| Err(Error::new(ErrorKind::Exists, what).hint(hint));
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io("look at the socket's place", e)),
        Ok(meta) if !meta.file_type().is_socket() => {
            exists("something that is not a socket is there", "give --socket-path another path")
        }
        Ok(_) => match sys::is_served(path) {
            Ok(false) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io("find out whether another process listens there", e)),
            Ok(true) => {
                exists("another process listens on this socket", "end it, or give --socket-path another path")
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_sockets_are_replaced_and_live_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.sock");
        let (file, endpoint) = SocketFile::bind(&path, &SocketOptions::default()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let again = SocketFile::bind(&path, &SocketOptions::default()).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Exists);
        drop(endpoint);
        let (_second, _endpoint) =
            SocketFile::bind(&path, &SocketOptions { mode: 0o660, group: None }).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        drop(file);
        assert!(!path.exists());
        fs::write(&path, "text").unwrap();
        let no = SocketFile::bind(&path, &SocketOptions::default()).unwrap_err();
        assert!(no.to_string().contains("not a socket"), "{no}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn descriptors_say_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        assert!(matches!(Endpoint::from_fd(listener.into()), Ok(Endpoint::Listener(_))));
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(matches!(Endpoint::from_fd(a.into()), Ok(Endpoint::Connected(_))));
        let plain = tempfile::tempfile().unwrap();
        assert_eq!(Endpoint::from_fd(plain.into()).unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert!(Endpoint::from_number(2).is_err() && Endpoint::from_number(999_999).is_err());
    }
}
