//! IMedium: a handle on a known medium. `docs/medium-api.md` has a row for each of its parts.

use super::absolute;
use super::check::{Question, format_named, format_of_name};
use super::code::{Code, Fault, Result};
use super::kinds::{MediumType, State, TypeFacts, allow_type};
use super::record::{self, Attachment, Record};
use super::state::{Answer, Call, Client, Outside, Phase};
use super::store::{Registry, call_in, said};
use crate::map::DeviceType;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// A known medium. It is asked anew with each call, so that two handles never differ; once it was closed every call fails with
/// [`Code::AccessDenied`].
#[derive(Clone, Copy, Debug)]
pub struct Medium<'r> {
    registry: &'r Registry,
    id: Uuid,
}

/// A call that changes the state: what it was, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The state it found.
    pub before: State,
    /// The state it left.
    pub after: State,
}

/// A client that holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockHolder {
    /// Its process, as the machine that took the lock counts them.
    pub pid: u32,
    /// The name of its program.
    pub program: String,
    /// `read` or `write`.
    pub mode: String,
    /// How many times over.
    pub count: u32,
}

impl<'r> Medium<'r> {
    pub(super) fn new(registry: &'r Registry, id: Uuid) -> Medium<'r> {
        Medium { registry, id }
    }

    /// All that is kept of it.
    ///
    /// # Errors
    /// [`Code::AccessDenied`] once it was closed.
    pub fn record(&self) -> Result<Record> {
        self.registry.read(|db, _| Registry::known(db, self.id))
    }

    /// UUID of the medium. While it is made or removed the registry's own name for it.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Optional description; `None` for new media.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn description(&self) -> Result<Option<String>> {
        Ok(self.record()?.description)
    }

    /// Changes the description; `None` takes it away.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] unless it is Created; [`Code::AccessDenied`].
    pub fn set_description(&self, text: Option<&str>) -> Result<()> {
        self.change(&Call::Modify, |_, r| {
            r.description = text.filter(|t| !t.is_empty()).map(str::to_string);
            Ok(())
        })
    }

    /// What is kept with it under a name; `None`: nothing. Names beginning with `CRYPT/` are VirtualBox's encryption.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn property(&self, name: &str) -> Result<Option<String>> {
        Ok(self.record()?.properties.remove(name))
    }

    /// Keeps a text with it under a name; `None`: nothing any more.
    ///
    /// # Errors
    /// [`Code::InvalidArg`] for an empty name, one of vdblk's own, or a key store that is none; [`Code::ObjectInUse`] for the key store of an
    /// encrypted medium; [`Code::InvalidObjectState`] while it is locked or inaccessible.
    pub fn set_property(&self, name: &str, value: Option<&str>) -> Result<()> {
        if name.is_empty() || name.starts_with("vdblk/") {
            return Err(Fault::new(
                Code::InvalidArg,
                format!("'{}' is no property to set", name.escape_debug()),
            ));
        }
        self.change(&Call::Modify, |_, r| {
            super::encryption::allow_property(r, name, value)?;
            match value {
                Some(text) => r.properties.insert(name.into(), text.into()),
                None => r.properties.remove(name),
            };
            Ok(())
        })
    }

    /// Current state, after an accessibility check.
    ///
    /// # Errors
    /// [`Code::AccessDenied`]; of the registry's file. A check that fails is none: see [`Self::last_access_error`].
    pub fn state(&self) -> Result<State> {
        let outside = self.registry.check(&[self.id])?.pop().flatten();
        self.state_seen(outside)
    }

    /// The state as it was last known, without a check: nothing waits.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn cached_state(&self) -> Result<State> {
        self.state_seen(None)
    }

    /// The state with what a check ([`Registry::check`]) saw others do with the file.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn state_seen(&self, outside: Option<Outside>) -> Result<State> {
        let (_, mut standing) = self.registry.standing(self.id)?;
        standing.outside = outside;
        Ok(standing.state())
    }

    /// Location of the storage unit: the full file name.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn location(&self) -> Result<PathBuf> {
        Ok(self.record()?.location)
    }

    /// Changes the record of where it is; no file is touched. Relative names are relative to the registry's folder; one without an
    /// extension gets that of the format.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] while it is locked, made or removed; [`Code::InvalidArg`] for a place that another medium has.
    pub fn set_location(&self, to: &Path) -> Result<()> {
        let home = self.registry.home().to_path_buf();
        self.change(&Call::Relocate, |db, r| {
            let to = absolute(&with_extension(&home.join(to), r.device, &r.format));
            if record::at_location(db, &to)?.iter().any(|o| o.device == r.device && o.id != r.id) {
                return Err(Fault::new(Code::InvalidArg, "is the location of another medium").at(&to));
            }
            r.location = to;
            Ok(())
        })
    }

    /// The file's name without its folder.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn name(&self) -> Result<String> {
        Ok(self.record()?.name())
    }

    /// Physical size in bytes: of an inaccessible medium the last known one, of one that is not there 0.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn size(&self) -> Result<u64> {
        let r = self.record()?;
        Ok(if r.phase == Phase::Creating { 0 } else { r.size })
    }

    /// Size of the disk in bytes, as last known.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn logical_size(&self) -> Result<u64> {
        Ok(self.record()?.logical_size)
    }

    /// What the last accessibility check found wrong; `None` if nothing, or if there was none.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn last_access_error(&self) -> Result<Option<String>> {
        Ok(self.record()?.last_access_error)
    }

    /// The machines that use it in any of their states; `None`: no machine does.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn machine_ids(&self) -> Result<Option<Vec<Uuid>>> {
        let mut ids: Vec<_> = self.attachments()?.iter().map(|a| a.machine).collect();
        ids.dedup();
        Ok(Some(ids).filter(|i| !i.is_empty()))
    }

    /// The states of a machine that use it: the machine's own id first if its current state does, then its snapshots; `None`: it
    /// is not attached to the machine at all.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn snapshot_ids(&self, machine: Uuid) -> Result<Option<Vec<Uuid>>> {
        let uses = self.attachments()?.into_iter().filter(|a| a.machine == machine);
        let ids: Vec<_> = uses.map(|a| a.snapshot.unwrap_or(machine)).collect();
        Ok(Some(ids).filter(|i| !i.is_empty()))
    }

    pub(super) fn attachments(&self) -> Result<Vec<Attachment>> {
        self.registry.read(|db, _| {
            Registry::known(db, self.id)?;
            record::attachments(db, self.id)
        })
    }

    /// Locks it for reading; may be nested.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] unless it is Created, Inaccessible or LockedRead.
    pub fn lock_read(&self) -> Result<Change> {
        self.lock(&Call::LockRead)
    }

    /// Takes back one [`Self::lock_read`] of this client.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] if this client has none.
    pub fn unlock_read(&self) -> Result<Change> {
        self.answer(&Call::UnlockRead, None)
    }

    /// Locks it for writing, alone.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] unless it is Created or Inaccessible, and for media that are never written.
    pub fn lock_write(&self) -> Result<Change> {
        self.lock(&Call::LockWrite)
    }

    /// Takes back [`Self::lock_write`] of this client.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] if this client has none.
    pub fn unlock_write(&self) -> Result<Change> {
        self.answer(&Call::UnlockWrite, None)
    }

    /// Others may use the file who know of no registry: they count.
    fn lock(&self, call: &Call) -> Result<Change> {
        self.answer(call, self.outside()?)
    }

    /// What others do with the file, as far as that can be found out in time.
    fn outside(&self) -> Result<Option<Outside>> {
        let r = self.record()?;
        let q = Question { path: r.location, format: format_named(&r.format), find_parent: false };
        Ok(self.registry.ask(&q).ok().and_then(|f| f.outside()))
    }

    fn answer(&self, call: &Call, outside: Option<Outside>) -> Result<Change> {
        let r = self.record()?;
        let Answer { before, after, .. } = said(&r, self.registry.call(self.id, call, outside)?)?;
        Ok(Change { before, after })
    }

    /// Forgets the medium. Its file stays, and can be made known again.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] unless it is Created or Inaccessible; [`Code::ObjectInUse`] with machines or children;
    /// [`Code::FileError`], [`Code::XmlError`] of the registry's file.
    pub fn close(self) -> Result<()> {
        self.registry.write_as(|db, client| {
            let r = Registry::known(db, self.id)?;
            said(&r, call_in(db, client, self.id, &Call::Close, None)?)?;
            record::remove(db, self.id)
        })
    }

    /// Makes it a medium of another type.
    ///
    /// # Errors
    /// As [`allow_type`]; [`Code::InvalidObjectState`] unless it is Created.
    pub fn set_type(&self, to: MediumType) -> Result<()> {
        self.change(&Call::Modify, |db, r| {
            let s = record::standing(db, r, &[])?;
            let facts = TypeFacts {
                device: r.device,
                old: r.medium_type,
                is_diff: r.parent.is_some(),
                children: s.children,
                machines: s.machines,
                is_fixed: is_fixed(r),
            };
            allow_type(facts, to).map_err(|e| e.at(&r.location))?;
            r.medium_type = to;
            Ok(())
        })
    }

    /// Whether it is made anew at every start.
    ///
    /// # Errors
    /// [`Code::NotSupported`] for what is no diff; [`Code::InvalidObjectState`] unless it is Created.
    pub fn set_auto_reset(&self, on: bool) -> Result<()> {
        self.change(&Call::Modify, |_, r| {
            if r.parent.is_none() {
                let why = "only a differencing image is reset";
                return Err(Fault::new(Code::NotSupported, why).at(&r.location));
            }
            r.auto_reset = on;
            Ok(())
        })
    }

    /// A machine uses it: in its current state, or in a snapshot. Of media that machines use through diffs only that is refused, see
    /// [`Registry::attach`].
    ///
    /// # Errors
    /// [`Code::ObjectInUse`] if it is attached so already, or to another machine; [`Code::InvalidObjectState`].
    pub fn attach(&self, machine: Uuid, snapshot: Option<Uuid>) -> Result<()> {
        self.registry.attach_record(self.id, &Attachment { machine, snapshot, place: None })
    }

    /// The machine does not use it any more, in this state of it.
    ///
    /// # Errors
    /// [`Code::ObjectNotFound`] if it did not.
    pub fn detach(&self, machine: Uuid, snapshot: Option<Uuid>) -> Result<()> {
        self.registry.write(|db| {
            let r = Registry::known(db, self.id)?;
            if record::drop_attachment(db, self.id, machine, snapshot)? {
                return Ok(());
            }
            let why = format!("is not attached to this state of machine {machine}");
            Err(Fault::new(Code::ObjectNotFound, why).at(&r.location))
        })
    }

    /// Its children.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn children(&self) -> Result<Vec<Uuid>> {
        self.registry.read(|db, _| {
            Registry::known(db, self.id)?;
            Ok(record::children(db, self.id)?.iter().map(|c| c.id).collect())
        })
    }

    /// Who holds locks on it.
    ///
    /// # Errors
    /// [`Code::AccessDenied`].
    pub fn holders(&self) -> Result<Vec<LockHolder>> {
        self.registry.read(|db, dead| {
            Registry::known(db, self.id)?;
            let sql = "SELECT h.id, h.pid, h.program, l.mode, l.count FROM locks l JOIN holders h ON h.id = l.holder
                       WHERE l.medium = ?1 ORDER BY h.id";
            let mut select = db.prepare(sql)?;
            let rows = select.query_map([self.id.to_string()], |r| {
                let holder =
                    LockHolder { pid: r.get(1)?, program: r.get(2)?, mode: r.get(3)?, count: r.get(4)? };
                Ok((r.get::<_, i64>(0)?, holder))
            })?;
            let all: Vec<_> = rows.collect::<rusqlite::Result<_>>()?;
            Ok(all.into_iter().filter(|(id, _)| !dead.contains(id)).map(|(_, h)| h).collect())
        })
    }

    /// Asks whether `call` is allowed, lets `f` change the record, and keeps it: all in one transaction.
    fn change(
        &self,
        call: &Call,
        f: impl FnOnce(&rusqlite::Connection, &mut Record) -> Result<()>,
    ) -> Result<()> {
        self.registry.write(|db| {
            let mut r = Registry::known(db, self.id)?;
            // Calls that only ask belong to nobody.
            said(&r, call_in(db, Client(0), self.id, call, None)?)?;
            f(db, &mut r)?;
            record::save(db, &r)
        })
    }
}

/// All of its disk has its place in the file.
fn is_fixed(r: &Record) -> bool {
    r.variant == "fixed" || format_named(&r.format) == Some(crate::format::Format::Raw)
}

/// The name with the extension that goes with its format, if it has none.
pub(super) fn with_extension(path: &Path, device: DeviceType, format: &str) -> PathBuf {
    if path.extension().is_some() || format_of_name(path).is_some() {
        return path.to_path_buf();
    }
    let extension = match (device, format_named(format)) {
        (DeviceType::Dvd, _) => "iso",
        (DeviceType::Floppy, _) => "img",
        (DeviceType::HardDisk, Some(f)) => f.extensions()[0],
        (DeviceType::HardDisk, None) => "vdi",
    };
    let mut name = path.as_os_str().to_os_string();
    name.push(".");
    name.push(extension);
    name.into()
}
