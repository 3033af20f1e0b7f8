//! Known media: a registry with the rules of VirtualBox's IMedium, shared by many processes.
//!
//! [`Standing`] is the state machine, pure. [`Registry`] keeps records and applies it in transactions; [`Medium`] is the interface.
//! Operations on files leave an intent before they begin, by which another process completes or takes back what a killed one left.
//! `docs/medium.md` tells more, `docs/medium-api.md` holds it against the interface.

mod check;
mod code;
mod db;
mod encryption;
mod handle;
mod holder;
mod intent;
mod kinds;
mod operations;
mod record;
mod scan;
mod serve;
mod staging;
mod state;
mod store;
mod transfer;
mod vbox;

pub use check::{CHECK_LIMIT, Facts, Prober, Question, answer, look};
pub use code::{Code, Fault, Result};
pub use db::{system_registry, user_registry};
pub use encryption::{ChangeEncryption, Encryption};
pub use handle::{Change, LockHolder, Medium};
pub use kinds::{MediumType, State, TypeFacts, allow_type};
pub use operations::{NewMedium, OpenMedium};
pub use record::{Attachment, Record};
pub use scan::Scanned;
pub use serve::{MachineDisk, ServeMedium, Served, machine_disk};
pub use state::{Answer, Call, Client, Outside, Phase, Refusal, Standing};
pub use store::Registry;
pub use transfer::Imported;

use std::path::{Path, PathBuf};

/// The full name of a file, by which the registry knows it: its folder without links, and its own name as it is.
pub fn absolute(path: &Path) -> PathBuf {
    let full = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let folder = full.parent().and_then(|f| f.canonicalize().ok());
    folder.zip(full.file_name()).map_or_else(|| full.clone(), |(folder, name)| folder.join(name))
}
