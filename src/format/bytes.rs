//! Numbers in the bytes of files. Where there are too few bytes there is no number.

/// The big-endian 32-bit number at `at`.
pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let raw = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(raw.try_into().ok()?))
}

/// The big-endian 64-bit number at `at`.
pub(super) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let raw = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(raw.try_into().ok()?))
}

/// Puts a big-endian 32-bit number at `at`.
///
/// # Panics
/// If the bytes end before: whoever patches a structure has it whole.
pub(super) fn put_be32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// Puts a big-endian 64-bit number at `at`.
///
/// # Panics
/// As [`put_be32`].
pub(super) fn put_be64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}
