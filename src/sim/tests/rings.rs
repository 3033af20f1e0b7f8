//! Do simulations behind real queue workers meet what they are for, and notice when a worker does it wrong?

use crate::sim::{Play, Played, Sabotage, play, sabotage};

/// Seeds within which a broken rule of the workers has to be noticed.
const MOST_SEEDS: u64 = 40;

fn short(seed: u64) -> Play {
    Play { faults: false, jobs: false, exhaustive: 0, samples: 0, ..Play::seed(seed) }
}

/// What each broken rule has the guest see, of these.
fn must_show_as(what: Sabotage) -> &'static [&'static str] {
    const AGAIN: &str = "was answered before: Begun";
    match what {
        Sabotage::UnmarkedChain => &[AGAIN, "is begun out of order", "hang"],
        Sabotage::ClearedTooEarly => &["is begun out of order", "hang"],
        Sabotage::MarkKept => &[AGAIN],
        Sabotage::RepeatedBesideNew => &["is begun before what a former process had begun has ended"],
        other => unreachable!("{other:?} is broken in `sabotaged`"),
    }
}

fn broken(what: Sabotage, seed: u64) -> Option<String> {
    sabotage(Some(what));
    let played = play(&short(seed));
    sabotage(None);
    played.wrong.filter(|why| must_show_as(what).iter().any(|words| why.contains(words)))
}

#[test]
fn lost_and_doubled_requests_are_noticed() {
    for what in Sabotage::RINGS {
        let caught = (0..MOST_SEEDS).find_map(|seed| Some((seed, broken(what, seed)?)));
        let (seed, why) = caught.unwrap_or_else(|| panic!("{what:?} is not noticed in {MOST_SEEDS} seeds"));
        println!("{what:?}: seed {seed}: {why}");
    }
}

#[test]
fn workers_are_killed_with_requests_in_flight_and_rings_are_stopped() {
    let all: Vec<Played> = (0..MOST_SEEDS).map(|seed| play(&short(seed))).collect();
    assert!(all.iter().all(|p| p.wrong.is_none() && p.requests >= 2000), "{all:?}");
    let (repeated, stops) = all.iter().fold((0, 0), |(r, s), p| (r + p.repeated, s + p.stops));
    println!("{repeated} chains executed again, {stops} rings stopped");
    assert!(repeated > 100 && stops > 100, "{repeated} {stops}");
}
