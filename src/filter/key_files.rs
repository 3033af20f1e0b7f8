//! The files that a user names: a password, a key store.

use super::key_store::{KeyStore, MAX_KEY_STORE_TEXT};
use super::{Crypt, Filters, Secret, Unallocated};
use crate::error::{Error, ErrorKind, Result};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest file of VirtualBox's own in which a key store is looked for.
const MAX_MACHINE_FILE: u64 = 16 << 20;
/// The property of the base medium.
const PROPERTY: &str = "\"CRYPT/KeyStore\"";

/// Where a key store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// In a file: its text, or a machine's `.vbox` file with one in it.
    File(PathBuf),
    /// It was found for the disk.
    Found {
        /// Its text.
        text: String,
        /// Where.
        at: PathBuf,
    },
}

impl KeySource {
    /// The key store.
    ///
    /// # Errors
    /// As [`KeyStore::parse`], with the file.
    pub fn read(&self) -> Result<KeyStore> {
        match self {
            KeySource::File(path) => read_key_store(path),
            KeySource::Found { text, at } => KeyStore::parse(text).map_err(|e| e.at(at)),
        }
    }
}

/// Where password and key store of a disk are. Both, or neither.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyFiles {
    /// Holds the password, less one newline at its end; `-`: standard input.
    pub password: Option<PathBuf>,
    /// Where its key store is.
    pub key_store: Option<KeySource>,
    /// What shows where nothing was written.
    pub unallocated: Unallocated,
}

impl KeyFiles {
    /// The filters for the disk; none if no files were named.
    ///
    /// # Errors
    /// Of reading, with the file; [`ErrorKind::PermissionDenied`] if the password is not the one; [`ErrorKind::InvalidArgument`] for one
    /// file without the other.
    pub fn unlock(&self) -> Result<Filters> {
        let (password, store) = match (&self.password, &self.key_store) {
            (None, None) => return Ok(Filters::default()),
            (Some(password), Some(store)) => (password, store),
            _ => {
                let what = "an encrypted disk takes a password and its key store";
                return Err(Error::new(ErrorKind::InvalidArgument, what)
                    .hint("pass --password-file FILE and --key-store FILE"));
            }
        };
        let store = store.read()?;
        let key = store.unlock(&read_password(password)?).map_err(|e| e.at(password))?;
        Ok(Filters::of(Arc::new(Crypt::new(store.cipher(), &key)?), self.unallocated))
    }
}

/// The key of a disk, by the files of its key store and of the password; and the key store.
///
/// # Errors
/// As [`KeyFiles::unlock`].
pub fn unlock(key_store: &Path, password: &Path) -> Result<(Secret, KeyStore)> {
    let store = read_key_store(key_store)?;
    let key = store.unlock(&read_password(password)?).map_err(|e| e.at(password))?;
    Ok((key, store))
}

/// The password in a file; `-`: standard input.
///
/// # Errors
/// As [`Secret::read_password`], with the file.
pub fn read_password(path: &Path) -> Result<Secret> {
    if path == Path::new("-") {
        return Secret::read_password(&mut std::io::stdin().lock())
            .map_err(|e| e.at(Path::new("standard input")));
    }
    let mut file = File::open(path).map_err(|e| Error::io("open it", e).at(path))?;
    Secret::read_password(&mut file).map_err(|e| e.at(path))
}

/// The key store in a file.
///
/// # Errors
/// As [`KeyStore::parse`], with the file.
pub fn read_key_store(path: &Path) -> Result<KeyStore> {
    let mut text = String::new();
    let file = File::open(path).map_err(|e| Error::io("open it", e).at(path))?;
    file.take(MAX_MACHINE_FILE).read_to_string(&mut text).map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidData => {
            Error::new(ErrorKind::NotThisFormat, "is not a key store: it is no text").at(path)
        }
        _ => Error::io("read it", e).at(path),
    })?;
    find(&text).and_then(KeyStore::parse).map_err(|e| e.at(path))
}

/// Writes a key store into a new file that only its owner can read; durable when this returns.
///
/// # Errors
/// [`ErrorKind::Exists`] if there is such a file; of writing.
pub fn write_key_store(path: &Path, store: &KeyStore) -> Result<()> {
    let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = new.map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::io("make it", e).at(path).hint("nothing is overwritten: a lost key store is a lost disk")
        }
        _ => Error::io("make it", e).at(path),
    })?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let written = file
        .write_all(store.to_text().as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| File::open(folder)?.sync_all());
    written.map_err(|e| {
        // Half a key store is none.
        let _ = std::fs::remove_file(path);
        Error::io("write it", e).at(path)
    })
}

/// The text of the key store: all there is, or the one in a file of VirtualBox's.
fn find(text: &str) -> Result<&str> {
    if !text.trim_start().starts_with('<') {
        if text.len() as u64 > MAX_KEY_STORE_TEXT {
            return Err(Error::new(ErrorKind::NotThisFormat, "is too long for a key store"));
        }
        return Ok(text);
    }
    let tags = text.split('<').filter(|tag| tag.starts_with("Property") && tag.contains(PROPERTY));
    let mut stores: Vec<&str> =
        tags.filter_map(|tag| tag.split_once("value=\"")?.1.split('"').next()).collect();
    stores.sort_unstable();
    stores.dedup();
    match stores[..] {
        [store] => Ok(store),
        [] => Err(Error::new(ErrorKind::NotFound, "names no key store: none of its disks is encrypted")),
        _ => {
            let what = format!("holds {} key stores", stores.len());
            let hint = "copy the value of CRYPT/KeyStore of the disk in question into a file of its own";
            Err(Error::new(ErrorKind::InvalidArgument, what).hint(hint))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_store_is_found_in_a_machine_s_file() {
        let disk = |store: &str| {
            format!(
                "<HardDisk><Property name=\"CRYPT/KeyId\" value=\"x\"/><Property name=\"CRYPT/KeyStore\" value=\"{store}\"/></HardDisk>"
            )
        };
        assert_eq!(find("U0NF\n").unwrap(), "U0NF\n");
        let xml = |disks: &str| format!("<?xml version=\"1.0\"?>\n<VirtualBox>{disks}</VirtualBox>");
        assert_eq!(find(&xml(&disk("U0N&#10;F"))).unwrap(), "U0N&#10;F");
        assert_eq!(find(&xml(&(disk("A") + &disk("A")))).unwrap(), "A");
        assert_eq!(find(&xml(&(disk("A") + &disk("B")))).unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert_eq!(find(&xml("")).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(find(&"A".repeat(1 << 17)).is_err());
    }

    #[test]
    fn one_file_without_the_other_is_refused() {
        assert!(KeyFiles::default().unlock().unwrap().is_empty());
        let half = KeyFiles { password: Some("p".into()), ..KeyFiles::default() };
        assert_eq!(half.unlock().unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
}
