//! Commands on what an image says of itself.

use super::common::{Lock, Output};
use clap::Args;
use std::path::PathBuf;
use uuid::Uuid;
use vdblk::format::{Chs, Format};

pub(super) const SETUUID: &str = "\
The copy of an image needs a UUID of its own before both are in one folder. The
disk shows the same before, after and at any moment between.
Examples: vdimg setuuid copy.vdi
          vdimg setuuid child.vdi --parent 0d2a3a07-6f0c-4a4c-8f3a-0a8ad7b8c2f1";

pub(super) const COMMENT: &str = "\
Examples: vdimg comment disk.vdi
          vdimg comment disk.vdi --set 'before the upgrade'";

pub(super) const GEOMETRY: &str = "\
C/H/S are cylinders, heads and sectors of a track; 0/0/0 is none. VDI keeps the
logical geometry alone, VHD the physical one.
Examples: vdimg geometry disk.vmdk
          vdimg geometry disk.vmdk --set 16383/16/63 --lchs 1024/255/63";

/// The image whose values are set or told.
#[derive(Debug, Args)]
pub(crate) struct Labelled {
    /// Format of the image [default: what extension and contents agree on].
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<Format>,
    /// Open an image that describes disks of this host.
    #[arg(long)]
    pub(crate) allow_raw_device: bool,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct SetUuid {
    /// The image's UUID [default, if no other option says what to set: a random one].
    #[arg(long, value_name = "UUID", conflicts_with = "random")]
    pub(crate) uuid: Option<Uuid>,
    /// The image's UUID becomes a random one.
    #[arg(long)]
    pub(crate) random: bool,
    /// The UUID of this state of its contents.
    #[arg(long, value_name = "UUID")]
    pub(crate) modification: Option<Uuid>,
    /// What it says is its parent's UUID.
    #[arg(long, value_name = "UUID")]
    pub(crate) parent: Option<Uuid>,
    /// What it says was its parent's modification UUID when it was made; nil: unknown.
    #[arg(long, value_name = "UUID")]
    pub(crate) parent_modification: Option<Uuid>,
    /// Change UUIDs although a diff in the folder names them: it will not find its parent any more.
    #[arg(long)]
    pub(crate) force: bool,
    /// How to print what it says now.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) image: Labelled,
}

#[derive(Debug, Args)]
pub(crate) struct Comment {
    /// The comment it shall have; VDI: up to 255 bytes, VMDK: up to 1024.
    #[arg(long, value_name = "TEXT", conflicts_with = "clear")]
    pub(crate) set: Option<String>,
    /// It shall have none.
    #[arg(long)]
    pub(crate) clear: bool,
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) image: Labelled,
}

#[derive(Debug, Args)]
pub(crate) struct Geometry {
    /// The physical geometry it shall have.
    #[arg(long, value_name = "C/H/S", value_parser = chs)]
    pub(crate) set: Option<Chs>,
    /// The logical geometry it shall have.
    #[arg(long, value_name = "C/H/S", value_parser = chs)]
    pub(crate) lchs: Option<Chs>,
    /// How to print them.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) image: Labelled,
}

fn chs(text: &str) -> Result<Chs, String> {
    let parts: Option<Vec<u32>> = text.split('/').map(|n| n.parse().ok()).collect();
    match parts.as_deref() {
        Some([c, h, s]) => Ok((*c, *h, *s)),
        _ => Err("C/H/S is wanted, three numbers".into()),
    }
}
