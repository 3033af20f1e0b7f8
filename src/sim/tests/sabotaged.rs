//! Does the simulator catch anything? Each rule is broken on purpose, and each time it has to notice.

use crate::sim::{Habit, Kind, Play, Sabotage, play, sabotage};
use std::panic::{AssertUnwindSafe, catch_unwind};

const HABITS: [Habit; 4] = [Habit::Usual, Habit::Churn, Habit::Syncs, Habit::Tails];
/// States within which a broken rule has to be noticed.
const MOST_STATES: u64 = 1000;

/// The same simulations find nothing where no rule is broken.
#[test]
fn powercut_finds_nothing_in_what_is_sound() {
    for kind in Kind::ALL {
        for (seed, habit) in (0..60).zip(HABITS.into_iter().cycle()) {
            let how = Play { exhaustive: 1, habit, ..Play::powercut(kind, seed, 2) };
            let p = play(&how);
            assert!(p.wrong.is_none(), "{kind:?} seed {seed}: {:?}", p.wrong);
        }
    }
}

/// States looked at until a broken rule was noticed, and by what.
fn states_until_caught(what: Sabotage, kind: Kind, habit: Habit) -> Option<(u64, String)> {
    let mut states = 0;
    for seed in 0..200 {
        let how = Play { most_states: MOST_STATES - states, habit, ..Play::powercut(kind, seed, 2) };
        sabotage(Some(what));
        let played = catch_unwind(AssertUnwindSafe(|| play(&Play { exhaustive: 1, ..how })));
        sabotage(None);
        match played {
            Err(_) => return Some((states, "an assertion of the product".into())),
            Ok(p) => {
                states += p.stats.states;
                if let Some(wrong) = p.wrong {
                    return Some((states, wrong));
                }
            }
        }
        if states >= MOST_STATES {
            return None;
        }
    }
    None
}

#[test]
fn powercut_catches_each_broken_rule_within_1000_states() {
    let mut missed = Vec::new();
    for what in Sabotage::ALL {
        let ways = [Kind::DiffDiscard, Kind::Vdi].into_iter().flat_map(|k| HABITS.map(|h| (k, h)));
        let caught: Vec<_> =
            ways.map(|(kind, habit)| ((kind, habit), states_until_caught(what, kind, habit))).collect();
        for ((kind, habit), caught) in &caught {
            let way = format!("{what:?} on {}, {habit:?}", kind.name());
            match caught {
                Some((states, why)) => println!("{way}: after {states} states: {why}"),
                None => println!("{way}: not caught"),
            }
        }
        if caught.iter().all(|(_, c)| c.is_none()) {
            missed.push(what);
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
