//! What an image need not keep.

use crate::map::Bitmap;

/// Units of allocation of an image, by the number of their claim, whose places can go without a change of what the disk shows.
#[derive(Clone, Debug, Default)]
pub struct Spare {
    /// What the unit's place says shows through from beneath as well: the parent's bytes, or zeros where there is no parent.
    pub same: Bitmap,
    /// The whole unit reads as zeros, and something else is beneath.
    pub zero: Bitmap,
}
