//! What both programs take of an encrypted disk.

use clap::{ArgGroup, Args, ValueEnum};
use std::path::PathBuf;
use vdblk::filter::{KeyFiles, KeySource, Unallocated};

/// Keys of an encrypted disk. Never a password itself: everybody on the host can read command lines.
#[derive(Clone, Debug, Default, Args)]
#[command(group = ArgGroup::new("key_source").multiple(true))]
pub(crate) struct Keys {
    /// The disk is encrypted as VirtualBox does it: the file with its password, less one newline at the end; - for standard
    /// input
    #[arg(long, value_name = "FILE", requires = "key_source")]
    pub(crate) password_file: Option<PathBuf>,
    /// The file with its key store: the text of CRYPT/KeyStore, or the machine's .vbox file with it
    #[arg(long, value_name = "FILE", requires = "password_file", group = "key_source")]
    pub(crate) key_store: Option<PathBuf>,
    /// What an encrypted disk shows where nothing was ever written
    #[arg(long, value_enum, default_value_t)]
    pub(crate) unallocated: Shown,
}

/// What unallocated space shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shown {
    /// Zeros
    #[default]
    Zeros,
    /// What decrypting zeros gives, as in VirtualBox
    Virtualbox,
}

impl From<Shown> for Unallocated {
    fn from(shown: Shown) -> Unallocated {
        match shown {
            Shown::Zeros => Unallocated::Zeros,
            Shown::Virtualbox => Unallocated::VirtualBox,
        }
    }
}

impl Keys {
    /// For the library.
    pub(crate) fn files(&self) -> KeyFiles {
        KeyFiles {
            password: self.password_file.clone(),
            key_store: self.key_store.clone().map(KeySource::File),
            unallocated: self.unallocated.into(),
        }
    }
}
