//! Libraries: which are loaded at all, and what they say of themselves. Loading one runs its code with all rights of this process,
//! so what matters is who could have written the file.

use super::abi;
use super::calls::text_of;
use super::elf;
use super::text::{Text, count_of};
use crate::error::{Error, ErrorKind, Result};
use std::ffi::{CStr, CString, c_char, c_void};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::ptr;

/// Formats, and filters, of one plug-in.
const MAX_THINGS: u32 = 16;
/// Of one format.
const MAX_OPTIONS: u32 = 32;

/// A library that is loaded.
#[derive(Debug)]
pub(super) struct Library {
    handle: *mut c_void,
    /// Open as long as the library is there: the loader knows it by the number of this descriptor.
    file: Option<File>,
    unload: Option<unsafe extern "C" fn()>,
}

// SAFETY: the handle is a name for the loader, which may be called from any thread; there is one owner, which closes it.
unsafe impl Send for Library {}
// SAFETY: nothing is done with it through a shared reference.
unsafe impl Sync for Library {}

/// What a plug-in says of itself, copied and looked at.
#[derive(Debug)]
pub(super) struct Description {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) formats: Vec<FormatDescription>,
    pub(super) filters: Vec<FilterDescription>,
}

/// What it says of a format.
pub(super) struct FormatDescription {
    pub(super) name: String,
    pub(super) title: String,
    pub(super) extensions: Vec<String>,
    pub(super) variants: Vec<String>,
    /// Key, default, whether it is a number.
    pub(super) options: Vec<(String, Option<String>, bool)>,
    pub(super) functions: abi::Format,
}

/// What it says of a filter.
pub(super) struct FilterDescription {
    pub(super) name: String,
    pub(super) functions: abi::Filter,
}

impl std::fmt::Debug for FormatDescription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FormatDescription").field("name", &self.name).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for FilterDescription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FilterDescription").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Which file it is, by device and inode.
pub(super) type Identity = (u64, u64);

/// Opens the file of a plug-in, if it may be loaded.
///
/// # Errors
/// [`ErrorKind::PermissionDenied`] for a file that somebody else than root and this user could have written;
/// [`ErrorKind::NotThisFormat`] for one that is no whole library; those of opening and reading.
pub(super) fn open(path: &Path) -> Result<(File, Identity)> {
    // A pipe of that name must not make us wait.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| Error::io("open it", e))?;
    let meta = file.metadata().map_err(|e| Error::io("look at it", e))?;
    if !meta.is_file() {
        return Err(Error::new(ErrorKind::InvalidArgument, "is no file"));
    }
    let refused = |what: &str, hint: &str| {
        Err(Error::new(ErrorKind::PermissionDenied, format!("is not loaded: {what}")).hint(hint.to_string()))
    };
    if ![0, own_user()].contains(&meta.uid()) {
        return refused("it belongs to another user", "its code would run with all your rights; chown it");
    }
    let group_may = meta.mode() & 0o020 != 0 && ![0, own_group()].contains(&meta.gid());
    if group_may || meta.mode() & 0o002 != 0 {
        return refused("others may write to it", "chmod go-w");
    }
    elf::check(&file)?;
    let identity = (meta.dev(), meta.ino());
    Ok((file, identity))
}

fn own_user() -> u32 {
    // SAFETY: the call has no arguments and cannot fail.
    unsafe { libc::geteuid() }
}

fn own_group() -> u32 {
    // SAFETY: the call has no arguments and cannot fail.
    unsafe { libc::getegid() }
}

/// The loader's last error.
fn loader_error() -> String {
    // SAFETY: it is called right after the call that failed, in the same thread; the text is copied before any other call.
    let text = unsafe {
        let text = libc::dlerror();
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    };
    // It begins with the descriptor's name.
    let text = text.unwrap_or_else(|| "no reason is given".into());
    text.strip_prefix("/proc/self/fd/").map_or(text.clone(), |t| {
        t.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches(": ").to_string()
    })
}

impl Library {
    /// Loads the library in `file`, the one that was looked at and no other that has its name by now, and has it describe itself.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] if it cannot be loaded or is no plug-in; [`ErrorKind::Unsupported`] for another version;
    /// [`ErrorKind::Corrupt`] for a description that cannot be; what it says itself. It is unloaded again.
    pub(super) fn load(file: File) -> Result<(Library, Description)> {
        let name = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("digits");
        // SAFETY: the name is a C string. What the library's initialisers do is its own responsibility: whoever asks for a
        // plug-in to be loaded asks for its code to be run.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            let what = format!("cannot be loaded: {}", loader_error());
            return Err(Error::new(ErrorKind::NotThisFormat, what));
        }
        let mut library = Library { handle, file: Some(file), unload: None };
        let described = library.enter();
        match described {
            Ok(description) => Ok((library, description)),
            Err(e) => {
                library.close();
                Err(e)
            }
        }
    }

    fn enter(&mut self) -> Result<Description> {
        // SAFETY: the handle is open, the name a C string.
        let symbol = unsafe { libc::dlsym(self.handle, c"vdblk_plugin_load".as_ptr()) };
        if symbol.is_null() {
            let what = "is a library, but no plug-in: it has no symbol vdblk_plugin_load";
            return Err(Error::new(ErrorKind::NotThisFormat, what));
        }
        // SAFETY: by the interface the symbol is a function of this type.
        let load = unsafe { std::mem::transmute::<*mut c_void, abi::LoadFn>(symbol) };
        let mut plugin: *const abi::Plugin = ptr::null();
        let mut why = Text::default();
        // SAFETY: all three arguments are valid for the call, the host for ever.
        let code = unsafe { load(&HOST.0, &mut plugin, why.as_mut_ptr()) };
        if code != abi::OK {
            return Err(super::judge::refusal(code, &why));
        }
        let plugin = read_plugin(plugin)?;
        self.unload = plugin.unload;
        describe(&plugin)
    }

    /// Unloads it. Nothing of it may be in use.
    pub(super) fn close(mut self) {
        if let Some(unload) = self.unload.take() {
            // SAFETY: by the interface the last call; nothing of the plug-in is in use any more.
            unsafe { unload() };
        }
        let file = self.file.take().expect("it is closed once");
        let name = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("digits");
        // SAFETY: the handle is open and not used afterwards. The second call only asks whether the library is still there.
        let is_still_there = unsafe {
            libc::dlclose(self.handle);
            !libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD).is_null()
        };
        if is_still_there {
            // Some cannot be unloaded. The loader goes on knowing it by the descriptor's number, which no other may get.
            std::mem::forget(file);
        }
    }
}

/// What plug-ins are told of the host.
struct HostCell(abi::Host);

// SAFETY: it is a constant; the pointers in it are to constants.
unsafe impl Sync for HostCell {}

static HOST: HostCell = HostCell(abi::Host {
    magic: abi::PLUGIN_MAGIC,
    abi_major: abi::ABI_MAJOR,
    abi_minor: abi::ABI_MINOR,
    struct_size: size_of::<abi::Host>() as u32,
    version: concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast::<c_char>(),
    log: Some(log),
});

/// `vdblk_host.log`.
///
/// # Safety
/// `text` is NULL or a text that ends with a NUL.
unsafe extern "C" fn log(level: u32, text: *const c_char) {
    // SAFETY: as the caller promises.
    let text = unsafe { text_of(text, 1024) }.unwrap_or_else(|_| "(no text)".into());
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match level {
        abi::LOG_ERROR => tracing::error!("plug-in: {text}"),
        abi::LOG_WARNING => tracing::warn!("plug-in: {text}"),
        abi::LOG_INFO => tracing::info!("plug-in: {text}"),
        _ => tracing::debug!("plug-in: {text}"),
    }
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the plug-in describes itself wrongly: {what}"))
}

/// Copies a structure.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for NULL, an odd address, or one that is shorter than the version it is of.
fn copy<T: Copy>(from: *const T, struct_size: impl Fn(*const T) -> *const u32, what: &str) -> Result<T> {
    if from.is_null() || !from.is_aligned() {
        return Err(corrupt(format!("there is no {what}")));
    }
    // SAFETY: it is not NULL and aligned, and by the interface it has at least the field that tells its size; its other fields are
    // read only if it says that it has them.
    unsafe {
        if struct_size(from).read() < abi::size::<T>() {
            return Err(corrupt(format!("its {what} is shorter than version 1.0 of the interface has it")));
        }
        Ok(from.read())
    }
}

fn read_plugin(plugin: *const abi::Plugin) -> Result<abi::Plugin> {
    if plugin.is_null() || !plugin.is_aligned() {
        return Err(corrupt("there is no description"));
    }
    // SAFETY: it is not NULL and aligned. By the interface all versions of it begin with these fields, and the others are not touched
    // before the version is known to be one that has them.
    let (magic, major, minor) = unsafe {
        (
            (&raw const (*plugin).magic).read(),
            (&raw const (*plugin).abi_major).read(),
            (&raw const (*plugin).abi_minor).read(),
        )
    };
    if magic != abi::PLUGIN_MAGIC {
        return Err(Error::new(ErrorKind::NotThisFormat, "is no plug-in of vdblk: its mark is another"));
    }
    let (ours, our_minor) = abi::ABI_VERSION;
    if major != ours || minor > our_minor {
        let what =
            format!("was made for version {major}.{minor} of the interface, and this is {ours}.{our_minor}");
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    let at = std::mem::offset_of!(abi::Plugin, struct_size);
    copy(plugin, |p| p.wrapping_byte_add(at).cast(), "description")
}

/// Copies the pointers of an array.
fn pointers<T: Copy>(array: *const T, count: u32, most: u32, what: &str) -> Result<Vec<T>> {
    if count > most {
        return Err(corrupt(format!("it has {count} {what}, at most {most} are taken")));
    }
    if count == 0 {
        return Ok(Vec::new());
    }
    if array.is_null() || !array.is_aligned() {
        return Err(corrupt(format!("its {what} are nowhere")));
    }
    // SAFETY: not NULL, aligned, and by the interface as many as it says; the number is bounded.
    Ok(unsafe { std::slice::from_raw_parts(array, count_of(count)) }.to_vec())
}

fn word(text: *const c_char, most: usize, what: &str) -> Result<String> {
    // SAFETY: by the interface NULL or a text that ends with a NUL; no more than `most` bytes and one are read.
    let text = unsafe { text_of(text, most) }.map_err(|e| corrupt(format!("{what} {e}")))?;
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(corrupt(format!("{what} is no text for people")));
    }
    Ok(text)
}

fn is_name(text: &str, upper: bool) -> bool {
    text.chars().all(|c| {
        c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c) || (upper && c.is_ascii_uppercase())
    })
}

fn name(text: *const c_char, most: usize, upper: bool, what: &str) -> Result<String> {
    let text = word(text, most, what)?;
    if !is_name(&text, upper) {
        return Err(corrupt(format!("{what} '{text}' has other characters than letters and digits")));
    }
    Ok(text)
}

fn describe(plugin: &abi::Plugin) -> Result<Description> {
    let formats = pointers(plugin.formats, plugin.format_count, MAX_THINGS, "formats")?;
    let filters = pointers(plugin.filters, plugin.filter_count, MAX_THINGS, "filters")?;
    if formats.is_empty() && filters.is_empty() {
        return Err(corrupt("it has neither formats nor filters"));
    }
    Ok(Description {
        name: word(plugin.name, 63, "its name")?,
        version: word(plugin.version, 63, "its version")?,
        formats: formats.into_iter().map(describe_format).collect::<Result<_>>()?,
        filters: filters.into_iter().map(describe_filter).collect::<Result<_>>()?,
    })
}

fn describe_format(format: *const abi::Format) -> Result<FormatDescription> {
    let f = copy(format, |p| p.cast(), "format")?;
    let list = |array, count, most, bytes, what: &str| -> Result<Vec<String>> {
        let texts = pointers(array, count, most, what)?;
        if texts.is_empty() {
            return Err(corrupt(format!("a format without {what}")));
        }
        texts.into_iter().map(|t| name(t, bytes, false, &format!("one of its {what}"))).collect()
    };
    let option = |o: abi::NewOption| -> Result<_> {
        let default = if o.value.is_null() { None } else { Some(word(o.value, 63, "an option's default")?) };
        Ok((name(o.key, 31, true, "an option")?, default, o.is_number != 0))
    };
    let options = pointers(f.options, f.option_count, MAX_OPTIONS, "options")?;
    let missing = [
        ("probe", f.probe.is_none()),
        ("open", f.open.is_none()),
        ("close", f.close.is_none()),
        ("info", f.info.is_none()),
        ("map", f.map.is_none()),
    ];
    let writes = f.flags & abi::FORMAT_WRITES != 0;
    let missing_to_write = [
        ("plan", f.plan.is_none()),
        ("room", f.room.is_none()),
        ("settle", f.settle.is_none()),
        ("must_write", f.must_write.is_none()),
        ("compose", f.compose.is_none()),
        ("publish", f.publish.is_none()),
        ("begin", f.begin.is_none()),
        ("end", f.end.is_none()),
    ];
    let all = missing.into_iter().chain(missing_to_write.into_iter().filter(|_| writes));
    if let Some((name, _)) = all.into_iter().find(|(_, is_missing)| *is_missing) {
        return Err(corrupt(format!("a format without the function {name}")));
    }
    Ok(FormatDescription {
        name: name(f.name, 31, false, "a format's name")?,
        title: word(f.title, 63, "a format's title")?,
        extensions: list(f.extensions, f.extension_count, 8, 15, "extensions")?,
        variants: list(f.variants, f.variant_count, 16, 31, "variants")?,
        options: options.into_iter().map(option).collect::<Result<_>>()?,
        functions: f,
    })
}

fn describe_filter(filter: *const abi::Filter) -> Result<FilterDescription> {
    let f = copy(filter, |p| p.cast(), "filter")?;
    if f.open.is_none() || f.close.is_none() || f.on_write.is_none() || f.on_read.is_none() {
        return Err(corrupt("a filter without all its functions"));
    }
    if f.sector_bytes != 512 {
        return Err(corrupt(format!("a filter of sectors of {} bytes, not 512", f.sector_bytes)));
    }
    Ok(FilterDescription { name: name(f.name, 31, true, "a filter's name")?, functions: f })
}
