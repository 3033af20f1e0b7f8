//! Import from VirtualBox's settings files and export to them.

use super::code::{Code, Fault, Result};
use super::kinds::MediumType;
use super::operations::insert_new;
use super::record::{self, Attachment, Record};
use super::store::Registry;
use super::vbox::{self, Entry, Settings};
use crate::error::Error;
use crate::io::sync_dir;
use crate::map::DeviceType;
use rusqlite::Connection;
use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// What an import has brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Media that were not known before.
    pub added: Vec<Uuid>,
    /// Media that were known already.
    pub known: Vec<Uuid>,
    /// Machines whose uses of media were taken over.
    pub machines: Vec<Uuid>,
    /// Files of machines that could not be read, each with why.
    pub left: Vec<(PathBuf, String)>,
}

impl Registry {
    /// Takes over all media, and the machines' uses of them, of a `VirtualBox.xml` with the machines it names, or of a `.vbox`: all or
    /// nothing. New media are Inaccessible until they are looked at.
    ///
    /// # Errors
    /// [`Code::FileError`], [`Code::XmlError`] of the file; [`Code::InvalidArg`] where another file has the UUID of one.
    pub fn import(&self, file: &Path) -> Result<Imported> {
        let mut files = vec![(super::absolute(file), vbox::read(file)?.1)];
        let mut left = Vec::new();
        for machine in files[0].1.machines.clone() {
            let path = vbox::resolve(file, &machine);
            match vbox::read(&path) {
                Ok((_, settings)) => files.push((path, settings)),
                Err(e) => left.push((path, e.to_string())),
            }
        }
        let mut done = self.write(|db| {
            let mut done = Imported::default();
            // Uses may be of media that another of the files has.
            for (path, settings) in &files {
                import_media(db, path, settings, &mut done)?;
            }
            files.iter().try_for_each(|(_, settings)| import_uses(db, settings, &mut done))?;
            Ok(done)
        })?;
        done.left = left;
        Ok(done)
    }

    /// Writes media into a settings file: into a `.vbox` those that the machine uses with their parents, into a new file all, into an old
    /// one those that belong to no machine's file. Of a file that exists only the registry is replaced; it is kept as `FILE-prev`.
    ///
    /// # Errors
    /// [`Code::FileError`], [`Code::XmlError`]; [`Code::ObjectNotFound`] for a machine that uses nothing.
    pub fn export(&self, file: &Path, machine: Option<Uuid>) -> Result<usize> {
        let path = super::absolute(file);
        let old = match fs::symlink_metadata(&path) {
            Ok(_) => Some(vbox::read(&path)?),
            Err(_) => None,
        };
        let machine = machine.or(old.as_ref().and_then(|(_, s)| s.machine));
        let (mut media, uses) = self.read(|db, _| export_media(db, machine))?;
        if machine.is_none() && old.is_some() {
            media.retain(|r| r.machine.is_none());
        }
        let entries: Vec<_> = media.iter().map(|r| entry(r, &path)).collect::<Result<_>>()?;
        let text = match &old {
            None => new_file(machine, &entries, &uses),
            Some((text, settings)) => spliced(text, settings, &entries).map_err(|e| e.at(&path))?,
        };
        // What is written has to be what is read.
        let back = vbox::parse(&text)?;
        if back.media.len() != entries.len() {
            return Err(Fault::new(Code::XmlError, "what would be written is not what is known").at(&path));
        }
        let failed = |e| Fault::because(Code::FileError, Error::io("write it", e).at(&path));
        write_file(&path, &text, old.is_some()).map_err(failed)?;
        sync_dir(super::staging::folder_of(&path))?;
        Ok(entries.len())
    }
}

fn import_media(db: &Connection, path: &Path, settings: &Settings, done: &mut Imported) -> Result<()> {
    for e in &settings.media {
        let location = vbox::resolve(path, &e.location);
        record::text_of(&location)?;
        let there = record::find(db, e.id)?.filter(|r| r.location == location && r.device == e.device);
        if there.is_some() {
            done.known.push(e.id);
            continue;
        }
        let format = e.format.clone().unwrap_or_else(|| "RAW".into());
        let new = Record {
            medium_type: e.medium_type.filter(|_| e.parent.is_none()).unwrap_or(MediumType::of_new(e.device)),
            description: e.description.clone(),
            auto_reset: e.auto_reset,
            parent: e.parent,
            machine: settings.machine,
            properties: e.properties.clone(),
            ..Record::new(e.id, e.device, &format, &location)
        };
        // Whether a disk is fixed is not known yet, and its type was right where it comes from.
        let as_usual = Record { medium_type: MediumType::of_new(e.device), ..new.clone() };
        match insert_new(db, &as_usual)? {
            id if id == e.id => {
                record::save(db, &new)?;
                done.added.push(id);
            }
            other => {
                let why = format!("is known as {other}, and the file calls it {}", e.id);
                return Err(Fault::new(Code::InvalidArg, why).at(&location));
            }
        }
    }
    Ok(())
}

fn import_uses(db: &Connection, settings: &Settings, done: &mut Imported) -> Result<()> {
    let Some(machine) = settings.machine else { return Ok(()) };
    for (place, u) in (0u32..).zip(&settings.uses) {
        if record::find(db, u.medium)?.is_none() {
            let why =
                format!("machine {machine} uses medium {}, which no registry of the files has", u.medium);
            return Err(Fault::new(Code::ObjectNotFound, why)
                .hint("import the VirtualBox.xml that names the machine"));
        }
        let known = record::attachments(db, u.medium)?;
        if !known.iter().any(|a| a.machine == machine && a.snapshot == u.snapshot) {
            let a = Attachment { machine, snapshot: u.snapshot, place: Some(place) };
            record::add_attachment(db, u.medium, &a)?;
        }
    }
    done.machines.push(machine);
    Ok(())
}

type Uses = Vec<(Uuid, DeviceType, Attachment)>;

/// The media that go into a file, and a machine's uses of them.
fn export_media(db: &Connection, machine: Option<Uuid>) -> Result<(Vec<Record>, Uses)> {
    let all = record::all(db)?;
    let Some(machine) = machine else {
        return Ok((all, Vec::new()));
    };
    let (mut wanted, mut uses) = (HashSet::new(), Vec::new());
    for r in &all {
        let own = record::attachments(db, r.id)?.into_iter().filter(|a| a.machine == machine);
        let own: Vec<_> = own.map(|a| (r.id, r.device, a)).collect();
        if !own.is_empty() || r.machine == Some(machine) {
            let mut next = Some(r.id);
            while let Some(id) = next.filter(|id| wanted.insert(*id)) {
                next = all.iter().find(|o| o.id == id).and_then(|o| o.parent);
            }
        }
        uses.extend(own);
    }
    if wanted.is_empty() {
        return Err(Fault::new(Code::ObjectNotFound, format!("machine {machine} uses no known medium")));
    }
    uses.sort_by_key(|(_, _, a)| (a.snapshot, a.place));
    Ok((all.into_iter().filter(|r| wanted.contains(&r.id)).collect(), uses))
}

fn entry(r: &Record, file: &Path) -> Result<Entry> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let is_machine = file.extension().is_some_and(|e| e == "vbox");
    let relative = r.location.strip_prefix(folder).ok().filter(|_| is_machine);
    Ok(Entry {
        id: r.id,
        device: r.device,
        parent: r.parent,
        location: record::text_of(relative.unwrap_or(&r.location))?.to_string(),
        format: Some(written_format(&r.format)),
        medium_type: Some(r.medium_type),
        auto_reset: r.auto_reset,
        description: r.description.clone(),
        // Ours mean nothing to others.
        properties: r.properties.clone().into_iter().filter(|(name, _)| !name.starts_with(OURS)).collect(),
    })
}

/// VirtualBox writes formats in capitals, and has one word for QEMU's; what was typed otherwise stays.
fn written_format(format: &str) -> String {
    match format {
        "qcow2" | "qcow" => "QCOW".into(),
        "parallels" => "Parallels".into(),
        known if known.parse::<crate::format::Format>().is_ok() && known == known.to_ascii_lowercase() => {
            known.to_ascii_uppercase()
        }
        other => other.to_string(),
    }
}

/// How names of properties begin that are vdblk's own.
pub(super) const OURS: &str = "vdblk/";
const NAMESPACE: &str = "http://www.virtualbox.org/";

/// A settings file with nothing but media.
fn new_file(machine: Option<Uuid>, entries: &[Entry], uses: &Uses) -> String {
    let registry = vbox::registry_text(entries, 4);
    let head =
        format!("<?xml version=\"1.0\"?>\n<VirtualBox xmlns=\"{NAMESPACE}\" version=\"1.12-linux\">\n");
    let Some(machine) = machine else {
        return format!("{head}  <Global>\n{registry}  </Global>\n</VirtualBox>\n");
    };
    let mut snapshots: Vec<_> = uses.iter().filter_map(|(_, _, a)| a.snapshot).collect();
    snapshots.dedup();
    let (mut open, mut close) = (String::new(), String::new());
    for id in &snapshots {
        let name = id.braced();
        open.push_str(&format!(
            "    <Snapshot uuid=\"{name}\" name=\"{id}\">\n{}",
            hardware(uses, Some(*id))
        ));
        close.push_str("    </Snapshot>\n");
        if Some(id) != snapshots.last() {
            open.push_str("    <Snapshots>\n");
            close.insert_str(0, "    </Snapshots>\n");
        }
    }
    // Snapshots nest: the innermost is closed first.
    let close: Vec<_> = close.lines().collect();
    let close: String = nested(&close);
    let name = machine.braced();
    let current = hardware(uses, None);
    format!(
        "{head}  <Machine uuid=\"{name}\" name=\"{machine}\">\n{registry}{open}{close}{current}  </Machine>\n</VirtualBox>\n"
    )
}

/// The closing tags of nested snapshots, from the inside.
fn nested(tags: &[&str]) -> String {
    let snapshots = tags.iter().filter(|t| t.contains("/Snapshot>")).count();
    (0..snapshots)
        .map(|n| if n == 0 { "    </Snapshot>\n" } else { "    </Snapshots>\n    </Snapshot>\n" })
        .collect()
}

/// The drives of one state of a machine.
fn hardware(uses: &Uses, snapshot: Option<Uuid>) -> String {
    let mut out = String::from("    <Hardware>\n      <StorageControllers>\n");
    out.push_str(
        "        <StorageController name=\"SATA\" type=\"AHCI\" PortCount=\"30\" Bootable=\"true\">\n",
    );
    for (port, (id, device, _)) in uses.iter().filter(|(_, _, a)| a.snapshot == snapshot).enumerate() {
        let kind = match device {
            DeviceType::HardDisk => "HardDisk",
            DeviceType::Dvd => "DVD",
            DeviceType::Floppy => "Floppy",
        };
        let drive = format!("<AttachedDevice type=\"{kind}\" port=\"{port}\" device=\"0\">");
        out.push_str(&format!("          {drive}\n            <Image uuid=\"{}\"/>\n", id.braced()));
        out.push_str("          </AttachedDevice>\n");
    }
    out.push_str("        </StorageController>\n      </StorageControllers>\n    </Hardware>\n");
    out
}

/// The text with another registry in it.
fn spliced(text: &str, settings: &Settings, entries: &[Entry]) -> Result<String> {
    let registry = vbox::registry_text(entries, 4);
    match (&settings.registry, settings.place) {
        (Some(old), _) => {
            let (before, after) = (&text[..old.start], &text[old.end..]);
            // Blanks before it are there already.
            Ok(format!("{before}{}{after}", registry.trim()))
        }
        (None, Some(place)) => {
            Ok(format!("{}\n{}{}", &text[..place], registry, text[place..].trim_start_matches('\n')))
        }
        (None, None) => Err(Fault::new(Code::XmlError, "has no place for a registry of media")),
    }
}

/// At once: a reader sees the old file or the new one.
fn write_file(path: &Path, text: &str, keep: bool) -> std::io::Result<()> {
    let beside = |suffix: &str| {
        let mut name = path.as_os_str().to_os_string();
        name.push(suffix);
        PathBuf::from(name)
    };
    let new = beside("-tmp");
    let mut file = fs::File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    if keep {
        let previous = beside("-prev");
        let _ = fs::remove_file(&previous);
        fs::hard_link(path, &previous).or_else(|_| fs::copy(path, &previous).map(drop))?;
    }
    fs::rename(&new, path)
}
