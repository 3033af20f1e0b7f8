//! `vdimg medium`.

use super::common::Output;
use clap::{Args, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use uuid::Uuid;
use vdblk::filter::Cipher;
use vdblk::format::Format;
use vdblk::job::{NewSize, parse_size};
use vdblk::map::DeviceType;
use vdblk::medium::MediumType;

/// What stands below the help of `vdimg medium`.
pub(crate) const ENDS: &str = "\
MEDIUM is a UUID or a file. A medium that is looked at has its file checked, for
--timeout seconds at most; one that does not answer delays no other. Locks are
held by processes and vanish with them.
Examples: vdimg medium add disk.vdi
          vdimg medium show disk.vdi --output json
          vdimg medium lock --read disk.vdi -- cp disk.vdi backup.vdi
          vdblk --medium disk.vdi --socket-path /tmp/s";

#[derive(Debug, Args)]
pub(crate) struct MediumArgs {
    /// The registry [default: this user's, $XDG_DATA_HOME/vdblk/media.sqlite].
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) registry: Option<PathBuf>,
    /// The registry of the whole system, /var/lib/vdblk/media.sqlite.
    #[arg(long, global = true, conflicts_with = "registry")]
    pub(crate) system: bool,
    /// Seconds a look at a medium may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0, global = true, value_parser = seconds)]
    pub(crate) timeout: f64,
    /// How to print.
    #[arg(long, value_enum, default_value_t, global = true)]
    pub(crate) output: Output,
    #[command(subcommand)]
    pub(crate) what: What,
}

#[derive(Debug, Subcommand)]
pub(crate) enum What {
    /// List the known media, each after a check.
    List {
        /// Only what is known already: no file is looked at.
        #[arg(long)]
        no_check: bool,
    },
    /// Make a file a known medium, with its parents. Prints its UUID.
    Add(Add),
    /// Tell all about a medium, after a check.
    Show {
        /// Only what is known already: no file is looked at.
        #[arg(long)]
        no_check: bool,
        /// UUID or file.
        medium: String,
    },
    /// Look at media (all, if none is named). Exit status: 0 all can be read, 2 some cannot, 1 error.
    Check {
        /// UUIDs or files.
        media: Vec<String>,
    },
    /// Note that a machine uses a medium. Prints what it uses: of immutable and multiattach media a new diff.
    Attach(Use),
    /// Note that a machine does not use a medium any more.
    Detach(Use),
    /// Lock a medium: while a command runs, else until standard input ends, or for another process.
    Lock(Lock),
    /// Take back a lock that was taken for a process.
    Unlock(Unlock),
    /// Move a medium's files, and its record.
    Move {
        /// UUID or file.
        medium: String,
        /// The new name, or a folder.
        to: PathBuf,
    },
    /// Change the record of where a medium is. No file is touched.
    SetLocation {
        /// UUID or file.
        medium: String,
        /// Where it is now.
        to: PathBuf,
    },
    /// Change description, type or auto-reset.
    Set(Set),
    /// Forget a medium. Its file stays.
    Close {
        /// UUID or file.
        medium: String,
    },
    /// Remove a hard disk's files, and forget it.
    Delete {
        /// UUID or file.
        medium: String,
    },
    /// Make a hard disk, with --parent a diff. Prints its UUID.
    Create(Create),
    /// Copy what a medium shows into a new one. Prints its UUID.
    Clone(Clone_),
    /// Merge a medium, and those between, into another of its chain.
    Merge {
        /// UUID or file.
        source: String,
        /// Which one takes it in: beneath it, or above.
        #[arg(long, value_name = "MEDIUM")]
        into: String,
    },
    /// Change the size of a medium's disk.
    Resize {
        /// Make it smaller although data is lost.
        #[arg(long)]
        shrink: bool,
        /// UUID or file.
        medium: String,
        /// The size, such as 20G; or +SIZE.
        #[arg(value_parser = super::change::new_size)]
        size: NewSize,
    },
    /// Take from a medium's file what need not be kept.
    Compact {
        /// UUID or file.
        medium: String,
    },
    /// Make a diff anew: it shows what its parent does.
    Reset {
        /// UUID or file.
        medium: String,
    },
    /// Encrypt a medium and what it stands on, as VirtualBox does it, or give it another key. The key store is kept in the registry.
    Encrypt(Encrypt),
    /// Take the encryption off a medium and what it stands on.
    Decrypt(Password),
    /// Give an encrypted medium another password; its key stays.
    SetPassword(SetPassword),
    /// Tell how a medium is encrypted, with --password-file whether that is its password.
    Encryption {
        /// The file with the password, less one newline at its end; - for standard input.
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// UUID or file.
        medium: String,
    },
    /// Show a medium's properties, or one, or change it.
    Property {
        /// Take it away.
        #[arg(long, requires = "name", conflicts_with = "value")]
        delete: bool,
        /// UUID or file.
        medium: String,
        /// Its name.
        name: Option<String>,
        /// What it is to be.
        value: Option<String>,
    },
    /// Show the media as trees of diffs.
    Tree,
    /// Take over the media of a VirtualBox.xml, with its machines, or of a .vbox.
    Import {
        /// The settings file.
        file: PathBuf,
    },
    /// Write the media into a settings file; of one that exists only the registry of media is replaced.
    Export {
        /// Those that this machine uses, with their parents.
        #[arg(long, value_name = "UUID")]
        machine: Option<Uuid>,
        /// The settings file: .vbox of a machine, else VirtualBox.xml.
        file: PathBuf,
    },
    /// Make all images in a folder and below known; chains are found by UUIDs.
    Scan {
        /// The folder.
        folder: PathBuf,
    },
    /// Look at a file, for another process of ours.
    #[command(hide = true)]
    Probe {
        #[arg(long)]
        format: Option<Format>,
        #[arg(long)]
        find_parent: bool,
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// Its format [default: what extension and contents agree on].
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<Format>,
    /// hdd, dvd or floppy [default: by its name and size].
    #[arg(long, value_parser = device)]
    pub(crate) device: Option<DeviceType>,
    /// Its parent, where the image does not name one.
    #[arg(long, value_name = "MEDIUM")]
    pub(crate) parent: Option<String>,
    /// normal, immutable, multiattach, writethrough, shareable or readonly [default: normal; dvd: readonly; floppy: writethrough].
    #[arg(long = "type", value_name = "TYPE", value_parser = medium_type)]
    pub(crate) medium_type: Option<MediumType>,
    /// A text.
    #[arg(long)]
    pub(crate) description: Option<String>,
    /// The file.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Use {
    /// The machine.
    #[arg(long, value_name = "UUID")]
    pub(crate) machine: Uuid,
    /// The snapshot of it that uses the medium [default: its current state].
    #[arg(long, value_name = "UUID")]
    pub(crate) snapshot: Option<Uuid>,
    /// UUID or file.
    pub(crate) medium: String,
}

#[derive(Clone, Copy, Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Mode {
    /// For reading: others may read.
    #[arg(long)]
    pub(crate) read: bool,
    /// For writing: alone.
    #[arg(long)]
    pub(crate) write: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Lock {
    #[command(flatten)]
    pub(crate) mode: Mode,
    /// The lock belongs to this process, and goes with it.
    #[arg(long, conflicts_with = "command")]
    pub(crate) pid: Option<u32>,
    /// UUID or file.
    pub(crate) medium: String,
    /// A command to run under the lock; its exit status is ours.
    #[arg(last = true)]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Unlock {
    #[command(flatten)]
    pub(crate) mode: Mode,
    /// The process it belongs to.
    #[arg(long)]
    pub(crate) pid: u32,
    /// UUID or file.
    pub(crate) medium: String,
}

#[derive(Debug, Args)]
pub(crate) struct Set {
    #[command(flatten)]
    pub(crate) changes: Changes,
    /// UUID or file.
    pub(crate) medium: String,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Changes {
    /// A text; an empty one takes it away.
    #[arg(long)]
    pub(crate) description: Option<String>,
    /// normal, immutable, multiattach, writethrough, shareable or readonly.
    #[arg(long = "type", value_name = "TYPE", value_parser = medium_type)]
    pub(crate) medium_type: Option<MediumType>,
    /// Whether the diff is made anew at every start.
    #[arg(long, value_name = "on|off", value_parser = on_off)]
    pub(crate) auto_reset: Option<bool>,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// vdi, vmdk, vhd, vhdx, qcow2, qcow, qed, parallels or raw.
    #[arg(long, value_name = "FORMAT", default_value = "vdi")]
    pub(crate) format: Format,
    /// Size of the disk [default: the parent's].
    #[arg(long, value_parser = parse_size, required_unless_present = "parent")]
    pub(crate) size: Option<u64>,
    /// Variant of the format, as vdimg create has them.
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// What it is a diff of.
    #[arg(long, value_name = "MEDIUM")]
    pub(crate) parent: Option<String>,
    /// The diff is made anew at every start.
    #[arg(long, requires = "parent")]
    pub(crate) auto_reset: bool,
    /// A text.
    #[arg(long)]
    pub(crate) description: Option<String>,
    /// The new file; without an extension it gets that of the format.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Clone_ {
    /// Format of the new one.
    #[arg(long, value_name = "FORMAT", default_value = "vdi")]
    pub(crate) format: Format,
    /// Variant of the format, as vdimg convert has them.
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// A text.
    #[arg(long)]
    pub(crate) description: Option<String>,
    /// UUID or file.
    pub(crate) medium: String,
    /// The new file; without an extension it gets that of the format.
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Encrypt {
    /// AES-XTS128-PLAIN64 or AES-XTS256-PLAIN64.
    #[arg(long, default_value_t)]
    pub(crate) cipher: Cipher,
    /// The file with the password it has, if it is encrypted already.
    #[arg(long, value_name = "FILE")]
    pub(crate) old_password_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) new: Named,
}

#[derive(Debug, Args)]
pub(crate) struct SetPassword {
    /// The file with the password it has.
    #[arg(long, value_name = "FILE")]
    pub(crate) old_password_file: PathBuf,
    #[command(flatten)]
    pub(crate) new: Named,
}

/// A new password.
#[derive(Debug, Args)]
pub(crate) struct Named {
    /// What the password is called.
    #[arg(long, value_name = "ID", default_value = "")]
    pub(crate) password_id: String,
    #[command(flatten)]
    pub(crate) password: Password,
}

#[derive(Debug, Args)]
pub(crate) struct Password {
    /// The file with the password, less one newline at its end; - for standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) password_file: PathBuf,
    /// UUID or file.
    pub(crate) medium: String,
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    let n: Option<f64> = text.parse().ok();
    n.filter(|n| (0.01..=3600.0).contains(n)).ok_or_else(|| "seconds, 0.01 to 3600".into())
}

fn medium_type(text: &str) -> std::result::Result<MediumType, String> {
    MediumType::parse(text).map_err(|e| e.to_string())
}

fn device(text: &str) -> std::result::Result<DeviceType, String> {
    let all = [DeviceType::HardDisk, DeviceType::Dvd, DeviceType::Floppy];
    all.into_iter().find(|d| d.name() == text).ok_or_else(|| "hdd, dvd or floppy".into())
}

fn on_off(text: &str) -> std::result::Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off".into()),
    }
}
