//! `vdimg medium`: the registry of known media.

use super::args::Output;
use super::args::medium::{Changes, Lock, MediumArgs, Unlock, What};
use super::terminal::{self, print};
use serde::Serialize;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use uuid::Uuid;
use vdblk::filter::{Secret, read_password};
use vdblk::job::human_bytes;
use vdblk::medium::{
    self, ChangeEncryption, Medium, NewMedium, OpenMedium, Prober, Question, Registry, State,
    system_registry, user_registry,
};
use vdblk::{Error, ErrorKind, Result};

pub(crate) fn run(args: &MediumArgs) -> Result<u8> {
    if let What::Probe { format, find_parent, file } = &args.what {
        let q = Question { path: file.clone(), format: *format, find_parent: *find_parent };
        print(&(medium::answer(&medium::look(&q)) + "\n"))?;
        return Ok(0);
    }
    let path = match &args.registry {
        Some(path) => path.clone(),
        None if args.system => system_registry(),
        None => user_registry()?,
    };
    let registry = Registry::open_with(&path, prober())?;
    registry.set_check_limit(Duration::from_secs_f64(args.timeout));
    let at = At { registry: &registry, output: args.output };
    match &args.what {
        What::List { no_check } => at.list(*no_check),
        What::Show { no_check, medium } => at.show(&registry.find(medium)?, !*no_check),
        What::Check { media } => at.check(media),
        What::Tree => at.tree(),
        What::Lock(a) => at.lock(a),
        What::Unlock(a) => at.unlock(a),
        What::Import { .. } | What::Export { .. } | What::Scan { .. } => at.transfer(&args.what),
        What::Add(_) | What::Create(_) | What::Clone(_) | What::Attach(_) => at.gain(&args.what),
        What::Encryption { password_file, medium } => at.encryption(medium, password_file.as_deref()),
        What::Property { .. } => at.property(&args.what),
        What::Encrypt(_) | What::Decrypt(_) | What::SetPassword(_) => at.change_encryption(&args.what),
        other => at.change(other),
    }
}

/// Media are looked at by processes of this program: one that hangs in the kernel is left behind. The link leads to it even after
/// its file was replaced.
fn prober() -> Prober {
    Prober::Process(["/proc/self/exe", "medium", "probe"].map(OsString::from).to_vec())
}

/// A relative name is one from where the user is.
fn from_here(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io("find the current folder", e))
}

/// What the interface tells of a medium.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Json {
    id: String,
    description: Option<String>,
    state: &'static str,
    location: String,
    name: String,
    size: u64,
    logical_size: u64,
    last_access_error: Option<String>,
    machine_ids: Option<Vec<String>>,
    snapshot_ids: std::collections::BTreeMap<String, Vec<String>>,
    device: &'static str,
    format: String,
    variant: String,
    #[serde(rename = "type")]
    medium_type: &'static str,
    auto_reset: bool,
    parent: Option<String>,
    children: Vec<String>,
    properties: std::collections::BTreeMap<String, String>,
    locks: Vec<JsonLock>,
}

#[derive(Serialize)]
struct JsonLock {
    pid: u32,
    program: String,
    mode: String,
    count: u32,
}

fn texts(ids: Vec<Uuid>) -> Vec<String> {
    ids.iter().map(Uuid::to_string).collect()
}

/// Everything of it; `checked`: what the check saw others do with its file.
fn describe(m: &Medium<'_>, state: State) -> Result<Json> {
    let r = m.record()?;
    let machines = m.machine_ids()?;
    let mut snapshot_ids = std::collections::BTreeMap::new();
    for machine in machines.iter().flatten() {
        snapshot_ids.insert(machine.to_string(), texts(m.snapshot_ids(*machine)?.unwrap_or_default()));
    }
    let locks = m.holders()?.into_iter();
    Ok(Json {
        id: r.id.to_string(),
        state: state.name(),
        location: r.location.display().to_string(),
        name: r.name(),
        size: m.size()?,
        logical_size: r.logical_size,
        last_access_error: r.last_access_error,
        machine_ids: machines.map(texts),
        snapshot_ids,
        device: r.device.name(),
        format: r.format,
        variant: r.variant,
        medium_type: r.medium_type.name(),
        auto_reset: r.auto_reset,
        parent: r.parent.map(|p| p.to_string()),
        children: texts(m.children()?),
        description: r.description,
        properties: r.properties,
        locks: locks
            .map(|l| JsonLock { pid: l.pid, program: l.program, mode: l.mode, count: l.count })
            .collect(),
    })
}

/// JSON, a document and a line end.
fn json(what: &impl Serialize) -> String {
    serde_json::to_string_pretty(what).expect("numbers and texts") + "\n"
}

/// The open registry and how to print.
struct At<'r> {
    registry: &'r Registry,
    output: Output,
}

impl At<'_> {
    fn all(&self, check: bool) -> Result<Vec<(Medium<'_>, State)>> {
        let ids: Vec<_> = self.registry.media()?.iter().map(|r| r.id).collect();
        let outside = if check { self.registry.check(&ids)? } else { vec![None; ids.len()] };
        let mut all = Vec::new();
        for (id, outside) in ids.into_iter().zip(outside) {
            // It may have been closed meanwhile.
            let Ok(m) = self.registry.medium(id) else { continue };
            let Ok(state) = m.state_seen(outside) else { continue };
            all.push((m, state));
        }
        Ok(all)
    }

    fn list(&self, no_check: bool) -> Result<u8> {
        let all = self.all(!no_check)?;
        let text = match self.output {
            Output::Json => json(&all.iter().map(|(m, s)| describe(m, *s)).collect::<Result<Vec<_>>>()?),
            Output::Human => {
                let mut t = String::new();
                for (m, state) in &all {
                    let r = m.record()?;
                    let _ =
                        writeln!(t, "{}  {state:<12}  {:<12}  {}", r.id, r.medium_type, r.location.display());
                }
                t
            }
        };
        print(&text)?;
        Ok(0)
    }

    fn show(&self, m: &Medium<'_>, check: bool) -> Result<u8> {
        let state = if check { m.state()? } else { m.cached_state()? };
        let j = describe(m, state)?;
        if self.output == Output::Json {
            print(&json(&j))?;
            return Ok(0);
        }
        let mut t = String::new();
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(t, "{name}: {value}");
        };
        line("UUID", &j.id);
        line("state", j.state);
        if let Some(e) = &j.last_access_error {
            line("last access error", e);
        }
        line("location", &j.location);
        line("device", j.device);
        line(
            "format",
            &[&j.format, &j.variant]
                .into_iter()
                .filter(|s| !s.is_empty())
                .cloned()
                .collect::<Vec<_>>()
                .join(", "),
        );
        line(
            "type",
            &if j.auto_reset { format!("{}, auto-reset", j.medium_type) } else { j.medium_type.into() },
        );
        line("size", &human_bytes(j.size));
        line("logical size", &human_bytes(j.logical_size));
        if let Some(text) = &j.description {
            line("description", &text.escape_debug().to_string());
        }
        j.parent.iter().for_each(|p| line("parent", p));
        j.children.iter().for_each(|c| line("child", c));
        for (machine, states) in &j.snapshot_ids {
            line("machine", &format!("{machine}, in {}", states.join(", ")));
        }
        for l in &j.locks {
            line("lock", &format!("{} by {}, process {}", l.mode, l.program, l.pid));
        }
        print(&t)?;
        Ok(0)
    }

    fn check(&self, media: &[String]) -> Result<u8> {
        let named = media.iter().map(|m| Ok(self.registry.find(m)?.id())).collect::<Result<Vec<_>>>()?;
        let mut all = if media.is_empty() { self.all(true)? } else { Vec::new() };
        for (id, outside) in named.iter().zip(self.registry.check(&named)?) {
            let m = self.registry.medium(*id)?;
            all.push((m, m.state_seen(outside)?));
        }
        let described = all.iter().map(|(m, s)| describe(m, *s)).collect::<Result<Vec<_>>>()?;
        let text = match self.output {
            Output::Json => json(&described),
            Output::Human => described.iter().fold(String::new(), |mut t, j| {
                let error = j.last_access_error.as_ref().map_or(String::new(), |e| format!(": {e}"));
                let _ = writeln!(t, "{}: {}{error}", j.location, j.state);
                t
            }),
        };
        print(&text)?;
        Ok(if described.iter().any(|j| j.last_access_error.is_some()) { 2 } else { 0 })
    }

    fn tree(&self) -> Result<u8> {
        let all = self.registry.media()?;
        let mut t = String::new();
        for root in all.iter().filter(|r| r.parent.is_none()) {
            let mut next = vec![(root, 0)];
            while let Some((r, depth)) = next.pop() {
                let (indent, name) = ("  ".repeat(depth), r.location.display());
                let reset = if r.auto_reset { ", auto-reset" } else { "" };
                let _ = writeln!(t, "{indent}{} {name} ({}, {}{reset})", r.id, r.format, r.medium_type);
                next.extend(all.iter().rev().filter(|c| c.parent == Some(r.id)).map(|c| (c, depth + 1)));
            }
        }
        if self.output == Output::Json {
            let all = self.all(false)?;
            t = json(&all.iter().map(|(m, s)| describe(m, *s)).collect::<Result<Vec<_>>>()?);
        }
        print(&t)?;
        Ok(0)
    }

    fn lock(&self, a: &Lock) -> Result<u8> {
        if let Some(pid) = a.pid {
            self.registry.act_for(pid)?;
        }
        let m = self.registry.find(&a.medium)?;
        let change = if a.mode.write { m.lock_write()? } else { m.lock_read()? };
        if !a.command.is_empty() {
            return run_command(&a.command);
        }
        self.print_change(change)?;
        if a.pid.is_none() {
            // Until whoever started us is done: an end, whatever came before it.
            let _ = std::io::copy(&mut std::io::stdin().lock().take(u64::MAX), &mut std::io::sink());
        }
        Ok(0)
    }

    fn unlock(&self, a: &Unlock) -> Result<u8> {
        self.registry.act_for(a.pid)?;
        let m = self.registry.find(&a.medium)?;
        let change = if a.mode.write { m.unlock_write()? } else { m.unlock_read()? };
        self.print_change(change)?;
        Ok(0)
    }

    fn print_change(&self, c: medium::Change) -> Result<()> {
        #[derive(Serialize)]
        struct Both {
            before: &'static str,
            after: &'static str,
        }
        match self.output {
            Output::Json => print(&json(&Both { before: c.before.name(), after: c.after.name() })),
            Output::Human => print(&format!("{} (was {})\n", c.after, c.before)),
        }
    }

    /// The UUID of what is there now and was not before.
    fn print_id(&self, m: &Medium<'_>) -> Result<u8> {
        match self.output {
            Output::Human => print(&format!("{}\n", m.id()))?,
            Output::Json => print(&json(&describe(m, m.cached_state()?)?))?,
        }
        Ok(0)
    }

    fn gain(&self, what: &What) -> Result<u8> {
        let id = |m: &Option<String>| m.as_ref().map(|m| self.registry.find(m).map(|m| m.id())).transpose();
        let gained = match what {
            What::Add(a) => self.registry.open_medium(&OpenMedium {
                location: a.file.clone(),
                format: a.format,
                device: a.device,
                parent: id(&a.parent)?,
                medium_type: a.medium_type,
                description: a.description.clone(),
            })?,
            What::Create(a) => self.registry.create(&NewMedium {
                location: from_here(&a.file)?,
                format: a.format,
                size_bytes: a.size,
                variant: a.variant.clone(),
                parent: id(&a.parent)?,
                description: a.description.clone(),
                auto_reset: a.auto_reset,
            })?,
            What::Clone(a) => {
                terminal::end_in_order();
                let source = self.registry.find(&a.medium)?.id();
                let new = NewMedium {
                    location: from_here(&a.file)?,
                    format: a.format,
                    size_bytes: None,
                    variant: a.variant.clone(),
                    parent: None,
                    description: a.description.clone(),
                    auto_reset: false,
                };
                terminal::watched(|watch| Ok(self.registry.clone_medium(source, &new, watch)?))?
            }
            What::Attach(a) => {
                let m = self.registry.find(&a.medium)?.id();
                self.registry.attach(m, a.machine, a.snapshot)?
            }
            _ => return Err(Error::new(ErrorKind::InvalidArgument, "nothing is made by this")),
        };
        self.print_id(&gained)
    }

    fn change(&self, what: &What) -> Result<u8> {
        let find = |m: &String| self.registry.find(m);
        match what {
            What::Detach(a) => find(&a.medium)?.detach(a.machine, a.snapshot)?,
            What::Move { medium, to } => {
                let (id, to) = (find(medium)?.id(), from_here(to)?);
                terminal::watched(|watch| Ok(self.registry.move_to(id, &to, watch)?))?;
            }
            What::SetLocation { medium, to } => find(medium)?.set_location(&from_here(to)?)?,
            What::Set(a) => self.set(&find(&a.medium)?, &a.changes)?,
            What::Close { medium } => find(medium)?.close()?,
            What::Delete { medium } => self.registry.delete(find(medium)?.id())?,
            What::Reset { medium } => self.registry.reset(find(medium)?.id())?,
            What::Merge { source, into } => {
                terminal::end_in_order();
                let (source, into) = (find(source)?.id(), find(into)?.id());
                terminal::watched(|watch| Ok(self.registry.merge(source, into, watch)?))?;
            }
            What::Resize { shrink, medium, size } => {
                terminal::end_in_order();
                let id = find(medium)?.id();
                let (old, new) =
                    terminal::watched(|watch| Ok(self.registry.resize(id, *size, *shrink, watch)?))?;
                print(&format!("{} before, {} now\n", human_bytes(old), human_bytes(new)))?;
            }
            What::Compact { medium } => {
                terminal::end_in_order();
                let id = find(medium)?.id();
                let done = terminal::watched(|watch| Ok(self.registry.compact(id, watch)?))?;
                print(&format!("{} before, {} now\n", human_bytes(done.before), human_bytes(done.after)))?;
            }
            _ => return Err(Error::new(ErrorKind::InvalidArgument, "nothing is changed by this")),
        }
        Ok(0)
    }

    fn set(&self, m: &Medium<'_>, a: &Changes) -> Result<()> {
        // Only what can be read is changed.
        m.state()?;
        if let Some(text) = &a.description {
            m.set_description(Some(text))?;
        }
        if let Some(t) = a.medium_type {
            m.set_type(t)?;
        }
        if let Some(on) = a.auto_reset {
            m.set_auto_reset(on)?;
        }
        Ok(())
    }

    fn encryption(&self, medium: &str, password: Option<&Path>) -> Result<u8> {
        let id = self.registry.find(medium)?.id();
        let seen = self.registry.encryption(id)?;
        if let Some(file) = password {
            self.registry.check_encryption_password(id, &read_password(file)?)?;
        }
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Seen<'a> {
            cipher: &'static str,
            password_id: &'a str,
        }
        match self.output {
            Output::Json => {
                print(&json(&Seen { cipher: seen.cipher.name(), password_id: &seen.password_id }))?
            }
            Output::Human if seen.password_id.is_empty() => print(&format!("{}\n", seen.cipher))?,
            Output::Human => {
                print(&format!("{}, password {}\n", seen.cipher, seen.password_id.escape_debug()))?;
            }
        }
        Ok(0)
    }

    fn change_encryption(&self, what: &What) -> Result<u8> {
        let (old, new, cipher) = match what {
            What::Encrypt(a) => (a.old_password_file.as_deref(), &a.new, Some(a.cipher)),
            What::SetPassword(a) => (Some(&*a.old_password_file), &a.new, None),
            What::Decrypt(a) => {
                let current = read_password(&a.password_file)?;
                return self.recrypt(&a.medium, Some(&current), &ChangeEncryption::Decrypt);
            }
            _ => return Err(Error::new(ErrorKind::InvalidArgument, "this changes no encryption")),
        };
        if [old, Some(&*new.password.password_file)].iter().all(|f| *f == Some(Path::new("-"))) {
            let what = "standard input holds one password, not two";
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        let (current, password) =
            (old.map(read_password).transpose()?, read_password(&new.password.password_file)?);
        let (password, password_id) = (&password, new.password_id.as_str());
        let change = match cipher {
            Some(cipher) => ChangeEncryption::Encrypt { cipher, password, password_id },
            None => ChangeEncryption::Password { password, password_id },
        };
        self.recrypt(&new.password.medium, current.as_ref(), &change)
    }

    fn recrypt(&self, medium: &str, current: Option<&Secret>, change: &ChangeEncryption<'_>) -> Result<u8> {
        terminal::end_in_order();
        let id = self.registry.find(medium)?.id();
        terminal::watched(|watch| Ok(self.registry.change_encryption(id, current, change, watch)?))?;
        Ok(0)
    }

    fn property(&self, what: &What) -> Result<u8> {
        let What::Property { delete, medium, name, value } = what else {
            return Err(Error::new(ErrorKind::InvalidArgument, "this is about no property"));
        };
        let m = self.registry.find(medium)?;
        match (name, value) {
            (None, _) => {
                let all = m.record()?.properties;
                match self.output {
                    Output::Json => print(&json(&all))?,
                    Output::Human => {
                        let lines =
                            all.iter().map(|(k, v)| format!("{}={}\n", k.escape_debug(), v.escape_debug()));
                        print(&lines.collect::<String>())?;
                    }
                }
            }
            (Some(name), None) if !delete => {
                let value = m.property(name)?.ok_or_else(|| {
                    let what = format!("has no property '{}'", name.escape_debug());
                    Error::new(ErrorKind::NotFound, what).at(Path::new(medium))
                })?;
                match self.output {
                    Output::Json => print(&json(&value))?,
                    Output::Human => print(&(value + "\n"))?,
                }
            }
            (Some(name), value) => {
                m.state()?;
                m.set_property(name, value.as_deref())?;
            }
        }
        Ok(0)
    }

    fn transfer(&self, what: &What) -> Result<u8> {
        let (added, known, left) = match what {
            What::Import { file } => {
                let done = self.registry.import(file)?;
                (done.added, done.known, done.left)
            }
            What::Scan { folder } => {
                let done = self.registry.scan(folder)?;
                (done.added, done.known, done.left)
            }
            What::Export { machine, file } => {
                let n = self.registry.export(file, *machine)?;
                print(&format!("{n} media written to {}\n", file.display()))?;
                return Ok(0);
            }
            _ => return Err(Error::new(ErrorKind::InvalidArgument, "nothing is transferred by this")),
        };
        #[derive(Serialize)]
        struct Done {
            added: Vec<String>,
            known: Vec<String>,
            left: Vec<(String, String)>,
        }
        let left: Vec<_> = left.into_iter().map(|(p, why)| (p.display().to_string(), why)).collect();
        if self.output == Output::Json {
            print(&json(&Done { added: texts(added), known: texts(known), left }))?;
            return Ok(0);
        }
        let mut t = format!("{} added, {} known already\n", added.len(), known.len());
        for (file, why) in left {
            let _ = writeln!(t, "left: {file}: {why}");
        }
        print(&t)?;
        Ok(0)
    }
}

/// Runs a command; its exit status is ours. That of one that a signal ended is what shells make of it.
fn run_command(command: &[OsString]) -> Result<u8> {
    use std::os::unix::process::ExitStatusExt;
    let (name, args) = command.split_first().expect("not empty");
    let ended = Command::new(name).args(args).stdin(Stdio::inherit()).status();
    let status = ended.map_err(|e| Error::io(format!("run {}", name.display()), e))?;
    let code = status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(1))
}
