//! Commands that change images and not what their disks hold.

use super::common::{Image, Lock};
use clap::Args;
use std::ffi::OsString;
use std::path::PathBuf;
use vdblk::format::Format;
use vdblk::job::{NewSize, parse_size};
use vdblk::vd::ImageSpec;

pub(super) const REPAIR: &str = "\
Examples: vdimg repair --dry-run disk.vdi
          vdimg repair disk.vdi";

pub(super) const REBASE: &str = "\
The image shows the same before, after and at any moment between: what the new
parent shows otherwise is copied into it first. Ended early the image has its
old parent, and the same command completes it. With -u nothing is copied: you
vouch for the new parent showing the same, as after its file was moved. Onto
nothing (-b '') the image needs no parent any more.
Examples: vdimg rebase -b newbase.qcow2 top.qcow2
          vdimg rebase -u -b ../images/base.vdi top.vdi
          vdimg rebase -b '' top.vmdk";

#[derive(Debug, Args)]
pub(crate) struct Rebase {
    #[command(flatten)]
    pub(crate) image: Image,
    /// The new parent; '' for none.
    #[arg(short = 'b', long, visible_alias = "backing", value_name = "FILE")]
    pub(crate) onto: OsString,
    /// Its format, as --format.
    #[arg(short = 'F', long, visible_alias = "backing-format", value_name = "FORMAT")]
    pub(crate) onto_format: Option<Format>,
    /// A parent of the new parent, base first, as --parent (repeatable).
    #[arg(long = "onto-parent", value_name = "FILE[,format=F]", value_parser = ImageSpec::parse)]
    pub(crate) onto_parents: Vec<ImageSpec>,
    /// Change the name of the parent alone.
    #[arg(short = 'u', long = "unsafe")]
    pub(crate) only_name: bool,
    /// Rebase an image although a diff in its folder has it as its parent.
    #[arg(long)]
    pub(crate) allow_write_to_parent: bool,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image.
    pub(crate) file: PathBuf,
}

pub(super) const MOVE: &str = "\
An image of several files takes them along into another folder; they keep their
names. Diffs in its folder that name it as their parent are told. A move that
fails leaves the image where it was.
Examples: vdimg move disk.vdi archive.vdi
          vdimg move base.qcow2 /mnt/images";

#[derive(Debug, Args)]
pub(crate) struct Move {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image.
    pub(crate) file: PathBuf,
    /// Its new name, or the folder it goes to. Nothing may be there yet.
    pub(crate) target: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Repair {
    #[command(flatten)]
    pub(crate) image: Image,
    /// Only tell what would be done.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image. Its parents are not looked at.
    pub(crate) file: PathBuf,
}

pub(super) const RESIZE: &str = "\
What is added reads as zeros. Partitions and file systems on the disk are left
alone: grow those afterwards, shrink them before. Ended at any moment the disk
has the old size or the new one; the same command completes it.
Example: vdimg resize disk.vdi +10G";

#[derive(Debug, Args)]
pub(crate) struct Resize {
    #[command(flatten)]
    pub(crate) image: Image,
    /// Make the disk smaller although data behind its new end is lost. Without it a smaller disk is possible where nothing but
    /// zeros is behind the new end.
    #[arg(long)]
    pub(crate) shrink: bool,
    /// Resize an image although a diff in its folder has it as its parent.
    #[arg(long)]
    pub(crate) allow_write_to_parent: bool,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image.
    pub(crate) file: PathBuf,
    /// The size, such as 20G; or +SIZE, so much more than now. A multiple of 512 bytes, up to 4P.
    #[arg(value_parser = new_size)]
    pub(crate) size: NewSize,
}

pub(super) const COMPACT: &str = "\
The disk shows the same before, after and at any moment between; ended early,
the same command completes it. A diff is compared with its parents, which have
to be there. Fill free space of the guest's file systems with zeros first.
Example: vdimg compact disk.vdi";

#[derive(Debug, Args)]
pub(crate) struct Compact {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The images, one after the other; the options are about each of them.
    #[arg(required = true)]
    pub(crate) files: Vec<PathBuf>,
}

pub(super) const MERGE: &str = "\
Downwards an image beneath takes in what those above it hold, and the image
above the last of them gets it as its parent; upwards a child takes in what its
parents hold, and gets the parent of the last of them. The top shows the same
before, after and at any moment between, and files are removed only when all is
durable. Ended early, the same command completes it, or says that the image is
not of the chain any more: then its file is not needed. Other images over one
that changes or goes would be corrupted: those in its folder are found by UUID
or file name, if their extension is an image's, and the merge is refused.
Examples: vdimg merge snapshot.qcow2
          vdimg merge top.vdi --from mid.vdi --into base.vdi
          vdimg merge top.vmdk --from base.vmdk --into top.vmdk";

#[derive(Debug, Args)]
pub(crate) struct Merge {
    #[command(flatten)]
    pub(crate) image: Image,
    /// The image of the chain that is merged, with those between it and --into [default: the one on top].
    #[arg(long, value_name = "FILE")]
    pub(crate) from: Option<PathBuf>,
    /// The image of the chain that takes it in, beneath it or above [default: its parent].
    #[arg(long, value_name = "FILE")]
    pub(crate) into: Option<PathBuf>,
    /// Leave the files that are not needed any more.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Merge although another image in the folder has one of those that change or go as its parent: it will be lost.
    #[arg(long)]
    pub(crate) allow_write_to_parent: bool,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image on top of the chain.
    pub(crate) top: PathBuf,
}

pub(crate) fn new_size(text: &str) -> vdblk::Result<NewSize> {
    match text.strip_prefix('+') {
        Some(more) => parse_size(more).map(NewSize::By),
        None => parse_size(text).map(NewSize::To),
    }
}
