//! What a format is to the data path.

use super::{
    Extent, ExtentList, FileId, GuestOffset, GuestRange, HostOffset, ImageInfo, MetaKey, MetaOp, Plan,
    PlanToken,
};
use crate::error::{Error, ErrorKind, Failure, Result};
use std::fmt::Debug;
use uuid::Uuid;

/// Why a range is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// To read it.
    Read,
    /// To write into what is allocated already; anything else needs a plan.
    Overwrite,
}

/// Why a look-up or a plan gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// [`Intent::Overwrite`] of a range that begins where nothing is allocated: take the claim and plan.
    NeedsPlan,
    /// No prepared host block is left: carry out [`ImageMap::room`] and ask again.
    NeedsRoom,
    /// This page of a table is not in memory: read it ([`ImageMap::page_place`], [`ImageMap::page_read`]) and ask again.
    /// Only where nothing of the range could be answered; otherwise the answer ends before it.
    NeedsPage(MetaKey),
    /// It cannot be done.
    Fail(Failure),
}

/// A change that needs a plan. It always concerns one [`ImageMap::unit`], under that unit's claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes are written to `part` of the unit. `beneath_zero`: the whole unit reads as zeros now.
    Write {
        /// What is written, inside one unit.
        part: GuestRange,
        /// Nothing but zeros shows through.
        beneath_zero: bool,
    },
    /// The whole unit shall read as zeros and hide the parent.
    Zero {
        /// The unit.
        unit: GuestRange,
    },
}

/// How a plan ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Every step is done.
    Done {
        /// Every [`super::Step::Extend`] of the plan made space that reads as zeros, durably by now. True for
        /// plans without one; false where the file system can only write zeros or lengthen the file over
        /// bytes nobody vouches for.
        clean: bool,
    },
    /// A step failed; those behind it were not begun.
    Failed {
        /// Why.
        why: Failure,
        /// A write that carries the plan's table entry was handed to the kernel: the disk may name the place
        /// although we do not, so the place must never be given away again.
        entry_submitted: bool,
    },
}

/// Where a page of metadata lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagePlace {
    /// The file.
    pub file: FileId,
    /// Where the page begins in it.
    pub off: HostOffset,
    /// Its bytes, at most [`crate::limits::META_PAGE_BYTES`].
    pub len: usize,
}

/// What the data path has to know of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the virtual disk in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Bytes of a unit of allocation; 0 where there is none (raw).
    pub block_bytes: u64,
    /// The image may have a parent.
    pub is_diff: bool,
    /// Largest power of two to which metadata and blocks are aligned in the file: device sectors up to this size
    /// never hold both, or parts of two tables.
    pub data_alignment: u64,
}

/// A format: a pure translator over metadata held in memory. It neither reads nor writes. What a method does by itself fits an image that
/// is only read.
pub trait ImageMap: Send + Sync + Debug {
    /// Sizes and granularities.
    fn limits(&self) -> Limits;

    /// The extent at the start of `r`, no longer than `r`, which has a byte and lies inside the image.
    ///
    /// # Errors
    /// With [`Intent::Overwrite`]: [`Miss::NeedsPlan`] where the first byte is not allocated.
    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss>;

    /// Appends the extents of `r` to `out`, from its start on, as many as fit and as [`Self::look`] has.
    ///
    /// # Errors
    /// As [`Self::look`], of the first byte.
    fn map(&self, r: GuestRange, why: Intent, out: &mut ExtentList) -> std::result::Result<(), Miss> {
        out.fill(r, |rest| self.look(rest, why))
    }

    /// The unit of allocation around `at`, clipped to the disk. Its claim key is [`Self::claim_of`].
    fn unit(&self, at: GuestOffset) -> GuestRange;

    /// The number of the unit around `at`, the key of its claim.
    fn claim_of(&self, at: GuestOffset) -> super::BlockIndex;

    /// What has to happen for `change`. Reserves what the plan needs; [`Self::settle`] must follow.
    /// The plan of [`Self::begin`] must have been settled before the first call.
    ///
    /// # Errors
    /// [`Miss::NeedsRoom`]: carry out [`Self::room`] (urgent) and ask again, also where that has failed: the
    /// answer is then another try with less, a place that is dearer to use, or [`Miss::Fail`] with the reason.
    /// [`Failure::Unsupported`] for [`Change::Zero`]: the unit keeps its place (fixed images), so write zeros
    /// there.
    fn plan(&self, _change: Change) -> std::result::Result<Plan, Miss> {
        Err(Miss::Fail(Failure::ReadOnly))
    }

    /// A plan that prepares host blocks ahead of need. `None` while none is wanted or one runs already
    /// (`urgent`: a request waits for it).
    fn room(&self, _urgent: bool) -> Option<Plan> {
        None
    }

    /// The plan with this token has ended. Called once for every plan that has a token, after the last
    /// completion of its steps; [`Self::publish`] was called before for the metadata it wrote.
    fn settle(&self, token: PlanToken, _how: Settled) {
        debug_assert!(false, "{token:?} of an image that is not written");
    }

    /// After a failed change of the unit around `at`, the disk may say something else about it than this map:
    /// a change that seems to change nothing (the bytes are there already, all is zero already) must be carried
    /// out all the same, or what failed would be seen after a crash. [`Self::map`] answers
    /// [`Miss::NeedsPlan`] for overwriting such a unit.
    fn must_write(&self, _at: GuestOffset) -> bool {
        false
    }

    /// The page that was missed is in memory by now: it must not be read again, for what is read could be older than what is here, and
    /// be taken in when it has gone. False for images that are only read, where it does no harm.
    fn has_page(&self, _key: MetaKey) -> bool {
        false
    }

    /// Where the page lies that a look-up or a plan has missed.
    ///
    /// # Errors
    /// [`Failure::Corrupt`] if the image says of no such page, or of one outside its file.
    fn page_place(&self, _key: MetaKey) -> std::result::Result<PagePlace, Failure> {
        Err(Failure::Corrupt)
    }

    /// The bytes of that page, as they were read after it was missed.
    ///
    /// # Errors
    /// [`Failure::Corrupt`] if they cannot be right.
    fn page_read(&self, _key: MetaKey, _bytes: &[u8]) -> std::result::Result<(), Failure> {
        Err(Failure::Corrupt)
    }

    /// The bytes of a metadata page as it is published, with `ops` over it: where they go, and the bytes.
    ///
    /// # Errors
    /// None of the formats here; a corrupt cache would be one.
    fn compose(&self, key: MetaKey, _ops: &[MetaOp], _out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        Err(Error::new(ErrorKind::ReadOnly, format!("{key:?} of an image that is not written")))
    }

    /// The kernel has accepted a write of the page with `ops` in it: they are visible from here on.
    fn publish(&self, key: MetaKey, _ops: &[MetaOp]) {
        debug_assert!(false, "{key:?} of an image that is not written");
    }

    /// Before the first change after opening: a new modification UUID and whatever else must be on disk first.
    /// Nothing may be changed, not even in place, until it is done and settled.
    fn begin(&self, _modification: Uuid) -> Plan {
        Plan::default()
    }

    /// Images above know this one by its content ID alone: the changes to come leave that as it is. Before [`Self::begin`].
    fn keep_content_id(&self) {}

    /// The first part of the disk that takes no writes, or forgets them, although the image is open for writing.
    fn unwritten(&self) -> Option<GuestRange> {
        None
    }

    /// A page that [`Self::end`] has to see next. Asked before each call of it, until there is none.
    fn end_needs(&self) -> Option<MetaKey> {
        None
    }

    /// At a clean close, with nothing in flight: everything derived exact, the file without slack. Called again when that plan
    /// is done, until one is empty; empty from the first where nothing was changed. No change is planned afterwards.
    fn end(&self) -> Plan {
        Plan::default()
    }

    /// The image's file has `file_bytes` bytes now; where that alone makes the disk larger, it is from here on, and its
    /// new size is the answer. `None` where it does not, or nothing has changed.
    fn grown(&self, _file_bytes: u64) -> Option<u64> {
        None
    }

    /// What there is to tell about the image.
    fn info(&self) -> ImageInfo;
}
