//! What the tests of vdimg share: running it, random disks, foreign judges.
#![allow(dead_code)] // each test program uses its part

pub(crate) mod shapes;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// A folder on the file system the tests were built on: a real one, where /tmp may be in memory.
pub(crate) fn scratch() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary folder")
}

/// vdimg with these arguments (separated by blanks), in a folder.
pub(crate) fn vdimg(dir: &Path, args: &str) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_vdimg"));
    c.current_dir(dir).args(args.split_whitespace()).stdin(Stdio::null());
    c
}

/// Runs vdimg.
pub(crate) fn run(dir: &Path, args: &str) -> Output {
    vdimg(dir, args).output().expect("start vdimg")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Runs vdimg, which must succeed; its standard output.
pub(crate) fn ok(dir: &Path, args: &str) -> String {
    succeeded(args, run(dir, args))
}

pub(crate) fn succeeded(what: &str, out: Output) -> String {
    assert!(out.status.success(), "{what}: {}: {}", out.status, text(&out.stderr));
    text(&out.stdout)
}

/// Runs vdimg, which must fail with this status and one line that says so; the line without "vdimg: ".
pub(crate) fn fails(dir: &Path, status: i32, args: &str) -> String {
    failed(args, status, run(dir, args))
}

pub(crate) fn failed(what: &str, status: i32, out: Output) -> String {
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(status), "{what}: {err}");
    let lines: Vec<_> = err.lines().filter(|l| !l.starts_with("vdimg: warning: ")).collect();
    let [line] = lines[..] else { panic!("{what}: one line was expected: {err}") };
    line.strip_prefix("vdimg: ").unwrap_or_else(|| panic!("{what}: {err}")).to_string()
}

/// `vdimg io` with these commands.
pub(crate) fn io(dir: &Path, args: &str, commands: &[&str]) -> Output {
    let mut c = vdimg(dir, &format!("io {args}"));
    commands.iter().for_each(|command| {
        c.args(["-c", command]);
    });
    c.output().expect("start vdimg")
}

pub(crate) fn io_ok(dir: &Path, args: &str, commands: &[&str]) -> String {
    succeeded(args, io(dir, args, commands))
}

/// A vdimg that holds an image open until it is dropped.
pub(crate) struct Holder(Child);

impl Holder {
    /// Returns once the image is locked.
    pub(crate) fn new(dir: &Path, args: &str) -> Holder {
        use std::io::{BufRead, BufReader};
        // One that was killed just before holds its lock until the kernel has ended its I/O.
        let mut c = vdimg(dir, &format!("io --lock-wait 20 {args}"));
        c.args(["-c", "read 0 512", "-c", "sleep 600000"]).stdout(Stdio::piped());
        let mut child = c.spawn().expect("start vdimg");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("its output");
        assert!(line.starts_with("read"), "{args}: {line}");
        Holder(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Random numbers, the same for the same seed (splitmix64).
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        bytes.chunks_mut(8).for_each(|c| c.copy_from_slice(&self.next().to_le_bytes()[..c.len()]));
    }
}

/// A sparse raw file with some runs of random bytes, and what is in it.
pub(crate) fn random_raw(path: &Path, size: u64, rng: &mut Rng) -> Vec<u8> {
    let mut model = vec![0; size as usize];
    let file = File::create_new(path).expect("new file");
    file.set_len(size).expect("length");
    for _ in 0..20 {
        let len = (1 + rng.below(512)).min(size / 512) * 512;
        let at = rng.below((size - len) / 512 + 1) * 512;
        let part = &mut model[at as usize..(at + len) as usize];
        // Now and then zeros that are really there.
        if rng.below(4) > 0 {
            rng.fill(part)
        } else {
            part.fill(0)
        }
        file.write_all_at(part, at).expect("write");
    }
    model
}

/// Bytes of storage a file takes.
pub(crate) fn storage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).expect("metadata").blocks() * 512
}

/// True if the program is here; else says that it is not.
pub(crate) fn has(program: &str) -> bool {
    let here = Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    if !here {
        println!("skipped: no {program}");
    }
    here
}

/// Runs another program in a folder, which must succeed; its standard output.
pub(crate) fn tool(dir: &Path, program: &str, args: &str) -> String {
    let out =
        Command::new(program).current_dir(dir).args(args.split_whitespace()).output().expect("start it");
    succeeded(&format!("{program} {args}"), out)
}

/// True if we may do everything.
pub(crate) fn is_root() -> bool {
    tool(Path::new("/"), "id", "-u").trim() == "0"
}

/// A small file system in memory, gone when dropped. `None` with a message where it cannot be mounted.
pub(crate) struct SmallFs(PathBuf);

impl SmallFs {
    pub(crate) fn mount(at: &Path, bytes: u64) -> Option<SmallFs> {
        std::fs::create_dir(at).expect("mount point");
        let size = format!("size={bytes}");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "vdimg-test"]).arg(at).output();
        if done.is_ok_and(|o| o.status.success()) {
            return Some(SmallFs(at.into()));
        }
        println!("skipped: no file system can be mounted here");
        None
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        // The kernel may still be at work on the files of a process that has ended.
        let umount = |how: &[&str]| {
            let done = Command::new("umount").args(how).arg(&self.0).stderr(Stdio::null()).status();
            done.is_ok_and(|s| s.success())
        };
        for _ in 0..100 {
            if umount(&[]) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        umount(&["-l"]);
    }
}

/// Waits for a child and watches the most memory it held, in bytes. `None`: it was too quick to be seen.
pub(crate) fn watch_memory(child: &mut Child) -> Option<u64> {
    let status = format!("/proc/{}/status", child.id());
    let until = Instant::now() + Duration::from_secs(120);
    let mut most = None;
    while child.try_wait().expect("wait").is_none() {
        assert!(Instant::now() < until, "it hangs");
        let now = std::fs::read_to_string(&status).unwrap_or_default();
        let line = now.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        if let Some(kib) = line.and_then(|l| l.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()) {
            most = most.max(Some(kib * KIB));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    most
}
