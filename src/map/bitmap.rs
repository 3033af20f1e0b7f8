//! One bit per place, grown as places are set.

/// A set of small numbers that takes an eighth of a byte for each number up to its largest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    count: usize,
    /// No word before this one has a bit set.
    first: usize,
}

fn word_and_mask(n: u32) -> (usize, u64) {
    (usize::try_from(n / 64).expect("32 bits fit"), 1 << (n % 64))
}

impl Bitmap {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// True if `n` is in the set.
    pub fn contains(&self, n: u32) -> bool {
        let (word, mask) = word_and_mask(n);
        self.words.get(word).is_some_and(|w| w & mask != 0)
    }

    /// Adds `n`; false if it was there.
    pub fn insert(&mut self, n: u32) -> bool {
        let (word, mask) = word_and_mask(n);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        if self.words[word] & mask != 0 {
            return false;
        }
        self.words[word] |= mask;
        self.count += 1;
        self.first = self.first.min(word);
        true
    }

    /// Takes `n` out; false if it was not there.
    pub fn remove(&mut self, n: u32) -> bool {
        if !self.contains(n) {
            return false;
        }
        let (word, mask) = word_and_mask(n);
        self.words[word] &= !mask;
        self.count -= 1;
        true
    }

    /// Takes the smallest number out.
    pub fn pop_first(&mut self) -> Option<u32> {
        while self.first < self.words.len() {
            let word = self.words[self.first];
            if word != 0 {
                let n =
                    u32::try_from(self.first).expect("made of 32-bit numbers") * 64 + word.trailing_zeros();
                self.remove(n);
                return Some(n);
            }
            self.first += 1;
        }
        None
    }

    /// How many numbers are in the set.
    pub fn count(&self) -> usize {
        self.count
    }

    /// True without any number.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The largest number in the set.
    pub fn last(&self) -> Option<u32> {
        let word = self.words.iter().rposition(|w| *w != 0)?;
        Some(u32::try_from(word).ok()? * 64 + 63 - self.words[word].leading_zeros())
    }
}

impl Extend<u32> for Bitmap {
    fn extend<I: IntoIterator<Item = u32>>(&mut self, numbers: I) {
        for n in numbers {
            self.insert(n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn is_a_set(ops in proptest::collection::vec((0u8..4, 0u32..300), 1..300)) {
            let (mut bits, mut model) = (Bitmap::new(), std::collections::BTreeSet::new());
            for (op, n) in ops {
                match op {
                    0 | 1 => prop_assert_eq!(bits.insert(n), model.insert(n)),
                    2 => prop_assert_eq!(bits.remove(n), model.remove(&n)),
                    _ => prop_assert_eq!(bits.pop_first(), model.pop_first()),
                }
                prop_assert_eq!(bits.contains(n), model.contains(&n));
                prop_assert_eq!(bits.count(), model.len());
                prop_assert_eq!(bits.is_empty(), model.is_empty());
                prop_assert_eq!(bits.last(), model.last().copied());
            }
        }
    }
}
