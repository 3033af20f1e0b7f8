//! The simulator at work.

mod caching;
mod chains;
mod compacting;
mod encrypted;
mod failing;
mod faults;
mod live;
mod merging;
mod plugins;
mod powercut;
mod properties;
mod rebasing;
mod recrypting;
mod repairing;
mod resizing;
mod rings;
mod sabotaged;
mod seeds;
