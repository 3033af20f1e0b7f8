//! Where tests and the simulator reach into the product: [`moment`]s at which they may kill it, and rules that they break on
//! purpose ([`sabotage`]). In a build without them nothing of it is left.

pub mod moment;
pub mod sabotage;
