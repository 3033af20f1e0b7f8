//! Commands that only look.

use super::super::usage::existing_dir;
use super::common::{Image, Lock, Output, Snapshot};
use clap::Args;
use std::path::PathBuf;
use vdblk::format::Format;
use vdblk::vd::ImageSpec;

pub(super) const INFO: &str = "\
Examples: vdimg info disk.vdi
          vdimg info --chain --output json snapshot.qcow2";

pub(super) const COMPARE: &str = "\
Where one disk is longer, what it has more must be zeros.
Example: vdimg compare disk.vdi copy.qcow2";

pub(super) const DIFF: &str = "\
Ranges are in whole sectors of 512 bytes, in the disk's order. Two points of a
chain are two of its images, or internal snapshots (--snapshot, --snapshot2).
Examples: vdimg diff monday.vdi tuesday.vdi
          vdimg diff --output json base.qcow2 top.qcow2";

pub(super) const CHECK: &str = "\
Examples: vdimg check disk.vdi
          vdimg check --output json disk.qcow2";

pub(super) const MAP: &str = "\
Examples: vdimg map disk.vmdk
          vdimg map --output json snapshot.vdi";

pub(super) const FORMATS: &str = "\
Names of capabilities are VirtualBox's; a key is what --option takes when an
image is made.
Example: vdimg formats --output json";

/// What can be done with images of each format, their extensions and options.
#[derive(Debug, Args)]
pub(crate) struct Formats {
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct Info {
    #[command(flatten)]
    pub(crate) image: Image,
    /// Tell as much of each image beneath it; as JSON a list, the image first.
    #[arg(long, visible_alias = "backing-chain")]
    pub(crate) chain: bool,
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    /// The image.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// How to print it; json is a list of ranges, start and length in bytes.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) images: Compare,
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    pub(crate) images: Compare,
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
}

/// Two images.
#[derive(Debug, Args)]
pub(crate) struct Compare {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) snapshot: Snapshot,
    /// The second image as it was at this internal snapshot, as --snapshot.
    #[arg(long, value_name = "NAME|ID")]
    pub(crate) snapshot2: Option<String>,
    /// Format of the second image, as --format.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format2: Option<Format>,
    /// A parent of the second image, base first, as --parent (repeatable).
    #[arg(long = "parent2", value_name = "FILE[,format=F]", value_parser = ImageSpec::parse)]
    pub(crate) parents2: Vec<ImageSpec>,
    /// Password of the second image, as --password-file.
    #[arg(long, value_name = "FILE", requires = "key_store2")]
    pub(crate) password_file2: Option<PathBuf>,
    /// Key store of the second image, as --key-store.
    #[arg(long, value_name = "FILE", requires = "password_file2")]
    pub(crate) key_store2: Option<PathBuf>,
    /// A folder to search parents of the second image in, as --parent-dir (repeatable).
    #[arg(long = "parent-dir2", value_name = "DIR", value_parser = existing_dir)]
    pub(crate) parent_dirs2: Vec<PathBuf>,
    /// Take parents of the second image although their UUID is not the one the child names.
    #[arg(long)]
    pub(crate) allow_parent_mismatch2: bool,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The first image; the options without a 2 are about it.
    pub(crate) first: PathBuf,
    /// The second image.
    pub(crate) second: PathBuf,
}

// Options on parents are taken and not needed: a diff is looked at by itself.
#[derive(Debug, Args)]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) image: Image,
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image. Its parents are not looked at.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Map {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) snapshot: Snapshot,
    /// How to print it; json has qemu-img's keys.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image.
    pub(crate) file: PathBuf,
}
