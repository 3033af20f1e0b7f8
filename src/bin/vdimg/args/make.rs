//! Commands that make images.

use super::super::crypt::NewKeys;
use super::common::{Image, Lock, Parents, Snapshot};
use clap::Args;
use std::path::PathBuf;
use uuid::Uuid;
use vdblk::format::Format;
use vdblk::job::parse_size;

pub(super) const CREATE: &str = "\
Examples: vdimg create --format vdi --size 20G disk.vdi
          vdimg create --format qcow2 --parent base.vdi overlay.qcow2";

pub(super) const CONVERT: &str = "\
The new image is a base. After an error, or when interrupted, no file is left.
Examples: vdimg convert disk.vmdk --output-format qcow2 disk.qcow2
          vdimg convert --new-password-file pw --new-key-store disk.keys disk.vmdk disk.vdi";

pub(super) const CLONE: &str = "\
Format, variant and size of blocks stay, UUIDs are new. What stands on parents
becomes a base that needs none.
Example: vdimg clone disk.vdi copy.vdi";

#[derive(Debug, Args)]
pub(crate) struct Clone {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) snapshot: Snapshot,
    #[command(flatten)]
    pub(crate) new_keys: NewKeys,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image to copy, with its parents.
    pub(crate) source: PathBuf,
    /// The new image. Nothing may be there yet; an extension has to be that of the format.
    pub(crate) target: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Format of the new image: raw, vdi, vmdk, vhd, vhdx, qcow2, qcow, qed or parallels.
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub(crate) format: Format,
    /// Size of the disk, such as 512M or 10G: a multiple of 512 bytes, up to 4P [default: the parent's].
    #[arg(long, value_parser = parse_size, required_unless_present_any = ["parents", "raw_device"])]
    pub(crate) size: Option<u64>,
    /// Variant of the format: dynamic or fixed; of vdi also zero-expand, of vmdk split2g, split2g-flat, esx and (convert
    /// alone) stream [default: dynamic].
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// With --format vmdk --variant rawdisk: the disk of this host that the image describes, whole or with --partitions. It is
    /// as large as the disk. With --allow-raw-device it can be opened.
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
    #[arg(short = 'o', long = "option", value_name = "KEY=VALUE", value_parser = key_and_value)]
    pub(crate) options: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) parents: Parents,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The new image. Nothing may be there yet; an extension has to be that of the format.
    pub(crate) file: PathBuf,
}

pub(super) const CREATE_CACHE: &str = "\
The file takes space as it is filled, up to --size, and may be removed at any
time it is not in use: everything in it can be read again. info and check take
it too.
Example: vdimg create-cache --size 10G base.vci
         vdblk --cache-image base.vci --blk-file base.vmdk --overlay vm.vdi …";

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

/// See [`vdblk::vd::CacheMode`].
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum TargetCache {
    None,
    Writeback,
    Unsafe,
}

#[derive(Debug, Args)]
pub(crate) struct Convert {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) snapshot: Snapshot,
    /// Format of the new image: raw, vdi, vmdk, vhd, vhdx, qcow2, qcow, qed or parallels.
    /// [default: what its name says]
    #[arg(short = 'O', long, value_name = "FORMAT")]
    pub(crate) output_format: Option<Format>,
    /// How the new image is written. none: past the page cache; writeback: through it, and it is durable when the command ends; unsafe: the
    /// same, but not durable, which is quicker.
    #[arg(short = 't', long, value_name = "MODE", value_enum, default_value = "writeback")]
    pub(crate) target_cache: TargetCache,
    /// Variant of the new image's format: dynamic or fixed; of vdi also zero-expand, of vmdk split2g, split2g-flat, esx and (convert
    /// alone) stream [default: dynamic].
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// An option of the new image's format (repeatable); vdi: AllocationBlockSize=SIZE, a power of two from 4k to 256M
    /// [default: 1M]; qcow2: cluster_size=SIZE, from 512 to 2M [default: 64k], compat=0.10 or 1.1, extended_l2=on or off,
    /// refcount_bits=BITS; qed: cluster_size=SIZE, from 4k to 64M [default: 64k], table_size=CLUSTERS, 2 to 16 [default: 4];
    /// qcow: cluster_size=SIZE, from 512 to 64k [default: 4k], table_entries=N, 64 to 8192 [default: 512].
    #[arg(short = 'o', long = "option", value_name = "KEY=VALUE", value_parser = key_and_value)]
    pub(crate) options: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) new_keys: NewKeys,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image to copy, with its parents.
    pub(crate) source: PathBuf,
    /// The new image. Nothing may be there yet; an extension has to be that of the format.
    pub(crate) target: PathBuf,
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
