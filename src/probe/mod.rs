//! Where tests and the simulator reach into the product: [`moment`]s at which they may kill it, rules that they break on
//! purpose ([`sabotage`]), tables held in parts ([`paging`]), smaller units of formats (`small`). In a build without them nothing of it is left.

pub mod moment;
pub mod paging;
pub mod sabotage;
pub(crate) mod small;
