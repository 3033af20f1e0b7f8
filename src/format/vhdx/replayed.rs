//! The file as it will be once its log was written to it. Nothing is written: what the log says lies over what the file holds.

use crate::error::Result;
use crate::map::{ByteSource, HostOffset};

/// Bytes that the log puts somewhere.
#[derive(Clone, Debug)]
pub(super) struct Patch {
    pub(super) at: u64,
    pub(super) what: Filling,
}

/// What a patch puts there.
#[derive(Clone, Debug)]
pub(super) enum Filling {
    Bytes(Box<[u8]>),
    Zeros(u64),
}

impl Patch {
    pub(super) fn len(&self) -> u64 {
        match &self.what {
            Filling::Bytes(b) => b.len() as u64,
            Filling::Zeros(n) => *n,
        }
    }

    /// Puts what belongs there over `buf`, which begins at `off` of the file.
    fn over(&self, off: u64, buf: &mut [u8]) {
        let from = self.at.max(off);
        let to = self.at.saturating_add(self.len()).min(off.saturating_add(buf.len() as u64));
        if from >= to {
            return;
        }
        let place = |n: u64| usize::try_from(n).expect("inside a buffer");
        let target = &mut buf[place(from - off)..place(to - off)];
        match &self.what {
            Filling::Bytes(b) => target.copy_from_slice(&b[place(from - self.at)..place(to - self.at)]),
            Filling::Zeros(_) => target.fill(0),
        }
    }
}

/// The patches of a log, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Patches(pub(super) Vec<Patch>);

impl Patches {
    /// Puts everything over `buf`, which begins at `off` of the file.
    pub(super) fn over(&self, off: u64, buf: &mut [u8]) {
        self.0.iter().for_each(|p| p.over(off, buf));
    }

    /// The first patch of a part of these bytes.
    pub(super) fn touching(&self, at: u64, len: u64) -> Option<&Patch> {
        self.0.iter().find(|p| p.at < at.saturating_add(len) && at < p.at.saturating_add(p.len()))
    }
}

/// A file under its log.
pub(super) struct Replayed<'a> {
    pub(super) file: &'a dyn ByteSource,
    pub(super) patches: &'a Patches,
}

impl ByteSource for Replayed<'_> {
    fn len(&self) -> u64 {
        self.file.len()
    }

    fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.file.read_at(off, buf)?;
        self.patches.over(off.0, buf);
        Ok(())
    }
}
