//! Rules broken on purpose, to see whether the simulator notices. Only tests and the simulator can break one; everywhere
//! else [`is_broken`] is the constant `false`.

/// A rule (docs/crash-model.md) and how it is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// O1: a plan's sync before the entry is left out.
    NoSyncBeforeEntry,
    /// O1: the entry is written together with the data it names, or before.
    EntryBeforeData,
    /// O1: prepared places count as clean before they and the count are durable.
    RoomWithoutSync,
    /// O2: a place is given to another block although a failed write of its entry may be on the disk.
    EarlyReuse,
    /// O2: a tail nobody names is cut before what was read is durable.
    CutBeforeSync,
    /// O2: at the close blocks move, and the file is cut, without syncs in between.
    CloseWithoutSync,
    /// O3: the count is left as it is when places are prepared.
    CountNotWritten,
    /// O4: a sync that failed is tried again.
    RetriedSync,
    /// O5: a write is answered before its entry is on its way to the kernel's end.
    AnsweredBeforeEntry,
    /// O5: a block of zeros is marked in memory only.
    ZeroInMemoryOnly,
    /// O6: a flush joins a sync that runs already.
    LateJoin,
    /// O6: a write does not make its file one that has to be synced.
    ForgottenWrite,
    /// A VHDX's log: entries count as written to their places before they durably are.
    LogBeforeTable,
    /// A VHDX's log: it begins anew although something was logged since the checkpoint began.
    LogReused,
    /// A VHDX's log: it begins anew, and goes on before that is durable.
    LogAnewUnsynced,
    /// A cache image: a block is shown in its place before it is written there.
    CachedBeforeData,
    /// A cache image: what a session left that was not ended in order is taken over, whichever wrote it.
    UncleanTrusted,
    /// A live snapshot: the record names the new image only when it is served already.
    RecordedAfterSwitch,
    /// A live snapshot: the new image is recorded before it is durable.
    NewImageUnsynced,
    /// A live snapshot: queues go on with the new image while others are still at the old one.
    SwitchedApart,
    /// A chain is not marked as in flight before it is started.
    UnmarkedChain,
    /// The mark of a chain is cleared before its answer is visible.
    ClearedTooEarly,
    /// The mark of a chain is kept when its answer is visible.
    MarkKept,
    /// New chains are taken while those of a former process are repeated.
    RepeatedBesideNew,
}

impl Sabotage {
    /// Those of the disk.
    pub const ALL: [Sabotage; 12] = [
        Sabotage::NoSyncBeforeEntry,
        Sabotage::EntryBeforeData,
        Sabotage::RoomWithoutSync,
        Sabotage::EarlyReuse,
        Sabotage::CutBeforeSync,
        Sabotage::CloseWithoutSync,
        Sabotage::CountNotWritten,
        Sabotage::RetriedSync,
        Sabotage::AnsweredBeforeEntry,
        Sabotage::ZeroInMemoryOnly,
        Sabotage::LateJoin,
        Sabotage::ForgottenWrite,
    ];

    /// Those of a log, which only a VHDX has.
    pub const LOG: [Sabotage; 3] = [Sabotage::LogBeforeTable, Sabotage::LogReused, Sabotage::LogAnewUnsynced];

    /// Those of a cache image.
    pub const CACHE: [Sabotage; 2] = [Sabotage::CachedBeforeData, Sabotage::UncleanTrusted];

    /// Those that only a queue worker can break.
    pub const RINGS: [Sabotage; 4] =
        [Sabotage::UnmarkedChain, Sabotage::ClearedTooEarly, Sabotage::MarkKept, Sabotage::RepeatedBesideNew];
}

#[cfg(any(test, feature = "sim"))]
mod switch {
    use super::Sabotage;
    use std::cell::Cell;

    thread_local! {
        static BROKEN: Cell<Option<Sabotage>> = const { Cell::new(None) };
    }

    /// Breaks a rule on this thread from now on, or none.
    pub fn sabotage(what: Option<Sabotage>) {
        BROKEN.set(what);
    }

    /// The rule is broken on this thread.
    pub fn is_broken(what: Sabotage) -> bool {
        BROKEN.get() == Some(what)
    }
}

#[cfg(any(test, feature = "sim"))]
pub use switch::{is_broken, sabotage};

/// No rule is ever broken.
#[cfg(not(any(test, feature = "sim")))]
#[inline(always)]
pub const fn is_broken(_what: Sabotage) -> bool {
    false
}
