//! VirtualBox's settings files: `VirtualBox.xml` and machines' `.vbox`. Only what is about media is understood; all else is left as it is.

use super::code::{Code, Fault, Result};
use super::kinds::MediumType;
use crate::error::Error;
use crate::map::DeviceType;
use quick_xml::Reader;
use quick_xml::XmlVersion;
use quick_xml::events::{BytesStart, Event};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Largest settings file that is read.
const MAX_BYTES: u64 = 64 << 20;
/// Deepest nesting that is followed.
const MAX_DEPTH: usize = 1000;

/// A medium in a settings file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) id: Uuid,
    pub(super) device: DeviceType,
    pub(super) parent: Option<Uuid>,
    /// As it stands there.
    pub(super) location: String,
    pub(super) format: Option<String>,
    pub(super) medium_type: Option<MediumType>,
    pub(super) auto_reset: bool,
    pub(super) description: Option<String>,
    pub(super) properties: BTreeMap<String, String>,
}

/// A machine's use of a medium, in the order of its controllers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Use {
    pub(super) medium: Uuid,
    pub(super) device: DeviceType,
    /// `None`: the current state.
    pub(super) snapshot: Option<Uuid>,
}

/// What a settings file says of media.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Settings {
    /// The machine, in a `.vbox`.
    pub(super) machine: Option<Uuid>,
    pub(super) media: Vec<Entry>,
    pub(super) uses: Vec<Use>,
    /// Files of machines that a `VirtualBox.xml` names, as they stand there.
    pub(super) machines: Vec<String>,
    /// Where the first registry stands in the text: what an export replaces.
    pub(super) registry: Option<std::ops::Range<usize>>,
    /// Where a registry may be put in if there is none.
    pub(super) place: Option<usize>,
}

/// Reads a settings file.
///
/// # Errors
/// [`Code::FileError`], [`Code::XmlError`].
pub(super) fn read(path: &Path) -> Result<(String, Settings)> {
    let failed = |e| Fault::because(Code::FileError, Error::io("read it", e).at(path));
    let mut text = String::new();
    let read = fs::File::open(path).map_err(failed)?.take(MAX_BYTES + 1).read_to_string(&mut text);
    match read {
        Ok(n) if n as u64 > MAX_BYTES => {
            return Err(Fault::new(Code::XmlError, "is too large for a settings file").at(path));
        }
        Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            return Err(Fault::new(Code::XmlError, "is not text").at(path));
        }
        other => drop(other.map_err(failed)?),
    }
    let settings = parse(&text).map_err(|e| e.at(path))?;
    Ok((text, settings))
}

/// Where a location of a settings file leads: relative ones to its folder.
pub(super) fn resolve(settings_file: &Path, location: &str) -> PathBuf {
    let folder = super::absolute(settings_file);
    super::absolute(&folder.parent().unwrap_or(Path::new("/")).join(location))
}

/// An element that is open.
#[derive(Debug)]
enum Open {
    /// A medium: its place in the list.
    Medium(usize),
    Snapshot(Uuid),
    Description,
    /// A drive of a machine.
    Drive(DeviceType),
    Registry(usize),
    Other,
}

struct Walk {
    found: Settings,
    open: Vec<Open>,
}

/// Understands the text of a settings file.
pub(super) fn parse(text: &str) -> Result<Settings> {
    let mut reader = Reader::from_str(text);
    let mut walk = Walk { found: Settings::default(), open: Vec::new() };
    let mut is_ours = false;
    loop {
        let at = place(reader.buffer_position());
        let event = reader.read_event().map_err(bad)?;
        let end = place(reader.buffer_position());
        match event {
            Event::Start(e) => {
                is_ours |= e.local_name().as_ref() == "VirtualBox";
                walk.begin(&e, at, end)?;
            }
            Event::Empty(e) => {
                walk.begin(&e, at, end)?;
                walk.finish(end);
            }
            Event::End(_) => walk.finish(end),
            Event::Text(t) => walk.text(&t.xml_content(XmlVersion::Implicit1_0)),
            Event::CData(t) => walk.text(&t.xml_content(XmlVersion::Implicit1_0)),
            Event::GeneralRef(r) => {
                let known = r.resolve_char_ref().map_err(bad)?.map(String::from);
                let name = r.xml_content(XmlVersion::Implicit1_0);
                let known = known.or_else(|| quick_xml::escape::resolve_xml_entity(&name).map(String::from));
                walk.text(&known.ok_or_else(|| bad(format!("unknown entity '{name}'")))?);
            }
            Event::Eof => break,
            Event::Decl(_) | Event::Comment(_) | Event::PI(_) | Event::DocType(_) => {}
        }
    }
    if !is_ours || !walk.open.is_empty() {
        return Err(bad("it is no complete settings file of VirtualBox"));
    }
    Ok(walk.found)
}

fn place(position: u64) -> usize {
    usize::try_from(position).expect("inside a text")
}

fn bad(why: impl std::fmt::Display) -> Fault {
    Fault::new(Code::XmlError, format!("could not be parsed: {why}"))
}

type Attributes = BTreeMap<String, String>;

fn attributes(e: &BytesStart<'_>) -> Result<Attributes> {
    let mut all = Attributes::new();
    for a in e.attributes() {
        let a = a.map_err(bad)?;
        let name = a.key.local_name().as_ref().to_string();
        all.insert(name, a.normalized_value(XmlVersion::Implicit1_0).map_err(bad)?.into_owned());
    }
    Ok(all)
}

/// A UUID, in braces or not.
fn uuid(text: Option<&String>) -> Result<Uuid> {
    let text = text.ok_or_else(|| bad("a UUID is missing"))?;
    let bare = text.trim().trim_start_matches('{').trim_end_matches('}');
    Uuid::parse_str(bare).map_err(|_| bad(format!("'{text}' is no UUID")))
}

fn is_true(text: Option<&String>) -> bool {
    text.is_some_and(|t| t.eq_ignore_ascii_case("true") || t == "1")
}

impl Walk {
    fn begin(&mut self, e: &BytesStart<'_>, at: usize, end: usize) -> Result<()> {
        if self.open.len() >= MAX_DEPTH {
            return Err(bad("it is nested too deeply"));
        }
        let open = match e.local_name().as_ref() {
            "HardDisk" => self.medium(&attributes(e)?, DeviceType::HardDisk)?,
            "Image" => match self.open.last() {
                Some(Open::Drive(device)) => {
                    let device = *device;
                    self.attached(&attributes(e)?, device)?
                }
                _ => self.image(&attributes(e)?)?,
            },
            "DVDImages" => self.list(DeviceType::Dvd),
            "FloppyImages" => self.list(DeviceType::Floppy),
            "Property" => self.property(&attributes(e)?),
            "Description" => Open::Description,
            "Machine" => {
                self.found.machine = Some(uuid(attributes(e)?.get("uuid"))?);
                self.found.place = Some(end);
                Open::Other
            }
            "Global" => {
                self.found.place = Some(end);
                Open::Other
            }
            "Snapshot" => Open::Snapshot(uuid(attributes(e)?.get("uuid"))?),
            "MachineEntry" => {
                self.found.machines.extend(attributes(e)?.remove("src"));
                Open::Other
            }
            "AttachedDevice" => drive(&attributes(e)?),
            "MediaRegistry" => Open::Registry(at),
            _ => Open::Other,
        };
        self.open.push(open);
        Ok(())
    }

    fn finish(&mut self, end: usize) {
        if let Some(Open::Registry(at)) = self.open.pop() {
            self.found.registry.get_or_insert(at..end);
        }
    }

    /// Lists of images look like drives without a machine.
    fn list(&self, device: DeviceType) -> Open {
        if self.in_registry() { Open::Drive(device) } else { Open::Other }
    }

    fn in_registry(&self) -> bool {
        self.open.iter().any(|o| matches!(o, Open::Registry(_)))
    }

    fn image(&mut self, a: &Attributes) -> Result<Open> {
        // Images of CDs in old files are nowhere else.
        if self.in_registry() { self.medium(a, DeviceType::Dvd) } else { Ok(Open::Other) }
    }

    fn medium(&mut self, a: &Attributes, device: DeviceType) -> Result<Open> {
        if !self.in_registry() {
            return Ok(Open::Other);
        }
        let parent = self.open.iter().rev().find_map(|o| match o {
            Open::Medium(n) => Some(self.found.media[*n].id),
            _ => None,
        });
        let medium_type = a.get("type").map(|t| MediumType::parse(t)).transpose()?;
        self.found.media.push(Entry {
            id: uuid(a.get("uuid"))?,
            device,
            parent,
            location: a.get("location").cloned().ok_or_else(|| bad("a location is missing"))?,
            format: a.get("format").cloned(),
            medium_type,
            auto_reset: is_true(a.get("autoReset")),
            description: None,
            properties: BTreeMap::new(),
        });
        Ok(Open::Medium(self.found.media.len() - 1))
    }

    fn attached(&mut self, a: &Attributes, device: DeviceType) -> Result<Open> {
        if self.in_registry() {
            return self.medium(a, device);
        }
        let snapshot = self.open.iter().rev().find_map(|o| match o {
            Open::Snapshot(id) => Some(*id),
            _ => None,
        });
        self.found.uses.push(Use { medium: uuid(a.get("uuid"))?, device, snapshot });
        Ok(Open::Other)
    }

    fn property(&mut self, a: &Attributes) -> Open {
        if let (Some(Open::Medium(n)), Some(name)) = (self.open.last(), a.get("name")) {
            let value = a.get("value").cloned().unwrap_or_default();
            self.found.media[*n].properties.insert(name.clone(), value);
        }
        Open::Other
    }

    fn text(&mut self, text: &str) {
        if let [.., Open::Medium(n), Open::Description] = &self.open[..] {
            self.found.media[*n].description.get_or_insert_default().push_str(text);
        }
    }
}

fn drive(a: &Attributes) -> Open {
    match a.get("type").map(String::as_str) {
        Some("HardDisk") => Open::Drive(DeviceType::HardDisk),
        Some("DVD") => Open::Drive(DeviceType::Dvd),
        Some("Floppy") => Open::Drive(DeviceType::Floppy),
        _ => Open::Other,
    }
}

/// A registry as text, indented by `indent` blanks. Media are in an order in which parents stand before children.
pub(super) fn registry_text(media: &[Entry], indent: usize) -> String {
    let mut out = Text { out: String::new(), indent };
    out.line("<MediaRegistry>");
    out.indent += 2;
    // Lists without anything in them are left out, as VirtualBox does.
    for (device, name) in [
        (DeviceType::HardDisk, "HardDisks"),
        (DeviceType::Dvd, "DVDImages"),
        (DeviceType::Floppy, "FloppyImages"),
    ] {
        let is_root = |m: &&Entry| m.parent.is_none_or(|p| !media.iter().any(|o| o.id == p));
        let roots: Vec<_> = media.iter().filter(|m| m.device == device).filter(is_root).collect();
        if roots.is_empty() {
            continue;
        }
        out.line(&format!("<{name}>"));
        out.indent += 2;
        roots.iter().for_each(|m| out.medium(m, media));
        out.indent -= 2;
        out.line(&format!("</{name}>"));
    }
    out.indent -= 2;
    out.line("</MediaRegistry>");
    out.out
}

pub(super) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // They would be read as blanks.
            '\n' | '\r' | '\t' => out.push_str(&format!("&#{};", u32::from(c))),
            // XML has no way to say them.
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

struct Text {
    out: String,
    indent: usize,
}

impl Text {
    fn line(&mut self, line: &str) {
        self.out.push_str(&" ".repeat(self.indent));
        self.out.push_str(line);
        self.out.push('\n');
    }

    fn medium(&mut self, m: &Entry, all: &[Entry]) {
        if m.device != DeviceType::HardDisk {
            let tag = format!("Image uuid=\"{}\" location=\"{}\"", m.id.braced(), escaped(&m.location));
            return self.element(&tag, m, &[], all);
        }
        let format = m.format.as_deref().unwrap_or("VDI");
        let mut tag = format!(
            "HardDisk uuid=\"{}\" location=\"{}\" format=\"{}\"",
            m.id.braced(),
            escaped(&m.location),
            escaped(format)
        );
        if m.auto_reset {
            tag.push_str(" autoReset=\"true\"");
        }
        if m.parent.is_none() {
            tag.push_str(&format!(" type=\"{}\"", m.medium_type.unwrap_or_default()));
        }
        let children: Vec<_> = all.iter().filter(|c| c.parent == Some(m.id)).collect();
        self.element(&tag, m, &children, all);
    }

    fn element(&mut self, tag: &str, m: &Entry, children: &[&Entry], all: &[Entry]) {
        if m.description.is_none() && m.properties.is_empty() && children.is_empty() {
            return self.line(&format!("<{tag}/>"));
        }
        self.line(&format!("<{tag}>"));
        self.indent += 2;
        if let Some(text) = &m.description {
            self.line(&format!("<Description>{}</Description>", escaped(text)));
        }
        for (name, value) in &m.properties {
            self.line(&format!("<Property name=\"{}\" value=\"{}\"/>", escaped(name), escaped(value)));
        }
        children.iter().for_each(|c| self.medium(c, all));
        self.indent -= 2;
        let name = tag.split(' ').next().unwrap_or(tag);
        self.line(&format!("</{name}>"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: &str = include_str!("../../tests/fixtures/machine.vbox");

    fn machine() -> String {
        MACHINE
            .replace("@BASE@", &Uuid::from_u128(1).to_string())
            .replace("@TOP@", &Uuid::from_u128(2).to_string())
    }

    #[test]
    fn what_is_written_is_read_back() {
        let read = parse(&machine()).unwrap();
        assert_eq!((read.media.len(), read.uses.len()), (5, 4));
        assert_eq!(read.media[1].parent, Some(Uuid::from_u128(1)));
        assert_eq!(read.media[1].format.as_deref(), Some("vdi"), "as it was typed");
        let odd = "a \"b\" <c> & 'd'\n\te\u{e9}";
        let mut media = read.media.clone();
        media[0].description = Some(odd.into());
        media[0].properties.insert("CRYPT/KeyStore".into(), odd.into());
        media[0].location = odd.into();
        let text = format!("<VirtualBox>{}</VirtualBox>", registry_text(&media, 2));
        let sorted = |mut all: Vec<Entry>| {
            all.sort_by_key(|m| m.id);
            all
        };
        let mut back = parse(&text).unwrap().media;
        // The type is that of the root, and written there alone.
        back.iter_mut().for_each(|m| m.medium_type = None);
        media.iter_mut().for_each(|m| m.medium_type = None);
        assert_eq!(sorted(back), sorted(media));
        let range = read.registry.unwrap();
        let all = machine();
        assert!(
            all[range.clone()].starts_with("<MediaRegistry>") && all[range].ends_with("</MediaRegistry>")
        );
    }

    #[test]
    fn damaged_files_are_refused_or_read_and_nothing_panics() {
        let good = machine();
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            usize::try_from(seed % below as u64).unwrap()
        };
        let pieces =
            ["<", ">", "\"", "&", "</HardDisk>", "<HardDisk>", "{", "]]>", "<!--", "\u{0}", "\u{e9}", ""];
        let mut read = 0;
        for _ in 0..4000 {
            let mut text = good.clone();
            for _ in 0..=random(3) {
                let (at, len) = (random(text.len()), random(40));
                let at = (0..=at).rev().find(|n| text.is_char_boundary(*n)).unwrap();
                let end = (at + len).min(text.len());
                let end = (end..=text.len()).find(|n| text.is_char_boundary(*n)).unwrap();
                text.replace_range(at..end, pieces[random(pieces.len())]);
            }
            read += usize::from(parse(&text).is_ok());
        }
        assert!(read > 0, "all of them were refused");
        let deep = format!("<VirtualBox>{}", "<a>".repeat(100_000));
        assert_eq!(parse(&deep).unwrap_err().code(), Code::XmlError);
    }
}
