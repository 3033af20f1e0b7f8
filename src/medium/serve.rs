//! A known medium as a disk that is served: its chain, its type's rule, its locks.

use super::check::format_named;
use super::code::{Code, Fault, Result};
use super::kinds::MediumType;
use super::operations::{disk_of, indirect_diff};
use super::record::{self, Record};
use super::store::{Registry, lock_all_in};
use super::{Attachment, vbox};
use crate::filter::KeySource;
use crate::map::DeviceType;
use crate::vd::ImageSpec;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Who is served from a diff that was made for that; kept with the diff.
const FOR: &str = "vdblk/for";
/// A diff that is being served, or was when its server was killed: the boot's id.
const SERVING: &str = "vdblk/serving";
/// Time between two tries to lock.
const RETRY_EVERY: Duration = Duration::from_millis(50);

/// What is to be served, and how.
#[derive(Clone, Debug)]
pub struct ServeMedium {
    /// Its UUID or place.
    pub medium: String,
    /// The machine it is for: of a medium that machines use through diffs it gets its own.
    pub machine: Option<Uuid>,
    /// Where front-ends reach it: tells apart whom a diff was made for where no machine is named.
    pub name: String,
    /// No changes.
    pub read_only: bool,
    /// How long to wait for locks.
    pub lock_wait: Duration,
}

/// A medium that is locked for being served, until dropped.
#[derive(Debug)]
pub struct Served<'r> {
    registry: &'r Registry,
    ids: Vec<Uuid>,
    write: bool,
    /// The image that is written, or read.
    pub image: ImageSpec,
    /// Its parents, base first.
    pub parents: Vec<ImageSpec>,
    /// Its type takes no changes, or nobody wants any.
    pub read_only: bool,
    /// Where its key store is, if it is encrypted.
    pub keys: Option<KeySource>,
}

impl Served<'_> {
    /// The medium that is served: a diff of the one that was named, where its type says so.
    pub fn id(&self) -> Uuid {
        self.ids[0]
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        // After an error the locks go with the process.
        let _ = self.registry.write(|db| {
            let mut r = Registry::known(db, self.ids[0])?;
            if r.properties.remove(SERVING).is_some() {
                record::save(db, &r)?;
            }
            Ok(())
        });
        let _ = self.registry.unlock_all(&self.ids, self.write);
    }
}

impl Registry {
    /// Locks a medium and what is beneath it, all or none: what is written for writing, the rest for reading.
    ///
    /// # Errors
    /// [`Code::ObjectNotFound`]; [`Code::ObjectInUse`] for a medium with children that shall be written; [`Code::InvalidObjectState`]
    /// while it is locked by others; of making or resetting a diff.
    pub fn serve(&self, how: &ServeMedium) -> Result<Served<'_>> {
        let r = self.find(&how.medium)?.record()?;
        let read_only = how.read_only || r.medium_type == MediumType::Readonly || r.device == DeviceType::Dvd;
        let ids = if read_only || !r.medium_type.is_indirect() {
            if !read_only {
                self.refuse_parent(&r)?;
            }
            // A shareable one is not locked against its other users; its file is.
            let write = !read_only && r.medium_type != MediumType::Shareable;
            let chain = self.lock_in_time(r.id, write, how.lock_wait)?;
            (chain, write)
        } else {
            (self.lock_diff(&r, how)?, true)
        };
        let (chain, write) = ids;
        let disk = disk_of(&chain, None);
        let served = Served {
            keys: self.key_source(chain[0].id)?,
            registry: self,
            ids: chain.iter().map(|r| r.id).collect(),
            write,
            image: disk.image,
            parents: disk.parents,
            read_only,
        };
        if chain[0].auto_reset && !read_only {
            self.begin_session(&chain)?;
        }
        Ok(served)
    }

    /// Its children would show other bytes.
    fn refuse_parent(&self, r: &Record) -> Result<()> {
        let children = self.read(|db, _| Ok(record::children(db, r.id)?.len()))?;
        if children == 0 {
            return Ok(());
        }
        let why = format!(
            "has {}: writing to it would corrupt them",
            super::state::count(children, "child", "children")
        );
        Err(Fault::new(Code::ObjectInUse, why).at(&r.location).hint("serve a child, or pass --read-only"))
    }

    fn lock_in_time(&self, id: Uuid, write: bool, wait: Duration) -> Result<Vec<Record>> {
        let until = Instant::now().checked_add(wait);
        loop {
            let chain = self.chain(id)?;
            let ids: Vec<_> = chain.iter().map(|r| r.id).collect();
            match self.lock_all(&ids, write) {
                Ok(()) => return Ok(chain),
                Err(e)
                    if e.code() == Code::InvalidObjectState && until.is_none_or(|u| Instant::now() < u) =>
                {
                    thread::sleep(RETRY_EVERY);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// A diff of a medium that is not written itself: the machine's own, the one that was made for this name, one that would be made
    /// anew anyway and is free, or a new one.
    fn lock_diff(&self, base: &Record, how: &ServeMedium) -> Result<Vec<Record>> {
        if let Some(machine) = how.machine {
            let is_own =
                |uses: &[Attachment]| uses.iter().any(|a| a.machine == machine && a.snapshot.is_none());
            let own = self.read(|db, _| {
                let children = record::children(db, base.id)?.into_iter();
                let with_uses = children.map(|c| Ok((record::attachments(db, c.id)?, c)));
                let all: Vec<_> = with_uses.collect::<Result<_>>()?;
                Ok(all.into_iter().find(|(uses, _)| is_own(uses)).map(|(_, c)| c.id))
            })?;
            let id = match own {
                Some(id) => id,
                None => self.attach(base.id, machine, None)?.id(),
            };
            return self.lock_in_time(id, true, how.lock_wait);
        }
        let free = self.write_as(|db, client| {
            let mut children = record::children(db, base.id)?;
            children.sort_by_key(|c| c.properties.get(FOR) != Some(&how.name));
            for c in children {
                let is_ours = c.properties.get(FOR) == Some(&how.name);
                let is_spare = c.auto_reset && !is_left_running(&c);
                let standing = record::standing(db, &c, &[])?;
                let is_used = standing.children > 0 || standing.machines > 0;
                if is_used || !(is_ours || is_spare && c.properties.contains_key(FOR)) {
                    continue;
                }
                let chain = super::store::chain_of(db, c.id)?;
                let ids: Vec<_> = chain.iter().map(|r| r.id).collect();
                if standing.state() == super::State::LockedWrite {
                    continue;
                }
                lock_all_in(db, client, &ids, true)?;
                return Ok(Some(chain));
            }
            Ok(None)
        })?;
        let chain = match free {
            Some(chain) => chain,
            None => {
                let id = self.create(&indirect_diff(base))?.id();
                self.lock_in_time(id, true, how.lock_wait)?
            }
        };
        self.write(|db| {
            let mut r = Self::known(db, chain[0].id)?;
            r.properties.insert(FOR.into(), how.name.clone());
            record::save(db, &r)
        })?;
        Ok(chain)
    }

    /// Makes a diff anew that is to be, unless its server was killed: its guest may still be running, and goes on with what it has.
    fn begin_session(&self, chain: &[Record]) -> Result<()> {
        let r = &chain[0];
        if is_left_running(r) {
            let path = r.location.display();
            tracing::info!("{path}: was being served when vdblk was killed: its contents are kept this time");
        } else {
            self.allow_reset(chain)?;
            self.reset_locked(chain)?;
        }
        self.write(|db| {
            let mut r = Self::known(db, r.id)?;
            r.properties.insert(SERVING.into(), boot_id());
            record::save(db, &r)
        })
    }
}

fn is_left_running(r: &Record) -> bool {
    r.properties.get(SERVING).is_some_and(|boot| *boot == boot_id())
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

/// A disk of a machine.
#[derive(Clone, Debug)]
pub struct MachineDisk {
    /// The image that is written.
    pub image: ImageSpec,
    /// Its parents, base first.
    pub parents: Vec<ImageSpec>,
    /// Where its key store is, if it is encrypted.
    pub keys: Option<KeySource>,
}

/// A disk of a machine's current state, straight from its `.vbox`. Disks are counted from 0 in the order of the controllers.
///
/// # Errors
/// [`Code::FileError`], [`Code::XmlError`]; [`Code::ObjectNotFound`] where there is no such disk, or its medium is registered elsewhere.
pub fn machine_disk(file: &Path, number: usize) -> Result<MachineDisk> {
    let (_, settings) = vbox::read(file)?;
    let is_current = |u: &&vbox::Use| u.device == DeviceType::HardDisk && u.snapshot.is_none();
    let disks: Vec<_> = settings.uses.iter().filter(is_current).collect();
    let not_found = |why: String| Fault::new(Code::ObjectNotFound, why).at(file);
    let Some(disk) = disks.get(number) else {
        let there = super::state::count(disks.len(), "hard disk", "hard disks");
        return Err(not_found(format!("has no disk {number}: its machine has {there}, counted from 0")));
    };
    let (mut chain, mut next, mut keys) = (Vec::new(), Some(disk.medium), None);
    while let Some(id) = next {
        let Some(e) = settings.media.iter().find(|m| m.id == id) else {
            let why = format!("does not say where medium {id} is");
            return Err(not_found(why)
                .hint("vdimg medium import the VirtualBox.xml that does, and serve it with --medium"));
        };
        let format = e.format.as_deref().and_then(format_named);
        chain.push(ImageSpec { path: vbox::resolve(file, &e.location), format });
        next = e.parent;
        // The base's, which is the last.
        keys = e.properties.get(super::encryption::KEY_STORE);
    }
    let image = chain.remove(0);
    chain.reverse();
    let keys = keys.map(|text| KeySource::Found { text: text.clone(), at: file.to_path_buf() });
    Ok(MachineDisk { image, parents: chain, keys })
}
