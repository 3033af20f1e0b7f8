//! The command line.

use super::usage::existing_dir;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;
use vdblk::format::Format;
use vdblk::job::{self, parse_size};
use vdblk::vd::{DiskOptions, ImageSpec, OpenDisk};

/// Makes, converts, compares, checks, repairs and looks at disk images.
#[derive(Debug, Parser)]
#[command(name = "vdimg", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Tell what an image is. Takes no locks: works while the image is served.
    Info(Info),
    /// Make a new image.
    Create(Create),
    /// Copy everything an image and its parents show into a new image.
    Convert(Convert),
    /// Compare what two images show. Exit status: 0 equal, 1 different, 2 error.
    Compare(Compare),
    /// Look for damage in one image. Exit status: 0 clean, 2 corrupt, 3 leaks only, 1 error.
    Check(Check),
    /// Put right what check finds. Exit status: 0 clean now, 2 still corrupt, 3 leaks left, 1 error.
    Repair(Repair),
    /// Tell where each range of the disk lies.
    Map(Map),
    /// Read and write by commands: read, write, discard, flush, sleep.
    Io(Io),
}

impl Command {
    /// Exit status of an error.
    pub(crate) fn trouble_status(&self) -> u8 {
        if matches!(self, Command::Compare(_)) { 2 } else { 1 }
    }
}

/// Where the parents of an image are.
#[derive(Debug, Args)]
pub(crate) struct Parents {
    /// A parent, base first; repeat for each.
    #[arg(long = "parent", value_name = "FILE[,format=F]", value_parser = ImageSpec::parse)]
    pub(crate) parents: Vec<ImageSpec>,
    /// A folder to search for parents by UUID, before the image's own (or the one above, if that is called Snapshots);
    /// repeatable.
    #[arg(long = "parent-dir", value_name = "DIR", value_parser = existing_dir)]
    pub(crate) parent_dirs: Vec<PathBuf>,
    /// Take parents whose UUID is not the one the child names.
    #[arg(long)]
    pub(crate) allow_parent_mismatch: bool,
}

/// An existing image.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// Format of the image; raw is never guessed. Default: what extension and contents agree on.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<Format>,
    #[command(flatten)]
    pub(crate) parents: Parents,
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Lock {
    /// Seconds to wait for an image another process has locked.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    lock_wait: u32,
}

impl Lock {
    pub(crate) fn wait(self) -> Duration {
        Duration::from_secs(self.lock_wait.into())
    }
}

impl Image {
    /// The file with the format that was said.
    pub(crate) fn spec(&self, file: &Path) -> ImageSpec {
        ImageSpec { path: file.into(), format: self.format }
    }

    /// How to open the disk: read-only, locked.
    pub(crate) fn open(&self, file: &Path, lock: Lock) -> OpenDisk {
        self.parents.open(self.spec(file), lock)
    }
}

impl Parents {
    /// How to open `image` with these parents: read-only, locked.
    pub(crate) fn open(&self, image: ImageSpec, lock: Lock) -> OpenDisk {
        OpenDisk {
            image,
            parents: self.parents.clone(),
            parent_dirs: self.parent_dirs.clone(),
            lock_wait: Some(lock.wait()),
            allow_parent_mismatch: self.allow_parent_mismatch,
            options: DiskOptions { read_only: true, ..DiskOptions::default() },
            ..OpenDisk::new("")
        }
    }
}

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct Info {
    #[command(flatten)]
    pub(crate) image: Image,
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Format of the new image.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Format,
    /// Size of the disk, such as 512M or 10G. Default: the parent's.
    #[arg(long, value_parser = parse_size, required_unless_present = "parents")]
    pub(crate) size: Option<u64>,
    /// Variant of the format; vdi: dynamic, fixed, zero-expand.
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// UUID of the new image. Default: a random one.
    #[arg(long)]
    pub(crate) uuid: Option<Uuid>,
    /// A comment, where the format keeps one.
    #[arg(long)]
    pub(crate) comment: Option<String>,
    /// An option of the format; vdi: AllocationBlockSize=SIZE. Repeatable.
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = key_and_value)]
    pub(crate) options: Vec<(String, String)>,
    /// Makes the image a diff of the last parent named; those before are that one's own parents, base first.
    #[command(flatten)]
    pub(crate) parents: Parents,
    #[command(flatten)]
    pub(crate) lock: Lock,
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Convert {
    #[command(flatten)]
    pub(crate) image: Image,
    /// Format of the new image.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) output_format: Format,
    /// Variant of the new image's format; vdi: dynamic, fixed, zero-expand.
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// An option of the new image's format; vdi: AllocationBlockSize=SIZE. Repeatable.
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = key_and_value)]
    pub(crate) options: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) lock: Lock,
    pub(crate) source: PathBuf,
    pub(crate) target: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Compare {
    #[command(flatten)]
    pub(crate) image: Image,
    /// Format of the second image.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format2: Option<Format>,
    /// A parent of the second image, base first; repeat for each.
    #[arg(long = "parent2", value_name = "FILE[,format=F]", value_parser = ImageSpec::parse)]
    pub(crate) parents2: Vec<ImageSpec>,
    /// A folder to search for parents of the second image; repeatable.
    #[arg(long = "parent-dir2", value_name = "DIR", value_parser = existing_dir)]
    pub(crate) parent_dirs2: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) lock: Lock,
    pub(crate) first: PathBuf,
    pub(crate) second: PathBuf,
}

/// Options on parents are taken and not needed: a diff is looked at by itself.
#[derive(Debug, Args)]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) lock: Lock,
    pub(crate) file: PathBuf,
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
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Map {
    #[command(flatten)]
    pub(crate) image: Image,
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) lock: Lock,
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Io {
    #[command(flatten)]
    pub(crate) image: Image,
    /// Refuse every write.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Write to an image although a diff in its folder has it as its parent.
    #[arg(long)]
    pub(crate) allow_write_to_parent: bool,
    /// A command; repeatable. Default: one per line of standard input.
    ///
    /// read [-P PATTERN] [-v] OFFSET LENGTH,
    /// write [-P PATTERN | -z [-u]] OFFSET LENGTH,
    /// discard OFFSET LENGTH, flush, sleep MS
    #[arg(short = 'c', long = "command", value_name = "COMMAND")]
    pub(crate) commands: Vec<job::Command>,
    #[command(flatten)]
    pub(crate) lock: Lock,
    pub(crate) file: PathBuf,
}

fn key_and_value(text: &str) -> std::result::Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("KEY=VALUE is wanted")?;
    Ok((key.into(), value.into()))
}
