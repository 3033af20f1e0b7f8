//! Does the simulator catch anything? Each rule is broken on purpose, and each time it has to notice, by what the broken
//! rule does to an image: a simulation that stumbles over something else has proved nothing.

use crate::sim::{Habit, Kind, Play, Sabotage, play, sabotage};

const HABITS: [Habit; 5] = [Habit::Usual, Habit::Churn, Habit::Syncs, Habit::Tails, Habit::Doubts];
/// The images rules are broken on.
const KINDS: [Kind; 3] = [Kind::DiffDiscard, Kind::Vdi, Kind::Diff];
/// States within which a broken rule has to be noticed.
const MOST_STATES: u64 = 1000;
/// Of the searches, one for each habit on each kind of image, so many have to notice.
const LEAST_SEARCHES: usize = 3;

/// What the simulator says of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// A sector holds what its guest may no longer find there.
    Stale,
    /// A sector holds another one's bytes, or nobody's.
    Foreign,
    /// It cannot be opened.
    Unopenable,
    /// The count of its blocks is too small.
    Count,
    /// A running process reads what was never there.
    Misread,
    /// It opens, and check finds more than leaks.
    Corrupt,
}

impl Verdict {
    /// By the sentence; one that is none of these is nobody's.
    fn of(wrong: &str) -> Option<Verdict> {
        let says = |words: &str| wrong.contains(words);
        Some(match () {
            () if says("holds what nobody wrote there") => Verdict::Foreign,
            () if says("it may hold") => Verdict::Stale,
            () if wrong.starts_with("does not open") => Verdict::Unopenable,
            () if says("the count of allocated blocks is") => Verdict::Count,
            () if wrong.starts_with("opens, and is corrupt") => Verdict::Corrupt,
            () if says(" reads ") && says("may be") => Verdict::Misread,
            () => return None,
        })
    }
}

/// How each broken rule shows.
fn must_show_as(what: Sabotage) -> &'static [Verdict] {
    use Verdict::{Corrupt, Count, Foreign, Misread, Stale, Unopenable};
    match what {
        // an entry without its data: zeros, or what the place held before
        Sabotage::NoSyncBeforeEntry => &[Stale, Foreign],
        // the same, and readers are shown the place before its data are there
        Sabotage::EntryBeforeData => &[Stale, Foreign, Misread, Corrupt],
        // the file is shorter than its entries say, or the count too small, or of references
        Sabotage::RoomWithoutSync => &[Unopenable, Count, Corrupt],
        Sabotage::EarlyReuse => &[Foreign],
        // an entry that should be gone names what is cut, or was cut and is in use again
        Sabotage::CutBeforeSync => &[Unopenable, Foreign],
        // the same for places that moved; or their data did not
        Sabotage::CloseWithoutSync => &[Unopenable, Foreign, Stale],
        Sabotage::CountNotWritten => &[Count],
        // what the failed sync has dropped is missing: data, or an entry
        Sabotage::RetriedSync => &[Stale, Foreign],
        // the entry is missing behind a flush, or after a close that knew nothing of it
        Sabotage::AnsweredBeforeEntry => &[Stale, Unopenable, Count],
        // the old entry is there behind a flush, or names what the close has cut or moved another block to
        Sabotage::ZeroInMemoryOnly => &[Stale, Unopenable, Foreign],
        Sabotage::LateJoin | Sabotage::ForgottenWrite => &[Stale],
        // a flushed entry is neither in its place nor in the log; or its place is another's by now
        Sabotage::LogBeforeTable | Sabotage::LogReused | Sabotage::LogAnewUnsynced => {
            &[Stale, Foreign, Unopenable]
        }
        Sabotage::UnmarkedChain
        | Sabotage::ClearedTooEarly
        | Sabotage::MarkKept
        | Sabotage::RepeatedBesideNew
        | Sabotage::CachedBeforeData
        | Sabotage::UncleanTrusted
        | Sabotage::RecordedAfterSwitch
        | Sabotage::NewImageUnsynced
        | Sabotage::SwitchedApart => {
            unreachable!("broken in `rings`, `caching` and `live`")
        }
    }
}

/// The same simulations find nothing where no rule is broken: `powercut` has a test of that for each kind of image.
pub(super) fn find_nothing_in_what_is_sound(kind: Kind) {
    for (seed, habit) in (0..75).zip(HABITS.into_iter().cycle()) {
        let how = Play { exhaustive: 1, habit, ..Play::powercut(kind, seed, 2) };
        let p = play(&how);
        assert!(p.wrong.is_none(), "{kind:?} seed {seed}: {:?}", p.wrong);
    }
}

/// States looked at until something was noticed, and what.
fn search(what: Sabotage, kind: Kind, habit: Habit, most: u64) -> Option<(u64, String)> {
    let mut states = 0;
    for seed in 0..200 {
        let most_states = most - states;
        // What a process notices by itself is not what is searched for.
        let how = Play { most_states, habit, forgetful: false, ..Play::powercut(kind, seed, 2) };
        sabotage(Some(what));
        let played = play(&Play { exhaustive: 1, ..how });
        sabotage(None);
        states += played.stats.states;
        if let Some(wrong) = played.wrong {
            return Some((states, wrong));
        }
        if states >= most {
            return None;
        }
    }
    None
}

/// A rule is broken in every search on these kinds of images; how many of them have noticed it by what it does.
fn caught(what: Sabotage, kinds: &[Kind], most: u64) -> usize {
    let searches = kinds.iter().flat_map(|k| HABITS.map(|h| (*k, h)));
    let caught = searches.filter(|(kind, habit)| {
        let way = format!("{what:?} on {}, {habit:?}", kind.name());
        let Some((states, why)) = search(what, *kind, *habit, most) else {
            println!("{way}: not caught");
            return false;
        };
        let verdict = Verdict::of(&why);
        let right = verdict.is_some_and(|v| must_show_as(what).contains(&v));
        let is = if right { "" } else { "NOT ITS VERDICT, " };
        println!("{way}: after {states} states: {is}{verdict:?}: {why}");
        right
    });
    caught.count()
}

#[test]
fn powercut_catches_each_broken_rule_within_1000_states() {
    let caught = Sabotage::ALL.map(|what| (what, caught(what, &KINDS, MOST_STATES)));
    println!("searches that have caught each: {caught:?}");
    let missed: Vec<_> = caught.iter().filter(|(_, n)| *n < LEAST_SEARCHES).collect();
    assert!(missed.is_empty(), "caught in fewer than {LEAST_SEARCHES} searches: {missed:?}");
}

/// The rules are every format's, and so is what notices that they are broken, in one search at least. `but`: what the format has no step for.
fn caught_in(kinds: &[Kind], but: &[Sabotage]) {
    let whats = Sabotage::ALL.into_iter().filter(|what| !but.contains(what));
    let caught: Vec<_> = whats.map(|what| (what, caught(what, kinds, 4 * MOST_STATES))).collect();
    println!("{kinds:?}: searches that have caught each: {caught:?}");
    let missed: Vec<_> = caught.iter().filter(|(_, n)| *n == 0).collect();
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

#[test]
fn powercut_catches_broken_rules_in_vmdk() {
    caught_in(&[Kind::VmdkZeroed, Kind::VmdkDiff], &[Sabotage::CountNotWritten]);
}

#[test]
fn powercut_catches_broken_rules_in_qcow2() {
    let but = [
        // only VDI counts its blocks
        Sabotage::CountNotWritten,
        // Not shown by any of 10,000 states each. Entries of so small a disk share a page of the table: the write that names
        // a place anew takes the doubtful entry along. And a close that was cut short leaves leaks.
        Sabotage::EarlyReuse,
        Sabotage::CutBeforeSync,
        Sabotage::CloseWithoutSync,
        // a page that is published without its write is not pinned: an assertion of the cache ends the process
        Sabotage::AnsweredBeforeEntry,
        Sabotage::ZeroInMemoryOnly,
    ];
    caught_in(&[Kind::Qcow2Diff, Kind::Qcow2], &but);
}

/// Refcounts are what other writers allocate by: an entry is written before the refcount of what it names is durable.
#[test]
fn powercut_catches_entries_of_qcow2_before_their_refcounts() {
    let caught = caught(Sabotage::RoomWithoutSync, &[Kind::Qcow2, Kind::Qcow2Diff], MOST_STATES);
    assert!(caught >= LEAST_SEARCHES, "caught in {caught} searches");
}

/// What only a log can do wrong shows when it begins anew, which takes a while.
#[test]
fn powercut_catches_broken_rules_of_a_log() {
    let kinds = [Kind::Vhdx, Kind::VhdxDiff];
    let caught = Sabotage::LOG.map(|what| (what, caught(what, &kinds, 4 * MOST_STATES)));
    println!("searches that have caught each: {caught:?}");
    assert!(caught.iter().all(|(_, n)| *n > 0), "not caught: {caught:?}");
}
