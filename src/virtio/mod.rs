//! virtio-blk as it is on the wire: the config space, and descriptor chains made into checked requests. Pure: no
//! I/O, no threads, no guest memory but what the caller's resolver hands out.

mod chain;
mod config;

pub use chain::{
    Action, ChainParser, DescriptorTable, GuestMemory, Refusal, Rules, STATUS_IOERR, STATUS_OK,
    STATUS_UNSUPP, Segment, Verdict,
};
pub use config::{CONFIG_BYTES, ConfigSpace, DeviceShape, Geometry, NotWritable, feature};
