//! Commands that move the bytes of a disk out, and time it.

use super::common::{Image, Lock, Output, Snapshot};
use clap::Args;
use std::path::PathBuf;
use vdblk::format::Format;
use vdblk::job::parse_size;

pub(super) const CAT: &str = "\
Examples: vdimg cat disk.vmdk | sha256sum
          vdimg cat disk.vdi --partition 1 >partition.ext4
          vdimg cat disk.qcow2 --offset 1M --length 4k | hexdump -C";

pub(super) const MOUNT: &str = "\
The folder shows the files disk and partition1, partition2 ... as Linux counts
them, of fixed length. The command stays in the foreground; SIGINT, SIGTERM,
SIGHUP and umount end it in order. The image is locked meanwhile, as vdblk does.
Examples: vdimg mount disk.vdi /mnt/disk & sleep 1
          mount -o loop,ro /mnt/disk/partition1 /mnt/files
          vdimg mount --writable disk.qcow2 /mnt/disk & sleep 1
          fsck.ext4 -f /mnt/disk/partition1; umount /mnt/disk";

pub(super) const DD: &str = "\
As dd(1): count blocks are copied from behind the skipped ones on. (qemu-img dd
counts the skipped ones as well.) The new image's disk ends at a multiple of 512
bytes, with zeros.
Example: vdimg dd if=disk.vdi of=head.raw bs=1M count=16";

pub(super) const BENCH: &str = "\
With -w what the disk holds is overwritten, by zeros or by --pattern.
Examples: vdimg bench disk.vdi
          vdimg bench -w -c 10000 -d 8 -s 64k scratch.qcow2";

#[derive(Debug, Args)]
pub(crate) struct Cat {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) snapshot: Snapshot,
    /// The bytes of this partition, as Linux counts them (MBR or GPT) [default: those of the disk].
    #[arg(long, value_name = "N")]
    pub(crate) partition: Option<u32>,
    /// Byte to begin at, of the partition if one is named.
    #[arg(long, value_name = "BYTES", value_parser = parse_size, default_value = "0")]
    pub(crate) offset: u64,
    /// Bytes to write [default: all].
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub(crate) length: Option<u64>,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Mount {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) snapshot: Snapshot,
    /// Let the files be written [default: only read].
    #[arg(long, conflicts_with = "snapshot")]
    pub(crate) writable: bool,
    /// Write to an image although a diff in its folder has it as its parent.
    #[arg(long, requires = "writable")]
    pub(crate) allow_write_to_parent: bool,
    /// Let others than the one who mounts it, root included, read the files.
    #[arg(long)]
    pub(crate) allow_other: bool,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image.
    pub(crate) file: PathBuf,
    /// The folder, which is there.
    #[arg(value_parser = super::super::usage::existing_dir)]
    pub(crate) folder: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Dd {
    /// Format of the image that is read, as --format of the other commands.
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub(crate) format: Option<Format>,
    /// Format of the new image.
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    pub(crate) output_format: Format,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// if=FILE, the image that is read; of=FILE, the new one, where nothing may be yet; bs=SIZE, a block's bytes [default: 512];
    /// count=N, blocks to copy [default: all]; skip=N, blocks to leave out before.
    #[arg(value_name = "if=FILE of=FILE [bs=SIZE] [count=N] [skip=N]", required = true)]
    pub(crate) operands: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(flatten)]
    pub(crate) image: Image,
    /// Requests.
    #[arg(short = 'c', long, value_name = "N", default_value_t = 75000)]
    pub(crate) count: u64,
    /// Requests at a time, 1 to 256.
    #[arg(short = 'd', long, value_name = "N", default_value_t = 64)]
    pub(crate) depth: u16,
    /// Byte of the disk at which the first request begins.
    #[arg(short = 'o', long, value_name = "BYTES", value_parser = parse_size, default_value = "0")]
    pub(crate) offset: u64,
    /// Bytes of a request, up to 1M.
    #[arg(short = 's', long, value_name = "SIZE", value_parser = parse_size, default_value = "4k")]
    pub(crate) buffer_size: u64,
    /// Bytes from one request to the next [default: those of a request].
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) step_size: Option<u64>,
    /// Write, instead of reading.
    #[arg(short = 'w', long)]
    pub(crate) write: bool,
    /// The byte that is written.
    #[arg(long, value_name = "BYTE", default_value_t = 0, requires = "write")]
    pub(crate) pattern: u8,
    /// Flush after so many requests.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "write")]
    pub(crate) flush_interval: u64,
    /// The host's page cache: writeback, or none, past it.
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback", value_parser = ["writeback", "none"])]
    pub(crate) cache: String,
    /// Taken for the sake of qemu-img's command lines: I/O is always asynchronous, by io_uring where there is one.
    #[arg(short = 'n', long)]
    pub(crate) native: bool,
    /// Write to an image although a diff in its folder has it as its parent.
    #[arg(long)]
    pub(crate) allow_write_to_parent: bool,
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) lock: Lock,
    /// The image.
    pub(crate) file: PathBuf,
}
