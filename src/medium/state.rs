//! The state machine of a medium: values in, values out. No file, no database, no clock.
//!
//! The store loads a [`Standing`], asks it in a transaction and keeps what became of it; the tests below walk through all of it.

use super::code::Code;
use super::kinds::{MediumType, State};
use crate::map::DeviceType;
use std::collections::BTreeMap;

/// Whoever calls: locks belong to one, and vanish with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Client(pub i64);

/// What a medium is, whatever locks there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// It has no storage unit.
    NotCreated,
    /// Somebody makes it.
    Creating,
    /// It could be read.
    Created,
    /// It could not be read, or that was not tried.
    Inaccessible,
    /// Somebody removes it.
    Deleting,
}

impl Phase {
    pub(crate) const ALL: [Phase; 5] =
        [Phase::NotCreated, Phase::Creating, Phase::Created, Phase::Inaccessible, Phase::Deleting];

    pub(crate) fn state(self) -> State {
        match self {
            Phase::NotCreated => State::NotCreated,
            Phase::Creating => State::Creating,
            Phase::Created => State::Created,
            Phase::Inaccessible => State::Inaccessible,
            Phase::Deleting => State::Deleting,
        }
    }

    /// It has a storage unit that calls may be about.
    pub(super) fn is_there(self) -> bool {
        matches!(self, Phase::Created | Phase::Inaccessible)
    }
}

/// What others do with the file, seen by its locks: QEMU, or a vdblk that knows of no registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outside {
    /// It is read, and shall not be written.
    Reading,
    /// It is written.
    Writing,
}

/// All that decides about a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Standing {
    /// What it is a medium for.
    pub device: DeviceType,
    /// Its type.
    pub medium_type: MediumType,
    /// What it is without locks.
    pub phase: Phase,
    /// Who makes or removes it.
    pub busy: Option<Client>,
    /// Who reads, and how many times over.
    pub readers: BTreeMap<Client, u32>,
    /// Who writes.
    pub writer: Option<Client>,
    /// What others do with the file.
    pub outside: Option<Outside>,
    /// Why the last accessibility check failed; `None` also before the first.
    pub last_access_error: Option<String>,
    /// Children it has.
    pub children: usize,
    /// Machines that refer to it, in any of their states.
    pub machines: usize,
    /// It was closed: there is nothing left to ask.
    pub closed: bool,
}

/// What is asked of a medium.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// `lockRead`.
    LockRead,
    /// `unlockRead`.
    UnlockRead,
    /// `lockWrite`.
    LockWrite,
    /// `unlockWrite`.
    UnlockWrite,
    /// `close`.
    Close,
    /// Its properties, its type, its description change.
    Modify,
    /// Only the record of where it is changes.
    Relocate,
    /// A machine begins to refer to it.
    Attach,
    /// Its storage unit begins to be made.
    BeginCreate,
    /// It is made, or that failed.
    EndCreate(bool),
    /// Its storage unit begins to be removed.
    BeginDelete,
    /// It begins to be merged into another medium, and will not be needed then.
    BeginMerge,
    /// It is removed, or that failed.
    EndDelete(bool),
    /// An accessibility check has ended: why it failed.
    Checked(Option<String>),
    /// The client is gone.
    Died,
    /// What a client that is gone left half done was completed or taken back: whether the storage unit is there.
    Recovered(bool),
}

/// Why a call was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The interface's code.
    pub code: Code,
    /// A sentence behind the medium's name.
    pub why: String,
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The state it found.
    pub before: State,
    /// The state it left.
    pub after: State,
    /// Why it was refused; then nothing has changed.
    pub outcome: Result<(), Refusal>,
}

impl Standing {
    /// A medium that is remembered, and of which nothing is known yet.
    pub fn new(device: DeviceType) -> Standing {
        Standing {
            device,
            medium_type: MediumType::of_new(device),
            phase: Phase::Inaccessible,
            busy: None,
            readers: BTreeMap::new(),
            writer: None,
            outside: None,
            last_access_error: None,
            children: 0,
            machines: 0,
            closed: false,
        }
    }

    /// The state that everybody sees.
    pub fn state(&self) -> State {
        if self.writer.is_some() {
            return State::LockedWrite;
        }
        if !self.readers.is_empty() {
            return State::LockedRead;
        }
        match self.outside.filter(|_| self.phase.is_there()) {
            Some(Outside::Writing) => State::LockedWrite,
            Some(Outside::Reading) => State::LockedRead,
            None => self.phase.state(),
        }
    }

    /// Carries out a call, or refuses it and changes nothing.
    pub fn call(&mut self, client: Client, call: &Call) -> Answer {
        let before = self.state();
        let outcome = if self.closed {
            refuse(Code::AccessDenied, "the object is not ready: it was closed")
        } else {
            self.carry_out(client, call)
        };
        Answer { before, after: self.state(), outcome }
    }

    fn carry_out(&mut self, client: Client, call: &Call) -> Result<(), Refusal> {
        match call {
            Call::LockRead => self.lock_read(client),
            Call::UnlockRead => self.unlock_read(client),
            Call::LockWrite => self.lock_write(client),
            Call::UnlockWrite => self.unlock_write(client),
            Call::Close => {
                self.allow_removal("closed")?;
                self.closed = true;
                Ok(())
            }
            Call::Modify => match self.state() {
                State::Created => Ok(()),
                s => wrong_state(s, "be changed"),
            },
            Call::Relocate => match self.state() {
                State::Created | State::Inaccessible => Ok(()),
                s => wrong_state(s, "get another location"),
            },
            Call::Attach => match self.phase {
                Phase::Created | Phase::Inaccessible => Ok(()),
                p => wrong_state(p.state(), "be attached"),
            },
            Call::BeginCreate => self.begin_create(client),
            Call::EndCreate(made) => {
                self.end(client, Phase::Creating, if *made { Phase::Created } else { Phase::NotCreated })
            }
            Call::BeginDelete => self.begin_delete(client),
            Call::BeginMerge => self.begin_merge(client),
            Call::EndDelete(gone) => {
                self.end(client, Phase::Deleting, if *gone { Phase::NotCreated } else { Phase::Created })
            }
            Call::Checked(error) => {
                self.checked(error.as_ref());
                Ok(())
            }
            Call::Died => {
                self.died(client);
                Ok(())
            }
            Call::Recovered(there) => self.recovered(*there),
        }
    }

    fn lock_read(&mut self, client: Client) -> Result<(), Refusal> {
        match self.state() {
            State::Created | State::Inaccessible | State::LockedRead => {}
            s => return wrong_state(s, "be locked for reading"),
        }
        let count = self.readers.get(&client).copied().unwrap_or(0);
        let Some(count) = count.checked_add(1) else {
            return refuse(Code::InvalidObjectState, "is locked for reading too many times");
        };
        self.readers.insert(client, count);
        Ok(())
    }

    fn unlock_read(&mut self, client: Client) -> Result<(), Refusal> {
        match self.readers.get_mut(&client) {
            None => refuse(Code::InvalidObjectState, "is not locked for reading by this client"),
            Some(1) => {
                self.readers.remove(&client);
                Ok(())
            }
            Some(count) => {
                *count -= 1;
                Ok(())
            }
        }
    }

    fn lock_write(&mut self, client: Client) -> Result<(), Refusal> {
        match self.state() {
            State::Created | State::Inaccessible => {}
            s => return wrong_state(s, "be locked for writing"),
        }
        if self.medium_type == MediumType::Readonly {
            // The state has no meaning for such media.
            return refuse(Code::InvalidObjectState, "is Readonly: it is never locked for writing");
        }
        self.writer = Some(client);
        Ok(())
    }

    fn unlock_write(&mut self, client: Client) -> Result<(), Refusal> {
        if self.writer != Some(client) {
            return refuse(Code::InvalidObjectState, "is not locked for writing by this client");
        }
        self.writer = None;
        Ok(())
    }

    /// What closing and deleting have in common.
    fn allow_removal(&self, what: &str) -> Result<(), Refusal> {
        match self.state() {
            State::NotCreated | State::Created | State::Inaccessible => {}
            s => return wrong_state(s, &format!("be {what}")),
        }
        let (machines, children) = (self.machines, self.children);
        if machines > 0 {
            let why =
                format!("is attached to {}: it cannot be {what}", count(machines, "machine", "machines"));
            return refuse(Code::ObjectInUse, why);
        }
        if children > 0 {
            let why = format!("has {}: it cannot be {what}", count(children, "child", "children"));
            return refuse(Code::ObjectInUse, why);
        }
        Ok(())
    }

    fn begin_create(&mut self, client: Client) -> Result<(), Refusal> {
        if self.phase != Phase::NotCreated {
            return wrong_state(self.state(), "be created");
        }
        if self.device != DeviceType::HardDisk {
            return refuse(Code::NotSupported, "only hard disks are created here");
        }
        (self.phase, self.busy) = (Phase::Creating, Some(client));
        Ok(())
    }

    fn begin_delete(&mut self, client: Client) -> Result<(), Refusal> {
        self.allow_removal("deleted")?;
        if self.phase == Phase::NotCreated {
            return wrong_state(State::NotCreated, "be deleted");
        }
        if self.device != DeviceType::HardDisk {
            return refuse(Code::NotSupported, "only hard disks are deleted here: close it");
        }
        (self.phase, self.busy, self.last_access_error) = (Phase::Deleting, Some(client), None);
        Ok(())
    }

    /// As deleting, but the one child it may have will do without it.
    fn begin_merge(&mut self, client: Client) -> Result<(), Refusal> {
        if self.children > 1 {
            let why = format!("has {} children: it cannot be merged away", self.children);
            return refuse(Code::ObjectInUse, why);
        }
        let children = std::mem::take(&mut self.children);
        let begun = self.begin_delete(client);
        self.children = children;
        begun
    }

    /// Only who began it ends it.
    fn end(&mut self, client: Client, during: Phase, then: Phase) -> Result<(), Refusal> {
        if self.phase != during || self.busy != Some(client) {
            return wrong_state(self.state(), "end what this client has not begun");
        }
        (self.phase, self.busy, self.last_access_error) = (then, None, None);
        Ok(())
    }

    /// Nothing is checked while it is made or removed. Under a lock the state stays, and what it will be afterwards changes.
    fn checked(&mut self, error: Option<&String>) {
        if self.phase.is_there() {
            self.phase = if error.is_none() { Phase::Created } else { Phase::Inaccessible };
            self.last_access_error = error.cloned();
        }
    }

    fn died(&mut self, client: Client) {
        self.readers.remove(&client);
        self.writer = self.writer.filter(|w| *w != client);
        self.busy = self.busy.filter(|b| *b != client);
    }

    fn recovered(&mut self, there: bool) -> Result<(), Refusal> {
        match (self.phase, self.busy) {
            (Phase::Creating | Phase::Deleting, None) => {
                self.phase = if there { Phase::Created } else { Phase::NotCreated };
                Ok(())
            }
            _ => wrong_state(self.state(), "be recovered"),
        }
    }
}

fn refuse(code: Code, why: impl Into<String>) -> Result<(), Refusal> {
    Err(Refusal { code, why: why.into() })
}

fn wrong_state(state: State, what: &str) -> Result<(), Refusal> {
    refuse(Code::InvalidObjectState, format!("is {state}: it cannot {what} now"))
}

pub(crate) fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

#[cfg(test)]
mod tests;
