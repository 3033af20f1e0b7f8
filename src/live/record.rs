//! The record of a disk: a small file that says which image is on top of its chain, across live changes of it.
//!
//! It is replaced as a whole: written beside, synced, renamed, the folder synced. Names are relative to its own folder where the
//! images are in it or below, so that the folder may be moved.

use crate::error::{Error, ErrorKind, Result};
use crate::io::sync_dir;
use crate::vd::ImageSpec;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// The only version there is.
const VERSION: u32 = 1;
/// More bytes no record has.
const MAX_BYTES: u64 = 1 << 20;

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// The image the disk was first served from: what tells a record of another disk.
    pub began: PathBuf,
    /// The images, top first.
    pub chain: Vec<ImageSpec>,
    /// An image above them that was being made: it has never been served.
    pub making: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    vdblk_record: u32,
    began: String,
    /// Top first.
    chain: Vec<TextImage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    making: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TextImage {
    file: String,
    format: String,
}

/// The folder a file is in, and all of its name without links on the way.
fn folder_of(path: &Path) -> Result<PathBuf> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::canonicalize(dir).map_err(|e| Error::io("find its folder", e).at(path))
}

/// A file without links on the way to it.
fn real(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(|e| Error::io("find it", e).at(path))
}

/// The name of a file that may have gone.
fn plain(path: &Path) -> Result<String> {
    let path = std::path::absolute(path).map_err(|e| Error::io("find it", e).at(path))?;
    Ok(path.to_string_lossy().into_owned())
}

/// Reads a record; `None` if there is none.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for what is no record, with what to do; from the operating system.
pub fn load(path: &Path) -> Result<Option<Recorded>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("open it", e).at(path)),
        Ok(file) => file,
    };
    let mut text = String::new();
    let read = file.take(MAX_BYTES).read_to_string(&mut text);
    read.map_err(|e| Error::io("read it", e).at(path))?;
    let refused = |what: String| {
        Error::new(ErrorKind::Corrupt, what)
            .at(path)
            .hint("name the image to serve, and a record that is free")
    };
    let text: Text = serde_json::from_str(&text).map_err(|e| refused(format!("is no record: {e}")))?;
    if text.vdblk_record != VERSION {
        return Err(refused(format!("is a record of version {}; {VERSION} is known", text.vdblk_record)));
    }
    let folder = folder_of(path)?;
    let image = |i: TextImage| Ok(ImageSpec { path: folder.join(i.file), format: Some(i.format.parse()?) });
    let chain = text.chain.into_iter().map(image).collect::<Result<Vec<_>>>().map_err(|e| e.at(path))?;
    if chain.is_empty() {
        return Err(refused("names no image".into()));
    }
    let making = text.making.map(|name| folder.join(name));
    Ok(Some(Recorded { began: folder.join(text.began), chain, making }))
}

/// Writes a record, in one piece and durably: whoever reads it sees the old one or this.
///
/// # Errors
/// From the operating system: either may be there then. [`ErrorKind::InvalidArgument`] for images without a format, and for names that
/// are not Unicode.
pub fn store(path: &Path, what: &Recorded) -> Result<()> {
    let folder = folder_of(path)?;
    let name = |image: &Path| -> Result<String> {
        let image = real(image)?;
        let short = image.strip_prefix(&folder).unwrap_or(&image);
        short.to_str().map(str::to_string).ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, "its name is not Unicode, which a record needs").at(&image)
        })
    };
    let image = |i: &ImageSpec| {
        let none = || Error::new(ErrorKind::InvalidArgument, "its format is not known").at(&i.path);
        Ok(TextImage { file: name(&i.path)?, format: i.format.ok_or_else(none)?.to_string() })
    };
    let text = Text {
        vdblk_record: VERSION,
        began: name(&what.began).or_else(|_| plain(&what.began))?,
        chain: what.chain.iter().map(image).collect::<Result<_>>()?,
        making: what.making.as_deref().map(plain).transpose()?,
    };
    let text = serde_json::to_string_pretty(&text).expect("strings and a number");
    replace(path, &folder, text.as_bytes())
}

/// What the name of a record that is being written begins and ends with.
const UNFINISHED: (&str, &str) = (".", ".new");

/// A record that was being written when its process ended: nobody was ever told of what it says.
pub fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().map(|n| n.to_string_lossy());
    name.is_some_and(|n| n.starts_with(UNFINISHED.0) && n.ends_with(UNFINISHED.1))
}

fn replace(path: &Path, folder: &Path, bytes: &[u8]) -> Result<()> {
    let name =
        path.file_name().ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "is no name").at(path))?;
    let mut beside = std::ffi::OsString::from(UNFINISHED.0);
    beside.push(name);
    beside.push(UNFINISHED.1);
    let beside = folder.join(beside);
    let tried = |what: &str, e| Error::io(what.to_string(), e).at(path);
    let written = File::create(&beside).and_then(|mut f| {
        f.write_all(bytes)?;
        f.write_all(b"\n")?;
        f.sync_all()
    });
    let renamed = written.and_then(|()| fs::rename(&beside, folder.join(name)));
    renamed.map_err(|e| {
        let _ = fs::remove_file(&beside); // the error is told
        tried("write it", e)
    })?;
    sync_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    #[test]
    fn what_is_stored_is_loaded_wherever_the_folder_is() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("own");
        fs::create_dir_all(own.join("snapshots")).unwrap();
        let files = [own.join("base.vdi"), own.join("snapshots/a.qcow2"), dir.path().join("else.raw")];
        files.iter().for_each(|f| fs::write(f, "x").unwrap());
        let spec = |n: usize, format| ImageSpec { path: files[n].clone(), format: Some(format) };
        let chain = vec![spec(1, Format::Qcow2), spec(0, Format::Vdi), spec(2, Format::Raw)];
        let record = own.join("disk.record");
        assert_eq!(load(&record).unwrap(), None);
        let mut what = Recorded { began: files[0].clone(), chain, making: None };
        store(&record, &what).unwrap();
        store(&record, &what).unwrap();
        assert_eq!(load(&record).unwrap().as_ref(), Some(&what));
        let moved = dir.path().join("moved");
        fs::rename(&own, &moved).unwrap();
        what.began = moved.join("base.vdi");
        what.chain[0].path = moved.join("snapshots/a.qcow2");
        what.chain[1].path = moved.join("base.vdi");
        assert_eq!(load(&moved.join("disk.record")).unwrap(), Some(what));
        assert_eq!(fs::read_dir(&moved).unwrap().count(), 3, "nothing is left beside it");
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        for text in [
            "",
            "{}",
            "[1]",
            r#"{"vdblk_record":2,"began":"a","chain":[{"file":"a","format":"VDI"}]}"#,
            r#"{"vdblk_record":1,"began":"a","chain":[]}"#,
            r#"{"vdblk_record":1,"began":"a","chain":[],"more":1}"#,
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(load(&path).unwrap_err().kind(), ErrorKind::Corrupt, "{text}");
        }
        fs::write(&path, r#"{"vdblk_record":1,"began":"a","chain":[{"file":"a","format":"odd"}]}"#).unwrap();
        assert!(load(&path).is_err());
    }
}
