//! Memory for secrets: in pages of its own, which are not swapped out nor written to core files, and cleared before they go.

use crate::error::{Error, ErrorKind, Result};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::io::Read;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use zeroize::Zeroize;

/// A multiple of every page size there is on common hosts would be 64 KiB; the usual one does: a neighbour in the same larger page
/// is locked as well, and no harm is done.
const PAGE: usize = 4096;

/// Bytes of the longest [`Secret`]: a password of one page.
pub const MAX_SECRET_BYTES: usize = PAGE;

/// A value in locked memory. Where the host does not allow locking (`ulimit -l`), it is said once and gone on without.
pub(super) struct Locked<T> {
    place: NonNull<T>,
}

// SAFETY: a Locked owns its value like a Box does.
unsafe impl<T: Send> Send for Locked<T> {}
// SAFETY: as above; `&Locked` gives out shared references only.
unsafe impl<T: Sync> Sync for Locked<T> {}

impl<T> Locked<T> {
    fn layout() -> Layout {
        let bytes = size_of::<T>().max(1).next_multiple_of(PAGE);
        Layout::from_size_align(bytes, PAGE.max(align_of::<T>())).expect("secrets are small")
    }

    /// Pages for a value that `fill` makes once they are locked.
    pub(super) fn new(fill: impl FnOnce() -> T) -> Self {
        let layout = Self::layout();
        // SAFETY: the layout's size is not 0.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(place) = NonNull::new(memory.cast::<T>()) else { handle_alloc_error(layout) };
        lock(memory, layout.size());
        // SAFETY: the memory is ours, large enough and aligned (`layout`), and holds no value yet.
        unsafe { place.write(fill()) };
        Locked { place }
    }
}

impl<T> Deref for Locked<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` has put a value there, which lives as long as self.
        unsafe { self.place.as_ref() }
    }
}

impl<T> DerefMut for Locked<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { self.place.as_mut() }
    }
}

impl<T> Drop for Locked<T> {
    fn drop(&mut self) {
        let layout = Self::layout();
        let memory = self.place.as_ptr().cast::<u8>();
        // SAFETY: the value is there and is not used again; the pages are ours until `dealloc`, with the layout they were allocated
        // with, and nobody else has a slice of them.
        unsafe {
            self.place.drop_in_place();
            std::slice::from_raw_parts_mut(memory, layout.size()).zeroize();
            libc::munlock(memory.cast(), layout.size());
            libc::madvise(memory.cast(), layout.size(), libc::MADV_DODUMP);
            dealloc(memory, layout);
        }
    }
}

fn lock(memory: *mut u8, bytes: usize) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    // SAFETY: whole pages of an allocation of ours; neither call changes what is in them.
    let locked = unsafe {
        libc::madvise(memory.cast(), bytes, libc::MADV_DONTDUMP);
        libc::mlock(memory.cast(), bytes) == 0
    };
    if !locked && !TOLD.swap(true, Ordering::Relaxed) {
        let why = std::io::Error::last_os_error();
        tracing::warn!("keys cannot be locked in memory, and may be swapped out: {why} (ulimit -l)");
    }
}

/// A password or key: at most [`MAX_SECRET_BYTES`] bytes.
pub struct Secret {
    memory: Locked<[u8; MAX_SECRET_BYTES]>,
    len: usize,
}

impl Secret {
    /// `len` zero bytes, for someone to fill.
    ///
    /// # Panics
    /// If that is too long.
    pub fn zeroed(len: usize) -> Secret {
        assert!(len <= MAX_SECRET_BYTES, "a secret of {len} bytes");
        Secret { memory: Locked::new(|| [0; MAX_SECRET_BYTES]), len }
    }

    /// A copy of these bytes. Panics as [`Self::zeroed`].
    pub fn copy_of(bytes: &[u8]) -> Secret {
        let mut secret = Self::zeroed(bytes.len());
        secret.bytes_mut().copy_from_slice(bytes);
        secret
    }

    /// A password: all that comes, less one newline at its end.
    ///
    /// # Errors
    /// Of reading; [`ErrorKind::InvalidArgument`] for an empty one and for one that is too long.
    pub fn read_password(from: &mut dyn Read) -> Result<Secret> {
        let mut secret = Self::zeroed(MAX_SECRET_BYTES);
        let mut len = 0;
        loop {
            if len == MAX_SECRET_BYTES {
                let what = format!("a password has fewer than {MAX_SECRET_BYTES} bytes");
                return Err(Error::new(ErrorKind::InvalidArgument, what));
            }
            match from.read(&mut secret.memory[len..]) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("read the password", e)),
            }
        }
        secret.len = len - usize::from(secret.memory[..len].ends_with(b"\n"));
        if secret.len == 0 {
            return Err(Error::new(ErrorKind::InvalidArgument, "holds no password"));
        }
        Ok(secret)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[..self.len]
    }

    /// The bytes, to change.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_newline_is_no_part_of_a_password() {
        let read = |mut text: &[u8]| Secret::read_password(&mut text).map(|s| s.bytes().to_vec());
        assert_eq!(read(b"a b\n").unwrap(), b"a b");
        assert_eq!(read(b"a\n\n").unwrap(), b"a\n");
        assert_eq!(read(b"a\r\n").unwrap(), b"a\r");
        assert_eq!(read(b" x").unwrap(), b" x");
        assert!(read(b"").is_err() && read(b"\n").is_err());
        assert!(read(&[b'x'; MAX_SECRET_BYTES]).is_err());
        assert_eq!(read(&[b'x'; MAX_SECRET_BYTES - 1]).unwrap().len(), MAX_SECRET_BYTES - 1);
    }

    #[test]
    fn secrets_are_locked_and_not_shown() {
        let s = Secret::copy_of(b"hidden");
        assert_eq!(format!("{s:?}"), "Secret");
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let locked = status.lines().find_map(|l| l.strip_prefix("VmLck:")).unwrap().trim();
        let limit = std::fs::read_to_string("/proc/self/limits").unwrap();
        let none = limit.lines().any(|l| l.starts_with("Max locked memory") && l.contains(" 0 "));
        assert!(none || locked != "0 kB", "{locked}");
        assert_eq!(s.bytes(), b"hidden");
    }
}
