//! The command line.

use super::keys::Keys;
use super::usage::existing_dir;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;
use vdblk::format::Format;
use vdblk::job::{self, NewSize, parse_size};
use vdblk::vd::{DiskOptions, ImageSpec, OpenDisk};

const ENDS: &str = "Sizes are bytes, or have a suffix for powers of 1024: 512M, 10G, 1.5T (k, M, G, T, P).\n\
                    Exit status: 0 done, 1 an error, with one line on standard error, 2 wrong usage; those of \
                    compare, check and repair are told with them.";

/// The script language of `vdimg io`.
const SCRIPT: &str = "\
Commands, one a line of standard input or one each --command. Empty lines
and lines that begin with # are passed over.
  read [-P PATTERN] [-v] OFFSET LENGTH
                     reads; -P: every byte must be PATTERN; -v: prints the bytes
  write [-P PATTERN] OFFSET LENGTH
                     writes PATTERN (default 0xcd)
  write -z [-u] OFFSET LENGTH
                     writes zeros; -u: their space may go back
  discard OFFSET LENGTH
                     the range is not needed: it reads as zeros or as before
  flush              makes durable what was written
  sleep MS           waits, in milliseconds
r, w, d and f are short for read, write, discard and flush.
OFFSET and LENGTH are multiples of 512, in bytes or with a suffix (k, M, G, T,
P). PATTERN is a byte, 0 to 255 or 0x00 to 0xff.
The first command that fails ends the script; what was written before stays.
Exit status: 0 all done, 1 an error or a pattern that is not there, 2 wrong
usage, also of a --command.";

/// Makes, converts, compares, checks, repairs, resizes, merges and looks at disk images.
#[derive(Debug, Parser)]
#[command(name = "vdimg", version, max_term_width = 100, after_help = ENDS)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Tell what an image is. Takes no locks: works while the image is served.
    Info(Info),
    /// Make a new image; with --parent a diff of the last one named, those before are that one's own parents.
    Create(Create),
    /// Copy everything an image and its parents show into a new image.
    Convert(Convert),
    /// Compare what two images show. Exit status: 0 equal, 1 different, 2 error.
    Compare(Compare),
    /// Look for damage in one image. Exit status: 0 clean, 2 corrupt, 3 leaks only, 1 error.
    Check(Check),
    /// Put right what check finds; bytes that belong to no block are given up, and named. Exit status: 0 clean now,
    /// 2 still corrupt, 3 leaks left, 1 error; with --dry-run as check.
    Repair(Repair),
    /// Change the size of an image's disk.
    #[command(after_help = RESIZE)]
    Resize(Resize),
    /// Take from images what they need not keep: blocks of zeros, blocks equal to what the parent shows, and holes.
    #[command(after_help = COMPACT)]
    Compact(Compact),
    /// Merge images of a chain: into the parent (as qemu-img commit), another one beneath, or upwards into a child.
    #[command(after_help = MERGE)]
    Merge(Merge),
    /// Encrypt an image as VirtualBox does, with a new key.
    #[command(after_help = ENCRYPT)]
    Encrypt(super::crypt::Encrypt),
    /// Decrypt an image.
    #[command(after_help = IN_PLACE)]
    Decrypt(super::crypt::Decrypt),
    /// Encrypt an image with another key, or change only the password.
    #[command(after_help = IN_PLACE)]
    Rekey(super::crypt::Rekey),
    /// Make an empty cache image, for vdblk --cache-image.
    #[command(after_help = CREATE_CACHE)]
    CreateCache(CreateCache),
    /// Tell where each range of the disk lies.
    Map(Map),
    /// Read and write by commands: read, write, discard, flush, sleep.
    #[command(after_help = SCRIPT)]
    Io(Io),
}

const RESIZE: &str = "\
What is added reads as zeros. Partitions and file systems on the disk are left
alone: grow those afterwards, shrink them before. Ended at any moment the disk
has the old size or the new one; the same command completes it.
Example: vdimg resize disk.vdi +10G";

const COMPACT: &str = "\
The disk shows the same before, after and at any moment between; ended early,
the same command completes it. A diff is compared with its parents, which have
to be there. Fill free space of the guest's file systems with zeros first.
Example: vdimg compact disk.vdi";

const MERGE: &str = "\
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

const ENCRYPT: &str = "\
The key store is written to a new file, readable by its owner alone. Keep it:
nothing in the image tells that it is encrypted, and without password and key
store everything in it is lost. VirtualBox takes its text as the property
CRYPT/KeyStore of the base image (docs/crypt.md).
Without --in-place a copy beside the image is encrypted, compared with it, and
takes its place: it needs as much space again. With --in-place the image itself
is changed, and its parents; ended at any moment, the same command completes it,
and until then nothing else opens the images.
Example: vdimg encrypt --password-file pw --key-store disk.keys disk.vdi";

const IN_PLACE: &str = "\
Without --in-place a copy beside the image is changed, compared with it, and
takes its place: it needs as much space again. With --in-place the image itself
is changed, and its parents; ended at any moment, the same command completes it,
and until then nothing else opens the images.";

const CREATE_CACHE: &str = "\
The file takes space as it is filled, up to --size, and may be removed at any
time it is not in use: everything in it can be read again. info and check take
it too.
Example: vdimg create-cache --size 10G base.vci
         vdblk --cache-image base.vci --blk-file base.vmdk --overlay vm.vdi …";

impl Command {
    /// Exit status of an error.
    pub(crate) fn trouble_status(&self) -> u8 {
        if matches!(self, Command::Compare(_)) { 2 } else { 1 }
    }
}

/// Where the parents of an image are.
#[derive(Debug, Args)]
pub(crate) struct Parents {
    /// A parent, base first (repeatable). Those that are not named are searched by UUID: in the folders of --parent-dir,
    /// then, if none was named, in the image's own; each with the folders below it, and of one called Snapshots the one
    /// above too.
    #[arg(long = "parent", value_name = "FILE[,format=F]", value_parser = ImageSpec::parse)]
    pub(crate) parents: Vec<ImageSpec>,
    /// A folder to search parents in that are not named; see --parent (repeatable).
    #[arg(long = "parent-dir", value_name = "DIR", value_parser = existing_dir)]
    pub(crate) parent_dirs: Vec<PathBuf>,
    /// Take parents although their UUID is not the one the child names.
    #[arg(long)]
    pub(crate) allow_parent_mismatch: bool,
    /// Open images that describe disks of this host (VMDK: full and partitioned devices).
    #[arg(long)]
    pub(crate) allow_raw_device: bool,
}

/// An existing image.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// Format of the image: raw, vdi, vmdk, vhd, vhdx, qcow2, qcow, qed, parallels, dmg or cue [default: what extension and contents agree on; the extension .raw says raw].
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<Format>,
    #[command(flatten)]
    pub(crate) parents: Parents,
    #[command(flatten)]
    pub(crate) keys: Keys,
}

/// Which state of an image.
#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// The image as it was at this internal snapshot (its name, else its number; info lists them), for reading only.
    #[arg(long, value_name = "NAME|ID")]
    pub(crate) snapshot: Option<String>,
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Lock {
    /// Seconds to wait for an image another process has locked, 0 or more.
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

    /// How to open the disk, or what it was at a snapshot: read-only, locked.
    ///
    /// # Errors
    /// If the key of an encrypted disk cannot be had.
    pub(crate) fn open(&self, file: &Path, snapshot: Option<&String>, lock: Lock) -> vdblk::Result<OpenDisk> {
        let filters = self.keys.files().unlock()?;
        Ok(OpenDisk { snapshot: snapshot.cloned(), filters, ..self.parents.open(self.spec(file), lock) })
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
            allow_raw_device: self.allow_raw_device,
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
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    /// The image.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Format of the new image: raw, vdi, vmdk, vhd, vhdx, qcow2, qcow, qed or parallels.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Format,
    /// Size of the disk, such as 512M or 10G: a multiple of 512 bytes, up to 4P [default: the parent's].
    #[arg(long, value_parser = parse_size, required_unless_present_any = ["parents", "raw_device"])]
    pub(crate) size: Option<u64>,
    /// Variant of the format: dynamic or fixed; of vdi also zero-expand, of vmdk split2g, split2g-flat, esx and (convert
    /// alone) stream [default: dynamic].
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// With --format vmdk --variant rawdisk: the disk of this host that the image describes, whole or with --partitions. It is
    /// as large as the disk; opening it takes --allow-raw-device.
    #[arg(long, value_name = "DEV", conflicts_with_all = ["size", "parents"])]
    pub(crate) raw_device: Option<PathBuf>,
    /// Partitions of the raw device that may be used, as Linux counts them: N, or N:ro only to read. All else reads as zeros
    /// and forgets what is written; the partition table is a copy in a file of its own.
    #[arg(long, value_name = "N[:ro],…", requires = "raw_device", value_delimiter = ',', value_parser = partition)]
    pub(crate) partitions: Option<Vec<(u32, bool)>>,
    /// All of the raw device is only to be read.
    #[arg(long, requires = "raw_device")]
    pub(crate) raw_read_only: bool,
    /// Name partitions by their own devices (/dev/sda5), not by their places on the disk's.
    #[arg(long, requires = "partitions")]
    pub(crate) relative: bool,
    /// UUID of the new image, where the format has one [default: a random one].
    #[arg(long)]
    pub(crate) uuid: Option<Uuid>,
    /// A comment, where the format keeps one; vdi: at most 255 bytes.
    #[arg(long)]
    pub(crate) comment: Option<String>,
    /// An option of the format (repeatable); vdi: AllocationBlockSize=SIZE, a power of two from 4k to 256M
    /// [default: 1M]; qcow2: cluster_size=SIZE, from 512 to 2M [default: 64k], compat=0.10 or 1.1, extended_l2=on or off,
    /// refcount_bits=BITS; qed: cluster_size=SIZE, from 4k to 64M [default: 64k], table_size=CLUSTERS, 2 to 16 [default: 4];
    /// qcow: cluster_size=SIZE, from 512 to 64k [default: 4k], table_entries=N, 64 to 8192 [default: 512].
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = key_and_value)]
    pub(crate) options: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) parents: Parents,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The new image. Nothing may be there yet; an extension has to be that of the format.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct CreateCache {
    /// Bytes the file has at most, such as 10G.
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: u64,
    /// Bytes of a block: what is read from below at a time, and what goes for others when the cache is full. A power of two from
    /// 4k to 256k.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64k")]
    pub(crate) block: u64,
    /// The new cache image. Nothing may be there yet; it is best called .vci.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Convert {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) snapshot: Snapshot,
    /// Format of the new image: raw, vdi, vmdk, vhd, vhdx, qcow2, qcow, qed or parallels.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) output_format: Format,
    /// Variant of the new image's format: dynamic or fixed; of vdi also zero-expand, of vmdk split2g, split2g-flat, esx and (convert
    /// alone) stream [default: dynamic].
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// An option of the new image's format (repeatable); vdi: AllocationBlockSize=SIZE, a power of two from 4k to 256M
    /// [default: 1M]; qcow2: cluster_size=SIZE, from 512 to 2M [default: 64k], compat=0.10 or 1.1, extended_l2=on or off,
    /// refcount_bits=BITS; qed: cluster_size=SIZE, from 4k to 64M [default: 64k], table_size=CLUSTERS, 2 to 16 [default: 4];
    /// qcow: cluster_size=SIZE, from 512 to 64k [default: 4k], table_entries=N, 64 to 8192 [default: 512].
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = key_and_value)]
    pub(crate) options: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image to copy, with its parents.
    pub(crate) source: PathBuf,
    /// The new image. Nothing may be there yet; an extension has to be that of the format.
    pub(crate) target: PathBuf,
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

#[derive(Debug, Args)]
pub(crate) struct Io {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) snapshot: Snapshot,
    /// Refuse every write.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Write to an image although a diff in its folder has it as its parent.
    #[arg(long)]
    pub(crate) allow_write_to_parent: bool,
    /// A command, see below (repeatable) [default: those of standard input].
    #[arg(short = 'c', long = "command", value_name = "COMMAND")]
    pub(crate) commands: Vec<job::Command>,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image.
    pub(crate) file: PathBuf,
}

fn new_size(text: &str) -> vdblk::Result<NewSize> {
    match text.strip_prefix('+') {
        Some(more) => parse_size(more).map(NewSize::By),
        None => parse_size(text).map(NewSize::To),
    }
}

fn partition(text: &str) -> std::result::Result<(u32, bool), String> {
    let (number, read_only) = text.strip_suffix(":ro").map_or((text, false), |n| (n, true));
    let number = number.parse().ok().filter(|n| *n > 0);
    number.map(|n| (n, read_only)).ok_or_else(|| "N or N:ro is wanted, N from 1 on".to_string())
}

fn key_and_value(text: &str) -> std::result::Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("KEY=VALUE is wanted")?;
    Ok((key.into(), value.into()))
}
