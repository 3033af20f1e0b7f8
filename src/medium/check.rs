//! Looking at a medium's file where looking may hang: in another process (or thread), with a limit of time.

use super::state::Outside;
use crate::error::{Error, ErrorKind};
use crate::format::{self, Format};
use crate::io::{FileUse, use_by_others};
use crate::job::inspect_image;
use crate::map::DeviceType;
use crate::vd::{ImageFiles, ImageSpec, OpenDisk, open_disk};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a check may take unless something else is said.
pub const CHECK_LIMIT: Duration = Duration::from_secs(10);
/// Checks that run at a time; of those that hang each keeps one place for its limit of time.
const AT_A_TIME: usize = 32;
/// Time between two looks at a process.
const POLL: Duration = Duration::from_millis(3);
/// Bytes of an answer that are read.
const MAX_ANSWER: u64 = 64 << 10;

/// What is to be looked at.
#[derive(Clone, Debug)]
pub struct Question {
    /// The file.
    pub path: PathBuf,
    /// Its format, if that is known.
    pub format: Option<Format>,
    /// Search its parent.
    pub find_parent: bool,
}

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Its format.
    pub format: String,
    /// Variant of it.
    pub variant: String,
    /// What it is a medium for: `hdd`, `dvd`, `floppy`.
    pub device: String,
    /// Bytes of its files.
    pub size: u64,
    /// Bytes of its disk.
    pub logical_size: u64,
    /// The image's own UUID.
    pub uuid: Option<String>,
    /// The UUID it names as its parent's.
    pub parent_uuid: Option<String>,
    /// It says that it has a parent, in whatever way.
    pub is_diff: bool,
    /// Where its parent was found.
    pub parent_path: Option<PathBuf>,
    /// Others read it.
    pub read_by_others: bool,
    /// Others write it.
    pub written_by_others: bool,
}

impl Facts {
    /// The image's own UUID.
    pub fn uuid(&self) -> Option<Uuid> {
        parsed(self.uuid.as_ref())
    }

    /// The UUID it names as its parent's.
    pub fn parent_uuid(&self) -> Option<Uuid> {
        parsed(self.parent_uuid.as_ref())
    }

    /// What it is a medium for.
    pub fn device(&self) -> DeviceType {
        super::kinds::device_by_name(&self.device).unwrap_or_default()
    }

    /// What others do with the file.
    pub fn outside(&self) -> Option<Outside> {
        match (self.written_by_others, self.read_by_others) {
            (true, _) => Some(Outside::Writing),
            (false, true) => Some(Outside::Reading),
            (false, false) => None,
        }
    }
}

fn parsed(text: Option<&String>) -> Option<Uuid> {
    Uuid::parse_str(text?).ok()
}

/// Looks, on this thread, for as long as it takes.
///
/// # Errors
/// Of opening and reading the image.
pub fn look(q: &Question) -> crate::Result<Facts> {
    let spec = ImageSpec { path: q.path.clone(), format: q.format.or_else(|| removable(&q.path)) };
    let seen = inspect_image(&spec)?;
    let info = &seen.info;
    let is_diff = info.variant == "diff" || info.parent_uuid.is_some() || !info.parent_names.is_empty();
    let files = ImageFiles::open(&q.path, Some(seen.format), false, None)?;
    // Where there are no such locks nobody can hold one.
    let usage = use_by_others(&*files.files()[0]).unwrap_or(None);
    let parent_path = if q.find_parent && is_diff { parent_of(&spec) } else { None };
    let text = |u: Option<Uuid>| u.map(|u| u.to_string());
    Ok(Facts {
        format: seen.format.name().into(),
        variant: info.variant.into(),
        device: info.device.name().into(),
        size: seen.file_size,
        logical_size: info.virtual_size,
        uuid: text(info.uuid),
        parent_uuid: text(info.parent_uuid),
        is_diff,
        parent_path,
        read_by_others: usage == Some(FileUse::Reading),
        written_by_others: usage == Some(FileUse::Writing),
    })
}

/// Discs and floppies have no signature: names and sizes that nothing else has tell that they are raw.
fn removable(path: &Path) -> Option<Format> {
    if format::extension_format(path).is_some() {
        return None;
    }
    let bytes = std::fs::metadata(path).ok()?.len();
    let device = format::device_type(Format::Raw, path, bytes);
    (device != DeviceType::HardDisk).then_some(Format::Raw)
}

/// The file of the parent, if it can be found and opened.
fn parent_of(spec: &ImageSpec) -> Option<PathBuf> {
    let opened = open_disk(&OpenDisk { image: spec.clone(), ..OpenDisk::new("") }).ok()?;
    Some(super::absolute(&opened.images.get(1)?.path))
}

/// Who looks.
#[derive(Clone, Debug)]
pub enum Prober {
    /// A thread of this process. One that hangs in the kernel may keep the process from ending.
    Thread,
    /// A process of this program, which takes a [`Question`] as its further arguments and prints what [`answer`] makes.
    Process(Vec<OsString>),
}

/// The line that a prober's process prints.
pub fn answer(seen: &crate::Result<Facts>) -> String {
    let text = match seen {
        Ok(facts) => serde_json::to_string(&Ok::<_, String>(facts)),
        Err(e) => serde_json::to_string(&Err::<&Facts, _>(e.to_string())),
    };
    text.expect("numbers and texts")
}

impl Prober {
    /// Looks, for at most `limit`. An error is a sentence.
    pub fn ask(&self, q: &Question, limit: Duration) -> Result<Facts, String> {
        match self {
            Prober::Thread => ask_thread(q.clone(), limit),
            Prober::Process(program) => ask_process(program, q, limit),
        }
    }

    /// Looks at many. One that hangs delays no other.
    pub fn ask_all(&self, questions: &[Question], limit: Duration) -> Vec<Result<Facts, String>> {
        let answers = Mutex::new(vec![Err(String::new()); questions.len()]);
        let next = Mutex::new(0..questions.len());
        thread::scope(|s| {
            for _ in 0..questions.len().min(AT_A_TIME) {
                s.spawn(|| {
                    while let Some(n) = next.lock().ok().and_then(|mut n| n.next()) {
                        let answer = self.ask(&questions[n], limit);
                        if let Ok(mut all) = answers.lock() {
                            all[n] = answer;
                        }
                    }
                });
            }
        });
        answers.into_inner().unwrap_or_default()
    }
}

/// What the error of a check that took too long begins with.
pub(super) const TIMED_OUT: &str = "timed out";

fn timed_out(limit: Duration) -> String {
    format!("{TIMED_OUT}: no answer within {} s", limit.as_secs_f32())
}

fn ask_thread(q: Question, limit: Duration) -> Result<Facts, String> {
    let (tell, told) = mpsc::channel();
    let run = move || {
        // Whoever asked may have gone.
        let _ = tell.send(look(&q).map_err(|e| e.to_string()));
    };
    thread::Builder::new().name("check".into()).spawn(run).map_err(|e| e.to_string())?;
    told.recv_timeout(limit).unwrap_or_else(|_| Err(timed_out(limit)))
}

fn ask_process(program: &[OsString], q: &Question, limit: Duration) -> Result<Facts, String> {
    let failed = |e: std::io::Error| format!("cannot look at it in a process of its own: {e}");
    let (name, first) = program.split_first().ok_or("no program")?;
    let mut command = Command::new(name);
    command.args(first).arg(&q.path).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.args(q.format.map(|f| format!("--format={f}")));
    command.args(q.find_parent.then_some("--find-parent"));
    let mut child = command.spawn().map_err(failed)?;
    let until = Instant::now() + limit;
    loop {
        match child.try_wait().map_err(failed)? {
            Some(_) => break,
            None if Instant::now() < until => thread::sleep(POLL),
            None => {
                // One that hangs in the kernel ends when that lets it go; nobody waits for that but a thread.
                let _ = child.kill();
                let _ = thread::Builder::new().spawn(move || child.wait());
                return Err(timed_out(limit));
            }
        }
    }
    let mut text = String::new();
    let out = child.stdout.take().ok_or("no answer")?;
    out.take(MAX_ANSWER).read_to_string(&mut text).map_err(failed)?;
    let answer: Result<Result<Facts, String>, _> = serde_json::from_str(text.trim());
    answer.unwrap_or_else(|_| Err("no answer: looking at it ended too early".into()))
}

/// The format by the name that a registry has; `None`: what the file itself says.
pub(super) fn format_named(name: &str) -> Option<Format> {
    match name.to_ascii_lowercase().as_str() {
        // VirtualBox's word for three formats of QEMU's.
        "qcow" => None,
        "iso" => Some(Format::Raw),
        other => other.parse().ok(),
    }
}

/// The name of a file's format, where the file need not be read for that.
pub(super) fn format_of_name(path: &Path) -> Option<Format> {
    format::extension_format(path)
}

/// The text of a failed check as an error.
pub(super) fn as_error(why: String, path: &Path) -> Error {
    // It names the file already.
    let start = format!("{}: ", path.display());
    let why = why.strip_prefix(&start).map_or(why.clone(), str::to_string);
    Error::new(ErrorKind::Io, why).at(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{CreateImage, create_image};

    fn question(path: &Path) -> Question {
        Question { path: path.into(), format: None, find_parent: true }
    }

    #[test]
    fn a_look_that_hangs_ends_and_delays_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let script = "case \"$0\" in *hang*) exec sleep 60;; *) printf '{\"Err\":\"seen\"}';; esac";
        let prober = Prober::Process(["sh", "-c", script].map(OsString::from).to_vec());
        let mut questions: Vec<_> = (0..4).map(|n| question(&dir.path().join(format!("hang{n}")))).collect();
        questions.extend((0..40).map(|n| question(&dir.path().join(format!("good{n}")))));
        let (start, limit) = (Instant::now(), Duration::from_secs(8));
        let answers = prober.ask_all(&questions, limit);
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
        for (q, a) in questions.iter().zip(&answers) {
            let why = a.as_ref().unwrap_err();
            let hangs = q.path.to_string_lossy().contains("hang");
            assert!(if hangs { why.starts_with(TIMED_OUT) } else { why == "seen" }, "{q:?}: {why}");
        }
    }

    #[test]
    fn a_prober_that_dies_is_an_error() {
        let prober = Prober::Process(["sh", "-c", "kill -9 $$"].map(OsString::from).to_vec());
        let why = prober.ask(&question(Path::new("x")), CHECK_LIMIT).unwrap_err();
        assert!(why.contains("too early"), "{why}");
        let none = Prober::Process(vec!["/no/such/program".into()]);
        assert!(none.ask(&question(Path::new("x")), CHECK_LIMIT).is_err());
    }

    #[test]
    fn what_is_seen_survives_the_way_through_a_pipe() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.vdi");
        create_image(&CreateImage::new(&path, Format::Vdi, 4 << 20)).unwrap();
        let seen = Prober::Thread.ask(&question(&path), CHECK_LIMIT).unwrap();
        assert_eq!((seen.format.as_str(), seen.logical_size, seen.is_diff), ("vdi", 4 << 20, false));
        assert!(seen.uuid().is_some());
        let back: Result<Facts, String> = serde_json::from_str(&answer(&Ok(seen.clone()))).unwrap();
        assert_eq!(back.unwrap(), seen);
        let error = look(&question(&dir.path().join("none.vdi")));
        let back: Result<Facts, String> = serde_json::from_str(&answer(&error)).unwrap();
        assert!(back.unwrap_err().contains("none.vdi"));
    }
}
