//! vdimg
fn main() {}
