//! Simulated images are small: what a format counts in units of a MiB may be smaller in them.

/// The smallest unit of something whose unit everywhere else is `usual`.
pub(crate) const fn unit(usual: u64) -> u64 {
    if cfg!(any(test, feature = "sim")) { 4096 } else { usual }
}
