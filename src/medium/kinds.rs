//! What a medium is: its device, its type, its state; and what its type allows.

use super::code::{Code, Fault, Result};
use crate::map::DeviceType;
use std::fmt;

/// The state of a medium, in the interface's words and numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// It has no storage unit yet, or none any more.
    NotCreated = 0,
    /// It is there, and could be read when that was last tried.
    Created = 1,
    /// Readers hold it.
    LockedRead = 2,
    /// A writer holds it.
    LockedWrite = 3,
    /// It could not be read, or that was not tried yet.
    Inaccessible = 4,
    /// Its storage unit is being made.
    Creating = 5,
    /// Its storage unit is being removed.
    Deleting = 6,
}

impl State {
    /// All of them.
    pub const ALL: [State; 7] = [
        State::NotCreated,
        State::Created,
        State::LockedRead,
        State::LockedWrite,
        State::Inaccessible,
        State::Creating,
        State::Deleting,
    ];

    /// The interface's name.
    pub fn name(self) -> &'static str {
        match self {
            State::NotCreated => "NotCreated",
            State::Created => "Created",
            State::LockedRead => "LockedRead",
            State::LockedWrite => "LockedWrite",
            State::Inaccessible => "Inaccessible",
            State::Creating => "Creating",
            State::Deleting => "Deleting",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How a medium behaves when it is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MediumType {
    /// Directly, by one machine.
    #[default]
    Normal,
    /// Never directly: each machine gets a diff, which is made anew at every start.
    Immutable,
    /// Directly; snapshots leave it alone.
    Writethrough,
    /// Directly, by several machines at once.
    Shareable,
    /// Never written: DVDs, floppies.
    Readonly,
    /// As immutable, but the diffs stay.
    MultiAttach,
}

impl MediumType {
    /// All of them, by the interface's numbers.
    pub const ALL: [MediumType; 6] = [
        MediumType::Normal,
        MediumType::Immutable,
        MediumType::Writethrough,
        MediumType::Shareable,
        MediumType::Readonly,
        MediumType::MultiAttach,
    ];

    /// The interface's name.
    pub fn name(self) -> &'static str {
        match self {
            MediumType::Normal => "Normal",
            MediumType::Immutable => "Immutable",
            MediumType::Writethrough => "Writethrough",
            MediumType::Shareable => "Shareable",
            MediumType::Readonly => "Readonly",
            MediumType::MultiAttach => "MultiAttach",
        }
    }

    /// By its name, in any case.
    ///
    /// # Errors
    /// [`Code::InvalidArg`].
    pub fn parse(name: &str) -> Result<MediumType> {
        Self::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|t| t.name().to_ascii_lowercase()).collect();
            Fault::new(Code::InvalidArg, format!("unknown type of medium '{name}'"))
                .hint(format!("one of: {}", names.join(", ")))
        })
    }

    /// What a medium is unless something else is said.
    pub fn of_new(device: DeviceType) -> MediumType {
        match device {
            DeviceType::HardDisk => MediumType::Normal,
            DeviceType::Dvd => MediumType::Readonly,
            DeviceType::Floppy => MediumType::Writethrough,
        }
    }

    /// A machine never writes to it directly: it gets a diff.
    pub fn is_indirect(self) -> bool {
        matches!(self, MediumType::Immutable | MediumType::MultiAttach)
    }

    /// Whether a diff may be made over it.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`].
    pub fn allow_diff(self) -> Result<()> {
        match self {
            MediumType::Normal | MediumType::Immutable | MediumType::MultiAttach => Ok(()),
            _ => {
                let why = format!("is {}: no differencing image can be made over it", self.name());
                Err(Fault::new(Code::InvalidObjectState, why))
            }
        }
    }
}

impl fmt::Display for MediumType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a change of type depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TypeFacts {
    /// What it is a medium for.
    pub device: DeviceType,
    /// What it is now.
    pub old: MediumType,
    /// It has a parent.
    pub is_diff: bool,
    /// Children it has.
    pub children: usize,
    /// Machines that refer to it, in any of their states.
    pub machines: usize,
    /// All of it is allocated.
    pub is_fixed: bool,
}

/// Whether a medium may become one of another type.
///
/// # Errors
/// [`Code::NotSupported`] where the type makes no sense for it; [`Code::ObjectInUse`] where machines or children are in the way.
pub fn allow_type(facts: TypeFacts, new: MediumType) -> Result<()> {
    use MediumType::{Immutable, MultiAttach, Normal, Readonly, Shareable, Writethrough};
    if facts.old == new {
        return Ok(());
    }
    let unsupported = |why: String| Err(Fault::new(Code::NotSupported, why));
    let in_use = |why: String| Err(Fault::new(Code::ObjectInUse, why));
    match (facts.device, new) {
        (DeviceType::HardDisk, Readonly) => return unsupported("a hard disk cannot be Readonly".into()),
        (DeviceType::Dvd, t) if t != Readonly => return unsupported("a DVD can only be Readonly".into()),
        (DeviceType::Floppy, t) if !matches!(t, Writethrough | Readonly) => {
            return unsupported("a floppy can only be Writethrough or Readonly".into());
        }
        _ => {}
    }
    if facts.is_diff && new != Normal {
        return unsupported("the type of a differencing image cannot be changed".into());
    }
    if facts.machines > 1 {
        return in_use(format!("is attached to {} machines: its type cannot be changed", facts.machines));
    }
    match new {
        Immutable | MultiAttach if facts.machines > 0 => {
            in_use(format!("is attached to a machine: it cannot become {new}"))
        }
        Writethrough | Shareable | Readonly if facts.children > 0 => {
            in_use(format!("has {} children: it cannot become {new}", facts.children))
        }
        Shareable if !facts.is_fixed => unsupported("only a fixed image can be Shareable".into()),
        Normal | Immutable | Writethrough | Shareable | Readonly | MultiAttach => Ok(()),
    }
}

/// The name of a device in the registry.
pub(crate) fn device_by_name(name: &str) -> Option<DeviceType> {
    [DeviceType::HardDisk, DeviceType::Dvd, DeviceType::Floppy].into_iter().find(|d| d.name() == name)
}

/// The device as people call its medium.
pub(crate) fn device_title(device: DeviceType) -> &'static str {
    match device {
        DeviceType::HardDisk => "hard disk",
        DeviceType::Dvd => "DVD image",
        DeviceType::Floppy => "floppy image",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_and_types_have_the_numbers_of_the_interface() {
        for (n, s) in State::ALL.iter().enumerate() {
            let by_number: Vec<_> = State::ALL.iter().filter(|o| **o as usize == *s as usize).collect();
            assert_eq!(by_number, [s], "{n}");
        }
        assert_eq!(State::Inaccessible as u8, 4);
        assert_eq!(State::Deleting as u8, 6);
        for t in MediumType::ALL {
            assert_eq!(MediumType::parse(&t.name().to_ascii_uppercase()).unwrap(), t);
        }
        assert_eq!(MediumType::parse("shared").unwrap_err().code(), Code::InvalidArg);
    }

    #[test]
    fn types_follow_the_device() {
        let of = |device, old| TypeFacts { device, old, is_fixed: true, ..TypeFacts::default() };
        let code = |f, t| allow_type(f, t).err().map(|e| e.code());
        for t in MediumType::ALL {
            let disk = of(DeviceType::HardDisk, MediumType::Normal);
            assert_eq!(code(disk, t), (t == MediumType::Readonly).then_some(Code::NotSupported), "{t}");
            let dvd = of(DeviceType::Dvd, MediumType::Readonly);
            assert_eq!(code(dvd, t), (t != MediumType::Readonly).then_some(Code::NotSupported), "{t}");
            let floppy = of(DeviceType::Floppy, MediumType::Writethrough);
            let may = matches!(t, MediumType::Writethrough | MediumType::Readonly);
            assert_eq!(code(floppy, t), (!may).then_some(Code::NotSupported), "{t}");
        }
    }

    #[test]
    fn types_follow_what_uses_the_disk() {
        use MediumType::{Immutable, MultiAttach, Shareable, Writethrough};
        let disk = TypeFacts { is_fixed: true, ..TypeFacts::default() };
        let code = |f, t| allow_type(f, t).err().map(|e: Fault| e.code());
        let attached = TypeFacts { machines: 1, ..disk };
        assert_eq!(code(attached, Immutable), Some(Code::ObjectInUse));
        assert_eq!(code(attached, MultiAttach), Some(Code::ObjectInUse));
        assert_eq!(code(attached, Writethrough), None);
        assert_eq!(code(TypeFacts { machines: 2, ..disk }, Writethrough), Some(Code::ObjectInUse));
        let parent = TypeFacts { children: 1, ..disk };
        assert_eq!(code(parent, Immutable), None);
        assert_eq!(code(parent, Writethrough), Some(Code::ObjectInUse));
        assert_eq!(code(parent, Shareable), Some(Code::ObjectInUse));
        assert_eq!(code(TypeFacts { is_fixed: false, ..disk }, Shareable), Some(Code::NotSupported));
        assert_eq!(code(TypeFacts { is_diff: true, ..disk }, Immutable), Some(Code::NotSupported));
        assert_eq!(code(TypeFacts { machines: 9, ..disk }, disk.old), None, "nothing changes");
    }

    #[test]
    fn diffs_are_made_over_three_types_only() {
        let refused: Vec<_> = MediumType::ALL.into_iter().filter(|t| t.allow_diff().is_err()).collect();
        assert_eq!(refused, [MediumType::Writethrough, MediumType::Shareable, MediumType::Readonly]);
        assert_eq!(MediumType::Shareable.allow_diff().unwrap_err().code(), Code::InvalidObjectState);
    }
}
