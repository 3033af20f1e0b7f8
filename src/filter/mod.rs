//! Filters between what a disk shows and what its images hold: each direction has its chain. They work on whole sectors of 512
//! bytes at offsets of the virtual disk, in memory of our own, never in the guest's.
//!
//! The one kind there is so far is [`Crypt`], VirtualBox's disk encryption.

mod crypt;
mod key_files;
mod key_store;
mod locked;
mod xts;

pub use crypt::Crypt;
pub use key_files::{KeyFiles, KeySource, read_key_store, read_password, unlock, write_key_store};
pub use key_store::{Cipher, KDF_MILLIS, KeyStore, iterations_for};
pub use locked::{MAX_SECRET_BYTES, Secret};
pub use xts::Xts;

use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::GuestOffset;
use std::fmt::Debug;
use std::sync::Arc;

/// Bytes of a sector.
const SECTOR: usize = SECTOR_BYTES as usize;

/// One transformation of sectors, and its reverse.
pub trait Filter: Send + Sync + Debug {
    /// What it is called, as in VirtualBox.
    fn name(&self) -> &'static str;

    /// What is written at `at` into what the images hold. Offset and length are multiples of 512.
    fn on_write(&self, at: GuestOffset, bytes: &mut [u8]);

    /// The reverse.
    fn on_read(&self, at: GuestOffset, bytes: &mut [u8]);
}

/// What a sector shows in which the images hold nothing but zeros: it was never written, or is not needed any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unallocated {
    /// Zeros.
    #[default]
    Zeros,
    /// What the filters make of zeros, as VirtualBox does: noise, always the same.
    VirtualBox,
}

/// In which direction a filter is at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What is read.
    Read,
    /// What is written.
    Write,
    /// Both.
    Both,
}

impl Direction {
    fn reads(self) -> bool {
        self != Direction::Write
    }

    fn writes(self) -> bool {
        self != Direction::Read
    }
}

/// The filters of a disk. What is written goes through those of its direction from the oldest to the newest, what is read from the
/// newest to the oldest, so that two of them nest.
#[derive(Clone, Debug, Default)]
pub struct Filters {
    read: Vec<Arc<dyn Filter>>,
    write: Vec<Arc<dyn Filter>>,
    unallocated: Unallocated,
}

impl Filters {
    /// One filter in both directions.
    pub fn of(filter: Arc<dyn Filter>, unallocated: Unallocated) -> Filters {
        Filters { read: vec![filter.clone()], write: vec![filter], unallocated }
    }

    /// The same filters, which show something else where nothing was written.
    #[must_use]
    pub fn showing(self, unallocated: Unallocated) -> Filters {
        Filters { unallocated, ..self }
    }

    /// No filter in either direction.
    pub fn is_empty(&self) -> bool {
        self.read.is_empty() && self.write.is_empty()
    }

    /// Adds a filter, the newest of its directions.
    pub fn add(&mut self, filter: Arc<dyn Filter>, direction: Direction) {
        if direction.reads() {
            self.read.push(filter.clone());
        }
        if direction.writes() {
            self.write.push(filter);
        }
    }

    /// Removes the newest of each of the directions.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where one of them has none; nothing is removed then.
    pub fn remove_last(&mut self, direction: Direction) -> Result<()> {
        if (direction.reads() && self.read.is_empty()) || (direction.writes() && self.write.is_empty()) {
            return Err(Error::new(ErrorKind::NotFound, "the disk has no filter in that direction"));
        }
        if direction.reads() {
            self.read.pop();
        }
        if direction.writes() {
            self.write.pop();
        }
        Ok(())
    }

    /// Removes all.
    pub fn remove_all(&mut self) {
        self.read.clear();
        self.write.clear();
    }

    /// Sectors of zeros show something else than zeros.
    pub fn hide_zeros(&self) -> bool {
        !self.read.is_empty() && self.unallocated == Unallocated::VirtualBox
    }

    /// What is written is changed on its way.
    pub fn changes_writes(&self) -> bool {
        !self.write.is_empty()
    }

    /// Makes of `bytes`, which the images hold at `at`, what the disk shows.
    ///
    /// # Panics
    /// If offset or length is not a multiple of 512.
    pub fn on_read(&self, at: GuestOffset, bytes: &mut [u8]) {
        check_sectors(at, bytes);
        if self.unallocated == Unallocated::VirtualBox {
            return self.read.iter().rev().for_each(|f| f.on_read(at, bytes));
        }
        let mut from = 0;
        while let Some((start, end)) = next_written(bytes, from) {
            let run = &mut bytes[start..end];
            self.read.iter().rev().for_each(|f| f.on_read(GuestOffset(at.0 + start as u64), run));
            from = end;
        }
    }

    /// Makes of `bytes`, which are to be written at `at`, what the images are to hold. Panics as [`Self::on_read`].
    pub fn on_write(&self, at: GuestOffset, bytes: &mut [u8]) {
        check_sectors(at, bytes);
        self.write.iter().for_each(|f| f.on_write(at, bytes));
    }
}

/// From one key to another, or to none, or from none to one.
#[derive(Clone, Debug, Default)]
pub struct KeyChange {
    /// What the bytes went through when they were written.
    pub from: Option<Arc<dyn Filter>>,
    /// What they are to go through.
    pub to: Option<Arc<dyn Filter>>,
}

impl KeyChange {
    /// Makes of what the images hold at `at` what they are to hold. Where there was a key, sectors of zeros were never written, and stay as
    /// they are.
    ///
    /// # Panics
    /// If offset or length is not a multiple of 512.
    pub fn apply(&self, at: GuestOffset, bytes: &mut [u8]) {
        check_sectors(at, bytes);
        let Some(old) = &self.from else {
            return self.to.iter().for_each(|new| new.on_write(at, bytes));
        };
        let mut from = 0;
        while let Some((start, end)) = next_written(bytes, from) {
            let (at, run) = (GuestOffset(at.0 + start as u64), &mut bytes[start..end]);
            old.on_read(at, run);
            self.to.iter().for_each(|new| new.on_write(at, run));
            from = end;
        }
    }
}

fn check_sectors(at: GuestOffset, bytes: &[u8]) {
    assert!(
        at.0.is_multiple_of(SECTOR_BYTES) && bytes.len().is_multiple_of(SECTOR),
        "a filter works on sectors"
    );
}

/// The next sectors behind `from` that are not all zeros.
fn next_written(bytes: &[u8], from: usize) -> Option<(usize, usize)> {
    let zero = |at: usize| bytes[at..at + SECTOR].iter().all(|b| *b == 0);
    let start = (from..bytes.len()).step_by(SECTOR).find(|at| !zero(*at))?;
    let end = (start..bytes.len()).step_by(SECTOR).find(|at| zero(*at));
    Some((start, end.unwrap_or(bytes.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Turns and adds: two of them with different numbers do not commute.
    #[derive(Debug)]
    struct Turn(u8);

    impl Turn {
        fn sectors<'a>(
            &self,
            at: GuestOffset,
            bytes: &'a mut [u8],
        ) -> impl Iterator<Item = (u8, &'a mut [u8])> {
            let first = self.0.wrapping_add((at.0 / SECTOR_BYTES) as u8);
            (0u8..).map(move |n| first.wrapping_add(n)).zip(bytes.chunks_mut(SECTOR))
        }
    }

    impl Filter for Turn {
        fn name(&self) -> &'static str {
            "TURN"
        }

        fn on_write(&self, at: GuestOffset, bytes: &mut [u8]) {
            for (key, sector) in self.sectors(at, bytes) {
                sector.iter_mut().for_each(|b| *b = b.rotate_left(u32::from(self.0)).wrapping_add(key));
            }
        }

        fn on_read(&self, at: GuestOffset, bytes: &mut [u8]) {
            for (key, sector) in self.sectors(at, bytes) {
                sector.iter_mut().for_each(|b| *b = b.wrapping_sub(key).rotate_right(u32::from(self.0)));
            }
        }
    }

    #[test]
    fn filters_nest_and_sectors_of_zeros_were_never_written() {
        let mut f = Filters::of(Arc::new(Turn(3)), Unallocated::Zeros);
        f.add(Arc::new(Turn(5)), Direction::Both);
        let plain: Vec<u8> = (0..2048u32).map(|i| (i % 251) as u8).collect();
        let mut bytes = plain.clone();
        f.on_write(GuestOffset(1024), &mut bytes);
        assert!(bytes[..512] != plain[..512] && bytes[1536..] != plain[1536..]);
        bytes[1024..1536].fill(0);
        f.on_read(GuestOffset(1024), &mut bytes);
        assert_eq!(bytes[..1024], plain[..1024]);
        assert!(bytes[1024..1536].iter().all(|b| *b == 0));
        assert_eq!(bytes[1536..], plain[1536..]);
        let mut zeros = [0; 512];
        let shown = Filters { unallocated: Unallocated::VirtualBox, ..f.clone() };
        shown.on_read(GuestOffset(0), &mut zeros);
        assert!(zeros.iter().any(|b| *b != 0) && shown.hide_zeros() && !f.hide_zeros());
    }

    #[test]
    fn the_last_of_a_direction_is_removed() {
        let mut f = Filters::default();
        assert_eq!(f.remove_last(Direction::Read).unwrap_err().kind(), ErrorKind::NotFound);
        f.add(Arc::new(Turn(1)), Direction::Both);
        f.add(Arc::new(Turn(2)), Direction::Write);
        f.remove_last(Direction::Both).unwrap();
        assert!(f.changes_writes() && !f.is_empty());
        assert!(f.remove_last(Direction::Both).is_err(), "none for reads");
        assert!(f.changes_writes(), "nothing is removed by half");
        f.remove_last(Direction::Write).unwrap();
        assert!(f.is_empty());
        f.add(Arc::new(Turn(1)), Direction::Both);
        f.remove_all();
        assert!(f.is_empty() && !f.changes_writes());
    }

    #[test]
    fn runs_of_written_sectors() {
        let mut b = vec![0; 512 * 5];
        assert_eq!(next_written(&b, 0), None);
        (b[512], b[1535], b[512 * 4 + 7]) = (1, 1, 1);
        assert_eq!(next_written(&b, 0), Some((512, 1536)));
        assert_eq!(next_written(&b, 1536), Some((2048, 2560)));
        assert_eq!(next_written(&b, 2560), None);
    }
}
