//! The bytes of a simulated file: sparse, and cheap to copy, so that every crash state can have its own.

use crate::map::{ByteSource, HostOffset};
use crate::{Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::sync::Arc;

const PAGE: u64 = 4096;

type Page = [u8; PAGE as usize];

/// Bytes up to a length; pages that are not there are zeros, and so is everything behind the end.
#[derive(Clone, Debug, Default)]
pub struct Bytes {
    len: u64,
    pages: BTreeMap<u64, Arc<Page>>,
    /// Of the first file of an image: those of its others.
    further: Vec<Bytes>,
}

impl Bytes {
    /// A copy of `bytes`.
    pub fn of(bytes: &[u8]) -> Bytes {
        let mut b = Bytes { len: bytes.len() as u64, ..Bytes::default() };
        for (page, chunk) in (0..).zip(bytes.chunks(PAGE as usize)) {
            if chunk.iter().any(|b| *b != 0) {
                b.put(page * PAGE, chunk);
            }
        }
        b
    }

    /// The first file of an image, with those of its others.
    pub(super) fn with(self, further: Vec<Bytes>) -> Bytes {
        Bytes { further, ..self }
    }

    /// The bytes of an image's further files.
    pub(super) fn further(&self) -> &[Bytes] {
        &self.further
    }

    /// The first file by itself, and the others.
    pub(super) fn apart(mut self) -> (Bytes, Vec<Bytes>) {
        let further = std::mem::take(&mut self.further);
        (self, further)
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True without a byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of them.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut v = vec![0; usize::try_from(self.len).expect("fits memory")];
        self.read(0, &mut v);
        v
    }

    /// Fills `out` with what is there; says how much that was.
    pub fn read(&self, off: u64, out: &mut [u8]) -> usize {
        let n = usize::try_from(self.len.saturating_sub(off)).unwrap_or(usize::MAX).min(out.len());
        let mut at = 0;
        while at < n {
            let (page, into) = split(off + at as u64);
            let len = (PAGE as usize - into).min(n - at);
            match self.pages.get(&page) {
                Some(p) => out[at..at + len].copy_from_slice(&p[into..into + len]),
                None => out[at..at + len].fill(0),
            }
            at += len;
        }
        n
    }

    /// Writes, and lengthens as far as needed.
    pub fn write(&mut self, off: u64, bytes: &[u8]) {
        self.len = self.len.max(off + bytes.len() as u64);
        self.put(off, bytes);
    }

    /// Writes without regard to the length: what lies behind the end is seen once that is there, unless
    /// [`Self::cut`] comes before.
    pub(super) fn put(&mut self, off: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let (page, into) = split(off + at as u64);
            let len = (PAGE as usize - into).min(bytes.len() - at);
            let p = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(p)[into..into + len].copy_from_slice(&bytes[at..at + len]);
            at += len;
        }
    }

    /// Zeros in a range; the length stays.
    pub fn zero(&mut self, off: u64, len: u64) {
        let end = off.saturating_add(len);
        let pages: Vec<u64> =
            self.pages.range(off / PAGE..).map(|(p, _)| *p).take_while(|p| p * PAGE < end).collect();
        for page in pages {
            let (from, to) = (off.max(page * PAGE), end.min((page + 1) * PAGE));
            if to - from == PAGE {
                self.pages.remove(&page);
                continue;
            }
            let range = split(from).1..split(from).1 + usize::try_from(to - from).expect("inside a page");
            Arc::make_mut(self.pages.get_mut(&page).expect("listed"))[range].fill(0);
        }
    }

    /// The length alone.
    pub(super) fn stretch(&mut self, len: u64) {
        self.len = len;
    }

    /// What lies behind the end is gone.
    pub(super) fn cut(&mut self) {
        self.zero(self.len, u64::MAX - self.len);
    }

    /// The length; what is cut off is gone, what is added reads as zeros.
    pub fn set_len(&mut self, len: u64) {
        self.len = len;
        self.cut();
    }

    /// Bytes that pages take.
    pub fn stored(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Start of the first page at or behind `off` that is stored (`true`) or is not.
    pub(super) fn next_page(&self, off: u64, stored: bool) -> Option<u64> {
        let mut page = off / PAGE;
        while page * PAGE < self.len {
            if self.pages.contains_key(&page) == stored {
                return Some((page * PAGE).max(off));
            }
            page = match stored {
                true => *self.pages.range(page..).next()?.0,
                false => page + 1,
            };
        }
        None
    }
}

fn split(off: u64) -> (u64, usize) {
    (off / PAGE, usize::try_from(off % PAGE).expect("inside a page"))
}

impl ByteSource for Bytes {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
        if self.read(off.0, buf) < buf.len() {
            return Err(Error::new(ErrorKind::Corrupt, format!("the file ends before {off}")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Rng;

    #[test]
    fn behaves_like_a_vector() {
        let mut rng = Rng(1);
        let (mut bytes, mut model) = (Bytes::default(), Vec::new());
        for i in 0..3000u32 {
            let (off, len) = (rng.index(20_000), rng.index(9_000));
            match rng.below(5) {
                0 => {
                    bytes.set_len(off as u64);
                    model.resize(off, 0);
                }
                1 => {
                    bytes.zero(off as u64, len as u64);
                    let end = model.len().min(off + len);
                    model[off.min(end)..end].fill(0);
                }
                _ => {
                    let data = vec![i as u8; len];
                    bytes.write(off as u64, &data);
                    model.resize(model.len().max(off + len), 0);
                    model[off..off + len].copy_from_slice(&data);
                }
            }
            assert_eq!(bytes.len(), model.len() as u64);
        }
        assert!(bytes.to_vec() == model);
        assert!(Bytes::of(&model).to_vec() == model);
    }
}
