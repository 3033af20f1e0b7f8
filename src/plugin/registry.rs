//! Which plug-ins are loaded, and who uses them.

use super::calls::{FilterFunctions, Functions};
use super::filter::PluginFilter;
use super::image::{self, Kind, PluginMap};
use super::judge;
use super::library::{self, FilterDescription, FormatDescription, Identity, Library};
use super::wish;
use crate::error::{Error, ErrorKind, Result};
use crate::filter;
use crate::format::{self, Format, NewFormat, NewOption, Registered};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Loads of one process, those of plug-ins that were unloaded since included: of each something stays in memory.
const MAX_LOADS: usize = 256;

/// A plug-in that is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginInfo {
    /// Its file, absolute.
    pub path: PathBuf,
    /// What it calls itself.
    pub name: String,
    /// Its version, as it says.
    pub version: String,
    /// The formats it has brought.
    pub formats: Vec<Format>,
    /// Names of the filters it has brought.
    pub filters: Vec<String>,
}

#[derive(Debug)]
struct Loaded {
    info: PluginInfo,
    identity: Identity,
    formats: Vec<Registered>,
    uses: Arc<Uses>,
    library: Library,
}

#[derive(Debug, Default)]
struct Plugins {
    loaded: Vec<Loaded>,
    loads: usize,
}

static PLUGINS: Mutex<Plugins> = Mutex::new(Plugins { loaded: Vec::new(), loads: 0 });

fn plugins() -> MutexGuard<'static, Plugins> {
    PLUGINS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who uses a plug-in.
#[derive(Debug)]
struct Uses {
    name: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    users: usize,
    gone: bool,
}

/// The plug-in is not unloaded as long as there is one of these.
#[derive(Debug)]
pub(super) struct InUse(Arc<Uses>);

impl Uses {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// [`ErrorKind::State`] once it is unloaded.
    fn enter(self: &Arc<Self>) -> Result<InUse> {
        let mut state = self.state();
        if state.gone {
            let what = format!("the plug-in {} was unloaded", self.name);
            return Err(Error::new(ErrorKind::State, what));
        }
        state.users += 1;
        Ok(InUse(self.clone()))
    }

    /// From here on nobody enters.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while somebody uses it.
    fn leave_for_good(&self) -> Result<()> {
        let mut state = self.state();
        if state.users > 0 {
            let what = format!("the plug-in {} is in use ({} times)", self.name, state.users);
            return Err(Error::new(ErrorKind::State, what).hint("close its images and filters first"));
        }
        state.gone = true;
        Ok(())
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.state().users -= 1;
    }
}

/// Loads a plug-in (`VDPluginLoadFromFilename`): its formats and filters are there from now on, behind those there were. Code of the
/// library runs with all rights of this process.
///
/// # Errors
/// [`ErrorKind::PermissionDenied`] for a file that somebody else than root and this user could have written; [`ErrorKind::NotThisFormat`]
/// if it is no plug-in, or not all of it is there; [`ErrorKind::Unsupported`] for another version of the interface;
/// [`ErrorKind::Corrupt`] for one that describes itself wrongly; [`ErrorKind::Exists`] if it is loaded, or one of its names is taken;
/// [`ErrorKind::Limit`]; what it says itself. Nothing of it is left then.
pub fn plugin_load(path: &Path) -> Result<PluginInfo> {
    load(path).map_err(|e| e.at(path))
}

fn load(path: &Path) -> Result<PluginInfo> {
    let (file, identity) = library::open(path)?;
    let path = std::path::absolute(path).map_err(|e| Error::io("tell where it is", e))?;
    // Held all the while: names are not taken twice.
    let mut plugins = plugins();
    if plugins.loaded.iter().any(|l| l.identity == identity) {
        return Err(Error::new(ErrorKind::Exists, "is loaded already"));
    }
    if plugins.loads >= MAX_LOADS {
        let what = format!("is one more than the {MAX_LOADS} plug-ins that a process loads at most");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    plugins.loads += 1;
    let (library, description) = Library::load(file)?;
    let uses = Arc::new(Uses { name: description.name.clone(), state: Mutex::default() });
    let origin = path.display().to_string();
    let (mut formats, mut filters) = (Vec::new(), Vec::new());
    let mut registered = Ok(());
    for f in description.formats {
        registered = registered.and_then(|()| {
            formats.push(format::register(new_format(f, &uses, &origin))?);
            Ok(())
        });
    }
    for f in description.filters {
        registered = registered.and_then(|()| {
            filters.push(register_filter(f, &uses, &origin)?);
            Ok(())
        });
    }
    if let Err(e) = registered {
        unregister(&formats, &filters);
        // Between the two somebody may have opened an image, and keeps the library: it is not listed, and harmless.
        return match uses.leave_for_good() {
            Ok(()) => {
                library.close();
                Err(e)
            }
            Err(_) => {
                std::mem::forget(library);
                Err(e)
            }
        };
    }
    let info = PluginInfo {
        path,
        name: description.name,
        version: description.version,
        formats: formats.iter().copied().map(Format::Registered).collect(),
        filters,
    };
    tracing::info!("plug-in {} {} is loaded from {origin}", info.name, info.version);
    plugins.loaded.push(Loaded { info: info.clone(), identity, formats, uses, library });
    Ok(info)
}

fn unregister(formats: &[Registered], filters: &[String]) {
    formats.iter().for_each(|f| format::unregister(*f));
    filters.iter().for_each(|f| filter::unregister(f));
}

fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

fn new_format(f: FormatDescription, uses: &Arc<Uses>, origin: &str) -> NewFormat {
    let variants: Vec<&'static str> = f.variants.into_iter().map(leak).collect();
    let kind: &'static Kind = Box::leak(Box::new(Kind {
        name: leak(f.name.clone()),
        variants: Box::leak(variants.into_boxed_slice()),
        functions: Functions::new(f.functions),
    }));
    let options: Vec<_> = f
        .options
        .into_iter()
        .map(|(key, default, is_number)| NewOption { key: leak(key), is_number, default: default.map(leak) })
        .collect();
    let known: &'static [NewOption] = Box::leak(options.clone().into_boxed_slice());
    let (probing, opening, checking, making) = (uses.clone(), uses.clone(), uses.clone(), uses.clone());
    let functions = f.functions;
    NewFormat {
        name: f.name,
        title: f.title,
        extensions: f.extensions,
        origin: origin.to_string(),
        options,
        probe: Box::new(move |head, foot, len| {
            probing.enter().is_ok_and(|_in_use| judge::probe(&kind.functions, head, foot, len))
        }),
        open: Box::new(move |files, how| {
            let file = only(files)?;
            Ok(Box::new(PluginMap::open(kind, opening.enter()?, file, how)?))
        }),
        check: functions.check.map(|_| {
            Box::new(move |files: &[format::ImageFile<'_>]| {
                image::check(kind, &checking.enter()?, only(files)?)
            }) as _
        }),
        blueprint: functions.create.map(|_| {
            Box::new(move |new: &format::NewImage| {
                let _in_use = making.enter()?;
                wish::blueprint(kind, known, new)
            }) as _
        }),
    }
}

/// The file of an image.
fn only<'a>(files: &[format::ImageFile<'a>]) -> Result<format::ImageFile<'a>> {
    match files {
        [file] => Ok(*file),
        _ => Err(Error::new(ErrorKind::Unsupported, "images of plug-ins have one file")),
    }
}

fn register_filter(f: FilterDescription, uses: &Arc<Uses>, origin: &str) -> Result<String> {
    let (name, uses, functions) = (leak(f.name.clone()), uses.clone(), FilterFunctions::new(f.functions));
    let open = move |config: &str| -> Result<Arc<dyn filter::Filter>> {
        Ok(Arc::new(PluginFilter::open(name, functions, uses.enter()?, config)?))
    };
    filter::register(name, origin, Arc::new(open))?;
    Ok(f.name)
}

/// Unloads a plug-in, by any name of its file (`VDPluginUnloadFromFilename`). [`Format`]s of it that somebody still has answer with an error
/// from then on.
///
/// # Errors
/// [`ErrorKind::State`] while an image or a filter of it is open: VirtualBox does not look, and crashes; [`ErrorKind::NotFound`] if it is
/// not loaded.
pub fn plugin_unload(path: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let absolute = std::path::absolute(path).map_err(|e| Error::io("tell where it is", e).at(path))?;
    let identity = std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    let mut plugins = plugins();
    let at = plugins.loaded.iter().position(|l| l.info.path == absolute || Some(l.identity) == identity);
    let at = at.ok_or_else(|| Error::new(ErrorKind::NotFound, "is no plug-in that is loaded").at(path))?;
    plugins.loaded[at].uses.leave_for_good().map_err(|e| e.at(path))?;
    let gone = plugins.loaded.remove(at);
    unregister(&gone.formats, &gone.info.filters);
    gone.library.close();
    Ok(())
}

/// A name of a plug-in's file in a folder that is scanned: as `vdblk-plugin-NAME.so`, or `libvdblk_plugin_NAME.so`, as cargo makes them.
pub fn is_plugin_name(path: &Path) -> bool {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let middle = |prefix| name.strip_prefix(prefix).and_then(|n| n.strip_suffix(".so"));
    middle("vdblk-plugin-").or_else(|| middle("libvdblk_plugin_")).is_some_and(|m| !m.is_empty())
}

/// What became of a plug-in in a folder.
pub type Scanned = (PathBuf, Result<PluginInfo>);

/// Loads the plug-ins of a folder, in the order of their names (`VDPluginLoadFromPath`). One that cannot be loaded does not keep the
/// others from it; one that is loaded already is left as it is and is not in the list.
///
/// # Errors
/// Of reading the folder; [`ErrorKind::PermissionDenied`] for one that everybody may write to.
pub fn plugin_load_dir(dir: &Path) -> Result<Vec<Scanned>> {
    use std::os::unix::fs::MetadataExt;
    let trouble = |e| Error::io("read the folder", e).at(dir);
    let meta = std::fs::metadata(dir).map_err(trouble)?;
    if meta.mode() & 0o002 != 0 {
        let what = "everybody may put files into this folder";
        return Err(Error::new(ErrorKind::PermissionDenied, what).at(dir).hint("chmod o-w"));
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(trouble)? {
        names.push(entry.map_err(trouble)?.path());
    }
    names.retain(|n| is_plugin_name(n));
    names.sort();
    let loaded = names.into_iter().map(|n| {
        let loaded = plugin_load(&n);
        (n, loaded)
    });
    let is_news =
        |s: &Scanned| !s.1.as_ref().is_err_and(|e| e.kind() == ErrorKind::Exists && is_loaded(&s.0));
    Ok(loaded.filter(is_news).collect())
}

fn is_loaded(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    plugins().loaded.iter().any(|l| Some(l.identity) == identity)
}

/// Unloads all plug-ins whose files are in this folder (`VDPluginUnloadFromPath`), and says which.
///
/// # Errors
/// As [`plugin_unload`], of the first that is in use; the others are unloaded all the same.
pub fn plugin_unload_dir(dir: &Path) -> Result<Vec<PathBuf>> {
    let dir = std::path::absolute(dir).map_err(|e| Error::io("tell where it is", e).at(dir))?;
    let inside: Vec<_> =
        plugin_info().into_iter().map(|p| p.path).filter(|p| p.parent() == Some(&*dir)).collect();
    let (mut gone, mut refused) = (Vec::new(), Ok(()));
    for path in inside {
        match plugin_unload(&path) {
            Ok(()) => gone.push(path),
            Err(e) => refused = refused.and(Err(e)),
        }
    }
    refused.map(|()| gone)
}

/// The plug-ins that are loaded, the oldest first.
pub fn plugin_info() -> Vec<PluginInfo> {
    plugins().loaded.iter().map(|l| l.info.clone()).collect()
}
