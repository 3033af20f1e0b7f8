//! Runs of sectors in a bitmap that says which of them an image holds.

/// Sectors of a word.
const WORD: u64 = 64;

/// Whether the sector `first` is there, and up to which one before `end` all are the same; `word(n)` has sector `64 n` in
/// its highest bit. `None` where the first word is not known; a later one that is not ends the run.
pub(super) fn run(first: u64, end: u64, word: impl Fn(u64) -> Option<u64>) -> Option<(bool, u64)> {
    let there = word(first / WORD)? << (first % WORD) >> 63 == 1;
    let mut at = first;
    while at < end {
        let Some(bits) = word(at / WORD) else { break };
        let ahead = bits << (at % WORD);
        let same = u64::from(if there { ahead.leading_ones() } else { ahead.leading_zeros() });
        let left = WORD - at % WORD;
        at += same.min(left);
        if same < left {
            break;
        }
    }
    // a word may have changed between the two looks: the first sector is what it was found to be
    Some((there, at.max(first + 1).min(end)))
}
