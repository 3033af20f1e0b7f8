//! The command line; each group of commands in a file of its own.

#[path = "args/bytes.rs"]
mod bytes;
#[path = "args/change.rs"]
mod change;
#[path = "args/common.rs"]
mod common;
#[path = "args/io.rs"]
mod io;
#[path = "args/look.rs"]
mod look;
#[path = "args/make.rs"]
mod make;
#[path = "args/medium.rs"]
pub(crate) mod medium;
#[path = "args/properties.rs"]
mod properties;

use super::terminal::ShowProgress;
pub(crate) use bytes::{Bench, Cat, Dd, Mount};
pub(crate) use change::{Compact, Merge, Move, Rebase, Repair, Resize};
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
pub(crate) use common::{Image, Lock, Output, Parents};
pub(crate) use io::Io;
pub(crate) use look::{Check, Compare, CompareArgs, Diff, Formats, Info, Map};
pub(crate) use make::{Clone, Convert, Create, CreateCache, TargetCache};
pub(crate) use properties::{Comment, Geometry, Labelled, SetUuid};
use std::path::PathBuf;

const ENDS: &str = "Sizes are bytes, or have a suffix for powers of 1024: 512M, 10G, 1.5T (k, M, G, T, P).\n\
                    Exit status: 0 done, 1 an error, with one line on standard error, 2 wrong usage; those of \
                    compare, diff, check and repair are told with them.";

/// Makes, converts, compares, checks, repairs, resizes, merges and looks at disk images.
#[derive(Debug, Parser)]
#[command(name = "vdimg", version, max_term_width = 100, after_help = ENDS)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// How the progress of what takes long is told on standard error.
    #[arg(long, global = true, value_enum, default_value_t)]
    pub(crate) progress: ShowProgress,
}

const COMPLETIONS: &str = "\
Example: vdimg completions bash >/usr/share/bash-completion/completions/vdimg";

const MANPAGES: &str = "\
Example: vdimg manpages /usr/local/share/man/man1";

#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell.
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManPages {
    /// The folder they go to: vdimg.1 and one for each command.
    #[arg(value_parser = super::usage::existing_dir)]
    pub(crate) dir: PathBuf,
}

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

const DECRYPT: &str = "\
Without --in-place a copy beside the image is changed, compared with it, and
takes its place: it needs as much space again. With --in-place the image itself
is changed, and its parents; ended at any moment, the same command completes it,
and until then nothing else opens the images.
Example: vdimg decrypt --password-file pw --key-store disk.keys disk.vdi";

const REKEY: &str = "\
Without --in-place a copy beside the image is changed, compared with it, and
takes its place: it needs as much space again. With --in-place the image itself
is changed, and its parents; ended at any moment, the same command completes it,
and until then nothing else opens the images.
Example: vdimg rekey --password-file pw --key-store disk.keys \\
             --new-password-file pw2 --new-key-store disk2.keys disk.vdi";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Tell what an image is. Takes no locks: works while the image is served.
    #[command(after_help = look::INFO)]
    Info(Info),
    /// Make a new image; with --parent a diff of the last one named, those before are that one's own parents.
    #[command(after_help = make::CREATE)]
    Create(Create),
    /// Copy everything an image and its parents show into a new image.
    #[command(after_help = make::CONVERT)]
    Convert(Convert),
    /// Copy an image, with its parents, into a new one of the same format.
    #[command(after_help = make::CLONE)]
    Clone(Clone),
    /// Compare what two images show. Exit status: 0 equal, 1 different, 2 error.
    #[command(after_help = look::COMPARE)]
    Compare(CompareArgs),
    /// Tell in which ranges two disks differ. Exit status: 0 they are equal, 1 different, 2 error.
    #[command(after_help = look::DIFF)]
    Diff(Diff),
    /// Look for damage in one image. Exit status: 0 clean, 2 corrupt, 3 leaks only, 1 error.
    #[command(after_help = look::CHECK)]
    Check(Check),
    /// Put right what check finds; bytes that belong to no block are given up, and named. Exit status: 0 clean now,
    /// 2 still corrupt, 3 leaks left, 1 error; with --dry-run as check.
    #[command(after_help = change::REPAIR)]
    Repair(Repair),
    /// Change the size of an image's disk.
    #[command(after_help = change::RESIZE)]
    Resize(Resize),
    /// Take from images what they need not keep: blocks of zeros, blocks equal to what the parent shows, and holes.
    #[command(after_help = change::COMPACT)]
    Compact(Compact),
    /// Merge images of a chain: into the parent (as qemu-img commit), another one beneath, or upwards into a child.
    #[command(after_help = change::MERGE)]
    Merge(Merge),
    /// Rename an image, or move it to another folder or file system, with all its files.
    #[command(after_help = change::MOVE)]
    Move(Move),
    /// Give an image another parent, or none, and copy before what that would show otherwise.
    #[command(after_help = change::REBASE)]
    Rebase(Rebase),
    /// Set an image's UUIDs: its own, that of its contents, what it says of its parent.
    #[command(name = "setuuid", after_help = properties::SETUUID)]
    SetUuid(SetUuid),
    /// Print an image's comment, or set it.
    #[command(after_help = properties::COMMENT)]
    Comment(Comment),
    /// Print the geometries an image states, or set them.
    #[command(after_help = properties::GEOMETRY)]
    Geometry(Geometry),
    /// Encrypt an image as VirtualBox does, with a new key.
    #[command(after_help = ENCRYPT)]
    Encrypt(super::crypt::Encrypt),
    /// Decrypt an image.
    #[command(after_help = DECRYPT)]
    Decrypt(super::crypt::Decrypt),
    /// Encrypt an image with another key, or change only the password.
    #[command(after_help = REKEY)]
    Rekey(super::crypt::Rekey),
    /// Make an empty cache image, for vdblk --cache-image.
    #[command(after_help = make::CREATE_CACHE)]
    CreateCache(CreateCache),
    /// Tell where each range of the disk lies.
    #[command(after_help = look::MAP)]
    Map(Map),
    /// Read and write by commands: read, write, discard, flush, sleep.
    #[command(after_help = io::SCRIPT)]
    Io(Io),
    /// Known media: a registry of what is where, on what it stands, which machines use it, and who holds it.
    #[command(after_help = medium::ENDS)]
    Medium(medium::MediumArgs),
    /// Write the bytes of a disk, or of one of its partitions, to standard output.
    #[command(after_help = bytes::CAT)]
    Cat(Cat),
    /// Show a disk and its partitions as files of a folder (FUSE), until it is unmounted or a signal comes.
    #[command(after_help = bytes::MOUNT)]
    Mount(Mount),
    /// Make an image of some blocks of a disk.
    #[command(after_help = bytes::DD)]
    Dd(Dd),
    /// Time requests to a disk.
    #[command(after_help = bytes::BENCH)]
    Bench(Bench),
    /// List the formats, what can be done with them, their extensions and options.
    #[command(after_help = look::FORMATS)]
    Formats(Formats),
    /// Print the completions of vdimg for a shell.
    #[command(after_help = COMPLETIONS)]
    Completions(Completions),
    /// Write man pages of vdimg and its commands.
    #[command(name = "manpages", after_help = MANPAGES)]
    ManPages(ManPages),
}

impl Command {
    /// Exit status of an error.
    pub(crate) fn trouble_status(&self) -> u8 {
        if matches!(self, Command::Compare(_) | Command::Diff(_)) { 2 } else { 1 }
    }
}
