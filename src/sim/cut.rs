//! What a power cut can leave of a file. docs/crash-model.md says why it is so.

use super::Rng;
use super::bytes::Bytes;
use std::sync::Arc;

/// Written whole or not at all.
const SECTOR: u64 = 512;
/// What space that a truncation added may hold after a cut, if nobody has written there.
const GARBAGE: u8 = 0xdb;

/// A change of a file that no sync has made durable yet.
#[derive(Clone, Debug)]
pub enum Change {
    /// Bytes written; `size`: the file grew up to there, which may persist without the bytes, and the other way round.
    Write {
        /// Where.
        off: u64,
        /// What.
        bytes: Arc<[u8]>,
        /// The new length, if the write lengthened the file.
        size: Option<u64>,
    },
    /// Bytes written that are durable, and a length of the file that reaches behind them: nothing else may be left.
    Through {
        /// Where.
        off: u64,
        /// What.
        bytes: Arc<[u8]>,
    },
    /// fallocate up to `size`: the space it adds reads as zeros.
    Allocate {
        /// The new length.
        size: u64,
    },
    /// ftruncate: what is added may hold anything until it is durable.
    Length {
        /// The new length.
        size: u64,
    },
    /// A hole punched or a range zeroed: sector by sector, like a write of zeros.
    Zero {
        /// Where.
        off: u64,
        /// Bytes.
        len: u64,
    },
}

/// One thing that has happened or not: a part of a [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Atom {
    /// The sector at this offset.
    Sector(u64),
    /// The new length.
    Size,
    /// What the new length added reads as garbage.
    Garbage,
}

fn sectors(off: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = off + len;
    std::iter::successors((len > 0).then_some(off), move |at| {
        let next = (at / SECTOR + 1) * SECTOR;
        (next < end).then_some(next)
    })
    .map(move |at| (at, end.min((at / SECTOR + 1) * SECTOR)))
}

impl Change {
    fn atoms(&self, len: u64, out: &mut Vec<Atom>) {
        match self {
            Change::Write { off, bytes, size } => {
                out.extend(sectors(*off, bytes.len() as u64).map(|(at, _)| Atom::Sector(at)));
                out.extend(size.map(|_| Atom::Size));
            }
            Change::Through { .. } => {}
            Change::Allocate { .. } => out.push(Atom::Size),
            Change::Length { size } if *size > len => out.extend([Atom::Size, Atom::Garbage]),
            Change::Length { .. } => out.push(Atom::Size),
            Change::Zero { off, len } => out.extend(sectors(*off, *len).map(|(at, _)| Atom::Sector(at))),
        }
    }

    /// The beginning of it, if it has one: what a killed process's write may have come to.
    pub(super) fn begin_of(self, rng: &mut Rng) -> Change {
        let mut some = |len: u64| rng.below(len / SECTOR + 1) * SECTOR;
        match self {
            Change::Write { off, bytes, size } => {
                let n = inside(some(bytes.len() as u64));
                Change::Write { off, bytes: bytes[..n].into(), size }
            }
            Change::Zero { off, len } => Change::Zero { off, len: some(len) },
            whole => whole,
        }
    }

    /// Does the parts of it that `keep` says happened.
    fn apply(&self, b: &mut Bytes, atoms: &[Atom], keep: &mut dyn FnMut() -> bool) {
        let old = b.len();
        if let Change::Through { off, bytes } = self {
            b.stretch(old.max(off + bytes.len() as u64));
            b.put(*off, bytes);
        }
        for atom in atoms {
            if !keep() {
                continue;
            }
            match (self, *atom) {
                (Change::Write { off, bytes, .. }, Atom::Sector(at)) => {
                    let end = (off + bytes.len() as u64).min((at / SECTOR + 1) * SECTOR);
                    b.put(at, &bytes[inside(at - off)..inside(end - off)]);
                }
                (Change::Zero { off, len }, Atom::Sector(at)) => {
                    b.zero(at, (off + len).min((at / SECTOR + 1) * SECTOR) - at);
                }
                (Change::Write { size: Some(size), .. } | Change::Allocate { size }, _) => {
                    b.stretch(b.len().max(*size));
                }
                (Change::Length { size }, Atom::Size) if *size < b.len() => b.set_len(*size),
                (Change::Length { size }, Atom::Size) => b.stretch(*size),
                (Change::Length { size }, Atom::Garbage) if b.len() == *size => {
                    b.put(old, &vec![GARBAGE; inside(size.saturating_sub(old))]);
                }
                _ => {}
            }
        }
    }
}

fn inside(n: u64) -> usize {
    usize::try_from(n).expect("inside a write")
}

/// A moment at which the power may go: what is durable, and what may be there as well.
#[derive(Clone, Debug)]
pub struct Cut {
    durable: Bytes,
    changes: Vec<(Change, Vec<Atom>)>,
    /// Parts of all changes together.
    atoms: usize,
    /// The further files of the image at the same moment.
    further: Vec<Cut>,
}

impl Cut {
    pub(super) fn new(durable: Bytes, changes: impl Iterator<Item = Change>) -> Cut {
        let mut len = durable.len();
        let changes: Vec<_> = changes
            .map(|c| {
                let mut atoms = Vec::new();
                c.atoms(len, &mut atoms);
                len = match c {
                    Change::Through { off, ref bytes } => len.max(off + bytes.len() as u64),
                    Change::Write { size: Some(s), .. }
                    | Change::Allocate { size: s }
                    | Change::Length { size: s } => s,
                    _ => len,
                };
                (c, atoms)
            })
            .collect();
        let atoms = changes.iter().map(|(_, a)| a.len()).sum();
        Cut { durable, changes, atoms, further: Vec::new() }
    }

    /// With the same moment of the image's further files.
    pub(super) fn with(mut self, further: Vec<Cut>) -> Cut {
        self.atoms += further.iter().map(Cut::parts).sum::<usize>();
        Cut { further, ..self }
    }

    /// Changes of all files.
    fn changes(&self) -> usize {
        self.changes.len() + self.further.iter().map(Cut::changes).sum::<usize>()
    }

    /// What may have happened or not, in parts.
    pub fn parts(&self) -> usize {
        self.atoms
    }

    /// The file if `keep`, asked part by part, says what happened.
    pub fn state(&self, keep: &mut dyn FnMut() -> bool) -> Bytes {
        let mut b = self.durable.clone();
        for (change, atoms) in &self.changes {
            change.apply(&mut b, atoms, keep);
        }
        b.cut();
        b.with(self.further.iter().map(|c| c.state(keep)).collect())
    }

    /// The file if `keep`, asked change by change, says what happened.
    fn state_of_whole_changes(&self, keep: &mut dyn FnMut() -> bool) -> Bytes {
        let mut b = self.durable.clone();
        for (change, atoms) in &self.changes {
            let happened = keep();
            change.apply(&mut b, atoms, &mut || happened);
        }
        b.cut();
        b.with(self.further.iter().map(|c| c.state_of_whole_changes(keep)).collect())
    }

    /// One state by chance: whole changes, torn ones, or mostly one or the other.
    pub fn random_state(&self, rng: &mut Rng) -> Bytes {
        let mode = rng.below(5);
        let mut b = self.durable.clone();
        for (change, atoms) in &self.changes {
            let whole = rng.chance([50, 90, 10, 50, 50][inside(mode)]);
            let torn = mode == 3 || (mode == 4 && rng.chance(30));
            change.apply(&mut b, atoms, &mut || if torn { rng.chance(50) } else { whole });
        }
        b.cut();
        b.with(self.further.iter().map(|c| c.random_state(rng)).collect())
    }

    /// All states of at most 2^`exhaustive` of them; beyond, every set of whole changes if those are few, and then
    /// `samples` by chance. Ends early when `each` says false.
    pub fn for_each_state(
        &self,
        exhaustive: u32,
        samples: u64,
        rng: &mut Rng,
        each: &mut dyn FnMut(&Bytes) -> bool,
    ) {
        if self.atoms <= exhaustive as usize {
            for bits in 0..1u64 << self.atoms {
                let mut at = 0;
                let state = self.state(&mut || {
                    at += 1;
                    bits >> (at - 1) & 1 == 1
                });
                if !each(&state) {
                    return;
                }
            }
            return;
        }
        if self.changes() <= 6.min(exhaustive as usize) && !self.each_set_of_changes(each) {
            return;
        }
        for _ in 0..samples {
            if !each(&self.random_state(rng)) {
                return;
            }
        }
    }

    fn each_set_of_changes(&self, each: &mut dyn FnMut(&Bytes) -> bool) -> bool {
        for bits in 0..1u64 << self.changes() {
            let mut at = 0;
            let b = self.state_of_whole_changes(&mut || {
                at += 1;
                bits >> (at - 1) & 1 == 1
            });
            if !each(&b) {
                return false;
            }
        }
        true
    }
}

/// Does all of a change, as a file that works shows it.
pub(super) fn apply_whole(b: &mut Bytes, change: &Change) {
    match change {
        Change::Write { off, bytes, .. } | Change::Through { off, bytes } => b.write(*off, bytes),
        Change::Allocate { size } => b.stretch(b.len().max(*size)),
        Change::Length { size } => b.set_len(*size),
        Change::Zero { off, len } => {
            let end = b.len().min(off.saturating_add(*len));
            b.zero(*off, end.saturating_sub(*off));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(durable: &[u8], changes: Vec<Change>) -> Vec<Vec<u8>> {
        let cut = Cut::new(Bytes::of(durable), changes.into_iter());
        let mut all = Vec::new();
        cut.for_each_state(12, 0, &mut Rng(1), &mut |b| {
            all.push(b.to_vec());
            true
        });
        all.sort();
        all.dedup();
        all
    }

    fn write(off: u64, len: usize, size: Option<u64>) -> Change {
        Change::Write { off, bytes: vec![7; len].into(), size }
    }

    #[test]
    fn writes_are_torn_at_sectors() {
        let all = states(&[1; 2048], vec![write(256, 1024, None)]);
        assert_eq!(all.len(), 8);
        assert!(all.iter().all(|s| s[..256] == [1; 256] && s[1280..] == [1; 768]));
    }

    #[test]
    fn sizes_and_data_are_independent() {
        let all = states(&[1; 512], vec![write(512, 512, Some(1024))]);
        let grown = |fill| [vec![1; 512], vec![fill; 512]].concat();
        assert_eq!(all, [vec![1; 512], grown(0), grown(7)]);
    }

    #[test]
    fn what_truncation_adds_may_hold_anything_and_what_fallocate_adds_zeros() {
        let grown = |fill| [vec![1; 512], vec![fill; 512]].concat();
        let all = states(&[1; 512], vec![Change::Length { size: 1024 }]);
        assert_eq!(all, [vec![1; 512], grown(0), grown(GARBAGE)]);
        let all = states(&[1; 512], vec![Change::Allocate { size: 1024 }]);
        assert_eq!(all, [vec![1; 512], grown(0)]);
    }

    #[test]
    fn a_cut_that_did_not_happen_leaves_old_bytes_under_an_extension() {
        let changes = vec![Change::Length { size: 512 }, Change::Allocate { size: 1024 }];
        let all = states(&[1; 1024], changes);
        assert!(all.contains(&vec![1; 1024]));
    }
}
