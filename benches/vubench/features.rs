//! Numbers of the virtio-blk specification, and their names.

pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_PROTOCOL: u64 = 1 << 30;
pub(crate) const F_VERSION_1: u64 = 1 << 32;
pub(crate) const BLK_F_RO: u64 = 1 << 5;
pub(crate) const BLK_F_BLK_SIZE: u64 = 1 << 6;
pub(crate) const BLK_F_FLUSH: u64 = 1 << 9;
pub(crate) const BLK_F_DISCARD: u64 = 1 << 13;
pub(crate) const BLK_F_WRITE_ZEROES: u64 = 1 << 14;

/// Every device type bit but those this driver does not drive: BARRIER, SCSI, LIFETIME,
/// SECURE_ERASE.
pub(crate) const BLK_DRIVEN: u64 = 0x1_ffff & !(1 | 1 << 7 | 1 << 15 | 1 << 16);

pub(crate) const T_IN: u32 = 0;
pub(crate) const T_OUT: u32 = 1;
pub(crate) const T_SCSI_CMD: u32 = 2;
pub(crate) const T_FLUSH: u32 = 4;
pub(crate) const T_GET_ID: u32 = 8;
pub(crate) const T_DISCARD: u32 = 11;
pub(crate) const T_WRITE_ZEROES: u32 = 13;

pub(crate) const S_OK: u8 = 0;
pub(crate) const S_IOERR: u8 = 1;
pub(crate) const S_UNSUPP: u8 = 2;

const NAMES: &[(u32, &str)] = &[
    (0, "BARRIER"),
    (1, "SIZE_MAX"),
    (2, "SEG_MAX"),
    (4, "GEOMETRY"),
    (5, "RO"),
    (6, "BLK_SIZE"),
    (7, "SCSI"),
    (9, "FLUSH"),
    (10, "TOPOLOGY"),
    (11, "CONFIG_WCE"),
    (12, "MQ"),
    (13, "DISCARD"),
    (14, "WRITE_ZEROES"),
    (15, "LIFETIME"),
    (16, "SECURE_ERASE"),
    (17, "ZONED"),
    (24, "NOTIFY_ON_EMPTY"),
    (26, "LOG_ALL"),
    (27, "ANY_LAYOUT"),
    (28, "INDIRECT_DESC"),
    (29, "EVENT_IDX"),
    (30, "PROTOCOL_FEATURES"),
    (32, "VERSION_1"),
    (33, "ACCESS_PLATFORM"),
    (34, "RING_PACKED"),
    (35, "IN_ORDER"),
    (40, "RING_RESET"),
];

/// The bits by name, blank separated.
pub(crate) fn names(bits: u64) -> String {
    let name = |b: u32| match NAMES.iter().find(|f| f.0 == b) {
        Some(f) => f.1.to_string(),
        None => format!("bit{b}"),
    };
    let set = (0..64).filter(|b| bits >> b & 1 != 0);
    set.map(name).collect::<Vec<_>>().join(" ")
}
