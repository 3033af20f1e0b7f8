//! A name for files that have none.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use uuid::Uuid;

/// What an overlay names as its parent if that is a raw file, which has no UUID of its own: a number made from the file's
/// name, inode, size and the time of its last change, so that the same command finds its overlay again, and that of another
/// file, or of this one before somebody wrote to it, is refused. `None` for devices: their names and numbers belong to
/// another after the next boot.
pub(crate) fn stand_in(path: &Path) -> Option<Uuid> {
    let path = fs::canonicalize(path).ok()?;
    let meta = fs::metadata(&path).ok()?;
    if !meta.is_file() {
        return None;
    }
    let changed = [meta.mtime(), meta.mtime_nsec()].into_iter().flat_map(i64::to_le_bytes);
    let numbers = [meta.ino(), meta.len()].into_iter().flat_map(u64::to_le_bytes).chain(changed);
    let bytes = path.as_os_str().as_bytes().iter().copied().chain([0]).chain(numbers);
    Some(uuid::Builder::from_custom_bytes(fnv(bytes).to_be_bytes()).into_uuid())
}

/// FNV-1a of 128 bits: the UUIDs made from it have to be different, not secret.
pub(super) fn fnv(bytes: impl Iterator<Item = u8>) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.fold(BASIS, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_fnv() {
        // Published test values of FNV-1a with 128 bits.
        assert_eq!(fnv([].into_iter()), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv(b"foobar".iter().copied()), 0x343e1662793c64bf6f0d3597ba446f18);
    }
}
