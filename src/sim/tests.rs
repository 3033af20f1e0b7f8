//! The simulator at work.

mod failing;
mod powercut;
mod repairing;
mod rings;
mod sabotaged;
mod seeds;
