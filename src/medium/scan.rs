//! Making a registry anew from a folder: what the images say of themselves and of their parents.

use super::check::{Facts, Question};
use super::code::Result;
use super::kinds::MediumType;
use super::operations::insert_new;
use super::record::{self, Record};
use super::state::Phase;
use super::store::{Registry, registered_parent};
use crate::format::{extension_format, is_optical_name};
use crate::limits::{MAX_PARENT_SEARCH_DEPTH, MAX_PARENT_SEARCH_FILES};
use rusqlite::Connection;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// What a scan has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Media that were not known before.
    pub added: Vec<Uuid>,
    /// Media that were known already.
    pub known: Vec<Uuid>,
    /// Files that could not be added, each with why.
    pub left: Vec<(PathBuf, String)>,
}

impl Registry {
    /// Makes all images in a folder and those below known: parents first, found by their UUIDs, else by their names. All at once, or
    /// nothing.
    ///
    /// # Errors
    /// Of the registry's file. An image that cannot be added is none: it is left, and named.
    pub fn scan(&self, folder: &Path) -> Result<Scanned> {
        let mut files = Vec::new();
        walk(&super::absolute(folder), 0, &mut files);
        let question = |p: &PathBuf| Question { path: p.clone(), format: None, find_parent: true };
        let questions: Vec<_> = files.iter().map(question).collect();
        let mut waiting = Vec::new();
        let mut done = Scanned::default();
        for (path, answer) in files.into_iter().zip(self.ask_all(&questions)) {
            match answer {
                Ok(facts) => waiting.push((path, facts)),
                Err(why) => done.left.push((path, why)),
            }
        }
        self.write(|db| {
            let mut done = done;
            let mut waiting = waiting;
            loop {
                let before = waiting.len();
                let mut still = Vec::new();
                for (path, facts) in waiting {
                    if !add(db, &path, &facts, &mut done)? {
                        still.push((path, facts));
                    }
                }
                waiting = still;
                if waiting.len() == before {
                    break;
                }
            }
            let missing = |f: &Facts| match &f.parent_uuid {
                Some(uuid) => format!("its parent {uuid} is not known and not among these files"),
                None => "its parent is not known and not among these files".into(),
            };
            done.left.extend(waiting.into_iter().map(|(p, f)| (p, missing(&f))));
            Ok(done)
        })
    }
}

/// False: its parent is not known yet.
fn add(db: &Connection, path: &Path, facts: &Facts, done: &mut Scanned) -> Result<bool> {
    let parent = if facts.is_diff { registered_parent(db, facts)? } else { None };
    if facts.is_diff && parent.is_none() {
        return Ok(false);
    }
    let device = facts.device();
    let id = facts.uuid().unwrap_or_else(Uuid::new_v4);
    let new = Record {
        parent,
        medium_type: MediumType::of_new(device),
        phase: Phase::Created,
        size: facts.size,
        logical_size: facts.logical_size,
        variant: facts.variant.clone(),
        ..Record::new(id, device, &facts.format, path)
    };
    let is_known = record::at_location(db, path)?.iter().any(|r| r.device == device);
    match insert_new(db, &new) {
        Ok(id) if is_known => done.known.push(id),
        Ok(id) => done.added.push(id),
        Err(e) => done.left.push((path.to_path_buf(), e.to_string())),
    }
    Ok(true)
}

/// Names that images have. Links are not followed.
fn walk(dir: &Path, depth: usize, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (path, Ok(kind)) = (entry.path(), entry.file_type()) else { continue };
        if kind.is_dir() && depth < MAX_PARENT_SEARCH_DEPTH {
            if !entry.file_name().to_string_lossy().starts_with(".vdblk-") {
                walk(&path, depth + 1, files);
            }
        } else if kind.is_file() && is_image_name(&path) {
            if files.len() >= MAX_PARENT_SEARCH_FILES {
                tracing::warn!(
                    "{}: more than {MAX_PARENT_SEARCH_FILES} images, the rest is left",
                    dir.display()
                );
                return;
            }
            files.push(path);
        }
    }
}

fn is_image_name(path: &Path) -> bool {
    let is_floppy =
        path.extension().is_some_and(|e| e.eq_ignore_ascii_case("img") || e.eq_ignore_ascii_case("flp"));
    extension_format(path).is_some() || is_optical_name(path) || is_floppy
}
