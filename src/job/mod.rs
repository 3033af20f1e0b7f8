//! Long work on containers: making, copying, comparing, checking, repairing images. Each [`Job`] is a state machine that
//! moves at most 1 MiB a call for each of its lanes, so that a thread drives it in production ([`Watch::run`]) and a seed in simulation.

mod bench;
mod cache_image;
mod check;
mod compact;
mod compare;
mod convert;
mod copy;
mod create;
mod delete;
mod diff;
mod disk_bytes;
mod disk_folder;
mod extract;
mod inspect;
mod lanes;
mod merge;
mod pack;
mod properties;
mod raw_disk;
mod rebase;
mod recrypt;
mod relocate;
mod repair;
mod resize;
mod script;
mod steps;
mod stream;
mod survey;
#[cfg(test)]
mod tests;

pub use crate::size::{human_bytes, parse_size};
pub use bench::{Bench, MAX_BENCH_DEPTH, Timed, bench_disk};
pub use cache_image::{CACHE_BLOCK_BYTES, InspectedCache, check_cache, create_cache, inspect_cache};
pub use check::{Checked, check_image, check_image_with};
pub use compact::{Compacted, SpareJob, compact_image};
pub use compare::{CompareJob, Comparison, compare_disks};
pub use convert::{Convert, convert};
pub use copy::{CopyJob, Selection};
pub use create::{CreateImage, create_image, create_overlay};
pub(crate) use create::{create_files, remove_files};
pub use delete::delete_image;
pub use diff::{DiffJob, diff_disks};
pub use disk_bytes::DiskBytes;
pub use disk_folder::{DiskFolder, FolderFile};
pub use extract::{Extract, extract};
pub use inspect::{Inspected, inspect_image, inspect_image_with};
pub(crate) use lanes::Lanes;
pub use merge::{Merge, Merged, merge_images, named_from};
pub use properties::{SetProperties, set_properties};
pub use raw_disk::{RawDiskWish, look_at_raw_disk};
pub use rebase::{Rebase, rebase_image};
pub use recrypt::{
    DiskKey, Into as RecryptInto, Recrypt, RecryptJob, Task as RecryptTask, is_unfinished, recrypt,
};
pub(crate) use relocate::link_or_copy;
pub use relocate::{MoveImage, move_image};
pub use repair::{Repaired, repair_image, repair_image_with};
pub use resize::{NewSize, Resize, resize_image};
pub use script::{Command, Script};
pub use steps::StepsJob;
pub(crate) use steps::change;
pub use stream::StreamWriter;
pub use survey::{Piece, PieceKind, Survey};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{EngineKind, make_engine};
use crate::vd::{Channel, Disk};
use std::sync::Arc;

/// How far a job is, in bytes of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Dealt with.
    pub done: u64,
    /// All there is; never 0 once the job has looked.
    pub total: u64,
}

/// Whether [`Job::step`] has to be called again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is more to do.
    More,
    /// The job is complete.
    Done,
}

/// Work that is done in small steps.
pub trait Job {
    /// Does a little: at most 1 MiB per lane. Waits at most a moment for I/O that runs.
    ///
    /// # Errors
    /// With the file and one line; the job is over then.
    fn step(&mut self) -> Result<Step>;

    /// How far it is.
    fn progress(&self) -> Progress;
}

/// Whoever watches a job: is told of its progress after each step, and may end it.
#[allow(missing_debug_implementations)] // two closures
pub struct Watch<'a> {
    /// True: the job ends, as soon as possible.
    pub cancelled: &'a dyn Fn() -> bool,
    /// Called after each step.
    pub progress: &'a mut dyn FnMut(Progress),
}

impl Watch<'_> {
    /// Steps `job` to its end, on this thread.
    ///
    /// # Errors
    /// The job's; [`ErrorKind::Cancelled`].
    pub fn run(&mut self, job: &mut dyn Job) -> Result<()> {
        loop {
            self.stop_if_cancelled()?;
            let step = job.step()?;
            (self.progress)(job.progress());
            if step == Step::Done {
                return Ok(());
            }
        }
    }

    /// # Errors
    /// [`ErrorKind::Cancelled`] if the job is to end.
    pub(crate) fn stop_if_cancelled(&self) -> Result<()> {
        if (self.cancelled)() { Err(Error::new(ErrorKind::Cancelled, "interrupted")) } else { Ok(()) }
    }
}

/// Bytes a lane moves at a time.
pub(crate) const LANE_BYTES: u64 = 1 << 20;
/// Requests a copy or a comparison has in flight.
pub(crate) const LANES: u16 = 8;
/// Operations the engine of a job's channel takes at a time.
const ENGINE_DEPTH: u32 = 128;

/// A channel over the best engine there is, for a job with `lanes` lanes.
pub(crate) fn open_channel(disk: &Arc<Disk>, lanes: u16) -> Result<Channel> {
    open_channel_over(EngineKind::Auto, disk, lanes)
}

/// The same for callers of several threads, one at a time: a ring belongs to the first thread that submits to it.
pub(crate) fn open_shared_channel(disk: &Arc<Disk>, lanes: u16) -> Result<Channel> {
    open_channel_over(EngineKind::Threads, disk, lanes)
}

/// The same over an engine of this kind.
pub(crate) fn open_channel_over(kind: EngineKind, disk: &Arc<Disk>, lanes: u16) -> Result<Channel> {
    let chosen = make_engine(kind, ENGINE_DEPTH)?;
    if let Some(why) = chosen.fallback {
        tracing::info!("threads instead of io_uring: {why}");
    }
    let mut channel = Channel::new(disk.clone(), chosen.engine, lanes)?;
    channel.be_patient(true);
    Ok(channel)
}
