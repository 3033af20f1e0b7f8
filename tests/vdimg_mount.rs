//! `vdimg mount`: a disk and its partitions as files, through the kernel. On a host without FUSE the command has to say so in one line; what is in the
//! files is tested without it (job::tests).

mod vdimg_support;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use vdimg_support::{MIB, Rng, fails, io_ok, ok, run, scratch, succeeded, vdimg};

/// Whether this host mounts anything for us; if not, the command says so.
fn has_fuse(dir: &Path) -> bool {
    let there = OpenOptions::new().read(true).write(true).open("/dev/fuse").is_ok();
    if !there {
        eprintln!("no /dev/fuse here: only the refusal is tested");
        assert!(fails(dir, 1, "mount disk.vdi mnt").contains("cannot mount it"));
    }
    there
}

/// A vdimg that has a disk mounted at `mnt`.
struct Mounted {
    child: Child,
    at: PathBuf,
}

impl Mounted {
    /// Returns once it is.
    fn new(dir: &Path, args: &str, files: &str) -> Mounted {
        let at = dir.join("mnt");
        let mut child =
            vdimg(dir, &format!("mount {args} mnt")).stdout(Stdio::piped()).spawn().expect("start vdimg");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("its output");
        assert_eq!(line, format!("mnt: {files}\n"), "{args}");
        Mounted { child, at }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        succeeded("kill", Command::new("kill").args(["-s", name, &pid]).output().expect("start kill"));
    }

    /// It ends by itself, soon.
    fn end(mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "it goes on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn ended_by(self, signal: &str) {
        let at = self.at.clone();
        self.signal(signal);
        assert!(self.end().success(), "{signal}");
        assert_eq!(fs::read_dir(at).expect("the folder").count(), 0, "the folder is what it was");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|s| s.is_none()) {
            let _ = Command::new("umount").arg("-l").arg(&self.at).output();
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A disk of 16 MiB with two partitions, of 8 and 4 MiB, and random bytes in between; `first` is what is in the first.
fn disk(dir: &Path, first: &[u8]) -> Vec<u8> {
    let mut all = vec![0; 16 << 20];
    Rng(3).fill(&mut all[10 << 20..]);
    all[1 << 20..(1 << 20) + first.len()].copy_from_slice(first);
    for (n, (start, len)) in [(2048u32, 8 * 2048u32), (10 * 2048, 4 * 2048)].into_iter().enumerate() {
        let entry = &mut all[446 + 16 * n..462 + 16 * n];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..].copy_from_slice(&len.to_le_bytes());
    }
    all[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(dir.join("disk.raw"), &all).expect("write");
    fs::create_dir(dir.join("mnt")).expect("a folder");
    ok(dir, "convert -O vdi disk.raw disk.vdi");
    all
}

const FILES: &str = "disk partition1 partition2";

#[test]
fn a_disk_and_its_partitions_are_files() {
    let dir = scratch();
    let dir = dir.path();
    let all = disk(dir, &[7; 4096]);
    assert!(fails(dir, 2, "mount disk.vdi nowhere").contains("nowhere"));
    if !has_fuse(dir) {
        return;
    }
    let m = Mounted::new(dir, "disk.vdi", FILES);
    let mut names: Vec<_> =
        fs::read_dir(&m.at).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names.join(" "), FILES);
    assert!(fs::read(m.path("disk")).unwrap() == all);
    assert!(fs::read(m.path("partition1")).unwrap() == all[1 << 20..9 << 20]);
    let second = File::open(m.path("partition2")).unwrap();
    assert_eq!(second.metadata().unwrap().len(), 4 * MIB);
    let mut end = [0; 100];
    assert_eq!(second.read_at(&mut end, 4 * MIB - 33).unwrap(), 33, "a file ends");
    assert_eq!(end[..33], all[(14 << 20) - 33..14 << 20]);
    drop(second);
    let e = OpenOptions::new().write(true).open(m.path("disk")).unwrap_err();
    assert_eq!(e.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert!(File::create(m.path("new")).is_err() && fs::metadata(m.path("partition3")).is_err());
    // It is locked as vdblk locks it.
    assert_eq!(run(dir, "cat disk.vdi --length 512").stdout, all[..512]);
    assert!(!vdimg_support::io(dir, "disk.vdi", &["write 0 512"]).status.success());
    m.ended_by("INT");
    io_ok(dir, "disk.vdi", &["write -P 1 0 512"]);
    for signal in ["TERM", "HUP"] {
        Mounted::new(dir, "-f raw disk.raw", FILES).ended_by(signal);
    }
}

#[test]
fn what_is_written_to_files_is_in_the_image() {
    let dir = scratch();
    let dir = dir.path();
    let mut all = disk(dir, &[7; 4096]);
    if !has_fuse(dir) {
        return;
    }
    ok(dir, "create --format qcow2 --parent disk.vdi top.qcow2");
    let m = Mounted::new(dir, "--writable top.qcow2", FILES);
    let file = OpenOptions::new().read(true).write(true).open(m.path("partition1")).unwrap();
    let whole = File::open(m.path("disk")).unwrap();
    for (at, len) in [(0u64, 512usize), (4000, 5000), (3 * MIB - 1, 2), (8 * MIB - 7, 7)] {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + 1) as u8).collect();
        file.write_all_at(&bytes, at).unwrap();
        let on_disk = (MIB + at) as usize;
        all[on_disk..on_disk + len].copy_from_slice(&bytes);
        let mut back = vec![0; len];
        whole.read_exact_at(&mut back, MIB + at).unwrap();
        assert_eq!(back, bytes, "the other file shows it at once");
    }
    let e = file.write_at(&[1; 16], 8 * MIB).unwrap_err();
    assert_eq!(e.kind(), std::io::ErrorKind::StorageFull, "behind its end");
    assert!(file.set_len(0).is_err() && File::create(m.path("disk")).is_err(), "its length stays");
    file.sync_all().unwrap();
    assert!(!run(dir, "cat top.qcow2 --length 512").status.success(), "locked by a writer");
    // Somebody still has a file open: it goes on until that is closed.
    m.signal("TERM");
    let begun = Instant::now();
    while fs::metadata(m.path("disk")).is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(20));
    }
    file.write_all_at(&[9; 512], MIB).unwrap();
    all[2 << 20..(2 << 20) + 512].fill(9);
    drop((file, whole));
    assert!(m.end().success());
    assert!(run(dir, "cat top.qcow2").stdout == all);
    ok(dir, "check top.qcow2");
    assert!(run(dir, "cat disk.vdi").stdout != all, "the parent is what it was");
}

/// An ext4 in the partition is checked, written to and checked again, as a file.
#[test]
fn e2fsck_and_debugfs_work_on_the_file_of_a_partition() {
    let dir = scratch();
    let dir = dir.path();
    let tool = |name: &str, args: &[&str]| {
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        Command::new(name).args(args).current_dir(dir).env("PATH", path).output()
    };
    fs::write(dir.join("part.raw"), vec![0; 8 << 20]).unwrap();
    let made = tool("mkfs.ext4", &["-q", "-F", "part.raw"]);
    let Ok(made) = made else { return eprintln!("no e2fsprogs here") };
    succeeded("mkfs.ext4", made);
    disk(dir, &fs::read(dir.join("part.raw")).unwrap());
    fs::write(dir.join("pw"), "secret\n").unwrap();
    ok(dir, "encrypt --password-file pw --key-store keys disk.vdi");
    if !has_fuse(dir) {
        return;
    }
    let keys = "--password-file pw --key-store keys";
    let m = Mounted::new(dir, &format!("--writable {keys} disk.vdi"), FILES);
    succeeded("e2fsck", tool("e2fsck", &["-f", "-n", "mnt/partition1"]).unwrap());
    fs::write(dir.join("note"), "kept").unwrap();
    succeeded("debugfs", tool("debugfs", &["-w", "-R", "write note note", "mnt/partition1"]).unwrap());
    succeeded("e2fsck", tool("e2fsck", &["-f", "-n", "mnt/partition1"]).unwrap());
    m.ended_by("INT");
    // Again, for reading: what was written is there.
    let m = Mounted::new(dir, &format!("{keys} disk.vdi"), FILES);
    let told = succeeded("debugfs", tool("debugfs", &["-R", "cat note", "mnt/partition1"]).unwrap());
    assert_eq!(told, "kept");
    succeeded("e2fsck", tool("e2fsck", &["-f", "-n", "mnt/partition1"]).unwrap());
    m.ended_by("TERM");
    // Without the key there are no partitions.
    Mounted::new(dir, "disk.vdi", "disk").ended_by("INT");
}
