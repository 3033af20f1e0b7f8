//! Finding the images a disk belongs with: parents by their UUID, children by the parent they name.

use super::image_files::ImageFiles;
use super::references::parent_path;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{self, extension_format};
use crate::limits::{MAX_PARENT_SEARCH_DEPTH, MAX_PARENT_SEARCH_FILES};
use crate::map::FileId;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Where an image's parents are looked for if nothing was said: its own folder, or the one above if its name is
/// `Snapshots`, as VirtualBox lays machines out.
pub(super) fn default_dirs(image: &Path) -> Vec<PathBuf> {
    let absolute = std::path::absolute(image).unwrap_or_else(|_| image.to_path_buf());
    let Some(own) = absolute.parent() else { return Vec::new() };
    vec![above_snapshots(own).unwrap_or_else(|| own.to_path_buf())]
}

/// The folder above one that is called `Snapshots`.
pub(super) fn above_snapshots(dir: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(dir).ok()?;
    let above = absolute.parent()?;
    (absolute.file_name()? == "Snapshots").then(|| above.to_path_buf())
}

/// The images found in some folders and the folders below, by what their headers say.
#[derive(Debug)]
pub(super) struct ParentSearch {
    dirs: Vec<PathBuf>,
    found: Option<Found>,
}

#[derive(Debug, Default)]
struct Found {
    by_uuid: HashMap<Uuid, Vec<PathBuf>>,
    by_parent: HashMap<Uuid, Vec<PathBuf>>,
    by_name: Vec<Named>,
    files: usize,
}

/// An image that says in which file its parent is.
#[derive(Debug)]
struct Named {
    child: PathBuf,
    names: Vec<String>,
    uuid: Option<Uuid>,
}

/// An image that others may have as their parent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sought<'a> {
    pub(crate) path: &'a Path,
    /// What it says of itself.
    pub(crate) own: Option<Uuid>,
    /// What its children may call it.
    pub(crate) named: Option<Uuid>,
}

/// The first of `images` that an image in its folder, or below, which is none of `but`, has as its parent, and that image: by UUID, or,
/// unless the UUIDs are different ones, by the file's name.
pub(crate) fn any_other_child<'a>(images: &[Sought<'a>], but: &[&Path]) -> Option<(&'a Path, PathBuf)> {
    let mut searches: HashMap<PathBuf, ParentSearch> = HashMap::new();
    images.iter().find_map(|image| {
        let dir = image.path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let new = || ParentSearch::new(vec![dir.to_path_buf()]);
        let search = searches.entry(dir.to_path_buf()).or_insert_with(new);
        let by_uuid = image.named.and_then(|uuid| search.child_of(uuid, but));
        let child = by_uuid.or_else(|| search.child_by_name(image, but))?;
        Some((image.path, child))
    })
}

/// An image in the folder of this one, or below, that names `uuid` as its parent's.
pub(crate) fn child_that_names(path: &Path, uuid: Uuid) -> Option<PathBuf> {
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ParentSearch::new(vec![dir.to_path_buf()]).child_of(uuid, &[])
}

impl ParentSearch {
    pub(super) fn new(dirs: Vec<PathBuf>) -> Self {
        ParentSearch { dirs, found: None }
    }

    /// The file with this UUID, other than `child` itself. Two different files with it are an error: only the
    /// user can tell which is meant.
    pub(super) fn find(&mut self, uuid: Uuid, child: &Path) -> Result<Option<PathBuf>> {
        let own = identity(child);
        let Some(paths) = self.found().by_uuid.get(&uuid) else { return Ok(None) };
        let mut others: Vec<_> = paths.iter().filter(|p| identity(p) != own).collect();
        others.sort_by_key(|p| identity(p));
        others.dedup_by_key(|p| identity(p));
        match others[..] {
            [] => Ok(None),
            [one] => Ok(Some(one.clone())),
            [a, b, ..] => {
                let what =
                    format!("two files have its parent's UUID {uuid}: {} and {}", a.display(), b.display());
                Err(Error::new(ErrorKind::ParentMismatch, what)
                    .at(child)
                    .hint("name the right one with --parent"))
            }
        }
    }

    /// A file that names `uuid` as its parent, and is none of `but`.
    pub(super) fn child_of(&mut self, uuid: Uuid, but: &[&Path]) -> Option<PathBuf> {
        let known: Vec<_> = but.iter().map(|p| identity(p)).collect();
        let children = self.found().by_parent.get(&uuid)?;
        children.iter().find(|p| !known.contains(&identity(p))).cloned()
    }

    /// A file that names this one as its parent's, and is none of `but`.
    fn child_by_name(&mut self, parent: &Sought<'_>, but: &[&Path]) -> Option<PathBuf> {
        let known: Vec<_> = but.iter().map(|p| identity(p)).collect();
        let own = identity(parent.path);
        let dirs = self.dirs.clone();
        let is_meant = |n: &&Named| {
            let is_another = n.uuid.zip(parent.own).is_some_and(|(said, is)| said != is);
            // One that says where it is in vain, or where it may not be, is nobody's child.
            let names = || parent_path(&n.child, &n.names, &dirs).ok().flatten();
            !is_another
                && !known.contains(&identity(&n.child))
                && names().is_some_and(|p| identity(&p) == own)
        };
        self.found().by_name.iter().find(is_meant).map(|n| n.child.clone())
    }

    fn found(&mut self) -> &Found {
        self.found.get_or_insert_with(|| {
            let mut found = Found::default();
            for d in &self.dirs {
                scan(d, 0, &mut found);
            }
            found
        })
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// Looks at a folder and those below. Links are not followed: a folder shared with others must not lead elsewhere.
fn scan(dir: &Path, depth: usize, found: &mut Found) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if found.files >= MAX_PARENT_SEARCH_FILES {
            tracing::warn!(
                "{}: more than {MAX_PARENT_SEARCH_FILES} files, the rest is not searched",
                dir.display()
            );
            return;
        }
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && depth < MAX_PARENT_SEARCH_DEPTH {
            scan(&entry.path(), depth + 1, found);
        } else if kind.is_file() {
            found.files += 1;
            look(&entry.path(), found);
        }
    }
}

/// Notes an image's UUIDs. Files that are no images, or damaged ones, are passed over: they are not what is sought.
fn look(path: &Path, found: &mut Found) {
    if extension_format(path).is_none_or(|f| f == format::Format::Raw) {
        return;
    }
    let how = format::OpenHow { read_only: true, info_only: true };
    let opened = ImageFiles::open(path, None, false, None).and_then(|files| files.map(FileId(0), how));
    let Ok(map) = opened else { return };
    let info = map.info();
    if let Some(u) = info.uuid {
        found.by_uuid.entry(u).or_default().push(path.to_path_buf());
    }
    if let Some(p) = info.parent_uuid {
        found.by_parent.entry(p).or_default().push(path.to_path_buf());
    }
    if !info.parent_names.is_empty() {
        let (child, uuid) = (path.to_path_buf(), info.parent_uuid);
        found.by_name.push(Named { child, names: info.parent_names, uuid });
    }
}
