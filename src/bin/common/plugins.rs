//! Plug-ins named on the command line. They are loaded before it is understood, because names of formats in it may be theirs.

use clap::Args;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use vdblk::Result;
use vdblk::container::{plugin_load, plugin_load_dir};

/// Folders whose plug-ins are loaded, separated by colons.
const FOLDERS: &str = "VDBLK_PLUGIN_PATH";

/// Plug-ins: formats and filters that are added.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Plugins {
    /// Load this plug-in first (repeatable); its formats and filters are there then. Its code runs with all rights of this program
    #[arg(long, value_name = "FILE", global = true)]
    plugin: Vec<PathBuf>,
    /// Load the plug-ins of this folder first, vdblk-plugin-*.so and libvdblk_plugin_*.so (repeatable); those that cannot be loaded are told
    /// of. So are those of the folders in VDBLK_PLUGIN_PATH, separated by colons
    #[arg(long, value_name = "DIR", global = true)]
    plugin_dir: Vec<PathBuf>,
}

/// What a command line says of plug-ins, in its order.
enum Wanted {
    File(PathBuf),
    Folder(PathBuf),
}

/// The plug-ins in `args`, up to a `--`. An option never takes another one for its value, so these words mean what they say.
fn wanted(args: impl IntoIterator<Item = OsString>) -> Vec<Wanted> {
    let (mut found, mut args) = (Vec::new(), args.into_iter());
    while let Some(arg) = args.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            break;
        }
        for (option, is_file) in [(&b"--plugin"[..], true), (b"--plugin-dir", false)] {
            let value = match bytes.strip_prefix(option) {
                Some([]) => args.next(),
                Some([b'=', value @ ..]) => Some(OsStr::from_bytes(value).to_os_string()),
                _ => continue,
            };
            let path = value.map(PathBuf::from);
            found.extend(path.map(if is_file { Wanted::File } else { Wanted::Folder }));
            break;
        }
    }
    found
}

/// Loads what environment and command line name. `warn` is told of plug-ins in folders that cannot be loaded.
///
/// # Errors
/// Of a plug-in that is named itself, or a folder that cannot be read.
pub(crate) fn load(warn: &dyn Fn(&str)) -> Result<()> {
    let scan = |dir: &Path| -> Result<()> {
        for (_, loaded) in plugin_load_dir(dir)? {
            if let Err(e) = loaded {
                warn(&format!("warning: {e}"));
            }
        }
        Ok(())
    };
    let folders = std::env::var_os(FOLDERS).unwrap_or_default();
    for dir in std::env::split_paths(&folders).filter(|d| !d.as_os_str().is_empty()) {
        if let Err(e) = scan(&dir) {
            warn(&format!("warning: {FOLDERS}: {e}"));
        }
    }
    for wanted in wanted(std::env::args_os().skip(1)) {
        match wanted {
            Wanted::File(path) => drop(plugin_load(&path)?),
            Wanted::Folder(dir) => scan(&dir)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugins_are_found_before_anything_is_understood() {
        let args =
            ["info", "--plugin", "a.so", "-f", "x", "--plugin-dir=/d", "--plugin=b", "--", "--plugin", "c"];
        let found = wanted(args.into_iter().map(OsString::from));
        let names: Vec<_> = found
            .iter()
            .map(|w| match w {
                Wanted::File(p) => format!("file {}", p.display()),
                Wanted::Folder(p) => format!("folder {}", p.display()),
            })
            .collect();
        assert_eq!(names, ["file a.so", "folder /d", "file b"]);
    }
}
