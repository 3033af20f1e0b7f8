//! The container: a chain of images as one object with VirtualBox's life cycle,, over [`crate::vd`] and [`crate::job`].

mod backends;
mod flags;

pub use backends::{
    BackendInfo, CACHE_BACKENDS, ConfigKey, ConfigValueType, FileExtension, backend_info, backend_info_one,
    cache_backend,
};
pub use flags::{
    BackendCaps, BufferFlags, ConfigKeyFlags, DiskFileFlags, FilterFlags, ImageFlags, IterFlags, OpenFlags,
    RawDiskFlags, RegionListFlags, RepairFlags, SegmentFlags,
};
