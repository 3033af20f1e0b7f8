//! The device as a driver sees it before any request: feature bits and `struct virtio_blk_config`.

use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use std::mem::offset_of;
use virtio_bindings::virtio_blk::{
    virtio_blk_config, virtio_blk_config_virtio_blk_geometry as virtio_blk_geometry,
};

/// Size of the config space: what the vhost-user specification gives a device. The part behind the last field
/// reads as zeros.
pub const CONFIG_BYTES: usize = 256;

/// Feature bits, as masks.
pub mod feature {
    use virtio_bindings::{virtio_blk as blk, virtio_config as config, virtio_ring as ring};

    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << blk::VIRTIO_BLK_F_SEG_MAX;
    /// The geometry is valid.
    pub const GEOMETRY: u64 = 1 << blk::VIRTIO_BLK_F_GEOMETRY;
    /// The disk is read-only.
    pub const RO: u64 = 1 << blk::VIRTIO_BLK_F_RO;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << blk::VIRTIO_BLK_F_BLK_SIZE;
    /// FLUSH is understood, and the cache is write-back.
    pub const FLUSH: u64 = 1 << blk::VIRTIO_BLK_F_FLUSH;
    /// Block size exponents and preferred I/O sizes are valid.
    pub const TOPOLOGY: u64 = 1 << blk::VIRTIO_BLK_F_TOPOLOGY;
    /// The driver may switch between write-back and write-through.
    pub const CONFIG_WCE: u64 = 1 << blk::VIRTIO_BLK_F_CONFIG_WCE;
    /// More than one queue.
    pub const MQ: u64 = 1 << blk::VIRTIO_BLK_F_MQ;
    /// DISCARD is understood.
    pub const DISCARD: u64 = 1 << blk::VIRTIO_BLK_F_DISCARD;
    /// WRITE_ZEROES is understood.
    pub const WRITE_ZEROES: u64 = 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;
    /// Every write to guest memory is logged (vhost's bit, for migration).
    pub const LOG_ALL: u64 = 1 << 26;
    /// Descriptors may refer to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// Notifications are asked for by ring index.
    pub const EVENT_IDX: u64 = 1 << ring::VIRTIO_RING_F_EVENT_IDX;
    /// The vhost-user protocol features are negotiated (vhost-user's bit).
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << config::VIRTIO_F_VERSION_1;
}

/// The disk's geometry as guests are told it (of no meaning to modern ones).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors of a track.
    pub sectors: u8,
}

impl Geometry {
    /// The customary geometry of a disk that brings none: 16 heads, 63 sectors, as many cylinders as fit.
    pub fn of_size(size_bytes: u64) -> Self {
        let cylinders = (size_bytes / limits::SECTOR_BYTES / (16 * 63)).min(16383);
        Geometry { cylinders: u16::try_from(cylinders).unwrap_or(16383), heads: 16, sectors: 63 }
    }
}

/// All that a driver is told about a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceShape {
    /// Size of the disk in bytes. A last part of less than 512 bytes cannot be reached by a driver.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// The unit the driver addresses in: a power of two from 512 to 4096. Requests in sectors are served all the same.
    pub logical_block_bytes: u32,
    /// The unit the storage writes in: a power of two, not below the logical block.
    pub physical_block_bytes: u32,
    /// The image's own geometry, if it has one.
    pub geometry: Option<Geometry>,
    /// Offer DISCARD, and give space back at WRITE_ZEROES.
    pub discard: bool,
    /// The smallest piece whose space can be given back: a multiple of 512. What is punched in place follows the
    /// file system (4096 mostly), not the image's block.
    pub discard_granularity_bytes: u32,
    /// Virtqueues, up to [`limits::MAX_QUEUES`].
    pub num_queues: u16,
    /// Largest virtqueue a front-end may set up: a power of two, up to [`limits::MAX_QUEUE_SIZE`].
    pub queue_size: u16,
}

impl DeviceShape {
    /// A writable disk with one queue and usual properties.
    pub fn new(size_bytes: u64) -> Self {
        DeviceShape {
            size_bytes,
            read_only: false,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            geometry: None,
            discard: true,
            discard_granularity_bytes: 4096,
            num_queues: 1,
            queue_size: limits::MAX_QUEUE_SIZE,
        }
    }

    /// Checks that a driver can be told this.
    ///
    /// # Errors
    /// `InvalidArgument` names the first value that is out of bounds.
    pub fn check(&self) -> Result<()> {
        let bad = |what: String| Err(Error::new(ErrorKind::InvalidArgument, what));
        let (logical, physical) = (self.logical_block_bytes, self.physical_block_bytes);
        if !logical.is_power_of_two() || !(512..=4096).contains(&logical) {
            return bad(format!("a logical block of {logical} bytes is not a power of two from 512 to 4096"));
        }
        if !physical.is_power_of_two() || physical < logical {
            return bad(format!(
                "a physical block of {physical} bytes is not a power of two from {logical} up"
            ));
        }
        if !u64::from(self.discard_granularity_bytes).is_multiple_of(limits::SECTOR_BYTES) {
            return bad(format!(
                "{} bytes of discard granularity are not sectors",
                self.discard_granularity_bytes
            ));
        }
        if self.num_queues == 0 || self.num_queues > limits::MAX_QUEUES {
            return bad(format!("{} queues are not between 1 and {}", self.num_queues, limits::MAX_QUEUES));
        }
        let sizes = limits::MIN_QUEUE_SIZE..=limits::MAX_QUEUE_SIZE;
        if !self.queue_size.is_power_of_two() || !sizes.contains(&self.queue_size) {
            return bad(format!(
                "a queue size of {} is not a power of two from {} to {}",
                self.queue_size,
                sizes.start(),
                sizes.end()
            ));
        }
        Ok(())
    }

    /// The feature bits to offer.
    pub fn features(&self) -> u64 {
        use feature::*;
        let mut bits = VERSION_1 | EVENT_IDX | INDIRECT_DESC | PROTOCOL_FEATURES | LOG_ALL;
        bits |= SEG_MAX | BLK_SIZE | TOPOLOGY | GEOMETRY | FLUSH | CONFIG_WCE;
        if self.num_queues > 1 {
            bits |= MQ;
        }
        if self.read_only {
            return bits | RO;
        }
        if self.discard {
            bits |= DISCARD;
        }
        bits | WRITE_ZEROES
    }

    /// Data segments a driver may put into one request.
    fn seg_max(&self) -> u32 {
        u32::from(self.queue_size).saturating_sub(2).min(limits::MAX_SEGMENTS)
    }
}

/// A driver tried to change a field that is not its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotWritable;

/// The config space: fixed but for the `wce` byte.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
}

impl ConfigSpace {
    const WCE: usize = offset_of!(virtio_blk_config, wce);

    /// The config space of a disk, its cache in write-back mode: a driver that is told "write through" never
    /// flushes.
    pub fn new(shape: &DeviceShape) -> Self {
        let mut c = ConfigSpace { bytes: [0; CONFIG_BYTES] };
        let geometry = shape.geometry.unwrap_or_else(|| Geometry::of_size(shape.size_bytes));
        let at = offset_of!(virtio_blk_config, geometry);
        c.set_size(shape.size_bytes);
        c.put(offset_of!(virtio_blk_config, seg_max), &shape.seg_max().to_le_bytes());
        c.put(at + offset_of!(virtio_blk_geometry, cylinders), &geometry.cylinders.to_le_bytes());
        c.put(at + offset_of!(virtio_blk_geometry, heads), &[geometry.heads]);
        c.put(at + offset_of!(virtio_blk_geometry, sectors), &[geometry.sectors]);
        c.put_topology(shape);
        c.bytes[Self::WCE] = 1;
        c.put(offset_of!(virtio_blk_config, num_queues), &shape.num_queues.to_le_bytes());
        c.put_discard(shape);
        c
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn put_topology(&mut self, shape: &DeviceShape) {
        let per_physical = shape.physical_block_bytes / shape.logical_block_bytes;
        let exponent = u8::try_from(per_physical.trailing_zeros()).unwrap_or(0);
        let min_io = u16::try_from(per_physical).unwrap_or(1);
        self.put(offset_of!(virtio_blk_config, blk_size), &shape.logical_block_bytes.to_le_bytes());
        self.put(offset_of!(virtio_blk_config, physical_block_exp), &[exponent]);
        self.put(offset_of!(virtio_blk_config, min_io_size), &min_io.to_le_bytes());
    }

    fn put_discard(&mut self, shape: &DeviceShape) {
        if shape.read_only {
            return;
        }
        let (sectors, segments) = (limits::MAX_DISCARD_SECTORS, limits::MAX_DISCARD_SEGMENTS);
        self.put(offset_of!(virtio_blk_config, max_write_zeroes_sectors), &sectors.to_le_bytes());
        self.put(offset_of!(virtio_blk_config, max_write_zeroes_seg), &segments.to_le_bytes());
        if shape.discard {
            let alignment = shape.discard_granularity_bytes / 512;
            self.put(offset_of!(virtio_blk_config, max_discard_sectors), &sectors.to_le_bytes());
            self.put(offset_of!(virtio_blk_config, max_discard_seg), &segments.to_le_bytes());
            self.put(offset_of!(virtio_blk_config, discard_sector_alignment), &alignment.to_le_bytes());
            self.put(offset_of!(virtio_blk_config, write_zeroes_may_unmap), &[1]);
        }
    }

    /// Exactly `size` bytes from `offset` on; zeros where the config space has ended. Front-ends ask for all kinds of
    /// pieces (QEMU 57 or 60 bytes, UML from offset 0 to each field's end, crosvm whatever its guest reads) and take
    /// an answer of another length for an error.
    pub fn read(&self, offset: u32, size: usize) -> Vec<u8> {
        let mut out = vec![0; size];
        let from = usize::try_from(offset).map_or(CONFIG_BYTES, |o| o.min(CONFIG_BYTES));
        let there = size.min(CONFIG_BYTES - from);
        out[..there].copy_from_slice(&self.bytes[from..from + there]);
        out
    }

    /// A driver's write. Only the `wce` byte, alone, can be written; any value but 0 means write-back.
    ///
    /// # Errors
    /// [`NotWritable`] for everything else; nothing has changed.
    pub fn write(&mut self, offset: u32, data: &[u8]) -> std::result::Result<(), NotWritable> {
        let [value] = data else { return Err(NotWritable) };
        if usize::try_from(offset) != Ok(Self::WCE) {
            return Err(NotWritable);
        }
        self.set_write_back(*value != 0);
        Ok(())
    }

    /// Sets the size of the disk. The geometry stays: a guest that goes by it has read it long ago.
    pub fn set_size(&mut self, size_bytes: u64) {
        let sectors = size_bytes / limits::SECTOR_BYTES;
        self.put(offset_of!(virtio_blk_config, capacity), &sectors.to_le_bytes());
    }

    /// Sets the cache mode.
    pub fn set_write_back(&mut self, on: bool) {
        self.bytes[Self::WCE] = u8::from(on);
    }

    /// The cache mode: completed writes may wait for a FLUSH to become durable.
    pub fn write_back(&self) -> bool {
        self.bytes[Self::WCE] != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn le32(c: &ConfigSpace, at: u32) -> u32 {
        u32::from_le_bytes(c.read(at, 4).try_into().unwrap())
    }

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let mut shape = DeviceShape::new((1 << 40) + 511);
        shape.num_queues = 4;
        shape.geometry = Some(Geometry { cylinders: 0x1234, heads: 0x56, sectors: 0x3f });
        let c = ConfigSpace::new(&shape);
        assert_eq!(c.read(0, 8), (1u64 << 31).to_le_bytes());
        assert_eq!(le32(&c, 12), limits::MAX_SEGMENTS);
        assert_eq!(c.read(16, 4), [0x34, 0x12, 0x56, 0x3f]);
        assert_eq!((le32(&c, 20), c.read(24, 4)), (512, vec![3, 0, 8, 0]));
        assert_eq!(c.read(32, 4), [1, 0, 4, 0]);
        assert_eq!((le32(&c, 36), le32(&c, 40), le32(&c, 44)), (1 << 21, 256, 8));
        assert_eq!((le32(&c, 48), le32(&c, 52), c.read(56, 1)), (1 << 21, 256, vec![1]));
    }

    #[test]
    fn any_piece_is_answered_in_its_very_length() {
        let c = ConfigSpace::new(&DeviceShape::new(1 << 30));
        for (offset, size) in
            [(0, 57), (0, 60), (32, 1), (255, 1), (250, 20), (256, 8), (4000, 96), (u32::MAX, 3)]
        {
            let got = c.read(offset, size);
            assert_eq!(got.len(), size);
            let from = offset.min(256) as usize;
            let to = (from + size).min(256);
            assert_eq!(got[..to - from], c.bytes[from..to]);
            assert!(got[to - from..].iter().all(|b| *b == 0));
        }
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        let mut c = ConfigSpace::new(&DeviceShape::new(1 << 30));
        assert!(c.write_back());
        assert_eq!(c.write(32, &[0]), Ok(()));
        assert!(!c.write_back());
        for (offset, data) in [(0, &[1u8][..]), (32, &[1, 1]), (31, &[1, 1]), (32, &[]), (u32::MAX, &[1])] {
            assert_eq!(c.write(offset, data), Err(NotWritable));
        }
        assert!(!c.write_back());
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        let mut shape = DeviceShape::new(1 << 30);
        assert_eq!(shape.features() & feature::RO, 0);
        assert_ne!(shape.features() & feature::DISCARD, 0);
        shape.discard = false;
        assert_eq!(shape.features() & (feature::DISCARD | feature::WRITE_ZEROES), feature::WRITE_ZEROES);
        shape.read_only = true;
        let bits = shape.features();
        assert_eq!(bits & (feature::DISCARD | feature::WRITE_ZEROES | feature::RO), feature::RO);
        assert!(ConfigSpace::new(&shape).read(36, 21).iter().all(|b| *b == 0));
        assert_eq!(bits & (feature::MQ | feature::LOG_ALL), feature::LOG_ALL);
    }

    #[test]
    fn shapes_out_of_bounds_are_refused() {
        let ok = DeviceShape::new(1 << 30);
        assert!(ok.check().is_ok());
        let changes: [fn(&mut DeviceShape); 8] = [
            |s| s.num_queues = 0,
            |s| s.num_queues = 65,
            |s| s.queue_size = 2048,
            |s| s.queue_size = 100,
            |s| s.queue_size = 8,
            |s| s.logical_block_bytes = 256,
            |s| s.physical_block_bytes = 256,
            |s| s.discard_granularity_bytes = 100,
        ];
        for change in changes {
            let mut s = ok.clone();
            change(&mut s);
            assert_eq!(s.check().unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
    }
}
