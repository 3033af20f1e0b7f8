//! Changes of whole images as values: what repairs, resizing and compacting do to the files, step by step.
//!
//! A step is complete before the next begins, and durable with the next [`FileStep::Sync`]. The orders follow rules O1 and O2
//! (docs/crash-model.md): what an entry will name is durable before the entry is written, and a place is written over only when
//! no entry on disk names it any more.

use crate::error::Result;
use crate::limits::TABLE_PIECE_BYTES;
use crate::map::{ByteSource, FileId, HostOffset};

/// One step; each is complete before the next begins. Files are numbered as they were given to whoever planned it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileStep {
    /// Bytes to write.
    Write {
        /// The file.
        file: FileId,
        /// Where.
        at: HostOffset,
        /// What; at most a few pages of a table.
        bytes: Vec<u8>,
    },
    /// One byte over and over, inside the file.
    Fill {
        /// The file.
        file: FileId,
        /// Where.
        at: HostOffset,
        /// How many.
        len: u64,
        /// The byte.
        byte: u8,
    },
    /// Bytes to copy inside the file; the ranges never overlap.
    Copy {
        /// The file.
        file: FileId,
        /// Where they are.
        from: HostOffset,
        /// Where they go.
        to: HostOffset,
        /// How many.
        len: u64,
    },
    /// The file's new length: cut, or lengthened by zeros.
    SetLen {
        /// The file.
        file: FileId,
        /// The length.
        to: HostOffset,
    },
    /// The file is lengthened by zeros whose space is reserved.
    Reserve {
        /// The file.
        file: FileId,
        /// The length.
        to: HostOffset,
    },
    /// Everything before becomes durable.
    Sync {
        /// The file.
        file: FileId,
    },
}

/// Steps on one file, in the making.
#[derive(Debug)]
pub(super) struct StepList {
    file: FileId,
    steps: Vec<FileStep>,
}

impl StepList {
    /// What was read to plan the steps may not be durable yet: a sync comes first.
    pub(super) fn new(file: FileId) -> Self {
        StepList { file, steps: vec![FileStep::Sync { file }] }
    }

    pub(super) fn write(&mut self, at: u64, bytes: Vec<u8>) {
        self.steps.push(FileStep::Write { file: self.file, at: HostOffset(at), bytes });
    }

    pub(super) fn fill(&mut self, from: u64, to: u64, byte: u8) {
        if let Some(len) = to.checked_sub(from).filter(|len| *len > 0) {
            self.steps.push(FileStep::Fill { file: self.file, at: HostOffset(from), len, byte });
        }
    }

    pub(super) fn copy(&mut self, from: u64, to: u64, len: u64) {
        let (from, to) = (HostOffset(from), HostOffset(to));
        self.steps.push(FileStep::Copy { file: self.file, from, to, len });
    }

    pub(super) fn set_len(&mut self, to: u64) {
        self.steps.push(FileStep::SetLen { file: self.file, to: HostOffset(to) });
    }

    pub(super) fn reserve(&mut self, to: u64) {
        self.steps.push(FileStep::Reserve { file: self.file, to: HostOffset(to) });
    }

    /// One sync is enough where nothing came since the last.
    pub(super) fn sync(&mut self) {
        if !matches!(self.steps.last(), Some(FileStep::Sync { .. })) {
            self.steps.push(FileStep::Sync { file: self.file });
        }
    }

    pub(super) fn done(mut self) -> Vec<FileStep> {
        self.sync();
        self.steps
    }
}

/// True if a range of the file has no byte but zeros; what is behind the file's end counts as zeros.
///
/// # Errors
/// Those of reading.
pub(super) fn all_zeros(source: &dyn ByteSource, from: u64, to: u64) -> Result<bool> {
    let mut piece = vec![0u8; TABLE_PIECE_BYTES];
    let (mut at, to) = (from, to.min(source.len()));
    while at < to {
        let len = usize::try_from(to - at).map_or(piece.len(), |left| left.min(piece.len()));
        source.read_at(HostOffset(at), &mut piece[..len])?;
        if piece[..len].iter().any(|b| *b != 0) {
            return Ok(false);
        }
        at += len as u64;
    }
    Ok(true)
}
