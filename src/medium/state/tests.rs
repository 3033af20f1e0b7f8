//! All that four clients can do to a medium, against the interface's own words.

use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

const CLIENTS: [Client; 4] = [Client(1), Client(2), Client(3), Client(4)];

fn calls() -> Vec<Call> {
    vec![
        Call::LockRead,
        Call::UnlockRead,
        Call::LockWrite,
        Call::UnlockWrite,
        Call::Close,
        Call::Modify,
        Call::Relocate,
        Call::Attach,
        Call::BeginCreate,
        Call::EndCreate(true),
        Call::EndCreate(false),
        Call::BeginDelete,
        Call::BeginMerge,
        Call::EndDelete(true),
        Call::EndDelete(false),
        Call::Checked(None),
        Call::Checked(Some("no such file".into())),
        Call::Died,
        Call::Recovered(true),
        Call::Recovered(false),
    ]
}

/// What holds for every standing that can come about.
fn assert_legal(s: &Standing) {
    assert!(s.writer.is_none() || s.readers.is_empty(), "a writer and readers: {s:?}");
    assert!(s.readers.values().all(|n| *n > 0), "a reader that reads 0 times: {s:?}");
    let locked = s.writer.is_some() || !s.readers.is_empty();
    assert!(!locked || s.phase.is_there(), "locks on what is not there: {s:?}");
    assert!(s.busy.is_none() || matches!(s.phase, Phase::Creating | Phase::Deleting), "{s:?}");
    assert!(s.last_access_error.is_none() || s.phase == Phase::Inaccessible, "{s:?}");
    assert!(!s.closed || !locked, "closed under a lock: {s:?}");
    if s.medium_type == MediumType::Readonly {
        assert_ne!(s.writer.map(|_| ()), Some(()), "a write lock on what is never written: {s:?}");
    }
    if s.device != DeviceType::HardDisk {
        let meaningless = [State::NotCreated, State::Creating, State::Deleting];
        assert!(!meaningless.contains(&s.state()) || s.phase == Phase::NotCreated, "{s:?}");
    }
}

/// What the seed says of the states before and after the locks; `None`: the call is not about locks.
fn seed_allows(s: &Standing, client: Client, call: &Call) -> Option<bool> {
    use State::{Created, Inaccessible, LockedRead};
    let before = s.state();
    Some(match call {
        Call::LockRead => [Created, Inaccessible, LockedRead].contains(&before),
        Call::UnlockRead => s.readers.contains_key(&client),
        Call::LockWrite => [Created, Inaccessible].contains(&before) && s.medium_type != MediumType::Readonly,
        Call::UnlockWrite => s.writer == Some(client),
        Call::Close => {
            [State::NotCreated, Created, Inaccessible].contains(&before) && s.machines == 0 && s.children == 0
        }
        _ => return None,
    })
}

fn assert_step(old: &Standing, client: Client, call: &Call, new: &Standing, answer: &Answer) {
    let what = || format!("{call:?} by {client:?} of {old:?}: {answer:?}");
    assert_eq!(answer.before, old.state(), "{}", what());
    assert_eq!(answer.after, new.state(), "{}", what());
    if let Err(refusal) = &answer.outcome {
        assert_eq!(old, new, "refused, and yet changed: {}", what());
        assert!(!refusal.why.is_empty());
        let expected: &[Code] = match call {
            _ if old.closed => &[Code::AccessDenied],
            Call::LockRead | Call::UnlockRead | Call::LockWrite | Call::UnlockWrite => {
                &[Code::InvalidObjectState]
            }
            Call::Close => &[Code::InvalidObjectState, Code::ObjectInUse],
            _ => &[Code::InvalidObjectState, Code::ObjectInUse, Code::NotSupported],
        };
        assert!(expected.contains(&refusal.code), "{}", what());
    }
    if old.closed {
        assert!(answer.outcome.is_err(), "{}", what());
        return;
    }
    if let Some(allowed) = seed_allows(old, client, call) {
        assert_eq!(answer.outcome.is_ok(), allowed, "{}", what());
    }
    if answer.outcome.is_ok() {
        match call {
            Call::LockRead => assert_eq!(answer.after, State::LockedRead, "{}", what()),
            Call::LockWrite => assert_eq!(answer.after, State::LockedWrite, "{}", what()),
            // A check changes no lock, and locks no check.
            Call::Checked(_) => {
                assert_eq!((&old.readers, old.writer), (&new.readers, new.writer), "{}", what());
            }
            _ => {}
        }
    }
}

/// Every standing that four clients of at most two calls each can come upon, in every order of their calls.
fn explore(start: Standing) -> HashSet<Standing> {
    let calls = calls();
    let (mut seen, mut next) = (HashSet::new(), vec![(start, [0u8; 4])]);
    while let Some((standing, made)) = next.pop() {
        if !seen.insert((standing.clone(), made)) {
            continue;
        }
        assert_legal(&standing);
        for (n, client) in CLIENTS.into_iter().enumerate().filter(|(n, _)| made[*n] < 2) {
            for call in &calls {
                let mut after = standing.clone();
                let answer = after.call(client, call);
                assert_step(&standing, client, call, &after, &answer);
                let mut made = made;
                made[n] += 1;
                next.push((after, made));
            }
        }
    }
    seen.into_iter().map(|(s, _)| s).collect()
}

#[test]
fn all_orders_of_two_calls_of_four_clients_come_upon_no_illegal_state() {
    let mut all = HashSet::new();
    for phase in Phase::ALL {
        all.extend(explore(Standing { phase, ..Standing::new(DeviceType::HardDisk) }));
    }
    let found: HashSet<_> = all.iter().map(Standing::state).collect();
    assert_eq!(found.len(), State::ALL.len(), "not all states were met: {found:?}");
    assert!(all.len() > 200, "{}", all.len());
}

#[test]
fn dvds_and_floppies_and_disks_in_use_too() {
    for device in [DeviceType::Dvd, DeviceType::Floppy] {
        explore(Standing::new(device));
    }
    for (children, machines, outside) in
        [(1, 0, None), (0, 1, None), (0, 0, Some(Outside::Reading)), (0, 0, Some(Outside::Writing))]
    {
        explore(Standing { children, machines, outside, ..Standing::new(DeviceType::HardDisk) });
    }
}

fn created() -> Standing {
    Standing { phase: Phase::Created, ..Standing::new(DeviceType::HardDisk) }
}

fn code(answer: &Answer) -> Option<Code> {
    answer.outcome.as_ref().err().map(|r| r.code)
}

#[test]
fn a_remembered_medium_begins_inaccessible_and_without_an_error() {
    let s = Standing::new(DeviceType::HardDisk);
    assert_eq!((s.state(), &s.last_access_error), (State::Inaccessible, &None));
}

#[test]
fn read_locks_are_shared_and_nest() {
    let [a, b, ..] = CLIENTS;
    let mut s = created();
    let first = s.call(a, &Call::LockRead);
    assert_eq!((first.before, first.after), (State::Created, State::LockedRead));
    s.call(a, &Call::LockRead).outcome.unwrap();
    let second = s.call(b, &Call::LockRead);
    assert_eq!((second.before, second.after), (State::LockedRead, State::LockedRead));
    for (who, after) in [(a, State::LockedRead), (a, State::LockedRead), (b, State::Created)] {
        assert_eq!(s.call(who, &Call::UnlockRead).after, after);
    }
    let too_often = s.call(a, &Call::UnlockRead);
    assert_eq!((code(&too_often), too_often.after), (Some(Code::InvalidObjectState), State::Created));
}

#[test]
fn a_write_lock_is_exclusive_and_does_not_nest() {
    let [a, b, ..] = CLIENTS;
    let mut s = created();
    let locked = s.call(a, &Call::LockWrite);
    assert_eq!((locked.before, locked.after), (State::Created, State::LockedWrite));
    for (who, call) in
        [(a, Call::LockWrite), (b, Call::LockWrite), (b, Call::LockRead), (b, Call::UnlockWrite)]
    {
        let refused = s.call(who, &call);
        assert_eq!((code(&refused), refused.before), (Some(Code::InvalidObjectState), State::LockedWrite));
    }
    assert_eq!(s.call(a, &Call::UnlockWrite).after, State::Created);
    s.call(a, &Call::LockRead).outcome.unwrap();
    assert_eq!(code(&s.call(b, &Call::LockWrite)), Some(Code::InvalidObjectState));
    assert_eq!(code(&s.call(a, &Call::LockWrite)), Some(Code::InvalidObjectState), "nor out of a read lock");
}

#[test]
fn inaccessible_media_are_locked_and_come_back_as_what_a_check_found() {
    let [a, b, ..] = CLIENTS;
    let mut s = Standing::new(DeviceType::HardDisk);
    s.call(a, &Call::LockWrite).outcome.unwrap();
    s.call(b, &Call::Checked(Some("gone".into()))).outcome.unwrap();
    assert_eq!((s.state(), s.last_access_error.as_deref()), (State::LockedWrite, Some("gone")));
    s.call(b, &Call::Checked(None)).outcome.unwrap();
    assert_eq!(s.call(a, &Call::UnlockWrite).after, State::Created);
}

#[test]
fn close_wants_no_lock_no_machine_and_no_child() {
    let [a, b, ..] = CLIENTS;
    let mut s = created();
    s.call(a, &Call::LockRead).outcome.unwrap();
    assert_eq!(code(&s.call(b, &Call::Close)), Some(Code::InvalidObjectState));
    s.call(a, &Call::Died).outcome.unwrap();
    for (machines, children) in [(1, 0), (0, 1)] {
        let mut used = Standing { machines, children, ..s.clone() };
        assert_eq!(code(&used.call(b, &Call::Close)), Some(Code::ObjectInUse));
    }
    s.call(b, &Call::Close).outcome.unwrap();
    for call in calls() {
        assert_eq!(code(&s.call(a, &call)), Some(Code::AccessDenied), "{call:?}: the object is not ready");
    }
}

#[test]
fn properties_change_only_when_created_and_the_location_when_unlocked() {
    let a = CLIENTS[0];
    for state in State::ALL {
        let mut s = created();
        match state {
            State::LockedRead => drop(s.call(a, &Call::LockRead)),
            State::LockedWrite => drop(s.call(a, &Call::LockWrite)),
            other => s.phase = Phase::ALL.into_iter().find(|p| p.state() == other).unwrap(),
        }
        assert_eq!(s.state(), state);
        assert_eq!(s.call(a, &Call::Modify).outcome.is_ok(), state == State::Created, "{state}");
        let may_move = matches!(state, State::Created | State::Inaccessible);
        assert_eq!(s.call(a, &Call::Relocate).outcome.is_ok(), may_move, "{state}");
    }
}

#[test]
fn what_a_dead_client_began_waits_to_be_recovered() {
    let [a, b, ..] = CLIENTS;
    for (phase, begin) in [(Phase::NotCreated, Call::BeginCreate), (Phase::Created, Call::BeginDelete)] {
        for there in [true, false] {
            let mut s = Standing { phase, ..created() };
            s.call(a, &begin).outcome.unwrap();
            assert!(s.call(b, &Call::Recovered(there)).outcome.is_err(), "its client lives");
            s.call(a, &Call::Died).outcome.unwrap();
            assert!(s.call(a, &Call::EndCreate(true)).outcome.is_err());
            let done = s.call(b, &Call::Recovered(there));
            assert_eq!(done.after, if there { State::Created } else { State::NotCreated });
        }
    }
}

#[test]
fn a_file_that_others_use_is_locked_for_everybody() {
    let a = CLIENTS[0];
    let mut s = Standing { outside: Some(Outside::Writing), ..created() };
    assert_eq!(s.state(), State::LockedWrite);
    for call in [Call::LockRead, Call::LockWrite, Call::Close, Call::BeginDelete, Call::Modify] {
        assert_eq!(code(&s.call(a, &call)), Some(Code::InvalidObjectState), "{call:?}");
    }
    s.outside = Some(Outside::Reading);
    assert_eq!(s.state(), State::LockedRead);
    s.call(a, &Call::LockRead).outcome.unwrap();
    s.call(a, &Call::UnlockRead).outcome.unwrap();
    assert_eq!(code(&s.call(a, &Call::LockWrite)), Some(Code::InvalidObjectState));
}

proptest! {
    /// Long sessions: no illegal state, locks of the dead are gone, and each unlock pairs with a lock.
    #[test]
    fn long_sessions_stay_legal(steps in prop::collection::vec((0usize..4, 0usize..20), 1..200)) {
        let calls = calls();
        let mut s = created();
        let mut held = [0u32; 4];
        for (who, what) in steps {
            let (old, client, call) = (s.clone(), CLIENTS[who], &calls[what]);
            let answer = s.call(client, call);
            assert_legal(&s);
            assert_step(&old, client, call, &s, &answer);
            match (call, answer.outcome.is_ok()) {
                (Call::LockRead, true) => held[who] += 1,
                (Call::UnlockRead, true) => held[who] -= 1,
                (Call::Died, true) => held[who] = 0,
                _ => {}
            }
            prop_assert_eq!(held[who], s.readers.get(&client).copied().unwrap_or(0));
        }
    }
}
