//! `vdimg encrypt`, `vdimg decrypt` and `vdimg rekey`.

use super::args::{Lock, Parents};
use super::keys::Shown;
use super::terminal;
use clap::Args;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use vdblk::filter::{
    Cipher, Filters, KDF_MILLIS, KeyStore, Secret, Unallocated, iterations_for, read_key_store,
    read_password, unlock, write_key_store,
};
use vdblk::format::Format;
use vdblk::job::{self, DiskKey, RecryptInto, is_unfinished};
use vdblk::vd::{ImageSpec, OpenDisk};
use vdblk::{Error, ErrorKind, Result};

/// Which image, and where the result goes.
#[derive(Debug, Args)]
pub(crate) struct What {
    /// Format of the image, as of the other commands [default: what extension and contents agree on].
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    #[command(flatten)]
    parents: Parents,
    /// Change the image where it stands, and its parents; a side file beside each makes that safe.
    #[arg(long, conflicts_with = "output")]
    in_place: bool,
    /// Leave the image as it is and write to this new file.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Change the key although another image in the folder has one of these as its parent: it will be lost.
    #[arg(long)]
    allow_write_to_parent: bool,
    #[command(flatten)]
    lock: Lock,
    /// The image; of a chain the one on top.
    file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Encrypt {
    /// The file with the new password, less one newline at its end; - for standard input.
    #[arg(long, value_name = "FILE")]
    password_file: PathBuf,
    /// The new file for the key store.
    #[arg(long, value_name = "FILE")]
    key_store: PathBuf,
    /// AES-XTS128-PLAIN64 or AES-XTS256-PLAIN64.
    #[arg(long, default_value_t)]
    cipher: Cipher,
    /// virtualbox: holes in allocated places are encrypted, too, so that VirtualBox reads zeros there.
    #[arg(long, value_enum, default_value_t)]
    unallocated: Shown,
    #[command(flatten)]
    what: What,
}

#[derive(Debug, Args)]
pub(crate) struct Decrypt {
    /// The file with the password, less one newline at its end; - for standard input.
    #[arg(long, value_name = "FILE")]
    password_file: PathBuf,
    /// The file with the key store, or the machine's .vbox file with it.
    #[arg(long, value_name = "FILE")]
    key_store: PathBuf,
    #[command(flatten)]
    what: What,
}

#[derive(Debug, Args)]
pub(crate) struct Rekey {
    #[command(flatten)]
    old: Decrypt,
    /// The file with the new password; it may be the old one.
    #[arg(long, value_name = "FILE")]
    new_password_file: PathBuf,
    /// The new file for the new key store.
    #[arg(long, value_name = "FILE")]
    new_key_store: PathBuf,
    /// The new cipher [default: the old one].
    #[arg(long)]
    cipher: Option<Cipher>,
    /// Keep the key and write only a key store with the new password: whoever has the old key store and password can still
    /// read the image.
    #[arg(long, conflicts_with_all = ["cipher", "in_place", "output"])]
    password_only: bool,
}

impl What {
    fn open(&self) -> OpenDisk {
        let spec = ImageSpec { path: self.file.clone(), format: self.format };
        OpenDisk { allow_write_to_parent: self.allow_write_to_parent, ..self.parents.open(spec, self.lock) }
    }

    fn into(&self) -> RecryptInto {
        match (&self.output, self.in_place) {
            (Some(path), _) => RecryptInto::File(path.clone()),
            (None, true) => RecryptInto::Place,
            (None, false) => RecryptInto::Replacement,
        }
    }

    /// A command before this one has begun and not ended.
    fn is_begun(&self) -> bool {
        self.in_place && is_unfinished(&self.file)
    }

    /// Which file it is: another one once a copy has taken its place.
    fn identity(&self) -> Option<(u64, u64)> {
        std::fs::metadata(&self.file).ok().map(|m| (m.dev(), m.ino()))
    }

    fn run(&self, from: Option<DiskKey>, to: Option<DiskKey>, fill_holes: bool) -> Result<()> {
        terminal::end_in_order();
        let how = job::Recrypt { image: self.open(), from, to, into: self.into(), fill_holes };
        terminal::watched(|watch| job::recrypt(&how, watch))
    }

    /// The same to a key of a new key store, which goes again if nothing was changed.
    fn run_to_new(&self, from: Option<DiskKey>, new: New<'_>, fill_holes: bool) -> Result<()> {
        let fresh = !self.is_begun();
        let before = self.identity();
        let key = if fresh { new.make()? } else { new.there()? };
        let done = self.run(from, Some(key), fill_holes);
        let untouched = before.is_some() && self.identity() == before && !self.is_begun();
        if done.is_err() && fresh && untouched {
            // What cannot be removed is told of when it is found to be there.
            let _ = std::fs::remove_file(new.key_store);
        }
        done
    }
}

/// The key of a new image.
#[derive(Debug, Args)]
pub(crate) struct NewKeys {
    /// Encrypt the new image, with a new key: the file with its password, less one newline at its end; - for standard input.
    #[arg(long, value_name = "FILE", requires = "new_key_store")]
    new_password_file: Option<PathBuf>,
    /// The new file for the key store of the new image. Keep it: without it everything in the image is lost.
    #[arg(long, value_name = "FILE", requires = "new_password_file")]
    new_key_store: Option<PathBuf>,
    /// AES-XTS128-PLAIN64 or AES-XTS256-PLAIN64 [default: the latter].
    #[arg(long, value_name = "CIPHER", requires = "new_key_store")]
    new_cipher: Option<Cipher>,
}

impl NewKeys {
    /// Makes an image with filters, or without if no key was asked for. The key store is there before, and goes again if that fails.
    pub(crate) fn with_filters(&self, make: impl FnOnce(Filters) -> Result<()>) -> Result<()> {
        let (Some(password), Some(key_store)) = (&self.new_password_file, &self.new_key_store) else {
            return make(Filters::default());
        };
        let key = New { password, key_store, cipher: self.new_cipher.unwrap_or_default() }.make()?;
        make(Filters::of(key.filter, Unallocated::Zeros)).inspect_err(|_| {
            // What cannot be removed is told of when it is found to be there.
            let _ = std::fs::remove_file(key_store);
        })
    }
}

/// A key that is to be.
#[derive(Clone, Copy)]
struct New<'a> {
    password: &'a Path,
    key_store: &'a Path,
    cipher: Cipher,
}

impl New<'_> {
    /// A new key, in a new key store.
    fn make(self) -> Result<DiskKey> {
        let password = read_password(self.password)?;
        let key = KeyStore::new_key(self.cipher)?;
        self.keep(&key, &password)
    }

    /// Wraps a key.
    fn keep(self, key: &Secret, password: &Secret) -> Result<DiskKey> {
        let iterations = iterations_for(self.cipher, KDF_MILLIS);
        let store = KeyStore::wrap(self.cipher, key, password, iterations)?;
        write_key_store(self.key_store, &store)?;
        DiskKey::of(key, &store)
    }

    /// The key of a command that was ended.
    fn there(self) -> Result<DiskKey> {
        let (key, store) = unlock(self.key_store, self.password)?;
        DiskKey::of(&key, &store)
    }
}

pub(crate) fn encrypt(args: &Encrypt) -> Result<u8> {
    let new = New { password: &args.password_file, key_store: &args.key_store, cipher: args.cipher };
    args.what.run_to_new(None, new, args.unallocated == Shown::Virtualbox)?;
    Ok(0)
}

pub(crate) fn decrypt(args: &Decrypt) -> Result<u8> {
    let (key, store) = unlock(&args.key_store, &args.password_file)?;
    args.what.run(Some(DiskKey::of(&key, &store)?), None, false)?;
    Ok(0)
}

pub(crate) fn rekey(args: &Rekey) -> Result<u8> {
    let old = &args.old;
    if [&old.password_file, &args.new_password_file].iter().all(|f| f.as_path() == Path::new("-")) {
        let what = "standard input holds one password, not two";
        return Err(Error::new(ErrorKind::InvalidArgument, what));
    }
    let cipher = args.cipher.map_or_else(|| read_key_store(&old.key_store).map(|s| s.cipher()), Ok)?;
    let new = New { password: &args.new_password_file, key_store: &args.new_key_store, cipher };
    let (key, store) = unlock(&old.key_store, &old.password_file)?;
    if args.password_only {
        new.keep(&key, &read_password(new.password)?)?;
        return Ok(0);
    }
    old.what.run_to_new(Some(DiskKey::of(&key, &store)?), new, false)?;
    Ok(0)
}
