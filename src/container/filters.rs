//! The container's filters: what is written goes through those of its direction from the oldest to the newest, what is read back from the newest to the
//! oldest. They are the container's, not an image's: all images of a chain hold what the filters made.

use super::Container;
use super::backends::{ConfigKey, ConfigValueType};
use super::flags::{ConfigKeyFlags, FilterFlags};
use crate::error::{Error, ErrorKind, Result, Status};
use crate::filter::{
    Cipher, Crypt, Filter, Filters, KDF_MILLIS, KeyStore, Secret, Unallocated, iterations_for,
};
use crate::job::{DiskKey, Recrypt, RecryptInto, Watch, recrypt};
use crate::map::GuestOffset;
use crate::vd::OpenDisk;
use sha2::{Digest, Sha256};
use std::fmt;
use std::sync::Arc;

/// A filter that containers know (`VDFILTERINFO`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterInfo {
    /// Its name.
    pub name: &'static str,
    /// What it can be told.
    pub config: Vec<ConfigKey>,
}

/// The cipher: for a new key store, or for a key without one.
const ALGORITHM: &str = "Algorithm";
/// By which its user knows the password, or the key.
const KEY_ID: &str = "KeyId";
/// The Base64 text.
const KEY_STORE: &str = "KeyStore";
/// 1: with a new key, in a new key store.
const CREATE_KEY_STORE: &str = "CreateKeyStore";

/// All filters (`VDFilterInfo`).
pub fn filter_info() -> Vec<FilterInfo> {
    let key = |key, value, default, flags| ConfigKey { key, default, value, flags };
    let text = |name, flags| key(name, ConfigValueType::String, None, flags);
    let config = vec![
        text(ALGORITHM, ConfigKeyFlags::NONE),
        text(KEY_ID, ConfigKeyFlags::MANDATORY),
        text(KEY_STORE, ConfigKeyFlags::NONE),
        key(CREATE_KEY_STORE, ConfigValueType::Integer, Some("0"), ConfigKeyFlags::NONE),
    ];
    vec![FilterInfo { name: "CRYPT", config }]
}

/// The filter of this name, in any case (`VDFilterInfoOne`).
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] if there is none, with those there are.
pub fn filter_info_one(name: &str) -> Result<FilterInfo> {
    let all = filter_info();
    let names = all.iter().map(|f| f.name).collect::<Vec<_>>().join(", ");
    all.into_iter().find(|f| f.name.eq_ignore_ascii_case(name)).ok_or_else(|| {
        let what = format!("unknown filter '{}'", name.escape_debug());
        Error::new(ErrorKind::InvalidArgument, what).hint(format!("one of: {names}"))
    })
}

/// What CRYPT asks its user for (VirtualBox's `VDINTERFACECRYPTO`). Each call is made while the filter is added, never later.
pub trait CryptInterface {
    /// The password of the key store whose key has this identifier.
    ///
    /// # Errors
    /// [`Status::DekMissing`] if it is not known.
    fn password(&self, id: &str) -> Result<Secret>;

    /// The key of this identifier, for a disk without key store.
    ///
    /// # Errors
    /// [`Status::DekMissing`] if it is not known; so unless an implementation says otherwise.
    fn key(&self, id: &str) -> Result<Secret> {
        Err(dek_missing(id))
    }

    /// Keeps the text of a new key store. Without it everything that is written afterwards is lost.
    ///
    /// # Errors
    /// If it could not be kept: the filter is not added then.
    fn save(&self, id: &str, key_store: &str) -> Result<()>;

    /// What a key store says of itself, for [`FilterFlags::INFO`].
    fn told(&self, _id: &str, _cipher: Cipher) {}
}

/// What a filter is told when it is added.
#[derive(Clone, Copy, Default)]
pub struct FilterConfig<'a> {
    /// Configuration keys, in any case, and their values.
    pub values: &'a [(&'a str, &'a str)],
    /// Whom CRYPT asks.
    pub crypt: Option<&'a dyn CryptInterface>,
    /// What the container shows where nothing was written, from now on.
    pub unallocated: Unallocated,
}

impl fmt::Debug for FilterConfig<'_> {
    /// Not the key store.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilterConfig").field("unallocated", &self.unallocated).finish_non_exhaustive()
    }
}

/// A filter of a container, and a name that no filter with another key has.
#[derive(Clone, Debug)]
struct Named {
    filter: Arc<dyn Filter>,
    digest: [u8; 32],
}

/// The filters of a container, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Added {
    read: Vec<Named>,
    write: Vec<Named>,
    unallocated: Unallocated,
}

impl Added {
    /// As a disk has them.
    pub(super) fn of_disk(&self) -> Filters {
        use crate::filter::Direction;
        let mut filters = Filters::default().showing(self.unallocated);
        self.read.iter().for_each(|n| filters.add(n.filter.clone(), Direction::Read));
        self.write.iter().for_each(|n| filters.add(n.filter.clone(), Direction::Write));
        filters
    }

    /// There are filters in one direction at least.
    pub(super) fn any(&self) -> bool {
        !self.read.is_empty() || !self.write.is_empty()
    }
}

/// Several filters as one.
#[derive(Debug)]
struct Stack(Vec<Named>);

impl Filter for Stack {
    fn name(&self) -> &'static str {
        "STACK"
    }

    fn on_write(&self, at: GuestOffset, bytes: &mut [u8]) {
        self.0.iter().for_each(|n| n.filter.on_write(at, bytes));
    }

    fn on_read(&self, at: GuestOffset, bytes: &mut [u8]) {
        self.0.iter().rev().for_each(|n| n.filter.on_read(at, bytes));
    }
}

/// All filters of a direction as the key of a change of keys.
fn key_of(filters: &[Named]) -> Option<DiskKey> {
    match filters {
        [] => None,
        [one] => Some(DiskKey { filter: one.filter.clone(), digest: one.digest }),
        all => {
            let sum = all.iter().fold(Sha256::new(), |sum, n| sum.chain_update(n.digest));
            Some(DiskKey { filter: Arc::new(Stack(all.to_vec())), digest: sum.finalize().into() })
        }
    }
}

impl Container {
    /// Adds a filter, the newest of the directions that `flags` name (`VDFilterAdd`). Requests that have begun keep those they have begun with. With
    /// [`FilterFlags::INFO`] the filter only tells what there is to tell of it, and is not added.
    ///
    /// CRYPT: with `KeyStore`, the text of a key store, whose password [`CryptInterface::password`] knows by `KeyId`; with `CreateKeyStore` = 1 and
    /// `Algorithm` a new key, whose key store [`CryptInterface::save`] is given; with `Algorithm` alone the key that [`CryptInterface::key`] knows.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for an unknown filter, or no direction; [`Status::UnknownCfgValues`]; [`Status::ValueNotFound`] for a value that is
    /// missing; [`Status::DekMissing`]; [`Status::PasswordIncorrect`]; of the key store. Nothing is added then.
    pub fn filter_add(&mut self, name: &str, flags: FilterFlags, config: &FilterConfig<'_>) -> Result<()> {
        let info = filter_info_one(name)?;
        let is_known = |key: &str| info.config.iter().any(|c| c.key.eq_ignore_ascii_case(key));
        if let Some((key, _)) = config.values.iter().find(|(key, _)| !is_known(key)) {
            let what = format!("{} has no configuration key '{}'", info.name, key.escape_debug());
            return Err(Error::of(Status::UnknownCfgValues, what));
        }
        let (reads, writes) = (flags.contains(FilterFlags::READ), flags.contains(FilterFlags::WRITE));
        if flags.contains(FilterFlags::INFO) {
            return tell(config);
        }
        if !reads && !writes {
            let what = "a filter works on what is read, on what is written, or on both";
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        let named = crypt(config)?;
        if reads {
            self.filters.read.push(named.clone());
        }
        if writes {
            self.filters.write.push(named);
        }
        self.filters.unallocated = config.unallocated;
        self.use_filters();
        Ok(())
    }

    /// Removes the newest filter of each direction that `flags` name (`VDFilterRemove`).
    ///
    /// # Errors
    /// [`Status::NotOpened`] if one of them has none, and nothing is removed; [`ErrorKind::InvalidArgument`] for no direction.
    pub fn filter_remove(&mut self, flags: FilterFlags) -> Result<()> {
        let (reads, writes) = (flags.contains(FilterFlags::READ), flags.contains(FilterFlags::WRITE));
        if !reads && !writes {
            return Err(Error::new(ErrorKind::InvalidArgument, "no direction is named"));
        }
        if (reads && self.filters.read.is_empty()) || (writes && self.filters.write.is_empty()) {
            return Err(Error::of(Status::NotOpened, "the container has no filter in that direction"));
        }
        if reads {
            self.filters.read.pop();
        }
        if writes {
            self.filters.write.pop();
        }
        self.use_filters();
        Ok(())
    }

    /// Removes all filters (`VDFilterRemoveAll`).
    pub fn filter_remove_all(&mut self) {
        self.filters = Added::default();
        self.use_filters();
    }

    /// How many filters what is read goes through, and what is written.
    pub fn filter_count(&self) -> (usize, usize) {
        (self.filters.read.len(), self.filters.write.len())
    }

    fn use_filters(&mut self) {
        if let Some(live) = &self.live {
            live.disk.change_filters(|f| *f = self.filters.of_disk());
        }
    }

    /// Makes of what all images hold what they would hold had it been written through the filters: it is read through those of reading, and written through those of
    /// writing, where it stands (`VDPrepareWithFilters`). So the disk shows, read through the filters of writing, what it showed through those of reading; the
    /// container's filters stay as they are, and it is up to the caller to add and remove them. Blocks that no image has are left alone.
    ///
    /// Every image is written, however it is open. Unlike in VirtualBox it may end at any moment: then no image can be opened but with
    /// [`super::OpenFlags::INFO`], and this function, called on a container with the same images so opened and the same filters, completes it.
    ///
    /// # Errors
    /// [`Status::NotOpened`] without an image; of [`recrypt`]; [`ErrorKind::Cancelled`].
    pub fn prepare_with_filters(&mut self, watch: &mut Watch<'_>) -> Result<()> {
        if self.images.is_empty() {
            return Err(Error::of(Status::NotOpened, "no image is open in the container"));
        }
        let (from, to) = (key_of(&self.filters.read), key_of(&self.filters.write));
        if from.as_ref().map(|k| k.digest) == to.as_ref().map(|k| k.digest) {
            return Ok(());
        }
        let how = Recrypt {
            // Images above these that are not in the container would keep what they have.
            image: OpenDisk { allow_write_to_parent: false, cache_image: None, ..self.how() },
            from,
            to,
            into: RecryptInto::Place,
            fill_holes: self.filters.unallocated == Unallocated::VirtualBox,
        };
        self.apart(|_| recrypt(&how, watch))
    }
}

fn value<'a>(config: &FilterConfig<'a>, key: &str) -> Option<&'a str> {
    config.values.iter().find(|(k, _)| k.eq_ignore_ascii_case(key)).map(|(_, v)| *v)
}

fn wanted<'a>(config: &FilterConfig<'a>, key: &str) -> Result<&'a str> {
    value(config, key)
        .ok_or_else(|| Error::of(Status::ValueNotFound, format!("CRYPT was not told its '{key}'")))
}

fn dek_missing(id: &str) -> Error {
    Error::of(Status::DekMissing, format!("the key or password '{}' is not known", id.escape_debug()))
}

fn asked<'a>(config: &FilterConfig<'a>, id: &str) -> Result<&'a dyn CryptInterface> {
    config.crypt.ok_or_else(|| dek_missing(id).hint("pass a CryptInterface"))
}

/// What a key store says of itself.
fn tell(config: &FilterConfig<'_>) -> Result<()> {
    let id = wanted(config, KEY_ID)?;
    let store = KeyStore::parse(wanted(config, KEY_STORE)?)?;
    asked(config, id)?.told(id, store.cipher());
    Ok(())
}

/// The filter that the configuration describes.
fn crypt(config: &FilterConfig<'_>) -> Result<Named> {
    let id = wanted(config, KEY_ID)?;
    let user = asked(config, id)?;
    let creates = match value(config, CREATE_KEY_STORE) {
        None | Some("0") => false,
        Some("1") => true,
        Some(other) => {
            let what = format!("'{CREATE_KEY_STORE}' is 0 or 1, not '{}'", other.escape_debug());
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
    };
    let (cipher, key, digest) = match value(config, KEY_STORE) {
        Some(_) if creates => {
            let what = "CRYPT takes a key store, or makes one, not both";
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        Some(text) => {
            let store = KeyStore::parse(text)?;
            (store.cipher(), store.unlock(&user.password(id)?)?, store.key_digest())
        }
        None => {
            let cipher: Cipher = wanted(config, ALGORITHM)?.parse()?;
            if creates {
                let (password, key) = (user.password(id)?, KeyStore::new_key(cipher)?);
                let store = KeyStore::wrap(cipher, &key, &password, iterations_for(cipher, KDF_MILLIS))?;
                user.save(id, &store.to_text())?;
                (cipher, key, store.key_digest())
            } else {
                let key = user.key(id)?;
                let digest = Sha256::new().chain_update(b"vdblk key").chain_update(key.bytes());
                (cipher, key, digest.finalize().into())
            }
        }
    };
    Ok(Named { filter: Arc::new(Crypt::new(cipher, &key)?), digest })
}
