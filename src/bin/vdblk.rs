//! vdblk
fn main() {}
