//! Cache images: making them, and what there is to tell of one.

use super::create::{folder_of, open_new};
use crate::error::{Error, ErrorKind, Result};
use crate::format::vci::{Header, NO_BLOCK, Shape};
use crate::format::{CheckReport, extension_format};
use crate::io::{HostFile, ImageLock, OpenHow, OsFile, sync_dir};
use crate::vd::{read_cache_header, read_cache_table};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Blocks of a cache image, in bytes, unless another size is asked for.
pub const CACHE_BLOCK_BYTES: u64 = 64 << 10;

/// What there is to tell of a cache image.
#[derive(Clone, Copy, Debug)]
pub struct InspectedCache {
    /// Its header.
    pub header: Header,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of storage the file takes.
    pub allocated_bytes: u64,
    /// Blocks it holds; `None` where that is not known: a session is under way, or has not ended in order.
    pub kept: Option<u64>,
}

/// Makes an empty cache image whose file will never have more than `size_bytes` bytes. It is complete and durable when this
/// returns, and takes space only as it is filled; after an error no file is left.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for sizes and names that cannot be, as [`Shape::within`] says; from the operating system.
pub fn create_cache(path: &Path, size_bytes: u64, block_bytes: u64) -> Result<Shape> {
    let shape = Shape::within(size_bytes, block_bytes).map_err(|e| e.at(path))?;
    if let Some(named) = extension_format(path) {
        let what = format!("its name says {named}, but it is to be a cache image");
        let hint = format!("call it {}", path.with_extension("vci").display());
        return Err(Error::new(ErrorKind::InvalidArgument, what).at(path).hint(hint));
    }
    let file = open_new(path)?;
    let made = file
        .set_len(shape.file_bytes())
        .and_then(|()| file.write_at(0, &Header::new(shape).to_bytes()))
        .and_then(|()| file.sync())
        .map_err(|e| Error::io("write its header", e).at(path))
        .and_then(|()| sync_dir(folder_of(path)));
    if made.is_err() {
        let _ = fs::remove_file(path); // half-made it is worth nothing
    }
    made.map(|()| shape)
}

/// What there is to tell of a cache image; `None` if the file at `path` is none by its signature, or its name says that it
/// is something else. Takes no lock.
///
/// # Errors
/// As [`read_cache_header`].
pub fn inspect_cache(path: &Path) -> Result<Option<InspectedCache>> {
    let Some(file) = open_cache(path)? else { return Ok(None) };
    let header = read_cache_header(&file)?;
    let allocated_bytes = file.allocated().map_err(|e| Error::io("look at it", e).at(path))?;
    let count = |entries: Vec<u64>| entries.iter().filter(|b| **b != NO_BLOCK).count() as u64;
    let kept = match (header.unclean, header.generation) {
        (true, _) => None,
        (false, 0) => Some(0),
        _ => read_cache_table(&file, &header).ok().map(count),
    };
    Ok(Some(InspectedCache { header, file_bytes: header.shape.file_bytes(), allocated_bytes, kept }))
}

/// What is wrong with a cache image, waiting as long as `lock_wait` says for who uses it; `None` if it is none, as with
/// [`inspect_cache`]. A session that was not ended in order is nothing wrong: the next begins with nothing.
///
/// # Errors
/// [`ErrorKind::Locked`] while it is in use; from the operating system.
pub fn check_cache(path: &Path, lock_wait: Duration) -> Result<Option<CheckReport>> {
    let Some(file) = open_cache(path)? else { return Ok(None) };
    let _lock = ImageLock::shared(&file, lock_wait)?;
    let looked = read_cache_header(&file).and_then(|header| {
        let is_read = header.generation > 0 && !header.unclean;
        let entries = if is_read { read_cache_table(&file, &header)? } else { Vec::new() };
        let allocated = entries.iter().filter(|b| **b != NO_BLOCK).count() as u64;
        Ok(CheckReport { blocks: header.shape.places, allocated, ..CheckReport::default() })
    });
    match looked {
        Err(e) if e.kind() == ErrorKind::Corrupt => Ok(Some(CheckReport::hopeless(&e))),
        other => other.map(Some),
    }
}

fn open_cache(path: &Path) -> Result<Option<OsFile>> {
    if extension_format(path).is_some() {
        return Ok(None);
    }
    let file = OsFile::open(path, OpenHow::default())?;
    let mut head = [0; 4];
    let n = file.read_at(0, &mut head).map_err(|e| Error::io("read its header", e).at(path))?;
    Ok(Header::is_signed(&head[..n]).then_some(file))
}
