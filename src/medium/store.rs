//! The registry: media in a database that many processes share.
//!
//! Every change is one transaction, so that a process that is killed has done all of it or nothing. Whoever writes first
//! clears away what belonged to clients that are gone.

use super::check::{CHECK_LIMIT, Facts, Prober, Question, format_named};
use super::code::{Code, Fault, Result};
use super::handle::Medium;
use super::holder::{self, Holder};
use super::kinds::MediumType;
use super::record::{self, Attachment, Record};
use super::state::{Answer, Call, Client, Outside, Standing};
use super::{absolute, db};
use crate::format::Format;
use crate::limits::MAX_CHAIN_IMAGES;
use crate::map::DeviceType;
use rusqlite::{Connection, Transaction, TransactionBehavior, params};
use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

/// An open registry. As a client it holds locks; they go with it.
#[derive(Debug)]
pub struct Registry {
    path: PathBuf,
    db: Connection,
    holder: RefCell<Option<Holder>>,
    prober: Prober,
    limit: Cell<Duration>,
}

impl Registry {
    /// Opens a registry, which is made if it is not there, and completes or takes back what clients that are gone left half
    /// done. Media are looked at by threads.
    ///
    /// # Errors
    /// [`Code::FileError`] where it is not accessible, [`Code::XmlError`] where it is none.
    pub fn open(path: &Path) -> Result<Registry> {
        Self::open_with(path, Prober::Thread)
    }

    /// The same, with media looked at by `prober`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(path: &Path, prober: Prober) -> Result<Registry> {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
        let registry = Registry {
            db: db::open(&path)?,
            holder: RefCell::new(None),
            limit: Cell::new(CHECK_LIMIT),
            prober,
            path,
        };
        registry.recover()?;
        Ok(registry)
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that relative locations are relative to.
    pub fn home(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// How long a look at a medium may take.
    pub fn set_check_limit(&self, limit: Duration) {
        self.limit.set(limit);
    }

    pub(super) fn holders_file(&self) -> PathBuf {
        holder::file_of(&self.path)
    }

    /// One moment of it; clients that are gone are handed over.
    pub(super) fn read<T>(&self, f: impl FnOnce(&Connection, &[i64]) -> Result<T>) -> Result<T> {
        let tx = Transaction::new_unchecked(&self.db, TransactionBehavior::Deferred)?;
        let dead = holder::dead(&tx, &self.holders_file())?;
        f(&tx, &dead)
    }

    /// A change: all of it or, after an error, nothing.
    pub(super) fn write<T>(&self, f: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        let tx = Transaction::new_unchecked(&self.db, TransactionBehavior::Immediate)?;
        holder::forget_dead(&tx, &self.holders_file())?;
        let done = f(&tx)?;
        tx.commit()?;
        Ok(done)
    }

    /// A change made by this client, which is noted with its first one.
    pub(super) fn write_as<T>(&self, f: impl FnOnce(&Connection, Client) -> Result<T>) -> Result<T> {
        let mut entered = None;
        let done = self.write(|db| {
            let known = self.holder.borrow().as_ref().map(|h| h.id);
            let id = match known {
                Some(id) => id,
                None => {
                    let new = holder::enter(db, &self.holders_file())?;
                    entered.insert(new).id
                }
            };
            f(db, Client(id))
        })?;
        if entered.is_some() {
            *self.holder.borrow_mut() = entered;
        }
        Ok(done)
    }

    /// From here on calls are another process's: locks belong to it and go with it.
    ///
    /// # Errors
    /// [`Code::InvalidArg`] if there is no such process.
    pub fn act_for(&self, pid: u32) -> Result<()> {
        let other = self.write(|db| holder::enter_process(db, pid))?;
        *self.holder.borrow_mut() = Some(other);
        Ok(())
    }

    /// All media, by location.
    ///
    /// # Errors
    /// Of the registry's file.
    pub fn media(&self) -> Result<Vec<Record>> {
        self.read(|db, _| record::all(db))
    }

    /// The medium with this UUID.
    ///
    /// # Errors
    /// [`Code::ObjectNotFound`].
    pub fn medium(&self, id: Uuid) -> Result<Medium<'_>> {
        match self.read(|db, _| record::find(db, id))? {
            Some(_) => Ok(Medium::new(self, id)),
            None => Err(Fault::new(Code::ObjectNotFound, format!("no medium {id} is known"))),
        }
    }

    /// The medium with this UUID, or at this place.
    ///
    /// # Errors
    /// [`Code::ObjectNotFound`]; [`Code::InvalidArg`] where several are meant.
    pub fn find(&self, uuid_or_path: &str) -> Result<Medium<'_>> {
        let bare = uuid_or_path.trim_start_matches('{').trim_end_matches('}');
        if let Ok(id) = Uuid::parse_str(bare) {
            return self.medium(id);
        }
        let path = absolute(Path::new(uuid_or_path));
        let found = self.read(|db, _| record::at_location(db, &path))?;
        match &found[..] {
            [one] => Ok(Medium::new(self, one.id)),
            [] => Err(Fault::new(Code::ObjectNotFound, "is no known medium")
                .at(&path)
                .hint("vdimg medium add makes it known")),
            _ => Err(Fault::new(Code::InvalidArg, "several media are there: name one by its UUID").at(&path)),
        }
    }

    /// A record that has to be there: a handle whose medium was closed is dead.
    pub(super) fn known(db: &Connection, id: Uuid) -> Result<Record> {
        let ready =
            || Fault::new(Code::AccessDenied, format!("medium {id}: the object is not ready: it was closed"));
        record::find(db, id)?.ok_or_else(ready)
    }

    /// Asks the state machine, and keeps what it says.
    pub(super) fn call(&self, id: Uuid, call: &Call, outside: Option<Outside>) -> Result<Answer> {
        self.write_as(|db, client| call_in(db, client, id, call, outside))
    }

    /// What stands in the way of calls, as everybody sees it.
    pub(super) fn standing(&self, id: Uuid) -> Result<(Record, Standing)> {
        self.read(|db, dead| {
            let r = Self::known(db, id)?;
            let s = record::standing(db, &r, dead)?;
            Ok((r, s))
        })
    }

    /// What is said of a file by those who look.
    pub(super) fn ask(&self, q: &Question) -> std::result::Result<Facts, String> {
        self.prober.ask(q, self.limit.get())
    }

    /// The same of many, at the same time.
    pub(super) fn ask_all(&self, questions: &[Question]) -> Vec<std::result::Result<Facts, String>> {
        self.prober.ask_all(questions, self.limit.get())
    }

    /// Looks at media, all at the same time, and keeps what was seen; tells what others do with each.
    ///
    /// # Errors
    /// Of the registry's file. A medium that cannot be read is no error: its record says so.
    pub fn check(&self, ids: &[Uuid]) -> Result<Vec<Option<Outside>>> {
        let asked: Vec<_> = ids.iter().map(|id| self.question(*id)).collect::<Result<_>>()?;
        let questions: Vec<_> = asked.iter().flatten().map(|(_, q)| q.clone()).collect();
        let mut answers = self.ask_all(&questions).into_iter();
        let mut outside = Vec::new();
        for asked in &asked {
            let Some((r, q)) = asked else {
                outside.push(None);
                continue;
            };
            let seen = answers.next().unwrap_or_else(|| Err("was not looked at".into()));
            outside.push(seen.as_ref().ok().and_then(Facts::outside));
            self.keep(r, q, &seen)?;
        }
        Ok(outside)
    }

    /// `None`: it is being made or removed, or gone.
    fn question(&self, id: Uuid) -> Result<Option<(Record, Question)>> {
        self.read(|db, _| {
            let Some(r) = record::find(db, id)?.filter(|r| r.phase.is_there()) else { return Ok(None) };
            let (path, format) = (r.location.clone(), format_named(&r.format));
            let q = Question { path, format, find_parent: r.parent.is_none() };
            Ok(Some((r, q)))
        })
    }

    /// Writes down what was seen of a medium, unless it is another one by now.
    fn keep(&self, asked: &Record, q: &Question, seen: &std::result::Result<Facts, String>) -> Result<()> {
        self.write(|db| {
            let Some(mut now) = record::find(db, asked.id)? else { return Ok(()) };
            if now.location != q.path || now.phase != asked.phase && !now.phase.is_there() {
                return Ok(());
            }
            let judged = match seen {
                Err(why) => Err(why.clone()),
                Ok(facts) => judge(db, &mut now, facts)?,
            };
            let old = record::standing(db, &now, &[])?;
            let mut new = old.clone();
            let _ = new.call(Client(0), &Call::Checked(judged.err()));
            (now.phase, now.last_access_error) = (new.phase, new.last_access_error);
            record::save(db, &now)
        })
    }

    /// A medium and what is beneath it, the base last.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] for a chain that is too long.
    pub fn chain(&self, id: Uuid) -> Result<Vec<Record>> {
        self.read(|db, _| chain_of(db, id))
    }

    /// Locks media, all or none: the first for writing if `write` says so, the others for reading. Those that are not there yet are
    /// passed over.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`], with the medium that is in the way.
    pub fn lock_all(&self, ids: &[Uuid], write: bool) -> Result<()> {
        self.write_as(|db, client| lock_all_in(db, client, ids, write))
    }

    /// Gives up what [`Self::lock_all`] took.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] for what is not locked.
    pub fn unlock_all(&self, ids: &[Uuid], write: bool) -> Result<()> {
        self.write_as(|db, client| unlock_all_in(db, client, ids, write))
    }

    /// Notes that a machine uses a medium.
    pub(super) fn attach_record(&self, id: Uuid, a: &Attachment) -> Result<()> {
        self.write_as(|db, client| {
            said(&Self::known(db, id)?, call_in(db, client, id, &Call::Attach, None)?)?;
            let others = record::attachments(db, id)?;
            let r = Self::known(db, id)?;
            allow_attachment(&r, &others, a)?;
            record::add_attachment(db, id, a)
        })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Locks of this process go with it; what stands for another process stays.
        if let Some(own) = self.holder.get_mut().take().filter(Holder::is_own) {
            let _ = self.write(|db| holder::leave(db, own.id));
        }
    }
}

/// Whether a machine may use a medium directly.
pub(super) fn allow_attachment(r: &Record, uses: &[Attachment], new: &Attachment) -> Result<()> {
    let refused = |code, why: String| Err(Fault::new(code, why).at(&r.location));
    let machine = new.machine;
    if r.medium_type == MediumType::Readonly {
        return Ok(()); // counted
    }
    if r.medium_type.is_indirect() && new.snapshot.is_none() {
        let why = format!("is {}: machines use diffs of it", r.medium_type);
        return refused(Code::InvalidObjectState, why);
    }
    if uses.iter().any(|u| u.machine == machine && u.snapshot == new.snapshot) {
        return refused(Code::ObjectInUse, format!("is attached to this state of machine {machine} already"));
    }
    let other = uses.iter().find(|u| u.machine != machine);
    match other.filter(|_| r.medium_type == MediumType::Normal) {
        Some(u) => refused(Code::ObjectInUse, format!("is attached to another machine, {}", u.machine)),
        None => Ok(()),
    }
}

/// Asks the state machine in a transaction.
pub(super) fn call_in(
    db: &Connection,
    client: Client,
    id: Uuid,
    call: &Call,
    outside: Option<Outside>,
) -> Result<Answer> {
    let r = Registry::known(db, id)?;
    let old = Standing { outside, ..record::standing(db, &r, &[])? };
    let mut new = old.clone();
    let answer = new.call(client, call);
    if answer.outcome.is_ok() {
        record::save_standing(db, &r, &old, &new)?;
    }
    Ok(answer)
}

/// A refusal as an error.
pub(super) fn said(r: &Record, answer: Answer) -> Result<Answer> {
    match &answer.outcome {
        Ok(()) => Ok(answer),
        Err(refusal) => Err(Fault::new(refusal.code, &refusal.why).at(&r.location)),
    }
}

pub(super) fn chain_of(db: &Connection, id: Uuid) -> Result<Vec<Record>> {
    let mut chain = vec![Registry::known(db, id)?];
    while let Some(parent) = chain[chain.len() - 1].parent {
        if chain.len() >= MAX_CHAIN_IMAGES {
            let what = format!("has more than {MAX_CHAIN_IMAGES} media in its chain");
            return Err(Fault::new(Code::InvalidObjectState, what).at(&chain[0].location));
        }
        chain.push(Registry::known(db, parent)?);
    }
    Ok(chain)
}

/// The base first, as VirtualBox orders it.
pub(super) fn lock_all_in(db: &Connection, client: Client, ids: &[Uuid], write: bool) -> Result<()> {
    for (n, id) in ids.iter().enumerate().rev() {
        let r = Registry::known(db, *id)?;
        if !r.phase.is_there() && n > 0 {
            continue;
        }
        let call = if write && n == 0 { Call::LockWrite } else { Call::LockRead };
        said(&r, call_in(db, client, *id, &call, None)?)?;
    }
    Ok(())
}

pub(super) fn unlock_all_in(db: &Connection, client: Client, ids: &[Uuid], write: bool) -> Result<()> {
    for (n, id) in ids.iter().enumerate() {
        let r = Registry::known(db, *id)?;
        if !r.phase.is_there() && n > 0 {
            continue;
        }
        let call = if write && n == 0 { Call::UnlockWrite } else { Call::UnlockRead };
        said(&r, call_in(db, client, *id, &call, None)?)?;
    }
    Ok(())
}

/// Holds what was seen of an image against the registry, and takes over what it may; the inner error is the text of an inaccessible
/// medium.
fn judge(db: &Connection, r: &mut Record, facts: &Facts) -> Result<std::result::Result<(), String>> {
    let (name, registry) = (r.location.display().to_string(), db.path().unwrap_or_default().to_string());
    if let Some(uuid) = facts.uuid().filter(|u| *u != r.id) {
        let id = r.id;
        return Ok(Err(format!(
            "UUID {{{uuid}}} of the medium '{name}' does not match the value {{{id}}} stored in the media registry ('{registry}')"
        )));
    }
    let named = facts.parent_uuid();
    match r.parent {
        None if facts.is_diff => match registered_parent(db, facts)? {
            Some(parent) if parent != r.id && !chain_of(db, parent)?.iter().any(|p| p.id == r.id) => {
                r.parent = Some(parent);
            }
            _ => {
                let said = named.map_or_else(String::new, |u| format!(" with UUID {{{u}}}"));
                return Ok(Err(format!(
                    "Parent medium{said} of the medium '{name}' is not found in the media registry ('{registry}')"
                )));
            }
        },
        Some(parent) if named.is_some_and(|n| n != parent) && has_own_uuid(db, parent)? => {
            let named = named.unwrap_or_default();
            return Ok(Err(format!(
                "Parent UUID {{{named}}} of the medium '{name}' does not match UUID {{{parent}}} of its parent medium stored in the \
                 media registry ('{registry}')"
            )));
        }
        _ => {}
    }
    r.size = facts.size;
    r.logical_size = facts.logical_size;
    r.variant.clone_from(&facts.variant);
    Ok(Ok(()))
}

/// Images of its format bear the UUID that the registry knows them by, and that diffs name.
fn has_own_uuid(db: &Connection, id: Uuid) -> Result<bool> {
    let format = record::find(db, id)?.and_then(|r| format_named(&r.format));
    Ok(matches!(format, Some(Format::Vdi | Format::Vhd | Format::Vhdx | Format::Vmdk)))
}

/// The registered medium that an image has as its parent: by its UUID, else by its file.
pub(super) fn registered_parent(db: &Connection, facts: &Facts) -> Result<Option<Uuid>> {
    if let Some(r) = facts.parent_uuid().map(|u| record::find(db, u)).transpose()?.flatten() {
        return Ok(Some(r.id));
    }
    let Some(path) = &facts.parent_path else { return Ok(None) };
    let found = record::at_location(db, path)?;
    Ok(found.iter().find(|r| r.device == DeviceType::HardDisk).map(|r| r.id))
}

/// Points a medium at the intent that is about it, or at none.
pub(super) fn set_intent(db: &Connection, id: Uuid, intent: Option<i64>) -> Result<()> {
    db.execute("UPDATE media SET intent = ?2 WHERE id = ?1", params![id.to_string(), intent])?;
    Ok(())
}
