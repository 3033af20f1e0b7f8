//! Encrypted media: what VirtualBox keeps with the base of a chain (its key store, and an identifier of the password), and changes of it.
//!
//! Between the key store and the bytes of the images nothing may come in doubt: the new key store is kept with the base, durable, before
//! the first byte changes ([`Plan`]), and takes the old one's place after the last. What tells how far a killed process had come is the side
//! file of the images (`docs/crypt.md`): it is there from before the first change until after the last.

use super::code::{Code, Fault, Result};
use super::operations::disk_of;
use super::record::{self, Record};
use super::state::Call;
use super::store::{Registry, call_in, said};
use crate::error::ErrorKind;
use crate::filter::{Cipher, KDF_MILLIS, KeySource, KeyStore, Secret, iterations_for};
use crate::job::{self, DiskKey, Progress, RecryptInto, Watch, is_unfinished};
use crate::map::DeviceType;
use crate::vd::{DiskOptions, OpenDisk};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use uuid::Uuid;

/// The key store, as text.
pub(super) const KEY_STORE: &str = "CRYPT/KeyStore";
/// What the password is called.
const KEY_ID: &str = "CRYPT/KeyId";
/// A change that has not ended.
const PLANNED: &str = "vdblk/encryption";

/// How a medium is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encryption {
    /// The cipher.
    pub cipher: Cipher,
    /// What its password is called; empty if it has no name.
    pub password_id: String,
}

/// A change of a medium's encryption.
#[derive(Debug)]
pub enum ChangeEncryption<'a> {
    /// A new key, under a new password; what is not encrypted yet will be.
    Encrypt {
        /// The cipher.
        cipher: Cipher,
        /// The new password.
        password: &'a Secret,
        /// What it is called.
        password_id: &'a str,
    },
    /// Another password for the same key: no byte of the images changes, and whoever knows the old key store and password can still
    /// read them.
    Password {
        /// The new password.
        password: &'a Secret,
        /// What it is called.
        password_id: &'a str,
    },
    /// No encryption any more.
    Decrypt,
}

impl ChangeEncryption<'_> {
    fn is_to(&self, plan: &Plan) -> Result<bool> {
        let Some(store) = &plan.key_store else { return Ok(matches!(self, ChangeEncryption::Decrypt)) };
        match self {
            ChangeEncryption::Encrypt { password, cipher, .. } => {
                let store = KeyStore::parse(store)?;
                Ok(store.cipher() == *cipher && store.unlock(password).is_ok())
            }
            _ => Ok(false),
        }
    }
}

/// What is to be, written down before the images are touched.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Plan {
    /// The image on top, beside which the side file is.
    top: PathBuf,
    /// `None`: it will not be encrypted.
    key_store: Option<String>,
    password_id: String,
    /// The side file has been there.
    begun: bool,
}

impl Plan {
    fn of(base: &Record) -> Result<Option<Plan>> {
        let plan = base.properties.get(PLANNED).map(|text| serde_json::from_str(text)).transpose();
        plan.map_err(|e| {
            Fault::new(Code::XmlError, format!("{PLANNED} cannot be read: {e}")).at(&base.location)
        })
    }

    fn put(&self, properties: &mut BTreeMap<String, String>) {
        let text = serde_json::to_string(self).expect("texts and a truth value");
        properties.insert(PLANNED.into(), text);
    }

    /// The change has been made.
    fn carry_out(&self, properties: &mut BTreeMap<String, String>) {
        properties.remove(PLANNED);
        match &self.key_store {
            Some(text) => set_key(properties, text, &self.password_id),
            None => {
                properties.remove(KEY_STORE);
                properties.remove(KEY_ID);
            }
        }
    }
}

fn set_key(properties: &mut BTreeMap<String, String>, text: &str, id: &str) {
    properties.insert(KEY_STORE.into(), text.into());
    properties.insert(KEY_ID.into(), id.into());
}

/// What encryption has put among a medium's properties: it goes where its bytes go.
pub(super) fn properties_of(r: &Record) -> impl Iterator<Item = (String, String)> + '_ {
    let ours = [KEY_STORE, KEY_ID];
    r.properties.iter().filter(move |(k, _)| ours.contains(&k.as_str())).map(|(k, v)| (k.clone(), v.clone()))
}

/// A key store is not lost or replaced by mistake: without it the disk is lost.
pub(super) fn allow_property(r: &Record, name: &str, value: Option<&str>) -> Result<()> {
    if name != KEY_STORE {
        return Ok(());
    }
    if r.properties.contains_key(KEY_STORE) {
        let why = "is encrypted with it: without its key store it is lost";
        return Err(Fault::new(Code::ObjectInUse, why)
            .at(&r.location)
            .hint("vdimg medium decrypt takes the encryption off"));
    }
    Ok(value.map_or(Ok(()), |text| KeyStore::parse(text).map(drop))?)
}

fn store_of(base: &Record) -> Result<Option<KeyStore>> {
    let text = base.properties.get(KEY_STORE);
    Ok(text.map(|t| KeyStore::parse(t).map_err(|e| e.at(&base.location))).transpose()?)
}

fn wrong_password(base: &Record) -> Fault {
    Fault::new(Code::PasswordIncorrect, "the password is not the one of the medium").at(&base.location)
}

impl Registry {
    /// How a medium is encrypted, which its base says for all that stand on it.
    ///
    /// # Errors
    /// [`Code::NotSupported`] if it is not; of the key store.
    pub fn encryption(&self, id: Uuid) -> Result<Encryption> {
        let base = self.settled_base(id)?;
        let store = store_of(&base)?.ok_or_else(|| not_encrypted(&base))?;
        let password_id = base.properties.get(KEY_ID).cloned().unwrap_or_default();
        Ok(Encryption { cipher: store.cipher(), password_id })
    }

    /// Whether this is a medium's password.
    ///
    /// # Errors
    /// [`Code::PasswordIncorrect`] if it is not; [`Code::NotSupported`] where there is none.
    pub fn check_encryption_password(&self, id: Uuid, password: &Secret) -> Result<()> {
        let base = self.settled_base(id)?;
        let store = store_of(&base)?.ok_or_else(|| not_encrypted(&base))?;
        store.unlock(password).map(drop).map_err(|_| wrong_password(&base))
    }

    /// Where the key store of a medium is, if it is encrypted.
    ///
    /// # Errors
    /// Of the registry's file.
    pub fn key_source(&self, id: Uuid) -> Result<Option<KeySource>> {
        let base = self.settled_base(id)?;
        let text = base.properties.get(KEY_STORE).cloned();
        Ok(text.map(|text| KeySource::Found { text, at: base.location }))
    }

    /// Changes the encryption of a medium and of all it stands on, in place, all of them locked for writing. `current` is the password it
    /// has. Stopped in any way, the same call completes it; until then nobody opens the images.
    ///
    /// # Errors
    /// [`Code::PasswordIncorrect`]; [`Code::NotSupported`] for what is no hard disk, or not encrypted; [`Code::InvalidObjectState`] while one is
    /// locked, has other children or is used by several machines; [`Code::ObjectInUse`] if the medium itself has children; as
    /// [`job::recrypt`].
    pub fn change_encryption(
        &self,
        id: Uuid,
        current: Option<&Secret>,
        change: &ChangeEncryption<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let chain = self.chain(id)?;
        self.write_as(|db, client| {
            allow_change(db, &chain)?;
            chain
                .iter()
                .rev()
                .try_for_each(|r| said(r, call_in(db, client, r.id, &Call::LockWrite, None)?).map(drop))
        })?;
        let done = self.change_locked(id, current, change, watch);
        let unlocked = self.write_as(|db, client| {
            chain
                .iter()
                .try_for_each(|r| said(r, call_in(db, client, r.id, &Call::UnlockWrite, None)?).map(drop))
        });
        done.and(unlocked)
    }

    fn change_locked(
        &self,
        id: Uuid,
        current: Option<&Secret>,
        change: &ChangeEncryption<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        // as it is now that nobody else changes it
        let chain = self.chain(id)?;
        let mut base = &chain[chain.len() - 1];
        let settled;
        if let Some(plan) = Plan::of(base)?.filter(|plan| !is_unfinished(&plan.top)) {
            self.settle(base.id, &plan)?;
            if plan.begun && change.is_to(&plan)? {
                return Ok(()); // it had been made, by one who was killed then
            }
            settled = self.read(|db, _| Registry::known(db, base.id))?;
            base = &settled;
        }
        let old = store_of(base)?;
        let key = match (&old, current) {
            (Some(store), Some(password)) => {
                Some((store.unlock(password).map_err(|_| wrong_password(base))?, store))
            }
            (Some(_), None) => {
                let why = "is encrypted, and its password was not given";
                return Err(Fault::new(Code::PasswordIncorrect, why).at(&base.location));
            }
            (None, Some(_)) => return Err(not_encrypted(base)),
            (None, None) => None,
        };
        let from = key.as_ref().map(|(key, store)| DiskKey::of(key, store)).transpose()?;
        if let Some(plan) = Plan::of(base)? {
            return self.resume(&chain, &plan, from, change, watch);
        }
        let (plan, to) = match *change {
            ChangeEncryption::Password { password, password_id } => {
                let (key, store) = key.ok_or_else(|| not_encrypted(base))?;
                let new = KeyStore::wrap(
                    store.cipher(),
                    &key,
                    password,
                    iterations_for(store.cipher(), KDF_MILLIS),
                )?;
                return self.with_base(base.id, |p| set_key(p, new.to_text().trim_end(), password_id));
            }
            ChangeEncryption::Encrypt { cipher, password, password_id } => {
                let key = KeyStore::new_key(cipher)?;
                let store = KeyStore::wrap(cipher, &key, password, iterations_for(cipher, KDF_MILLIS))?;
                let text = store.to_text().trim_end().to_string();
                (Some((text, password_id)), Some(DiskKey::of(&key, &store)?))
            }
            ChangeEncryption::Decrypt if from.is_none() => return Err(not_encrypted(base)),
            ChangeEncryption::Decrypt => (None, None),
        };
        let (key_store, id) = plan.map_or((None, ""), |(text, id)| (Some(text), id));
        let plan =
            Plan { top: chain[0].location.clone(), key_store, password_id: id.to_string(), begun: false };
        self.with_base(base.id, |p| plan.put(p))?;
        self.carry_out(&chain, &plan, (from, to), watch)
    }

    /// Goes on with a change that did not end; the same one has to be asked for.
    fn resume(
        &self,
        chain: &[Record],
        plan: &Plan,
        from: Option<DiskKey>,
        change: &ChangeEncryption<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let base = &chain[chain.len() - 1];
        if plan.top != chain[0].location || !change.is_to(plan)? {
            let why = "another change of its encryption was interrupted";
            return Err(Fault::new(Code::InvalidObjectState, why)
                .at(&base.location)
                .hint(format!("repeat that one, of {}", plan.top.display())));
        }
        let to = match (&plan.key_store, change) {
            (Some(text), ChangeEncryption::Encrypt { password, .. }) => {
                let store = KeyStore::parse(text)?;
                Some(DiskKey::of(&store.unlock(password)?, &store)?)
            }
            _ => None,
        };
        self.carry_out(chain, plan, (from, to), watch)
    }

    fn carry_out(
        &self,
        chain: &[Record],
        plan: &Plan,
        (from, to): (Option<DiskKey>, Option<DiskKey>),
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let base = chain[chain.len() - 1].id;
        let begun = Cell::new(plan.begun);
        let failed = RefCell::new(None);
        let cancelled = || failed.borrow().is_some() || (watch.cancelled)();
        let mut progress = |p: Progress| {
            // The side file is there before the first step, and goes after the last.
            if !begun.replace(true) {
                let now = Plan { begun: true, ..plan.clone() };
                *failed.borrow_mut() = self.with_base(base, |p| now.put(p)).err();
            }
            (watch.progress)(p);
        };
        let image = OpenDisk { options: DiskOptions::default(), ..disk_of(chain, Some(Duration::ZERO)) };
        let how = job::Recrypt { image, from, to, into: RecryptInto::Place, fill_holes: false };
        let done = job::recrypt(&how, &mut Watch { cancelled: &cancelled, progress: &mut progress });
        if let Some(e) = failed.take() {
            return Err(e);
        }
        if let Err(e) = done {
            if !is_unfinished(&plan.top) {
                // Nothing has begun.
                self.with_base(base, |p| drop(p.remove(PLANNED)))?;
            }
            return Err(match e.kind() {
                ErrorKind::ReadOnly | ErrorKind::Locked => Fault::because(Code::InvalidObjectState, e),
                _ => e.into(),
            });
        }
        self.with_base(base, |p| plan.carry_out(p))
    }

    fn with_base(&self, base: Uuid, f: impl FnOnce(&mut BTreeMap<String, String>)) -> Result<()> {
        self.write(|db| {
            let mut r = Registry::known(db, base)?;
            f(&mut r.properties);
            record::save(db, &r)
        })
    }

    /// The base of a medium's chain. What a change that was killed had completed, or had not begun, is written down.
    fn settled_base(&self, id: Uuid) -> Result<Record> {
        let mut chain = self.chain(id)?;
        let base = chain.pop().expect("a chain has a base");
        let Some(plan) = Plan::of(&base)? else { return Ok(base) };
        if is_unfinished(&plan.top) || self.is_written(base.id)? {
            return Ok(base);
        }
        self.settle(base.id, &plan)?;
        self.read(|db, _| Registry::known(db, base.id))
    }

    /// There is no side file: what was planned has been done, or was not begun.
    fn settle(&self, base: Uuid, plan: &Plan) -> Result<()> {
        self.with_base(base, |p| {
            if plan.begun {
                plan.carry_out(p);
            } else {
                p.remove(PLANNED);
            }
        })
    }

    /// Somebody is at it.
    fn is_written(&self, id: Uuid) -> Result<bool> {
        Ok(self.standing(id)?.1.state() == super::State::LockedWrite)
    }
}

fn not_encrypted(base: &Record) -> Fault {
    Fault::new(Code::NotSupported, "is not encrypted").at(&base.location)
}

/// VirtualBox's rules.
fn allow_change(db: &Connection, chain: &[Record]) -> Result<()> {
    let top = &chain[0];
    let refused = |code, r: &Record, why: &str| Err(Fault::new(code, why).at(&r.location));
    if top.device != DeviceType::HardDisk {
        return refused(Code::NotSupported, top, "only hard disks are encrypted");
    }
    if !record::children(db, top.id)?.is_empty() {
        return refused(Code::ObjectInUse, top, "has children, which share its key: name the one on top");
    }
    for r in chain {
        if record::children(db, r.id)?.len() > 1 {
            return refused(Code::InvalidObjectState, r, "has several children, which share its key");
        }
        let mut machines: Vec<_> = record::attachments(db, r.id)?.into_iter().map(|a| a.machine).collect();
        machines.sort_unstable();
        machines.dedup();
        if machines.len() > 1 {
            return refused(Code::InvalidObjectState, r, "is attached to several machines");
        }
    }
    Ok(())
}
