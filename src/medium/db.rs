//! The file of the registry: its tables, their version, and how many processes share it.
//!
//! SQLite in WAL mode: readers see one moment, one writer at a time, and what was committed is durable (synchronous = FULL).

use super::code::{Code, Fault};
use crate::error::Error;
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest wait for another process that writes.
const PATIENCE: Duration = Duration::from_secs(30);
/// "vdbm": what tells our files from other databases.
const APPLICATION_ID: i32 = 0x7664_626d;

/// What each version of the tables adds to the one before; the first makes them.
const VERSIONS: &[&str] = &[
    // 1
    "CREATE TABLE holders (
        id INTEGER PRIMARY KEY,
        byte INTEGER UNIQUE,
        pid INTEGER NOT NULL,
        start INTEGER,
        boot TEXT,
        program TEXT NOT NULL
    ) STRICT;
    CREATE TABLE intents (
        id INTEGER PRIMARY KEY,
        holder INTEGER REFERENCES holders(id) ON DELETE SET NULL,
        detail TEXT NOT NULL
    ) STRICT;
    CREATE TABLE media (
        id TEXT PRIMARY KEY,
        device TEXT NOT NULL CHECK (device IN ('hdd', 'dvd', 'floppy')),
        type TEXT NOT NULL,
        format TEXT NOT NULL,
        location TEXT NOT NULL,
        description TEXT,
        auto_reset INTEGER NOT NULL DEFAULT 0 CHECK (auto_reset IN (0, 1)),
        parent TEXT REFERENCES media(id),
        phase TEXT NOT NULL CHECK (phase IN ('Creating', 'Created', 'Inaccessible', 'Deleting')),
        last_error TEXT,
        size INTEGER NOT NULL DEFAULT 0,
        logical_size INTEGER NOT NULL DEFAULT 0,
        variant TEXT NOT NULL DEFAULT '',
        machine TEXT,
        intent INTEGER REFERENCES intents(id) ON DELETE SET NULL,
        UNIQUE (device, location)
    ) STRICT;
    CREATE INDEX media_by_parent ON media(parent);
    CREATE TABLE attachments (
        medium TEXT NOT NULL REFERENCES media(id),
        machine TEXT NOT NULL,
        snapshot TEXT NOT NULL DEFAULT '',
        count INTEGER NOT NULL DEFAULT 1 CHECK (count > 0),
        place INTEGER,
        PRIMARY KEY (medium, machine, snapshot)
    ) STRICT;
    CREATE INDEX attachments_by_machine ON attachments(machine);
    CREATE TABLE properties (
        medium TEXT NOT NULL REFERENCES media(id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (medium, name)
    ) STRICT;
    CREATE TABLE locks (
        medium TEXT NOT NULL REFERENCES media(id),
        holder INTEGER NOT NULL REFERENCES holders(id) ON DELETE CASCADE,
        mode TEXT NOT NULL CHECK (mode IN ('read', 'write')),
        count INTEGER NOT NULL CHECK (count > 0),
        PRIMARY KEY (medium, holder, mode)
    ) STRICT;",
];

/// Where the registry of this user is: `$XDG_DATA_HOME/vdblk`, else `~/.local/share/vdblk`.
///
/// # Errors
/// [`Code::FileError`] where neither is set.
pub fn user_registry() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let folder = set("XDG_DATA_HOME").or_else(|| set("HOME").map(|h| h.join(".local/share")));
    folder.map(|f| f.join("vdblk").join(FILE_NAME)).ok_or_else(|| {
        Fault::new(Code::FileError, "neither XDG_DATA_HOME nor HOME says where this user's data is")
            .hint("name a registry with --registry FILE")
    })
}

/// Where the registry of the whole system is.
pub fn system_registry() -> PathBuf {
    Path::new("/var/lib/vdblk").join(FILE_NAME)
}

const FILE_NAME: &str = "media.sqlite";

/// Opens the registry, which is made if it is not there, and brings its tables to this version.
pub(super) fn open(path: &Path) -> Result<Connection> {
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|e| Fault::because(Code::FileError, Error::io("make its folder", e).at(path)))?;
    }
    let named = |e: rusqlite::Error| Fault::from(e).at(path);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    // The last part alone may be no link: folders above may.
    let real = path.parent().filter(|f| !f.as_os_str().is_empty()).and_then(|f| f.canonicalize().ok());
    let real = real.zip(path.file_name()).map_or_else(|| path.to_path_buf(), |(f, name)| f.join(name));
    let db = Connection::open_with_flags(real, flags).map_err(named)?;
    db.busy_timeout(PATIENCE).map_err(named)?;
    patiently(|| set_up(&db)).map_err(|e| e.at(path))?;
    Ok(db)
}

/// Changing to WAL gives up at once where another opens the same new file.
fn patiently(mut what: impl FnMut() -> Result<(), Trouble>) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match what() {
            Ok(()) => return Ok(()),
            Err(Trouble::Sqlite(e)) => {
                let busy = matches!(
                    e.sqlite_error_code(),
                    Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)
                );
                if !busy || Instant::now() > until {
                    return Err(e.into());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Trouble::Fault(f)) => return Err(f),
        }
    }
}

type Result<T, E = Fault> = std::result::Result<T, E>;

enum Trouble {
    Sqlite(rusqlite::Error),
    Fault(Fault),
}

impl From<rusqlite::Error> for Trouble {
    fn from(e: rusqlite::Error) -> Self {
        Trouble::Sqlite(e)
    }
}

fn set_up(db: &Connection) -> Result<(), Trouble> {
    let mode: String = db.query_row("PRAGMA journal_mode = WAL", [], |r| r.get(0))?;
    if !mode.eq_ignore_ascii_case("wal") {
        let what = "the registry's file system has no shared memory for SQLite";
        return Err(Trouble::Fault(Fault::new(Code::FileError, what)));
    }
    db.execute_batch("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF;")?;
    let newest = u32::try_from(VERSIONS.len()).expect("few versions");
    let version = |db: &Connection| db.query_row("PRAGMA user_version", [], |r| r.get::<_, u32>(0));
    if version(db)? == newest {
        return Ok(());
    }
    let tx = Transaction::new_unchecked(db, TransactionBehavior::Immediate)?;
    let now = version(&tx)?; // another may have been first
    let tables: i64 = tx.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get(0))?;
    let id: i32 = tx.query_row("PRAGMA application_id", [], |r| r.get(0))?;
    if now == 0 && tables > 0 || now > 0 && id != APPLICATION_ID {
        return Err(Trouble::Fault(Fault::new(Code::XmlError, "is a database of another program")));
    }
    let Some(missing) = VERSIONS.get(now as usize..) else {
        let what = format!("was written by a newer vdblk: version {now}, {newest} is known");
        return Err(Trouble::Fault(Fault::new(Code::XmlError, what)));
    };
    for sql in missing {
        tx.execute_batch(sql)?;
    }
    tx.pragma_update(None, "application_id", APPLICATION_ID)?;
    tx.pragma_update(None, "user_version", newest)?;
    tx.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_programs_database_and_a_newer_one_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other");
        Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
        assert_eq!(open(&other).unwrap_err().code(), Code::XmlError);
        let text = dir.path().join("text");
        std::fs::write(
            &text,
            "this is no database, and long enough to be looked at as one, which it is not, at all",
        )
        .unwrap();
        assert_eq!(open(&text).unwrap_err().code(), Code::XmlError);
        let newer = dir.path().join("newer");
        drop(open(&newer).unwrap());
        Connection::open(&newer).unwrap().pragma_update(None, "user_version", 99).unwrap();
        let e = open(&newer).unwrap_err();
        assert!(e.code() == Code::XmlError && e.to_string().contains("newer"), "{e}");
        assert_eq!(open(Path::new("/proc/none/x")).unwrap_err().code(), Code::FileError);
    }

    #[test]
    fn it_is_made_with_its_folder_for_this_user_alone() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/media.sqlite");
        open(&path).unwrap();
        let mode = std::fs::metadata(path.parent().unwrap()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
