//! What is about to be done to files: written down before, so that another process can complete it or take it back.
//!
//! An intent belongs to a client. When that is gone the intent belongs to nobody, and whoever opens the registry next takes it over.

use super::code::{Code, Fault, Result};
use super::encryption;
use super::record;
use super::staging::{self, Staging, folder_of, identity};
use super::state::{Call, Client};
use super::store::{Registry, call_in};
use crate::error::Error;
use crate::io::sync_dir;
use crate::job::inspect_image;
use crate::vd::ImageSpec;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use uuid::Uuid;

/// How long an opening waits for the files of an operation that was interrupted; then it is left to the next one.
const RECOVERY_LIMIT: std::time::Duration = std::time::Duration::from_secs(2);

/// An operation on files.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Intent {
    /// A new medium's files are made in `dir`, and published as `target`.
    Create { medium: String, dir: PathBuf, target: PathBuf },
    /// A medium's files get other names: first in `dir`, then published as `target`; then the old ones go.
    Move { medium: String, dir: PathBuf, target: PathBuf, old: Vec<Doomed> },
    /// Files go, and then the records of media.
    Remove { media: Vec<String>, files: Vec<Doomed>, dir: Option<PathBuf> },
    /// Media that are merged are not needed any more once the child names its new parent, or if there is none, not before the merge
    /// says so itself.
    Merge { media: Vec<String>, child: Option<Link>, files: Vec<Doomed> },
}

/// A child that gets another parent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Link {
    pub(super) child: String,
    pub(super) file: PathBuf,
    pub(super) parent: Option<String>,
    pub(super) parent_file: Option<PathBuf>,
}

impl Link {
    /// The child's file names the new parent.
    pub(super) fn is_made(&self) -> bool {
        let Ok(seen) = inspect_image(&ImageSpec { path: self.file.clone(), format: None }) else {
            return false;
        };
        let named = seen.info.parent_uuid.map(|u| u.to_string());
        match (named, &self.parent) {
            (Some(named), Some(parent)) => named == *parent,
            (None, None) => seen.info.parent_names.is_empty(),
            (Some(_), None) => false,
            (None, Some(_)) => self.parent_file.as_deref().is_some_and(|p| {
                let own = Path::new(folder_of(&self.file));
                seen.info.parent_names.iter().any(|n| identity(&own.join(n)) == identity(p))
            }),
        }
    }
}

/// After a merge: the child has its new parent, and what is left is to remove what is not needed any more.
pub(super) fn merged(
    db: &Connection,
    media: &[String],
    link: Option<&Link>,
    files: &[Doomed],
) -> Result<Intent> {
    if let Some(link) = link
        && let Some(mut child) = record::find(db, uuid(&link.child)?)?
    {
        child.parent = link.parent.as_deref().map(uuid).transpose()?;
        if child.parent.is_none() {
            // The new base has the bytes of the old one, and without its key store they were lost.
            for medium in media {
                let spent = record::find(db, uuid(medium)?)?;
                child.properties.extend(spent.iter().flat_map(encryption::properties_of));
            }
        }
        record::save(db, &child)?;
    }
    Ok(Intent::Remove { media: media.to_vec(), files: files.to_vec(), dir: None })
}

/// A file that is to be removed, if it is still the same.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Doomed {
    path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Doomed {
    /// `None`: nothing is there.
    pub(super) fn now(path: &Path) -> Option<Doomed> {
        identity(path).map(|(dev, ino)| Doomed { path: path.to_path_buf(), dev, ino })
    }

    fn remove(&self) -> crate::Result<()> {
        if identity(&self.path) != Some((self.dev, self.ino)) {
            return Ok(());
        }
        fs::remove_file(&self.path).map_err(|e| Error::io("remove it", e).at(&self.path))?;
        sync_dir(folder_of(&self.path))
    }
}

/// Removes files, the main one first: if that cannot be, nothing has happened.
pub(super) fn remove_files(files: &[Doomed]) -> crate::Result<()> {
    files.iter().try_for_each(Doomed::remove)
}

/// Writes an intent down.
pub(super) fn begin(db: &Connection, client: Client, intent: &Intent) -> Result<i64> {
    let detail = serde_json::to_string(intent).map_err(|e| Fault::new(Code::InvalidArg, e))?;
    db.execute("INSERT INTO intents (holder, detail) VALUES (?1, ?2)", params![client.0, detail])?;
    Ok(db.last_insert_rowid())
}

/// What was begun goes on as something else.
pub(super) fn change(db: &Connection, id: i64, intent: &Intent) -> Result<()> {
    let detail = serde_json::to_string(intent).map_err(|e| Fault::new(Code::InvalidArg, e))?;
    db.execute("UPDATE intents SET detail = ?2 WHERE id = ?1", params![id, detail])?;
    Ok(())
}

/// It is done, or taken back.
pub(super) fn end(db: &Connection, id: i64) -> Result<()> {
    db.execute("DELETE FROM intents WHERE id = ?1", [id])?;
    Ok(())
}

/// What the files say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// It was as good as done, and is to be completed.
    Forward,
    /// It was taken back.
    Back,
}

impl Intent {
    /// Looks at the files, and takes back what cannot be completed.
    fn settle(&self) -> crate::Result<Found> {
        match self {
            Intent::Create { dir, target, .. } | Intent::Move { dir, target, .. } => {
                let staging = Staging::again(dir, target);
                if staging.is_published() {
                    return Ok(Found::Forward);
                }
                staging.take_back();
                staging.clear()?;
                Ok(Found::Back)
            }
            Intent::Remove { files, dir, .. } => {
                remove_files(files)?;
                dir.as_deref().map_or(Ok(()), staging::clear)?;
                Ok(Found::Forward)
            }
            Intent::Merge { child, .. } => {
                let linked = child.as_ref().is_some_and(Link::is_made);
                Ok(if linked { Found::Forward } else { Found::Back })
            }
        }
    }

    /// The same with a limit of time: its files may be out of reach.
    fn settle_in_time(&self) -> crate::Result<Found> {
        let (tell, told) = mpsc::channel();
        let own = self.clone();
        let run = move || {
            let _ = tell.send(own.settle());
        };
        let started = thread::Builder::new().name("recovery".into()).spawn(run);
        started.map_err(|e| Error::io("start a thread", e))?;
        told.recv_timeout(RECOVERY_LIMIT).unwrap_or_else(|_| {
            Err(Error::new(crate::ErrorKind::Io, "its files do not answer; it is tried again later"))
        })
    }
}

impl Registry {
    /// Takes over what clients that are gone left half done.
    pub(super) fn recover(&self) -> Result<()> {
        let orphans: Vec<i64> = self.read(|db, dead| {
            let mut select = db.prepare("SELECT id, holder FROM intents ORDER BY id")?;
            let rows = select.query_map([], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, Option<i64>>(1)?)))?;
            let all: Vec<_> = rows.collect::<rusqlite::Result<_>>()?;
            Ok(all
                .into_iter()
                .filter(|(_, h)| h.is_none_or(|h| dead.contains(&h)))
                .map(|(id, _)| id)
                .collect())
        })?;
        for id in orphans {
            let Some(mut intent) = self.take_over(id)? else { continue };
            // Each round leaves less to do.
            loop {
                match intent.settle_in_time() {
                    Ok(found) => match self.complete(id, &intent, found)? {
                        Some(rest) => intent = rest,
                        None => break,
                    },
                    Err(e) => {
                        tracing::warn!("an operation that was interrupted is not completed yet: {e}");
                        self.write(|db| {
                            Ok(db.execute("UPDATE intents SET holder = NULL WHERE id = ?1", [id])?)
                        })?;
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// `None`: another process was first.
    fn take_over(&self, id: i64) -> Result<Option<Intent>> {
        self.write_as(|db, client| {
            let sql = "UPDATE intents SET holder = ?2 WHERE id = ?1 AND holder IS NULL";
            if db.execute(sql, params![id, client.0])? == 0 {
                return Ok(None);
            }
            let detail: String =
                db.query_row("SELECT detail FROM intents WHERE id = ?1", [id], |r| r.get(0))?;
            let intent = serde_json::from_str(&detail);
            intent.map(Some).map_err(|e| Fault::new(Code::XmlError, format!("an intent cannot be read: {e}")))
        })
    }

    /// Writes down what became of an intent; what is left to do of it.
    fn complete(&self, id: i64, intent: &Intent, found: Found) -> Result<Option<Intent>> {
        self.write_as(|db, client| {
            let rest = match (intent, found) {
                (Intent::Create { medium, dir, .. }, Found::Forward) => {
                    let _ = call_in(db, client, uuid(medium)?, &Call::EndCreate(true), None)?;
                    Some(Intent::Remove { media: Vec::new(), files: Vec::new(), dir: Some(dir.clone()) })
                }
                (Intent::Create { medium, .. }, Found::Back) => {
                    record::remove(db, uuid(medium)?)?;
                    None
                }
                (Intent::Move { medium, dir, target, old }, Found::Forward) => {
                    if let Some(mut r) = record::find(db, uuid(medium)?)? {
                        r.location.clone_from(target);
                        record::save(db, &r)?;
                    }
                    Some(Intent::Remove { media: Vec::new(), files: old.clone(), dir: Some(dir.clone()) })
                }
                (Intent::Remove { media, .. }, _) => {
                    for medium in media {
                        record::remove(db, uuid(medium)?)?;
                    }
                    None
                }
                (Intent::Merge { media, child, files }, Found::Forward) => {
                    Some(merged(db, media, child.as_ref(), files)?)
                }
                (Intent::Merge { media, .. }, Found::Back) => {
                    for medium in media {
                        if let Some(mut r) = record::find(db, uuid(medium)?)? {
                            r.phase = super::state::Phase::Created;
                            record::save(db, &r)?;
                        }
                    }
                    None
                }
                (Intent::Move { .. }, Found::Back) => None,
            };
            match &rest {
                Some(rest) => change(db, id, rest)?,
                None => end(db, id)?,
            }
            Ok(rest)
        })
    }
}

pub(super) fn uuid(text: &str) -> Result<Uuid> {
    Uuid::parse_str(text).map_err(|_| Fault::new(Code::XmlError, format!("'{text}' is no UUID")))
}
