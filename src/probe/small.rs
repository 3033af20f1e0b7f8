//! Simulated images are small: what a format counts in units of a MiB may be smaller in them.

/// True in the simulator and in tests of the library.
const SIMULATED: bool = cfg!(any(test, feature = "sim"));

/// The smallest unit of something whose unit everywhere else is `usual`.
pub(crate) const fn unit(usual: u64) -> u64 {
    if SIMULATED { 4096 } else { usual }
}
