//! Formats that are registered at run time, behind those of our own (docs/plugins.md).

use super::{Blueprint, CheckReport, Driver, Format, ImageFile, NewImage, NewOption, OpenHow};
use crate::error::{Error, ErrorKind, Result};
use crate::map::ImageMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// A format of which nothing is known before it is registered. It is a value like the others, and stays one when it has been
/// unregistered: its functions then say so.
#[derive(Clone, Copy)]
pub struct Registered(&'static Row);

struct Row {
    name: &'static str,
    title: &'static str,
    extensions: &'static [&'static str],
    origin: &'static str,
    probe: Box<Probe>,
    driver: Driver,
}

type Probe = dyn Fn(&[u8], &[u8], u64) -> bool + Send + Sync;
type OpenImage = dyn Fn(&[ImageFile<'_>], OpenHow) -> Result<Box<dyn ImageMap>> + Send + Sync;
type CheckImage = dyn Fn(&[ImageFile<'_>]) -> Result<CheckReport> + Send + Sync;
type MakeImage = dyn Fn(&NewImage) -> Result<Blueprint> + Send + Sync;

/// What is registered. All of it stays in memory until the process ends, so that [`Format`] is a plain value: some hundred bytes.
pub(crate) struct NewFormat {
    /// Lower case, no other format's.
    pub(crate) name: String,
    /// As people write it in a sentence.
    pub(crate) title: String,
    /// Lower case, without the dot, no other format's; at least one.
    pub(crate) extensions: Vec<String>,
    /// Where it comes from, for people.
    pub(crate) origin: String,
    /// Options of new images.
    pub(crate) options: Vec<NewOption>,
    /// Whether a file may be one: its first and its last 512 bytes (all of a shorter one), and its length.
    pub(crate) probe: Box<Probe>,
    /// See [`super::open`]. Images have one file.
    pub(crate) open: Box<OpenImage>,
    /// See [`super::check`].
    pub(crate) check: Option<Box<CheckImage>>,
    /// See [`super::blueprint`].
    pub(crate) blueprint: Option<Box<MakeImage>>,
}

static ROWS: RwLock<Vec<Registered>> = RwLock::new(Vec::new());

fn rows() -> RwLockReadGuard<'static, Vec<Registered>> {
    ROWS.read().unwrap_or_else(PoisonError::into_inner)
}

/// All there are now, the oldest first.
pub(super) fn all() -> Vec<Registered> {
    rows().clone()
}

/// The first that takes a file for its own.
pub(super) fn probe(head: &[u8], foot: &[u8], len: u64) -> Option<Registered> {
    // The lock is not held while strangers are asked.
    all().into_iter().find(|r| (r.0.probe)(head, foot, len))
}

fn leak<T: ?Sized>(value: Box<T>) -> &'static T {
    Box::leak(value)
}

/// Registers a format.
///
/// # Errors
/// [`ErrorKind::Exists`] if one of its names or extensions is another format's.
pub(crate) fn register(new: NewFormat) -> Result<Registered> {
    let mut rows = ROWS.write().unwrap_or_else(PoisonError::into_inner);
    let others = Format::ALL.into_iter().chain(rows.iter().copied().map(Format::Registered));
    for other in others {
        let taken = |what: String| {
            let where_ = match other {
                Format::Registered(r) => format!("of {}", r.origin()),
                _ => "of our own".to_string(),
            };
            Err(Error::new(ErrorKind::Exists, format!("{what} is a format {where_}")))
        };
        // `vpc` is another word for VHD.
        let names = [other.name(), other.title()].into_iter().chain((other == Format::Vhd).then_some("vpc"));
        for name in names {
            if [&new.name, &new.title].iter().any(|n| n.eq_ignore_ascii_case(name)) {
                return taken(format!("'{name}'"));
            }
        }
        if let Some(e) = other.extensions().iter().find(|e| new.extensions.iter().any(|n| n == *e)) {
            return taken(format!("the extension .{e}"));
        }
    }
    let texts = |list: Vec<String>| {
        let list: Vec<&'static str> = list.into_iter().map(|t| leak(t.into_boxed_str())).collect();
        leak(list.into_boxed_slice())
    };
    let driver = Driver {
        open: leak(new.open),
        references: None,
        check: new.check.map(|f| leak(f) as _),
        repair: None,
        compact: None,
        resize: None,
        relink: None,
        blueprint: new.blueprint.map(|f| leak(f) as _),
        options: leak(new.options.into_boxed_slice()),
        properties: None,
    };
    let row = Registered(leak(Box::new(Row {
        name: leak(new.name.into_boxed_str()),
        title: leak(new.title.into_boxed_str()),
        extensions: texts(new.extensions),
        origin: leak(new.origin.into_boxed_str()),
        probe: new.probe,
        driver,
    })));
    rows.push(row);
    Ok(row)
}

/// Takes a format off the list. Values of it that somebody still has answer through their own functions.
pub(crate) fn unregister(format: Registered) {
    ROWS.write().unwrap_or_else(PoisonError::into_inner).retain(|r| *r != format);
}

impl Registered {
    pub(crate) fn name(self) -> &'static str {
        self.0.name
    }

    pub(super) fn title(self) -> &'static str {
        self.0.title
    }

    pub(super) fn extensions(self) -> &'static [&'static str] {
        self.0.extensions
    }

    /// The file it came from.
    pub fn origin(self) -> &'static str {
        self.0.origin
    }

    pub(super) fn driver(self) -> &'static Driver {
        &self.0.driver
    }
}

impl PartialEq for Registered {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for Registered {}

impl Hash for Registered {
    fn hash<H: Hasher>(&self, state: &mut H) {
        std::ptr::from_ref(self.0).hash(state);
    }
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Registered").field(&self.0.name).finish()
    }
}
