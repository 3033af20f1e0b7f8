//! The simulator at work.

mod chains;
mod failing;
mod faults;
mod powercut;
mod repairing;
mod rings;
mod sabotaged;
mod seeds;
