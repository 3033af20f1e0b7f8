//! The vhost-user side: the front-end's connection, guest memory, virtqueues and their workers.
//!
//! One control thread ([`serve`]) talks to the front-end; one worker thread per queue pops chains, gives requests to
//! its own [`crate::vd::BlockDevice`] and publishes what has ended. They share nothing but immutable snapshots of guest
//! memory; the control thread sends orders and waits for their acknowledgement.

mod control;
mod dirty;
mod handler;
mod inflight;
mod lost;
mod mapping;
mod memory;
mod poller;
mod ring;
mod server;
mod shared;
mod socket;
mod state;
mod sys;
mod thread;
mod worker;

pub use control::{Control, Held};
pub use dirty::{DirtyLog, RingLog};
pub use inflight::{InflightRegion, Tracker};
pub use memory::{Memory, MemoryView, RegionInfo};
pub use ring::{Ring, RingError, RingSetup};
pub use server::{Device, Resize, ServeOptions, serve};
pub use socket::{Endpoint, SocketFile, SocketOptions};
pub use worker::{QueueCounters, QueueWorker, RingExtras, WorkerOptions};
