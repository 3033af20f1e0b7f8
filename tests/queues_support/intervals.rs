//! Whether what was read can be explained: each sector as a register that many write and read at the same time.
//!
//! Every access has an interval on one clock, from before it was asked for until after it was seen answered, and takes
//! effect at one moment in it. A history is right if such moments can be chosen for all accesses of a sector so that each
//! read finds what was written last. Values are unique, and so that can be decided exactly (Gibbons and Korach, "Testing
//! Shared Memories", 1997): a value's *zone* lies between the earliest end and the latest begin of the accesses that
//! wrote or read it. If the end comes first (*forward*), the value was there all that time: two such zones must not
//! overlap, and nobody else's whole zone may lie inside one.
//!
//! Zeros are written by many, so a read of zeros may not say whose. Such a read is taken as belonging to a source of zeros
//! if no other can be meant: every other one began too late, or something was certainly written after it and before the
//! read. If none is left, the read is wrong. If several are, no more is demanded than that no other value was there all
//! the time. So nothing right is ever refused; a wrong history can pass only where several writes of zeros overlap what
//! proves it.
//!
//! A discard may have an effect or none, but only during its interval, and what was seen of it must not come undone: it is
//! a source of zeros, with a zone only if a read certainly saw its zeros.

use std::collections::HashMap;

/// Who is no queue: what was there at the start, jobs, the look at everything in the end.
pub const NOBODY: u16 = 1000;

/// What an access did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// This value, never 0 and never written twice.
    Write(u64),
    Zero,
    /// Zeros or nothing.
    Discard,
    Read(u64),
}

/// An access to one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub sector: u32,
    /// The queue it went through.
    pub who: u16,
    /// On a clock without equal readings but 0, which is "before everything".
    pub begin: u64,
    pub end: u64,
    pub what: What,
}

/// What no order of the writes explains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub sector: u32,
    pub why: String,
    /// All accesses to the sector, by their begin.
    pub history: Vec<Access>,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "sector {}: {}", self.sector, self.why)?;
        self.history
            .iter()
            .try_for_each(|a| writeln!(f, "  {}: {} to {}: {:x?}", a.who, a.begin, a.end, a.what))
    }
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub accesses: u64,
    /// Accesses of a queue.
    pub of_queues: u64,
    /// Those of them that overlapped another of the same sector, one of the two being a change.
    pub overlapping: u64,
    /// Reads of zeros.
    pub zeros: u64,
    /// Those of them that more than one write explains.
    pub ambiguous: u64,
}

impl Seen {
    pub fn add(&mut self, more: Seen) {
        self.accesses += more.accesses;
        self.of_queues += more.of_queues;
        self.overlapping += more.overlapping;
        self.zeros += more.zeros;
        self.ambiguous += more.ambiguous;
    }
}

/// Checks a whole history, in any order. Sectors start with what accesses at time 0 wrote.
pub fn check(accesses: &mut [Access]) -> Result<Seen, Violation> {
    accesses.sort_unstable_by_key(|a| (a.sector, a.begin, a.end));
    let mut seen = Seen::default();
    for of_one in accesses.chunk_by(|a, b| a.sector == b.sector) {
        let ambiguous = check_sector(of_one).map_err(|why| Violation {
            sector: of_one[0].sector,
            why,
            history: of_one.to_vec(),
        })?;
        let of_queues = of_one.iter().filter(|a| a.who < NOBODY).count() as u64;
        let accesses = of_one.len() as u64;
        let zeros = of_one.iter().filter(|a| a.what == What::Read(0)).count() as u64;
        seen.add(Seen { accesses, of_queues, overlapping: overlapping(of_one), zeros, ambiguous });
    }
    Ok(seen)
}

/// A write and the reads that saw it.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    write: (u64, u64),
    first_end: u64,
    last_begin: u64,
    zeros: bool,
}

impl Cluster {
    fn of(write: &Access) -> Self {
        let zeros = !matches!(write.what, What::Write(_));
        Cluster { write: (write.begin, write.end), first_end: write.end, last_begin: write.begin, zeros }
    }

    fn add(&mut self, read: &Access) {
        self.first_end = self.first_end.min(read.end);
        self.last_begin = self.last_begin.max(read.begin);
    }
}

/// Returns the number of ambiguous reads.
fn check_sector(accesses: &[Access]) -> Result<u64, String> {
    let mut clusters = clusters_of_values(accesses)?;
    let overwritten = Overwritten::by(&clusters);
    // source of zeros, whether it is known to have had an effect
    let mut sources: Vec<(Cluster, bool)> = accesses
        .iter()
        .filter(|a| matches!(a.what, What::Zero | What::Discard))
        .map(|a| (Cluster::of(a), a.what == What::Zero))
        .collect();
    let mut unclear = Vec::new();
    for read in accesses.iter().filter(|a| a.what == What::Read(0)) {
        let latest = overwritten.before(read.begin);
        let mut possible =
            sources.iter_mut().take_while(|(z, _)| z.write.0 < read.end).filter(|(z, _)| z.write.1 >= latest);
        match (possible.next(), possible.next()) {
            (None, _) => return Err(format!("zeros that nobody wrote, or that were overwritten: {read:?}")),
            (Some((source, works)), None) => {
                source.add(read);
                *works = true;
            }
            (Some(_), Some(_)) => unclear.push((read.begin, read.end)),
        }
    }
    clusters.extend(sources.iter().filter(|(_, works)| *works).map(|(z, _)| *z));
    check_zones(&clusters, &unclear)?;
    Ok(unclear.len() as u64)
}

fn clusters_of_values(accesses: &[Access]) -> Result<Vec<Cluster>, String> {
    let mut of_value = HashMap::new();
    for a in accesses {
        if let What::Write(value) = a.what {
            assert!(value != 0 && of_value.insert(value, Cluster::of(a)).is_none(), "no unique value: {a:?}");
        }
    }
    for a in accesses {
        let What::Read(value) = a.what else { continue };
        if value == 0 {
            continue;
        }
        let Some(c) = of_value.get_mut(&value) else { return Err(format!("never written here: {a:?}")) };
        if a.end < c.write.0 {
            return Err(format!("read before it was written at {:?}: {a:?}", c.write));
        }
        c.add(a);
    }
    Ok(of_value.into_values().collect())
}

/// When, at the latest, a write began that certainly took effect before a given moment.
struct Overwritten(Vec<(u64, u64)>);

impl Overwritten {
    fn by(clusters: &[Cluster]) -> Self {
        let mut all: Vec<_> = clusters.iter().map(|c| (c.first_end, c.write.0)).collect();
        all.sort_unstable();
        let mut latest = 0;
        for (_, began) in &mut all {
            latest = latest.max(*began);
            *began = latest;
        }
        Overwritten(all)
    }

    fn before(&self, moment: u64) -> u64 {
        let n = self.0.partition_point(|(effective, _)| *effective < moment);
        n.checked_sub(1).map_or(0, |i| self.0[i].1)
    }
}

fn check_zones(clusters: &[Cluster], unclear: &[(u64, u64)]) -> Result<(), String> {
    let is_forward = |c: &&Cluster| c.first_end < c.last_begin;
    let mut forward: Vec<_> = clusters.iter().filter(is_forward).collect();
    forward.sort_unstable_by_key(|c| c.first_end);
    for pair in forward.windows(2) {
        if pair[1].first_end < pair[0].last_begin {
            return Err(format!("seen in turns, or a lost write came back: {:?} and {:?}", pair[0], pair[1]));
        }
    }
    let backward = clusters.iter().filter(|c| !is_forward(c)).map(|c| (c.last_begin, c.first_end, false));
    let unclear = unclear.iter().map(|(from, to)| (*from, *to, true));
    for (from, to, zeros) in backward.chain(unclear) {
        let n = forward.partition_point(|c| c.first_end < from);
        if let Some(c) = n.checked_sub(1).map(|i| forward[i])
            && to < c.last_begin
            && !(zeros && c.zeros)
        {
            return Err(format!("what was there from {from} to {to} was not seen by {c:?}"));
        }
    }
    Ok(())
}

/// How many of the queues' accesses among these, which are sorted by begin, overlap another, one of the two being a change.
fn overlapping(accesses: &[Access]) -> u64 {
    let is_read = |a: &Access| matches!(a.what, What::Read(_));
    let mut met = vec![false; accesses.len()];
    let (mut any, mut change) = (0, 0);
    for (met, a) in met.iter_mut().zip(accesses) {
        *met = a.begin < if is_read(a) { change } else { any };
        any = any.max(a.end);
        if !is_read(a) {
            change = change.max(a.end);
        }
    }
    let (mut any, mut change) = (u64::MAX, u64::MAX);
    for (met, a) in met.iter_mut().zip(accesses).rev() {
        *met |= a.end > if is_read(a) { change } else { any };
        any = any.min(a.begin);
        if !is_read(a) {
            change = change.min(a.begin);
        }
    }
    met.iter().zip(accesses).filter(|(met, a)| **met && a.who < NOBODY).count() as u64
}

#[cfg(test)]
mod tests {
    use super::What::{Discard, Read, Write, Zero};
    use super::*;

    fn history(of: &[(u64, u64, What)]) -> Vec<Access> {
        let access = |&(begin, end, what)| Access { sector: 7, who: 0, begin, end, what };
        of.iter().map(access).collect()
    }

    #[track_caller]
    fn right(of: &[(u64, u64, What)]) -> Seen {
        check(&mut history(of)).unwrap_or_else(|v| panic!("{v:#?}"))
    }

    #[track_caller]
    fn wrong(of: &[(u64, u64, What)], why: &str) {
        let v = check(&mut history(of)).expect_err("no order explains this");
        assert!(v.sector == 7 && v.why.contains(why) && v.history.len() == of.len(), "{v:#?}");
    }

    #[test]
    fn one_after_the_other() {
        right(&[
            (0, 0, Zero),
            (1, 2, Read(0)),
            (3, 4, Write(1)),
            (5, 6, Read(1)),
            (7, 8, Zero),
            (9, 10, Read(0)),
        ]);
        wrong(&[(0, 0, Write(9)), (1, 2, Write(1)), (3, 4, Read(9))], "was not seen");
        wrong(&[(0, 0, Zero), (1, 2, Write(1)), (3, 4, Read(0))], "overwritten");
        wrong(&[(0, 0, Write(9)), (1, 2, Zero), (3, 4, Read(9))], "was not seen");
        wrong(&[(0, 0, Zero), (1, 2, Read(5))], "never written");
        wrong(&[(0, 0, Zero), (1, 2, Read(5)), (3, 4, Write(5))], "before it was written");
        wrong(&[(0, 0, Write(9)), (1, 2, Read(0))], "nobody wrote");
    }

    #[test]
    fn a_read_that_overlaps_a_write_sees_old_or_new_but_not_new_then_old() {
        let (start, write) = ((0, 0, Write(9)), (1, 10, Write(1)));
        let seen = right(&[start, write, (2, 3, Read(9)), (4, 5, Read(1)), (6, 7, Read(1))]);
        assert_eq!((seen.accesses, seen.overlapping), (5, 4));
        wrong(&[start, write, (2, 3, Read(1)), (4, 5, Read(9))], "was not seen");
        wrong(&[start, write, (2, 3, Read(1)), (4, 5, Read(9)), (6, 7, Read(1))], "seen in turns");
        // the same two reads side by side are explained
        right(&[start, write, (2, 4, Read(1)), (3, 5, Read(9))]);
    }

    #[test]
    fn all_readers_see_overlapping_writes_in_one_order() {
        let writes = [(0, 0, Write(9)), (1, 20, Write(1)), (2, 21, Write(2))];
        right(&[&writes[..], &[(3, 4, Read(1)), (5, 6, Read(2)), (30, 31, Read(2))]].concat());
        right(&[&writes[..], &[(30, 31, Read(1)), (32, 33, Read(1))]].concat());
        wrong(&[&writes[..], &[(30, 31, Read(1)), (32, 33, Read(2))]].concat(), "seen in turns");
        wrong(
            &[&writes[..], &[(3, 4, Read(1)), (5, 6, Read(2)), (30, 31, Read(1))]].concat(),
            "was not seen",
        );
    }

    #[test]
    fn a_write_between_two_sights_of_another_value() {
        let start = (0, 0, Write(9));
        // 1 must be there from 2 to 7, and 2 was written and done within that time
        wrong(&[start, (1, 2, Write(1)), (3, 4, Write(2)), (7, 8, Read(1))], "was not seen");
        wrong(&[start, (1, 2, Write(1)), (3, 4, Zero), (7, 8, Read(1))], "was not seen");
        right(&[start, (1, 2, Write(1)), (3, 4, Discard), (7, 8, Read(1))]);
        right(&[start, (1, 2, Write(1)), (3, 9, Write(2)), (7, 8, Read(1)), (10, 11, Read(2))]);
    }

    #[test]
    fn a_discard_has_an_effect_or_none_but_none_later_and_not_half() {
        let start = [(0, 0, Write(9)), (1, 2, Discard)];
        right(&[&start[..], &[(3, 4, Read(9)), (5, 6, Read(9))]].concat());
        right(&[&start[..], &[(3, 4, Read(0)), (5, 6, Read(0))]].concat());
        wrong(&[&start[..], &[(3, 4, Read(0)), (5, 6, Read(9))]].concat(), "seen in turns");
        wrong(&[&start[..], &[(3, 4, Read(9)), (5, 6, Read(0))]].concat(), "seen in turns");
        // it lands after a write that came later
        wrong(&[&start[..], &[(3, 4, Write(1)), (5, 6, Read(0))]].concat(), "overwritten");
        // two of them, and the first was seen to have had an effect
        let two = [&start[..], &[(3, 4, Read(0)), (5, 6, Discard)]].concat();
        right(&[&two[..], &[(7, 8, Read(0))]].concat());
        wrong(&[&two[..], &[(7, 8, Read(9))]].concat(), "seen in turns");
    }

    #[test]
    fn zeros_of_several_writers() {
        let both = [(0, 0, Zero), (1, 4, Write(1)), (2, 9, Zero)];
        // the start's, or the later ones
        assert_eq!(right(&[&both[..], &[(3, 5, Read(0))]].concat()).ambiguous, 1);
        assert_eq!(right(&[&both[..], &[(6, 7, Read(0)), (8, 10, Read(0))]].concat()).ambiguous, 0);
        wrong(&[&both[..], &[(6, 7, Read(0)), (8, 10, Read(1))]].concat(), "was not seen");
        // whosever zeros they were, 1 was there all the time
        let held = [(0, 0, Zero), (1, 2, Write(1)), (3, 20, Discard), (4, 21, Discard)];
        right(&[&held[..], &[(5, 6, Read(0))]].concat());
        wrong(&[&held[..], &[(5, 6, Read(0)), (7, 8, Read(1))]].concat(), "was not seen");
    }

    #[test]
    fn a_sector_that_stays_torn_is_wrong_one_that_is_read_while_it_is_written_not() {
        let writes = [(0, 0, Write(9)), (1, 10, Write(1)), (2, 11, Write(2))];
        right(&[&writes[..], &[(3, 4, Read(1)), (3, 4, Read(2))]].concat());
        wrong(&[&writes[..], &[(12, 13, Read(1)), (12, 13, Read(2))]].concat(), "seen in turns");
    }

    /// Every history of a register that really is one passes; after one value is swapped for another, most do not.
    #[test]
    fn random_histories() {
        let (mut caught, mut rounds) = (0, 0);
        for seed in 1..2000u64 {
            let mut rng = seed;
            let mut below = |n: u64| {
                rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (rng >> 33) % n
            };
            let mut h = vec![(0, 0, Zero)];
            let mut value = 0;
            for n in 1..40u64 {
                // it happens at 100 n + 1000; intervals around that reach over four neighbours to each side
                let what = match below(10) {
                    0 => Zero,
                    1 => Discard,
                    2..5 => Write(n),
                    _ => Read(value),
                };
                let effective = what != Discard || below(2) == 0;
                match what {
                    Write(v) => value = v,
                    Zero | Discard if effective => value = 0,
                    _ => {}
                }
                h.push((1000 + 100 * n - 80 * below(7), 1001 + 100 * n + 80 * below(7), what));
            }
            right(&h);
            let reads: Vec<usize> = (0..h.len()).filter(|i| matches!(h[*i].2, Read(_))).collect();
            let values: Vec<u64> =
                h.iter().filter_map(|a| if let Write(v) = a.2 { Some(v) } else { None }).collect();
            if let (Some(&last), Some(&first)) = (reads.last(), values.first())
                && h[last].2 != Read(first)
                && values.len() > 6
            {
                rounds += 1;
                h[last].2 = Read(first);
                caught += u32::from(check(&mut history(&h)).is_err());
            }
        }
        assert!(rounds > 1000 && caught * 100 > rounds * 90, "{caught} of {rounds}");
    }
}
