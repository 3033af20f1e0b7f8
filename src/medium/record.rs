//! What the registry keeps of a medium, and how it is read and written.

use super::code::{Code, Fault, Result};
use super::kinds::{MediumType, device_by_name};
use super::state::{Client, Phase, Standing};
use crate::map::DeviceType;
use rusqlite::{Connection, OptionalExtension, Row, params};
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// A medium as the registry remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its UUID.
    pub id: Uuid,
    /// What it is a medium for.
    pub device: DeviceType,
    /// How it behaves when attached.
    pub medium_type: MediumType,
    /// Its format, as the user typed it.
    pub format: String,
    /// Where it is.
    pub location: PathBuf,
    /// A text of the user's.
    pub description: Option<String>,
    /// A diff that is made anew at every start.
    pub auto_reset: bool,
    /// What it is a diff of.
    pub parent: Option<Uuid>,
    /// What it is without locks.
    pub phase: Phase,
    /// Why the last check failed.
    pub last_access_error: Option<String>,
    /// Bytes of its files when that was last looked at.
    pub size: u64,
    /// Bytes of its disk when that was last looked at.
    pub logical_size: u64,
    /// Variant of its format when that was last looked at.
    pub variant: String,
    /// The machine in whose file it is registered; `None`: it belongs to all.
    pub machine: Option<Uuid>,
    /// Further names and values, kept as they are: a key store among them.
    pub properties: BTreeMap<String, String>,
}

impl Record {
    /// A medium of which only its file is known.
    pub fn new(id: Uuid, device: DeviceType, format: &str, location: &Path) -> Record {
        Record {
            id,
            device,
            medium_type: MediumType::of_new(device),
            format: format.to_string(),
            location: location.to_path_buf(),
            description: None,
            auto_reset: false,
            parent: None,
            phase: Phase::Inaccessible,
            last_access_error: None,
            size: 0,
            logical_size: 0,
            variant: String::new(),
            machine: None,
            properties: BTreeMap::new(),
        }
    }

    /// The file's name without its folder.
    pub fn name(&self) -> String {
        self.location.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The location as the text that the registry keeps.
    ///
    /// # Errors
    /// [`Code::InvalidArg`] for names that are no UTF-8.
    pub(super) fn location_text(&self) -> Result<&str> {
        text_of(&self.location)
    }
}

pub(super) fn text_of(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Fault::new(Code::InvalidArg, "its name is not valid UTF-8").at(path))
}

const COLUMNS: &str = "id, device, type, format, location, description, auto_reset, parent, phase, last_error, size, \
                       logical_size, variant, machine";

/// What stands in the table and should not: somebody else wrote it.
fn odd(what: &str) -> rusqlite::Error {
    rusqlite::Error::InvalidColumnType(0, what.to_string(), rusqlite::types::Type::Text)
}

fn uuid_at(row: &Row<'_>, n: usize) -> rusqlite::Result<Uuid> {
    Uuid::parse_str(&row.get::<_, String>(n)?).map_err(|_| odd("a UUID"))
}

fn optional_uuid_at(row: &Row<'_>, n: usize) -> rusqlite::Result<Option<Uuid>> {
    let text: Option<String> = row.get(n)?;
    text.map(|t| Uuid::parse_str(&t).map_err(|_| odd("a UUID"))).transpose()
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<Record> {
    let phase: String = row.get(8)?;
    Ok(Record {
        id: uuid_at(row, 0)?,
        device: device_by_name(&row.get::<_, String>(1)?).ok_or_else(|| odd("a device"))?,
        medium_type: MediumType::parse(&row.get::<_, String>(2)?).map_err(|_| odd("a type"))?,
        format: row.get(3)?,
        location: row.get::<_, String>(4)?.into(),
        description: row.get(5)?,
        auto_reset: row.get(6)?,
        parent: optional_uuid_at(row, 7)?,
        phase: Phase::ALL.into_iter().find(|p| p.state().name() == phase).ok_or_else(|| odd("a phase"))?,
        last_access_error: row.get(9)?,
        size: row.get::<_, i64>(10)?.unsigned_abs(),
        logical_size: row.get::<_, i64>(11)?.unsigned_abs(),
        variant: row.get(12)?,
        machine: optional_uuid_at(row, 13)?,
        properties: BTreeMap::new(),
    })
}

fn with_properties(db: &Connection, mut record: Record) -> Result<Record> {
    let mut select = db.prepare("SELECT name, value FROM properties WHERE medium = ?1")?;
    let rows = select.query_map([record.id.to_string()], |r| Ok((r.get(0)?, r.get(1)?)))?;
    record.properties = rows.collect::<rusqlite::Result<_>>()?;
    Ok(record)
}

/// The medium with this UUID.
pub(super) fn find(db: &Connection, id: Uuid) -> Result<Option<Record>> {
    let sql = format!("SELECT {COLUMNS} FROM media WHERE id = ?1");
    let found = db.query_row(&sql, [id.to_string()], from_row).optional()?;
    found.map(|r| with_properties(db, r)).transpose()
}

/// The media at this place: one for each device at most.
pub(super) fn at_location(db: &Connection, location: &Path) -> Result<Vec<Record>> {
    let sql = format!("SELECT {COLUMNS} FROM media WHERE location = ?1");
    many(db, &sql, &[&text_of(location)?])
}

/// All media, by location.
pub(super) fn all(db: &Connection) -> Result<Vec<Record>> {
    many(db, &format!("SELECT {COLUMNS} FROM media ORDER BY location, id"), &[])
}

/// The children of a medium.
pub(super) fn children(db: &Connection, id: Uuid) -> Result<Vec<Record>> {
    many(db, &format!("SELECT {COLUMNS} FROM media WHERE parent = ?1 ORDER BY id"), &[&id.to_string()])
}

fn many(db: &Connection, sql: &str, params: &[&dyn rusqlite::ToSql]) -> Result<Vec<Record>> {
    let mut select = db.prepare(sql)?;
    let rows: Vec<_> = select.query_map(params, from_row)?.collect::<rusqlite::Result<_>>()?;
    rows.into_iter().map(|r| with_properties(db, r)).collect()
}

fn sql_size(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Writes a medium, new or known, with its properties.
pub(super) fn save(db: &Connection, r: &Record) -> Result<()> {
    let id = r.id.to_string();
    db.execute(
        "INSERT INTO media (id, device, type, format, location, description, auto_reset, parent, phase, last_error, size,
             logical_size, variant, machine)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)
         ON CONFLICT (id) DO UPDATE SET device = ?2, type = ?3, format = ?4, location = ?5, description = ?6,
             auto_reset = ?7, parent = ?8, phase = ?9, last_error = ?10, size = ?11, logical_size = ?12, variant = ?13,
             machine = ?14",
        params![
            id,
            r.device.name(),
            r.medium_type.name(),
            r.format,
            r.location_text()?,
            r.description,
            r.auto_reset,
            r.parent.map(|p| p.to_string()),
            r.phase.state().name(),
            r.last_access_error,
            sql_size(r.size),
            sql_size(r.logical_size),
            r.variant,
            r.machine.map(|m| m.to_string()),
        ],
    )?;
    db.execute("DELETE FROM properties WHERE medium = ?1", [&id])?;
    for (name, value) in &r.properties {
        let sql = "INSERT INTO properties (medium, name, value) VALUES (?1, ?2, ?3)";
        db.execute(sql, params![id, name, value])?;
    }
    Ok(())
}

/// Forgets a medium.
pub(super) fn remove(db: &Connection, id: Uuid) -> Result<()> {
    for sql in [
        "DELETE FROM locks WHERE medium = ?1",
        "DELETE FROM attachments WHERE medium = ?1",
        "DELETE FROM media WHERE id = ?1",
    ] {
        db.execute(sql, [id.to_string()])?;
    }
    Ok(())
}

/// All that decides about a call; locks of `dead` clients do not count.
pub(super) fn standing(db: &Connection, r: &Record, dead: &[i64]) -> Result<Standing> {
    let id = r.id.to_string();
    let count = |sql: &str| db.query_row(sql, [&id], |row| row.get::<_, u32>(0)).map(|n| n as usize);
    let mut s = Standing {
        medium_type: r.medium_type,
        phase: r.phase,
        last_access_error: r.last_access_error.clone(),
        children: count("SELECT count(*) FROM media WHERE parent = ?1")?,
        machines: count("SELECT count(DISTINCT machine) FROM attachments WHERE medium = ?1")?,
        ..Standing::new(r.device)
    };
    let sql = "SELECT i.holder FROM media m JOIN intents i ON i.id = m.intent WHERE m.id = ?1";
    let busy: Option<Option<i64>> = db.query_row(sql, [&id], |row| row.get(0)).optional()?;
    s.busy = busy.flatten().filter(|h| !dead.contains(h)).map(Client);
    let mut select = db.prepare("SELECT holder, mode, count FROM locks WHERE medium = ?1")?;
    let rows = select.query_map([&id], |row| Ok((row.get(0)?, row.get::<_, String>(1)?, row.get(2)?)))?;
    for row in rows {
        let (holder, mode, count): (i64, String, u32) = row?;
        match mode.as_str() {
            _ if dead.contains(&holder) => {}
            "write" => s.writer = Some(Client(holder)),
            _ => drop(s.readers.insert(Client(holder), count)),
        }
    }
    Ok(s)
}

/// Writes what a call has changed of a medium's standing.
pub(super) fn save_standing(db: &Connection, r: &Record, old: &Standing, new: &Standing) -> Result<()> {
    let id = r.id.to_string();
    if (old.phase, &old.last_access_error) != (new.phase, &new.last_access_error) {
        let sql = "UPDATE media SET phase = ?2, last_error = ?3 WHERE id = ?1";
        db.execute(sql, params![id, new.phase.state().name(), new.last_access_error])?;
    }
    if old.readers != new.readers {
        let clients: HashSet<_> = old.readers.keys().chain(new.readers.keys()).collect();
        for c in clients {
            put_lock(db, &id, *c, "read", new.readers.get(c).copied().unwrap_or(0))?;
        }
    }
    if old.writer != new.writer {
        if let Some(gone) = old.writer {
            put_lock(db, &id, gone, "write", 0)?;
        }
        if let Some(came) = new.writer {
            put_lock(db, &id, came, "write", 1)?;
        }
    }
    Ok(())
}

fn put_lock(db: &Connection, medium: &str, client: Client, mode: &str, count: u32) -> Result<()> {
    let sql = if count == 0 {
        "DELETE FROM locks WHERE medium = ?1 AND holder = ?2 AND mode = ?3 AND ?4 = 0"
    } else {
        "INSERT INTO locks (medium, holder, mode, count) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (medium, holder, mode) DO UPDATE SET count = ?4"
    };
    db.execute(sql, params![medium, client.0, mode, count])?;
    Ok(())
}

/// A machine's use of a medium.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    /// The machine.
    pub machine: Uuid,
    /// The snapshot of it that refers to the medium; `None`: its current state.
    pub snapshot: Option<Uuid>,
    /// The place in the order of the machine's disks, where one is known.
    pub place: Option<u32>,
}

/// The uses of a medium: of each machine its current state first.
pub(super) fn attachments(db: &Connection, id: Uuid) -> Result<Vec<Attachment>> {
    let sql = "SELECT machine, snapshot, place FROM attachments WHERE medium = ?1 ORDER BY machine, snapshot <> '', rowid";
    let mut select = db.prepare(sql)?;
    let rows = select.query_map([id.to_string()], |r| {
        let text: String = r.get(1)?;
        let snapshot =
            if text.is_empty() { None } else { Some(Uuid::parse_str(&text).map_err(|_| odd("a UUID"))?) };
        Ok(Attachment { machine: uuid_at(r, 0)?, snapshot, place: r.get(2)? })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Notes a use. One more of the same is counted.
pub(super) fn add_attachment(db: &Connection, id: Uuid, a: &Attachment) -> Result<()> {
    let sql = "INSERT INTO attachments (medium, machine, snapshot, place) VALUES (?1, ?2, ?3, ?4)
               ON CONFLICT (medium, machine, snapshot) DO UPDATE SET count = count + 1";
    let snapshot = a.snapshot.map(|s| s.to_string()).unwrap_or_default();
    db.execute(sql, params![id.to_string(), a.machine.to_string(), snapshot, a.place])?;
    Ok(())
}

/// Takes a use back; false: there is none.
pub(super) fn drop_attachment(
    db: &Connection,
    id: Uuid,
    machine: Uuid,
    snapshot: Option<Uuid>,
) -> Result<bool> {
    let key =
        params![id.to_string(), machine.to_string(), snapshot.map(|s| s.to_string()).unwrap_or_default()];
    let which = "WHERE medium = ?1 AND machine = ?2 AND snapshot = ?3";
    if db.execute(&format!("UPDATE attachments SET count = count - 1 {which} AND count > 1"), key)? > 0 {
        return Ok(true);
    }
    Ok(db.execute(&format!("DELETE FROM attachments {which}"), key)? > 0)
}
