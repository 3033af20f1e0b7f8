//! What a hostile guest, front-end or image may do, as functions of bytes: the bodies of the fuzz targets in `fuzz/`
//! and of the runs on a stable toolchain in `tests/fuzz_smoke.rs`. A `run` panics where a promise is broken.
//!
//! Every sequence of bytes is a case. Where bytes are missing zeros follow, so what is cut off a case makes it simpler.

pub(crate) mod chains;
pub(crate) mod effort;
pub(crate) mod image;
pub(crate) mod key_store;
pub(crate) mod messages;
pub(crate) mod mutate;
pub(crate) mod one_file;
pub(crate) mod plain;
pub(crate) mod sparse;

use crate::common::hostile::Choices;
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

/// Bytes that decide what happens.
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Input(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, fewer at the end.
    pub(crate) fn take(&mut self, len: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now
    }

    fn word<const N: usize>(&mut self) -> [u8; N] {
        let mut word = [0; N];
        let there = self.take(N);
        word[..there.len()].copy_from_slice(there);
        word
    }

    pub(crate) fn u8(&mut self) -> u8 {
        let [b] = self.word();
        b
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.word())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.word())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.word())
    }
}

impl Choices for Input<'_> {
    fn next(&mut self) -> u64 {
        self.u64()
    }

    /// One byte where that is enough.
    fn below(&mut self, n: u64) -> u64 {
        let drawn = if n <= 256 { u64::from(self.u8()) } else { self.u64() };
        drawn % n
    }
}

/// A file in memory.
pub(crate) fn memfd(len: u64) -> File {
    // SAFETY: a C string and a flag; the descriptor is new and nobody else's.
    let fd = unsafe { libc::memfd_create(c"case".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "a file in memory");
    // SAFETY: as above.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len).unwrap();
    file
}
