//! The container: a chain of images as one disk, and the interpreter that carries out what formats plan.

mod request;

pub use request::{BlockDevice, Done, Outcome, Request};
