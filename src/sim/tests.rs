//! The simulator at work.

mod failing;
mod powercut;
mod sabotaged;
mod seeds;
