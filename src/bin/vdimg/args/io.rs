//! Commands on the bytes of a disk.

use super::common::{Image, Lock, Snapshot};
use clap::Args;
use std::path::PathBuf;
use vdblk::job;

/// The script language of `vdimg io`.
pub(super) const SCRIPT: &str = "\
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
usage, also of a --command.
Example: vdimg io disk.vdi -c 'write -P 0x41 0 64k' -c flush -c 'read -v 0 512'";

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
