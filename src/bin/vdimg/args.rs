//! The command line; each group of commands in a file of its own.

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
#[path = "args/properties.rs"]
mod properties;

pub(crate) use change::{Compact, Merge, Repair, Resize};
use clap::{Parser, Subcommand};
pub(crate) use common::{Image, Output, Parents};
pub(crate) use io::Io;
pub(crate) use look::{Check, Compare, Info, Map};
pub(crate) use make::{Convert, Create, CreateCache};
pub(crate) use properties::{Comment, Geometry, Labelled, SetUuid};

const ENDS: &str = "Sizes are bytes, or have a suffix for powers of 1024: 512M, 10G, 1.5T (k, M, G, T, P).\n\
                    Exit status: 0 done, 1 an error, with one line on standard error, 2 wrong usage; those of \
                    compare, check and repair are told with them.";

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
    #[command(after_help = change::RESIZE)]
    Resize(Resize),
    /// Take from images what they need not keep: blocks of zeros, blocks equal to what the parent shows, and holes.
    #[command(after_help = change::COMPACT)]
    Compact(Compact),
    /// Merge images of a chain: into the parent (as qemu-img commit), another one beneath, or upwards into a child.
    #[command(after_help = change::MERGE)]
    Merge(Merge),
    /// Set an image's UUIDs: its own, that of its contents, what it says of its parent.
    #[command(name = "setuuid", after_help = properties::SETUUID)]
    SetUuid(SetUuid),
    /// Print an image's comment, or set it.
    #[command(after_help = properties::COMMENT)]
    Comment(Comment),
    /// Print the geometries an image states, or set them.
    #[command(after_help = properties::GEOMETRY)]
    Geometry(Geometry),
    /// Make an empty cache image, for vdblk --cache-image.
    #[command(after_help = make::CREATE_CACHE)]
    CreateCache(CreateCache),
    /// Tell where each range of the disk lies.
    Map(Map),
    /// Read and write by commands: read, write, discard, flush, sleep.
    #[command(after_help = io::SCRIPT)]
    Io(Io),
}

impl Command {
    /// Exit status of an error.
    pub(crate) fn trouble_status(&self) -> u8 {
        if matches!(self, Command::Compare(_)) { 2 } else { 1 }
    }
}
