//! Result codes of the interface, and errors that carry one.

use crate::error::{Error, ErrorKind};
use std::fmt;
use std::path::Path;

/// A result code, as the interface names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// No such medium, machine or parent.
    ObjectNotFound,
    /// The medium's state does not allow the call.
    InvalidObjectState,
    /// A file (of the registry or of a medium) is not accessible.
    FileError,
    /// The run time: an image could not be read or written.
    IprtError,
    /// The registry, or a file that is imported, could not be parsed.
    XmlError,
    /// This medium, its type or its format does not do that.
    NotSupported,
    /// Machines or children use the medium.
    ObjectInUse,
    /// The password is not the medium's.
    PasswordIncorrect,
    /// The attribute does not exist for this type of medium.
    NotImpl,
    /// The object was closed: it is not ready.
    AccessDenied,
    /// An argument makes no sense.
    InvalidArg,
}

impl Code {
    /// All of them.
    pub const ALL: [Code; 11] = [
        Code::ObjectNotFound,
        Code::InvalidObjectState,
        Code::FileError,
        Code::IprtError,
        Code::XmlError,
        Code::NotSupported,
        Code::ObjectInUse,
        Code::PasswordIncorrect,
        Code::NotImpl,
        Code::AccessDenied,
        Code::InvalidArg,
    ];

    /// The interface's name.
    pub fn name(self) -> &'static str {
        match self {
            Code::ObjectNotFound => "VBOX_E_OBJECT_NOT_FOUND",
            Code::InvalidObjectState => "VBOX_E_INVALID_OBJECT_STATE",
            Code::FileError => "VBOX_E_FILE_ERROR",
            Code::IprtError => "VBOX_E_IPRT_ERROR",
            Code::XmlError => "VBOX_E_XML_ERROR",
            Code::NotSupported => "VBOX_E_NOT_SUPPORTED",
            Code::ObjectInUse => "VBOX_E_OBJECT_IN_USE",
            Code::PasswordIncorrect => "VBOX_E_PASSWORD_INCORRECT",
            Code::NotImpl => "E_NOTIMPL",
            Code::AccessDenied => "E_ACCESSDENIED",
            Code::InvalidArg => "E_INVALIDARG",
        }
    }

    /// The interface's number.
    pub fn value(self) -> u32 {
        match self {
            Code::ObjectNotFound => 0x80bb_0001,
            Code::FileError => 0x80bb_0004,
            Code::IprtError => 0x80bb_0005,
            Code::InvalidObjectState => 0x80bb_0007,
            Code::NotSupported => 0x80bb_0009,
            Code::XmlError => 0x80bb_000a,
            Code::ObjectInUse => 0x80bb_000c,
            Code::PasswordIncorrect => 0x80bb_000d,
            Code::NotImpl => 0x8000_4001,
            Code::AccessDenied => 0x8007_0005,
            Code::InvalidArg => 0x8007_0057,
        }
    }

    /// The kind of the error that goes with it.
    fn kind(self) -> ErrorKind {
        match self {
            Code::ObjectNotFound => ErrorKind::NotFound,
            Code::InvalidObjectState | Code::ObjectInUse => ErrorKind::Locked,
            Code::FileError | Code::IprtError => ErrorKind::Io,
            Code::XmlError => ErrorKind::Corrupt,
            Code::NotSupported | Code::NotImpl => ErrorKind::Unsupported,
            Code::AccessDenied | Code::PasswordIncorrect => ErrorKind::PermissionDenied,
            Code::InvalidArg => ErrorKind::InvalidArgument,
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Result of the registry's calls.
pub type Result<T> = std::result::Result<T, Fault>;

/// An error with the interface's result code.
#[derive(Debug)]
pub struct Fault {
    code: Code,
    error: Error,
}

impl Fault {
    /// A call was refused; `why` is a sentence, without the file's name.
    pub fn new(code: Code, why: impl fmt::Display) -> Fault {
        Fault { code, error: Error::new(code.kind(), format!("{why} [{}]", code.name())) }
    }

    /// Work on files failed.
    pub fn because(code: Code, error: Error) -> Fault {
        Fault { code, error }
    }

    /// Names the medium, unless a deeper layer has done so.
    #[must_use]
    pub fn at(self, path: &Path) -> Fault {
        Fault { error: self.error.at(path), ..self }
    }

    /// Says what to do about it.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Fault {
        Fault { error: self.error.hint(hint), ..self }
    }

    /// The interface's code.
    pub fn code(&self) -> Code {
        self.code
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Fault {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.error)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        let code = match error.kind() {
            ErrorKind::NotFound | ErrorKind::Exists | ErrorKind::PermissionDenied | ErrorKind::NoSpace => {
                Code::FileError
            }
            ErrorKind::Unsupported => Code::NotSupported,
            ErrorKind::InvalidArgument => Code::InvalidArg,
            ErrorKind::Locked => Code::InvalidObjectState,
            _ => Code::IprtError,
        };
        Fault { code, error }
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Error {
        fault.error
    }
}

/// Of the registry's own file: what cannot be parsed is no database of ours, anything else means that it is not accessible.
impl From<rusqlite::Error> for Fault {
    fn from(e: rusqlite::Error) -> Fault {
        use rusqlite::ErrorCode as E;
        let code = match e.sqlite_error_code() {
            Some(E::NotADatabase | E::DatabaseCorrupt | E::TypeMismatch) => Code::XmlError,
            Some(E::ConstraintViolation) => Code::ObjectInUse,
            // What stands in a column is nothing that this program writes.
            None => Code::XmlError,
            _ => Code::FileError,
        };
        Fault::new(code, format!("the registry: {e}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn codes_differ_in_name_and_number() {
        let names: BTreeSet<_> = Code::ALL.iter().map(|c| c.name()).collect();
        let numbers: BTreeSet<_> = Code::ALL.iter().map(|c| c.value()).collect();
        assert_eq!((names.len(), numbers.len()), (Code::ALL.len(), Code::ALL.len()));
        assert_eq!(Code::InvalidObjectState.value(), 0x80bb_0007);
        assert_eq!(Code::ObjectInUse.value(), 0x80bb_000c);
    }

    #[test]
    fn a_fault_is_one_line_with_its_code() {
        let f = Fault::new(Code::ObjectInUse, "has 1 child").at(Path::new("/a.vdi")).hint("close that");
        assert_eq!(f.to_string(), "/a.vdi: has 1 child [VBOX_E_OBJECT_IN_USE] (close that)");
    }
}
