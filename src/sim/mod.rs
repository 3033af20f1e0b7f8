//! The simulator: the third [`crate::io::IoEngine`], files whose power can go, and everything around them, on one thread
//! and from one seed. docs/crash-model.md says what is simulated and what is promised.
//!
//! A [`World`] is the life of one process: a disk, its channels, its guest and its jobs. The guest calls the channels, or
//! posts chains into rings in its memory, which real queue workers serve. It knows what each sector may hold ([`Past`]).
//! A [`Life`] says when the process dies. A [`SimFile`] remembers what no sync has made durable; a [`Cut`] is a moment at
//! which the power may go, and a [`Judge`] looks at what it can leave. [`play`] puts all of that together for a seed.

mod bytes;
mod caching;
mod cut;
mod dmlog;
mod driver;
mod engine;
mod fault;
mod file;
mod foreign;
mod forgetful;
mod images;
mod judge;
mod life;
mod living;
mod mending;
mod merging;
mod past;
mod play;
mod port;
mod ram;
mod rebasing;
mod recrypting;
mod rng;
#[cfg(test)]
mod tests;
mod trace;
mod workload;
mod world;

pub use bytes::Bytes;
pub use caching::CacheFile;
pub use cut::{Change, Cut};
pub use dmlog::DmLog;
pub use engine::SimEngine;
pub use fault::{Failing, Fault, FaultMix, Faults};
pub use file::{DATA, Landing, SimFile};
pub use foreign::take_away;
pub use images::{Images, Kind, Shape};
pub use judge::{Judge, Stats};
pub use life::Life;
pub use living::{Snapping, snapshot_under_load};
pub use mending::{interrupted_compacting, interrupted_properties, interrupted_repairs, interrupted_resizes};
pub use merging::{Stack, interrupted_merge};
pub use past::{Past, fill, value_of};
pub use play::{Habit, Play, Played, play};
pub use rebasing::interrupted_rebase;
pub use recrypting::interrupted_recrypt;
pub use rng::Rng;
pub use trace::Trace;
pub use workload::{
    Kills, Op, Thorough, all_workloads, powercut_after_kills, powercut_workload, small_disk,
    small_disk_behind,
};
pub use world::{Guest, Left, Through, World};

pub use crate::probe::sabotage::{Sabotage, sabotage};
