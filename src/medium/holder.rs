//! Who holds locks: a process, known by a lock of the kernel's that goes with it, or by its number and the time it was started.

use super::code::{Code, Fault, Result};
use crate::io::HeldByte;
use rusqlite::{Connection, OptionalExtension, params};
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of the file of holders: as many clients at a time.
const MAX_HOLDERS: u16 = 60_000;

/// A client of the registry that lives as long as this value.
#[derive(Debug)]
pub(super) struct Holder {
    pub(super) id: i64,
    /// The kernel's word that we live; `None`: another process stands for it.
    alive: Option<HeldByte>,
}

impl Holder {
    /// It is this process.
    pub(super) fn is_own(&self) -> bool {
        self.alive.is_some()
    }
}

/// The file whose bytes living clients hold.
pub(super) fn file_of(registry: &Path) -> PathBuf {
    let mut name = registry.as_os_str().to_os_string();
    name.push("-holders");
    name.into()
}

/// Notes this process as a client. In a transaction that writes, after [`forget_dead`].
pub(super) fn enter(db: &Connection, file: &Path) -> Result<Holder> {
    for byte in 1..MAX_HOLDERS {
        let taken =
            db.query_row("SELECT 1 FROM holders WHERE byte = ?1", [byte], |_| Ok(())).optional()?.is_some();
        if taken {
            continue;
        }
        let Some(alive) = HeldByte::take(file, byte).map_err(|e| Fault::because(Code::FileError, e))? else {
            continue;
        };
        let pid = std::process::id();
        db.execute(
            "INSERT INTO holders (byte, pid, program) VALUES (?1, ?2, ?3)",
            params![byte, pid, program_of(pid)],
        )?;
        return Ok(Holder { id: db.last_insert_rowid(), alive: Some(alive) });
    }
    Err(Fault::new(Code::FileError, format!("more than {MAX_HOLDERS} clients use the registry")))
}

/// The client that another living process is, which is noted if it is not known.
pub(super) fn enter_process(db: &Connection, pid: u32) -> Result<Holder> {
    let Some(start) = start_of(pid) else {
        return Err(Fault::new(Code::InvalidArg, format!("there is no process {pid}")));
    };
    let known = find_process(db, pid)?;
    let id = match known {
        Some(id) => id,
        None => {
            db.execute(
                "INSERT INTO holders (pid, start, boot, program) VALUES (?1, ?2, ?3, ?4)",
                params![pid, start, boot_id(), program_of(pid)],
            )?;
            db.last_insert_rowid()
        }
    };
    Ok(Holder { id, alive: None })
}

fn find_process(db: &Connection, pid: u32) -> Result<Option<i64>> {
    let sql = "SELECT id FROM holders WHERE byte IS NULL AND pid = ?1 AND start = ?2 AND boot = ?3";
    Ok(db.query_row(sql, params![pid, start_of(pid), boot_id()], |r| r.get(0)).optional()?)
}

/// The clients that are gone.
pub(super) fn dead(db: &Connection, file: &Path) -> Result<Vec<i64>> {
    let mut all = db.prepare("SELECT id, byte, pid, start, boot FROM holders")?;
    let rows = all.query_map([], |r| {
        Ok((
            r.get::<_, i64>(0)?,
            r.get::<_, Option<u16>>(1)?,
            r.get::<_, u32>(2)?,
            r.get::<_, Option<i64>>(3)?,
            r.get::<_, Option<String>>(4)?,
        ))
    })?;
    let mut dead = Vec::new();
    for row in rows {
        let (id, byte, pid, start, boot) = row?;
        let lives = match byte {
            Some(byte) => HeldByte::is_held(file, byte).map_err(|e| Fault::because(Code::FileError, e))?,
            None => start.is_some() && start == start_of(pid) && boot == boot_id(),
        };
        if !lives {
            dead.push(id);
        }
    }
    Ok(dead)
}

/// Removes clients that are gone, with their locks. What they left half done loses its owner.
pub(super) fn forget_dead(db: &Connection, file: &Path) -> Result<()> {
    for id in dead(db, file)? {
        leave(db, id)?;
    }
    Ok(())
}

/// Removes a client, with its locks.
pub(super) fn leave(db: &Connection, id: i64) -> Result<()> {
    db.execute("DELETE FROM holders WHERE id = ?1", [id])?;
    Ok(())
}

/// When a process was started, in clock ticks since boot; `None`: there is none, or it has ended and was not waited for.
fn start_of(pid: u32) -> Option<i64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in brackets and may have anything in it.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn boot_id() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|s| s.trim().to_string())
}

fn program_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).map_or_else(|_| "?".into(), |s| s.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn processes_are_told_apart_by_when_they_were_started() {
        let own = start_of(std::process::id()).expect("we live");
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let other = start_of(child.id()).expect("it lives");
        assert!(other >= own);
        child.kill().unwrap();
        // Dead, and not waited for: it holds nothing any more.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while start_of(child.id()).is_some() && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(start_of(child.id()), None);
        child.wait().unwrap();
        assert_eq!(start_of(child.id()), None);
    }
}
