//! Errors: a small kind that programs match, one line that people read, the source beneath.

mod status;

pub use status::Status;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Result of everything outside the data path.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, for code that has to decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The bytes are not of this format (wrong signature).
    NotThisFormat,
    /// The format's own rules are broken.
    Corrupt,
    /// A version, feature or operation that is not supported.
    Unsupported,
    /// A file, parent or medium does not exist.
    NotFound,
    /// Something to be created exists already.
    Exists,
    /// The operating system refused access.
    PermissionDenied,
    /// Another process holds the image.
    Locked,
    /// A change was asked of something open for reading only.
    ReadOnly,
    /// The parent's UUID is not the one the child names.
    ParentMismatch,
    /// A value the caller gave is not usable.
    InvalidArgument,
    /// An offset or length lies outside the disk or file.
    OutOfRange,
    /// No room on the file system.
    NoSpace,
    /// An earlier sync failed: what the disk holds is not known, so no further write is taken.
    SyncFailed,
    /// A bound of this program was reached.
    Limit,
    /// The call does not fit what is going on: nothing is open, or something is in use.
    State,
    /// The caller cancelled the job.
    Cancelled,
    /// Reading or writing failed.
    Io,
}

/// An error outside the data path: kind, sentence, file, advice and source.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: ErrorKind,
    status: Option<Status>,
    message: String,
    path: Option<PathBuf>,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `message` says what is wrong, without the file's name.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let message = message.into();
        let inner = Inner { kind, status: None, message, path: None, hint: None, source: None };
        Error { inner: Box::new(inner) }
    }

    /// An error that VirtualBox has a code for.
    ///
    /// # Panics
    /// If the code is none of an error.
    pub fn of(status: Status, message: impl Into<String>) -> Self {
        let mut e = Error::new(status.kind().expect("an error's code"), message);
        e.inner.status = Some(status);
        e
    }

    /// The same error, whose code in VirtualBox says more than its kind does.
    #[must_use]
    pub fn with_status(mut self, status: Status) -> Self {
        self.inner.status.get_or_insert(status);
        self
    }

    /// VirtualBox's code for it, if there is one.
    pub fn status(&self) -> Option<Status> {
        self.inner.status.or_else(|| Status::of_kind(self.inner.kind))
    }

    /// An error from the operating system; `tried` completes the sentence "cannot …".
    pub fn io(tried: impl fmt::Display, source: io::Error) -> Self {
        let kind = kind_of_io(&source);
        let message = format!("cannot {tried}: {}", plain(&source));
        let mut e = Error::new(kind, message);
        e.inner.source = Some(Box::new(source));
        e
    }

    /// Names the file, unless a deeper layer has done so.
    #[must_use]
    pub fn at(mut self, path: &Path) -> Self {
        self.inner.path.get_or_insert_with(|| path.to_path_buf());
        self
    }

    /// Says what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.inner.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The kind, to match on.
    pub fn kind(&self) -> ErrorKind {
        self.inner.kind
    }

    /// The file this is about, if it is about one.
    pub fn path(&self) -> Option<&Path> {
        self.inner.path.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let i = &*self.inner;
        if let Some(p) = &i.path {
            write!(f, "{}: ", p.display())?;
        }
        f.write_str(&i.message)?;
        if let Some(h) = &i.hint {
            write!(f, " ({h})")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.inner.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_deref().map(|e| e as _)
    }
}

fn kind_of_io(e: &io::Error) -> ErrorKind {
    match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => return ErrorKind::NoSpace,
        Some(libc::EROFS) => return ErrorKind::ReadOnly,
        _ => {}
    }
    match e.kind() {
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::AlreadyExists => ErrorKind::Exists,
        io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        _ => ErrorKind::Io,
    }
}

/// The operating system's sentence without "(os error N)".
fn plain(e: &io::Error) -> String {
    let s = e.to_string();
    match s.find(" (os error") {
        Some(i) => s[..i].to_string(),
        None => s,
    }
}

/// Why one request of the data path failed. Small and copyable: it travels through slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The operating system's error number.
    Os(i32),
    /// The disk is read-only.
    ReadOnly,
    /// The range leaves the disk.
    OutOfRange,
    /// The request's form is wrong.
    Malformed,
    /// Not a request this device knows.
    Unsupported,
    /// The image's metadata contradicts itself.
    Corrupt,
    /// An earlier sync failed; no write is taken any more.
    SyncFailed,
}

impl Failure {
    /// Takes the error number out of an [`io::Error`].
    pub fn from_io(e: &io::Error) -> Self {
        Failure::Os(e.raw_os_error().unwrap_or(libc::EIO))
    }

    /// The same as an error number, for callers that speak errno.
    pub fn errno(self) -> i32 {
        match self {
            Failure::Os(n) => n,
            Failure::ReadOnly => libc::EROFS,
            Failure::OutOfRange | Failure::Malformed => libc::EINVAL,
            Failure::Unsupported => libc::EOPNOTSUPP,
            Failure::Corrupt => libc::EUCLEAN,
            Failure::SyncFailed => libc::EIO,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Os(n) => f.write_str(&plain(&io::Error::from_raw_os_error(*n))),
            Failure::ReadOnly => f.write_str("the disk is read-only"),
            Failure::OutOfRange => f.write_str("beyond the end of the disk"),
            Failure::Malformed => f.write_str("malformed request"),
            Failure::Unsupported => f.write_str("not supported"),
            Failure::Corrupt => f.write_str("the image's metadata contradicts itself"),
            Failure::SyncFailed => f.write_str("an earlier sync failed; writes are refused"),
        }
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for Error {
    fn from(f: Failure) -> Self {
        let kind = match f {
            Failure::Os(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
            Failure::Os(_) => ErrorKind::Io,
            Failure::ReadOnly => ErrorKind::ReadOnly,
            Failure::OutOfRange => ErrorKind::OutOfRange,
            Failure::Malformed => ErrorKind::InvalidArgument,
            Failure::Unsupported => ErrorKind::Unsupported,
            Failure::Corrupt => ErrorKind::Corrupt,
            Failure::SyncFailed => ErrorKind::SyncFailed,
        };
        Error::new(kind, f.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_with_file_and_advice() {
        let e = Error::new(ErrorKind::Locked, "another process has it open for writing")
            .at(Path::new("/d/a.vdi"))
            .hint("stop it or open read-only");
        assert_eq!(
            e.to_string(),
            "/d/a.vdi: another process has it open for writing (stop it or open read-only)"
        );
        assert_eq!(e.kind(), ErrorKind::Locked);
    }

    #[test]
    fn os_errors_keep_their_kind_and_lose_their_number() {
        let e = Error::io("open it", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(e.kind(), ErrorKind::NotFound);
        assert_eq!(e.to_string(), "cannot open it: No such file or directory");
        assert_eq!(Error::io("x", io::Error::from_raw_os_error(libc::EDQUOT)).kind(), ErrorKind::NoSpace);
    }
}
