//! Long work on containers: making, copying, comparing, checking images. Each job is a state machine that moves a block at
//! a time, so that a thread drives it in production and a seed in simulation.

mod create;
mod size;

pub use create::{CreateImage, create_image, create_overlay};
pub use size::parse_size;
