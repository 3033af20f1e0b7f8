//! What an image tells about itself besides its bytes.

use uuid::Uuid;

/// The device that an image is meant for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceType {
    /// A hard disk.
    #[default]
    HardDisk,
    /// A CD or DVD. It is never written to.
    Dvd,
    /// A floppy disk.
    Floppy,
}

impl DeviceType {
    /// The name for output, as VirtualBox's tools write it, lower case.
    pub fn name(self) -> &'static str {
        match self {
            DeviceType::HardDisk => "hdd",
            DeviceType::Dvd => "dvd",
            DeviceType::Floppy => "floppy",
        }
    }
}

/// What the blocks of a region hold, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataForm {
    /// Sound: samples of 16 bits, two channels.
    Audio,
    /// Silence between tracks.
    Pause,
    /// Data of 2048 bytes a block, with nothing around it.
    Mode1Cooked,
    /// The same inside raw blocks of 2352 bytes.
    Mode1Raw,
    /// Mode 2: data of 2336 bytes a block, without a header.
    Mode2Cooked,
    /// Mode 2 in raw blocks of 2352 bytes.
    Mode2Raw,
}

impl DataForm {
    /// The name for output.
    pub fn name(self) -> &'static str {
        match self {
            DataForm::Audio => "audio",
            DataForm::Pause => "pause",
            DataForm::Mode1Cooked => "mode1/2048",
            DataForm::Mode1Raw => "mode1/2352",
            DataForm::Mode2Cooked => "mode2/2336",
            DataForm::Mode2Raw => "mode2/2352",
        }
    }
}

/// A stretch of a medium whose blocks are of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The first block's number on the medium.
    pub start: u64,
    /// Blocks.
    pub blocks: u64,
    /// Bytes of a block where the medium's image has them.
    pub block_bytes: u32,
    /// Bytes of it that are data: what the disk shows; 0 where no file has them.
    pub data_bytes: u32,
    /// What they are.
    pub form: DataForm,
}

/// An internal snapshot of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its number, as text.
    pub id: String,
    /// Its name. Not to be trusted.
    pub name: String,
    /// Seconds since 1970 (UTC) when it was made.
    pub seconds: u32,
    /// Bytes of a machine's state that were saved with it; 0: none.
    pub state_bytes: u64,
    /// Size of the disk in bytes at that time.
    pub disk_bytes: u64,
}

/// Everything `vdimg info` tells of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageInfo {
    /// Format name, lower case.
    pub format: &'static str,
    /// Variant (`dynamic`, `fixed`, `diff` …).
    pub variant: &'static str,
    /// The device it is meant for.
    pub device: DeviceType,
    /// Size of the virtual disk in bytes.
    pub virtual_size: u64,
    /// Unit of allocation in bytes.
    pub block_size: Option<u64>,
    /// Allocated units, counted from the table itself. `None` where that is not known, or would take too long.
    pub allocated_blocks: Option<u64>,
    /// The image's UUID.
    pub uuid: Option<Uuid>,
    /// UUID of this state of its contents.
    pub modification_uuid: Option<Uuid>,
    /// The parent's UUID; `None` for a base.
    pub parent_uuid: Option<Uuid>,
    /// The parent's modification UUID when the diff was made.
    pub parent_modification_uuid: Option<Uuid>,
    /// VMware's number of this state of the contents.
    pub content_id: Option<u32>,
    /// The parent's when the diff was made.
    pub parent_content_id: Option<u32>,
    /// What the image calls the parent's file, the best name first. Not to be trusted.
    pub parent_names: Vec<String>,
    /// The parent's format, as the image states it.
    pub parent_format: Option<String>,
    /// The user's comment.
    pub comment: Option<String>,
    /// Geometry the image states: cylinders, heads, sectors. The physical one where it has two, a VDI's logical one.
    pub geometry: Option<(u32, u32, u32)>,
    /// Logical geometry: what a BIOS uses.
    pub logical_geometry: Option<(u32, u32, u32)>,
    /// Format version, as people write it.
    pub version: Option<String>,
    /// Internal snapshots, in the image's order.
    pub snapshots: Vec<SnapshotInfo>,
    /// Where the image is one of a CD: what is on it, in the disk's order.
    pub regions: Vec<Region>,
    /// What is odd about the image although nothing is in danger, a sentence each that its file's name stands before.
    pub notes: Vec<String>,
}
