//! The vocabulary between formats and the data path: typed offsets, extents, plans, claims.
//!
//! A format answers two questions and does nothing else: *where is this guest range* ([`ImageMap::map`])
//! and *what has to happen, in which order, so that it can be written* ([`ImageMap::plan`]). The answers are
//! values: they can be printed, asserted on and enumerated by a simulator.

mod alloc;
mod bitmap;
mod cache;
mod claims;
mod extent;
mod image;
mod info;
mod plan;
mod range;
mod source;

pub use alloc::{HostBlock, HostBlocks, Taken};
pub use bitmap::Bitmap;
pub use cache::PageCache;
pub use claims::{ClaimKey, Claims, Waiter};
pub use extent::{Codec, Extent, ExtentKind, ExtentList, Packed};
pub use image::{Change, ImageMap, Intent, Limits, Miss, PagePlace, Settled};
pub use info::{DataForm, DeviceType, ImageInfo, Region, SnapshotInfo};
pub use plan::{MetaKey, MetaOp, Plan, PlanToken, Step};
pub use range::{BlockIndex, FileId, GuestOffset, GuestRange, HostOffset};
pub use source::ByteSource;
