//! Whether a file is a whole shared library. The system's loader maps what the headers promise and touches it: of a file that
//! ends before, that is a SIGBUS and no error.

use crate::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;

const HEADER_BYTES: usize = 64;
const ENTRY_BYTES: usize = 56;
/// Program headers of one library.
const MAX_ENTRIES: u16 = 1024;
const PT_LOAD: u32 = 1;
const ET_DYN: u16 = 3;

fn bad(what: &str) -> Error {
    Error::new(ErrorKind::NotThisFormat, what)
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("N bytes")
}

fn read(file: &File, at: u64, bytes: &mut [u8]) -> Result<()> {
    file.read_exact_at(bytes, at).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => bad("is no shared library, or only the beginning of one"),
        _ => Error::io("read it", e),
    })
}

/// # Errors
/// [`ErrorKind::NotThisFormat`] if it is no ELF library of 64 bits in the machine's byte order, or not all of it is there.
pub(super) fn check(file: &File) -> Result<()> {
    let len = file.metadata().map_err(|e| Error::io("look at it", e))?.len();
    let mut header = [0; HEADER_BYTES];
    read(file, 0, &mut header)?;
    // Signature, 64 bits, byte order, version.
    let order = if cfg!(target_endian = "little") { 1 } else { 2 };
    if header[..4] != *b"\x7fELF" || header[4] != 2 || header[5] != order || header[6] != 1 {
        return Err(bad("is no shared library"));
    }
    if u16::from_ne_bytes(number(&header, 16)) != ET_DYN {
        return Err(bad("is an ELF file, but no shared library"));
    }
    let at = u64::from_ne_bytes(number(&header, 32));
    let entry_bytes = u16::from_ne_bytes(number(&header, 54));
    let entries = u16::from_ne_bytes(number(&header, 56));
    if usize::from(entry_bytes) != ENTRY_BYTES || entries == 0 || entries > MAX_ENTRIES {
        return Err(bad("is a shared library with odd program headers"));
    }
    let mut table = vec![0; usize::from(entries) * ENTRY_BYTES];
    read(file, at, &mut table)?;
    for entry in table.chunks_exact(ENTRY_BYTES) {
        let (off, bytes) = (u64::from_ne_bytes(number(entry, 8)), u64::from_ne_bytes(number(entry, 32)));
        let is_loaded = u32::from_ne_bytes(number(entry, 0)) == PT_LOAD;
        if is_loaded && off.checked_add(bytes).is_none_or(|end| end > len) {
            return Err(bad("is only the beginning of a shared library"));
        }
    }
    Ok(())
}
