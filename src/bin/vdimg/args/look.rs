//! Commands that only look.

use super::super::usage::existing_dir;
use super::common::{Image, Lock, Output, Snapshot};
use clap::Args;
use std::path::PathBuf;
use vdblk::format::Format;
use vdblk::vd::ImageSpec;

#[derive(Debug, Args)]
pub(crate) struct Info {
    #[command(flatten)]
    pub(crate) image: Image,
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    /// The image.
    pub(crate) file: PathBuf,
}

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
