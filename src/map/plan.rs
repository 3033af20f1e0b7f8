//! Changes as values: ordered steps with barriers, carried out by one interpreter for all formats.

use super::{FileId, GuestRange, HostOffset};
use smallvec::SmallVec;
use uuid::Uuid;

/// A unit of metadata that is written as one: at most [`crate::limits::META_PAGE_BYTES`] long, and with
/// at most one write in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MetaKey {
    /// The header.
    Header,
    /// A page of a table.
    Page {
        /// Which table, in the format's own counting (0 where there is one).
        table: u8,
        /// The page's number in it.
        number: u64,
    },
}

/// A change of metadata by name. Bytes are computed when the write is submitted, never earlier:
/// whatever was published or released for that write by then is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaOp {
    /// Entry `index` of the page's table becomes `value` (in the format's own coding).
    Entry {
        /// Its number, counted from the table's first.
        index: u64,
        /// What the table shall say.
        value: u64,
        /// `value` names a host block (O1 applies).
        pointer: bool,
    },
    /// The header's count of allocated blocks.
    Count(u32),
    /// The header's modification UUID.
    Modification(Uuid),
    /// The header's mark that somebody writes to the image.
    InUse(bool),
}

/// One step of a plan. Steps between two barriers may run at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The request's own bytes for `part`, written in place.
    Guest {
        /// Guest bytes to write.
        part: GuestRange,
        /// The file.
        file: FileId,
        /// Where `part` begins in it.
        to: HostOffset,
    },
    /// A whole block: what the disk holds there without this image, the request's bytes over it, and zeros up
    /// to `len` where the block reaches past the end of the disk.
    Block {
        /// The guest range of the block, clipped to the disk.
        block: GuestRange,
        /// The file.
        file: FileId,
        /// Where the block begins in it.
        to: HostOffset,
        /// Bytes of the block in the file.
        len: u64,
        /// The place reads as zeros, so pieces of zeros need no write.
        clean: bool,
    },
    /// A metadata change; done when the write that carries it was accepted by the kernel, and visible to
    /// [`super::ImageMap::map`] from then on.
    Meta {
        /// What is written.
        key: MetaKey,
        /// The change.
        op: MetaOp,
    },
    /// From here to the end of the plan no sync of the file runs beside it: [`Step::Through`] and [`Step::SyncLength`] stand behind it. One
    /// descriptor tells of a failed write-back once, whoever asks, so what two ask at a time proves nothing.
    HoldSyncs {
        /// The file.
        file: FileId,
    },
    /// As [`Step::Meta`], done only once that write is durable: it needs no [`Step::Sync`] behind it.
    Through {
        /// What is written.
        key: MetaKey,
        /// The change, which names no block.
        op: MetaOp,
    },
    /// The file grows to `to` by space that reads as zeros, durably once synced.
    Extend {
        /// The file.
        file: FileId,
        /// Present end of what is in use.
        from: HostOffset,
        /// The new end.
        to: HostOffset,
    },
    /// What a [`Step::Extend`] behind an earlier barrier has made is there for good: durable is the file's length, not what others have
    /// written meanwhile. That it reads as zeros follows: nobody has written there.
    SyncLength {
        /// The file.
        file: FileId,
        /// Where the extension began.
        from: HostOffset,
        /// Where it ended.
        to: HostOffset,
    },
    /// The file is cut at `to`.
    Truncate {
        /// The file.
        file: FileId,
        /// The new end.
        to: HostOffset,
    },
    /// The space goes back to the file system, where that can be done and the user wants it: nothing names it any more.
    Punch {
        /// The file.
        file: FileId,
        /// Where it begins.
        from: HostOffset,
        /// Where it ends.
        to: HostOffset,
    },
    /// Bytes move inside one file (a block into a hole, at a clean close).
    Move {
        /// The file.
        file: FileId,
        /// Where they are.
        from: HostOffset,
        /// Where they go.
        to: HostOffset,
        /// How many.
        len: u64,
    },
    /// Everything before is complete before anything after begins.
    Barrier,
    /// A sync of the file, submitted after everything before has completed. Barrier included.
    Sync {
        /// The file.
        file: FileId,
    },
}

/// What a format wants to hear about when the plan has ended. The meaning is the format's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlanToken(pub u64);

/// An ordered change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps.
    pub steps: SmallVec<[Step; 6]>,
    /// For [`super::ImageMap::settle`].
    pub token: Option<PlanToken>,
    /// What the plan's pointers name reads, as it is durable now, like the guest range does without them.
    pub clean: bool,
}

impl Plan {
    /// A plan of these steps, without a token, not clean.
    pub fn of(steps: impl IntoIterator<Item = Step>) -> Self {
        Plan { steps: steps.into_iter().collect(), token: None, clean: false }
    }

    /// The same steps in an order that breaks rule O1, for [`super::sabotage`].
    pub(crate) fn entries_first(mut self) -> Self {
        let is_pointer = |s: &Step| matches!(s, Step::Meta { op: MetaOp::Entry { pointer: true, .. }, .. });
        self.steps.sort_by_key(|s| !is_pointer(s));
        self
    }

    /// The rule of docs/crash-model.md that the plan breaks. O1: a pointer is handed to the kernel only if what it names is clean,
    /// or after a sync behind the last write of data.
    pub fn broken_rule(&self) -> Option<&'static str> {
        let (mut unsynced_data, mut holds) = (false, false);
        for step in &self.steps {
            let pointer = |op: &MetaOp| matches!(op, MetaOp::Entry { pointer: true, .. });
            match step {
                Step::Guest { .. } | Step::Block { .. } | Step::Move { .. } | Step::Extend { .. } => {
                    unsynced_data = true;
                }
                Step::Sync { .. } if holds => return Some("a sync that waits for itself"),
                Step::Sync { .. } => unsynced_data = false,
                Step::HoldSyncs { .. } => holds = true,
                Step::Through { .. } | Step::SyncLength { .. } if !holds => {
                    return Some("written through beside a sync");
                }
                Step::Through { op, .. } if pointer(op) => return Some("an entry that nobody gates"),
                Step::Meta { op, .. } if pointer(op) && unsynced_data && !self.clean => {
                    return Some("O1: pointer before its data is durable");
                }
                Step::Meta { .. }
                | Step::Through { .. }
                | Step::SyncLength { .. }
                | Step::Truncate { .. }
                | Step::Punch { .. }
                | Step::Barrier => {}
            }
        }
        None
    }

    /// Checks what [`Self::broken_rule`] tells.
    ///
    /// # Panics
    /// On a plan that breaks a rule: a format is wrong, and running it could lose data.
    pub fn assert_ordered(&self) {
        if let Some(rule) = self.broken_rule() {
            panic!("{rule}: {self:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POINTER: Step = Step::Meta {
        key: MetaKey::Page { table: 0, number: 0 },
        op: MetaOp::Entry { index: 0, value: 0, pointer: true },
    };
    const DATA: Step = Step::Guest { part: GuestRange::EMPTY, file: FileId(0), to: HostOffset(0) };

    #[test]
    fn gated_and_clean_plans_pass() {
        Plan::of([DATA, Step::Sync { file: FileId(0) }, POINTER]).assert_ordered();
        Plan { clean: true, ..Plan::of([DATA, POINTER]) }.assert_ordered();
    }

    #[test]
    #[should_panic(expected = "O1")]
    fn a_pointer_before_its_data_is_caught() {
        Plan::of([DATA, Step::Barrier, POINTER]).assert_ordered();
    }
}
