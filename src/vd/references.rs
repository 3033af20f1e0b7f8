//! Names that stand in images: which of them may be opened, and where they are.
//!
//! An image may come from a stranger. What it names decides nothing by itself: a file is opened only if it lies in the image's own folder
//! (for parents also in the folders the operator named), is a regular file, and no link leads out.

use crate::error::{Error, ErrorKind, Result};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Longest name that is looked at.
const MAX_NAME_BYTES: usize = 4096;

/// The folder a file is in, without links.
fn folder_of(path: &Path) -> Result<PathBuf> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::canonicalize(dir).map_err(|e| Error::io("find its folder", e).at(path))
}

/// Where the file is that the image at `image` names as a part of itself.
///
/// # Errors
/// [`ErrorKind::NotFound`]; [`ErrorKind::PermissionDenied`] for names that lead elsewhere, links, and whatever is no regular
/// file.
pub(super) fn extent_path(image: &Path, name: &str) -> Result<PathBuf> {
    let folder = folder_of(image)?;
    let refused = |why: &str| {
        let what = format!("names '{}' as a part of itself, {why}", name.escape_debug());
        Error::new(ErrorKind::PermissionDenied, what).at(image)
    };
    let path = inside(&folder, name).ok_or_else(|| refused("which is not in its own folder"))?;
    match fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_file() => {}
        Ok(_) => return Err(refused("which is no regular file")),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let what = format!("its part '{}' is missing", name.escape_debug());
            return Err(Error::new(ErrorKind::NotFound, what).at(image).hint("put it into the same folder"));
        }
        Err(e) => return Err(Error::io("look at it", e).at(&path)),
    }
    // A folder on the way may be a link.
    let real = fs::canonicalize(&path).map_err(|e| Error::io("look at it", e).at(&path))?;
    if real.starts_with(&folder) { Ok(path) } else { Err(refused("which is not in its own folder")) }
}

/// The disk of the host that the image at `image` describes, if the operator allows that.
///
/// # Errors
/// [`ErrorKind::PermissionDenied`].
pub(super) fn device_path(image: &Path, name: &str, allowed: bool) -> Result<PathBuf> {
    if !allowed {
        let what = format!("describes the disk '{}' of this host", name.escape_debug());
        return Err(Error::new(ErrorKind::PermissionDenied, what)
            .at(image)
            .hint("pass --allow-raw-device if that is meant"));
    }
    Ok(PathBuf::from(name))
}

/// `name` in `folder`, by its words alone: nothing above the folder, and no absolute name but one in it.
fn inside(folder: &Path, name: &str) -> Option<PathBuf> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains('\0') {
        return None;
    }
    let name = Path::new(name);
    let relative = if name.is_absolute() { name.strip_prefix(folder).ok()? } else { name };
    let mut path = folder.to_path_buf();
    for part in relative.components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            _ => return None,
        }
    }
    (path != folder).then_some(path)
}

/// Where the parent is that the image at `child` names, if it is in one of `folders`. Names of other systems are
/// understood as far as their last part: `C:\VMs\base.vhd` is looked for as `base.vhd`.
///
/// # Errors
/// [`ErrorKind::PermissionDenied`] if there is such a file, but elsewhere: the operator has to name it.
pub(super) fn parent_path(child: &Path, names: &[String], folders: &[PathBuf]) -> Result<Option<PathBuf>> {
    let own = folder_of(child)?;
    let folders: Vec<_> = folders.iter().filter_map(|f| fs::canonicalize(f).ok()).collect();
    let is_allowed = |p: &Path| p.starts_with(&own) || folders.iter().any(|f| p.starts_with(f));
    let mut elsewhere = None;
    for name in names.iter().filter(|n| !n.is_empty() && n.len() <= MAX_NAME_BYTES && !n.contains('\0')) {
        let slashes = name.replace('\\', "/");
        let last = slashes.rsplit('/').next().unwrap_or_default();
        let stated = [own.join(name), own.join(&slashes)];
        let by_last = std::iter::once(&own).chain(&folders).map(|f| f.join(last));
        for path in stated.into_iter().chain(by_last.filter(|_| !matches!(last, "" | "." | ".."))) {
            let Ok(real) = fs::canonicalize(&path) else { continue };
            if !fs::metadata(&real).is_ok_and(|m| m.is_file()) {
                continue;
            }
            if is_allowed(&real) {
                return Ok(Some(real));
            }
            elsewhere.get_or_insert(real);
        }
    }
    match elsewhere {
        None => Ok(None),
        Some(path) => {
            let what = format!("names {} as its parent, which is in another folder", path.display());
            Err(Error::new(ErrorKind::PermissionDenied, what)
                .at(child)
                .hint("if it is meant, name it with --parent FILE, or its folder with --parent-dir DIR"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn parts_lie_in_the_images_own_folder() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let own = root.join("own");
        fs::create_dir_all(own.join("parts")).unwrap();
        for f in ["own/a.vmdk", "own/a-flat.vmdk", "own/parts/b", "secret"] {
            fs::write(root.join(f), "x").unwrap();
        }
        symlink(root.join("secret"), own.join("link")).unwrap();
        symlink(&root, own.join("up")).unwrap();
        let image = own.join("a.vmdk");
        let absolute = own.join("a-flat.vmdk").display().to_string();
        for name in ["a-flat.vmdk", "./a-flat.vmdk", "parts/b", &absolute] {
            let path = extent_path(&image, name).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(path.starts_with(&own), "{name}");
        }
        let kind = |name: &str| extent_path(&image, name).unwrap_err().kind();
        for name in ["../secret", "/etc/passwd", "link", "up/secret", "parts", "", ".", "/dev/zero", "a\0b"] {
            assert_eq!(kind(name), ErrorKind::PermissionDenied, "{name}");
        }
        assert_eq!(kind("none"), ErrorKind::NotFound);
        assert_eq!(kind("nbd:localhost:1"), ErrorKind::NotFound, "a name like any other");
    }

    #[test]
    fn parents_lie_there_or_where_the_operator_says() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir_all(root.join("own")).unwrap();
        for f in ["own/base.vhd", "other.vhd"] {
            fs::write(root.join(f), "x").unwrap();
        }
        symlink(root.join("other.vhd"), root.join("own/sly.vhd")).unwrap();
        let child = root.join("own/child.vhd");
        let find = |name: &str, dirs: &[PathBuf]| parent_path(&child, &[name.to_string()], dirs);
        for name in ["base.vhd", ".\\base.vhd", "C:\\VMs\\base.vhd", "../own/base.vhd"] {
            assert_eq!(find(name, &[]).unwrap(), Some(root.join("own/base.vhd")), "{name}");
        }
        for name in ["../other.vhd", "sly.vhd", "..\\other.vhd"] {
            assert_eq!(find(name, &[]).unwrap_err().kind(), ErrorKind::PermissionDenied, "{name}");
            assert_eq!(
                find(name, std::slice::from_ref(&root)).unwrap(),
                Some(root.join("other.vhd")),
                "{name}"
            );
        }
        assert_eq!(find("gone.vhd", std::slice::from_ref(&root)).unwrap(), None);
        assert_eq!(find("..", &[]).unwrap(), None);
    }
}
