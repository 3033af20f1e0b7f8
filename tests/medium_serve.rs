//! Known media that are served: `vdblk --medium` and `--vbox`, by their type's rule, locked for everybody.

mod daemon_support;

use daemon_support::client::{OK, pattern};
use daemon_support::images::{MIB, contents, diff, vdi};
use daemon_support::process::{Daemon, run, vdblk};
use daemon_support::{comes_true, scratch};
use std::fs;
use std::path::{Path, PathBuf};
use uuid::Uuid;
use vdblk::filter::{Cipher, Secret};
use vdblk::format::Format;
use vdblk::job::Watch;
use vdblk::medium::{ChangeEncryption, Code, Medium, MediumType, NewMedium, OpenMedium, Registry, State};

const SIZE: u64 = 8 * MIB;

/// A registry and a disk in it.
struct Known {
    dir: tempfile::TempDir,
    r: Registry,
    base: Uuid,
}

impl Known {
    fn new(variant: &str) -> Known {
        let dir = scratch();
        let r = Registry::open(&dir.path().join("media.sqlite")).unwrap();
        let new = NewMedium {
            location: dir.path().join("base.vdi"),
            format: Format::Vdi,
            size_bytes: Some(SIZE),
            variant: Some(variant.into()),
            parent: None,
            description: None,
            auto_reset: false,
        };
        let base = r.create(&new).unwrap().id();
        Known { dir, r, base }
    }

    fn base(&self) -> Medium<'_> {
        self.r.medium(self.base).unwrap()
    }

    fn diff(&self, name: &str, parent: Uuid) -> Medium<'_> {
        let new = NewMedium {
            location: self.dir.path().join(name),
            format: Format::Vdi,
            size_bytes: None,
            variant: None,
            parent: Some(parent),
            description: None,
            auto_reset: false,
        };
        self.r.create(&new).unwrap()
    }

    fn command(&self, medium: Uuid, options: &[&str]) -> std::process::Command {
        let mut c = vdblk(&["--medium", &medium.to_string(), "--registry"]);
        c.arg(self.dir.path().join("media.sqlite")).args(options);
        c
    }

    fn serve(&self, medium: Uuid, options: &[&str]) -> Daemon {
        Daemon::with_socket(self.command(medium, options))
    }

    /// One that is expected to be refused.
    fn refused(&self, medium: Uuid, options: &[&str], parts: &[&str]) {
        let mut c = self.command(medium, options);
        c.args(["--lock-wait", "0", "--socket-path"]).arg(self.dir.path().join("refused"));
        run(c).assert_refused(parts);
    }
}

fn bytes(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

#[test]
fn a_served_chain_is_locked() {
    let k = Known::new("dynamic");
    let mid = k.diff("mid.vdi", k.base);
    let top = k.diff("top.vdi", mid.id());
    let states = || [top.id(), mid.id(), k.base].map(|id| k.r.medium(id).unwrap().state().unwrap());
    let daemon = k.serve(top.id(), &[]);
    daemon.connect().mark(0, 1);
    assert_eq!(states(), [State::LockedWrite, State::LockedRead, State::LockedRead]);
    assert_eq!(top.holders().unwrap()[0].pid, daemon.pid());
    assert_eq!(top.lock_read().unwrap_err().code(), Code::InvalidObjectState);
    assert_eq!(k.base().lock_write().unwrap_err().code(), Code::InvalidObjectState);
    k.refused(top.id(), &[], &["LockedWrite", "VBOX_E_INVALID_OBJECT_STATE"]);
    k.refused(mid.id(), &[], &["child", "VBOX_E_OBJECT_IN_USE", "--read-only"]);
    // What is beneath can be read by others too.
    let reader = k.serve(mid.id(), &["--read-only"]);
    reader.connect().assert_zero(0);
    reader.stop();
    daemon.stop();
    assert_eq!(states(), [State::Created; 3]);
    // Killed, it holds nothing either.
    let mut daemon = k.serve(top.id(), &[]);
    daemon.connect().assert_marked(0, 1);
    daemon.signal(libc::SIGKILL);
    assert!(comes_true(|| daemon.has_ended()));
    assert!(comes_true(|| states() == [State::Created; 3]), "{:?}", states());
    k.serve(top.id(), &[]).stop();
}

#[test]
fn an_image_that_is_served_without_a_registry_is_locked_too() {
    let k = Known::new("dynamic");
    let daemon = Daemon::serve(&k.base().location().unwrap(), &[]);
    assert_eq!(k.base().state().unwrap(), State::LockedWrite);
    assert_eq!(k.base().holders().unwrap(), []);
    assert_eq!(k.base().lock_read().unwrap_err().code(), Code::InvalidObjectState);
    daemon.stop();
    assert_eq!(k.base().state().unwrap(), State::Created);
}

#[test]
fn an_immutable_medium_is_served_from_a_fresh_diff() {
    let k = Known::new("dynamic");
    let daemon = k.serve(k.base, &[]);
    daemon.connect().mark(0, 1);
    daemon.stop();
    assert_eq!(k.base().state().unwrap(), State::Created);
    k.base().set_type(MediumType::Immutable).unwrap();
    let before = bytes(&k.base().location().unwrap());
    let socket = k.dir.path().join("vm");
    let serve = || {
        let mut c = k.command(k.base, &[]);
        c.arg("--socket-path").arg(&socket);
        let dir = tempfile::tempdir().unwrap();
        let daemon = Daemon::spawn(c, socket.clone(), dir);
        daemon.wait_until_serving();
        daemon
    };
    for _ in 0..2 {
        let daemon = serve();
        let mut guest = daemon.connect();
        guest.assert_marked(0, 1);
        guest.assert_zero(MIB);
        guest.mark(MIB, 2);
        drop(guest);
        let diffs = k.base().children().unwrap();
        assert_eq!(diffs.len(), 1, "the same diff each time");
        assert_eq!(k.r.medium(diffs[0]).unwrap().state().unwrap(), State::LockedWrite);
        daemon.stop();
    }
    // A server that was killed: the guest may still be running, and finds what it has written.
    let mut daemon = serve();
    daemon.connect().mark(MIB, 3);
    daemon.signal(libc::SIGKILL);
    assert!(comes_true(|| daemon.has_ended()));
    let again = serve();
    again.connect().assert_marked(MIB, 3);
    // Another one gets another diff.
    let other = k.serve(k.base, &[]);
    other.connect().assert_zero(MIB);
    assert_eq!(k.base().children().unwrap().len(), 2);
    other.stop();
    again.stop();
    assert!(bytes(&k.base().location().unwrap()) == before, "the immutable image was changed");
}

#[test]
fn a_multiattach_medium_keeps_what_is_written() {
    let k = Known::new("dynamic");
    k.base().set_type(MediumType::MultiAttach).unwrap();
    let machines = [Uuid::new_v4(), Uuid::new_v4()];
    for round in 0..2 {
        for (n, machine) in machines.iter().enumerate() {
            let daemon = k.serve(k.base, &["--machine", &machine.to_string()]);
            let mut guest = daemon.connect();
            let seed = n as u8 + 7;
            if round == 0 {
                guest.assert_zero(0);
                guest.mark(0, seed);
            }
            guest.assert_marked(0, seed);
            drop(guest);
            daemon.stop();
        }
    }
    let diffs = k.base().children().unwrap();
    assert_eq!(diffs.len(), 2);
    let of = |id: &Uuid| k.r.medium(*id).unwrap().machine_ids().unwrap().unwrap();
    let mut attached: Vec<_> = diffs.iter().flat_map(of).collect();
    attached.sort();
    let mut expected = machines.to_vec();
    expected.sort();
    assert_eq!(attached, expected);
}

#[test]
fn machines_get_diffs_of_what_they_do_not_use_directly() {
    let k = Known::new("dynamic");
    k.base().set_type(MediumType::Immutable).unwrap();
    let machine = Uuid::new_v4();
    assert_eq!(k.base().attach(machine, None).unwrap_err().code(), Code::InvalidObjectState);
    let own = k.r.attach(k.base, machine, None).unwrap();
    let record = own.record().unwrap();
    assert_eq!((record.parent, record.auto_reset), (Some(k.base), true));
    assert!(record.location.parent().unwrap().ends_with("Snapshots"));
    assert_eq!((own.machine_ids().unwrap(), k.base().machine_ids().unwrap()), (Some(vec![machine]), None));
    let daemon = k.serve(k.base, &["--machine", &machine.to_string()]);
    assert_eq!(own.state().unwrap(), State::LockedWrite);
    daemon.stop();
}

#[test]
fn types_change_by_their_rules() {
    let k = Known::new("dynamic");
    let code = |t| k.base().set_type(t).err().map(|e| e.code());
    assert_eq!(code(MediumType::Readonly), Some(Code::NotSupported));
    assert_eq!(code(MediumType::Shareable), Some(Code::NotSupported), "it is not fixed");
    assert_eq!(k.base().set_auto_reset(true).unwrap_err().code(), Code::NotSupported);
    let child = k.diff("child.vdi", k.base);
    assert_eq!(code(MediumType::Writethrough), Some(Code::ObjectInUse));
    assert_eq!(child.set_type(MediumType::Immutable).unwrap_err().code(), Code::NotSupported);
    child.set_auto_reset(true).unwrap();
    assert!(child.record().unwrap().auto_reset);
    k.r.delete(child.id()).unwrap();
    k.base().set_type(MediumType::Writethrough).unwrap();
    assert_eq!(k.base().record().unwrap().medium_type, MediumType::Writethrough);
    let fixed = Known::new("fixed");
    fixed.base().set_type(MediumType::Shareable).unwrap();
    let daemon = fixed.serve(fixed.base, &[]);
    daemon.connect().mark(0, 1);
    assert_eq!(fixed.base().cached_state().unwrap(), State::LockedRead);
    daemon.stop();
}

#[test]
fn a_readonly_medium_takes_no_writes() {
    let dir = scratch();
    let r = Registry::open(&dir.path().join("media.sqlite")).unwrap();
    let iso = dir.path().join("cd.iso");
    fs::write(&iso, vec![0x42; 1 << 20]).unwrap();
    let m = r.open_medium(&OpenMedium { location: iso.clone(), ..OpenMedium::default() }).unwrap();
    assert_eq!(m.record().unwrap().medium_type, MediumType::Readonly);
    let serve = || {
        let mut c = vdblk(&["--registry"]);
        c.arg(dir.path().join("media.sqlite")).arg("--medium").arg(&iso);
        Daemon::with_socket(c)
    };
    let (one, two) = (serve(), serve());
    let mut guest = one.connect();
    assert_ne!(guest.write(0, &pattern(1)), OK);
    assert_eq!(guest.read(0, 4096), [0x42; 4096]);
    assert_eq!(m.cached_state().unwrap(), State::LockedRead);
    assert_eq!(m.holders().unwrap().len(), 2);
    drop(guest);
    one.stop();
    two.stop();
}

#[test]
fn a_machines_disk_is_served_from_its_folder() {
    let dir = scratch();
    let folder = dir.path().join("vm");
    fs::create_dir_all(folder.join("Snapshots")).unwrap();
    let base: PathBuf = vdi(&folder.join("disk.vdi"), SIZE);
    let top = diff(&folder.join("Snapshots/{top}.vdi"), &base, None);
    let (base_id, top_id) = (daemon_support::images::uuid(&base), daemon_support::images::uuid(&top));
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/machine.vbox"))
        .unwrap();
    let text = text.replace("@BASE@", &base_id.to_string()).replace("@TOP@", &top_id.to_string());
    let vbox = folder.join("vm.vbox");
    fs::write(&vbox, &text).unwrap();
    let mut c = vdblk(&["--vbox"]);
    c.arg(&vbox).args(["--disk", "0"]);
    let daemon = Daemon::with_socket(c);
    daemon.connect().mark(MIB, 5);
    daemon.stop();
    let shown = contents(&[top.clone(), base.clone()]);
    assert!(shown[MIB as usize..][..4096] == pattern(5));
    assert!(contents(&[base]).iter().all(|b| *b == 0), "the parent was written");
    assert_eq!(fs::read_to_string(&vbox).unwrap(), text);
    let mut c = vdblk(&["--vbox"]);
    c.arg(&vbox).args(["--disk", "7", "--socket-path"]).arg(dir.path().join("s"));
    run(c).assert_refused(&["vm.vbox", "no disk 7", "counted from 0"]);
}

#[test]
fn an_encrypted_medium_is_served_with_the_key_store_that_is_kept_with_it() {
    let k = Known::new("dynamic");
    let top = k.diff("top.vdi", k.base);
    let secret = Secret::copy_of(b"secret");
    let change = ChangeEncryption::Encrypt { cipher: Cipher::Xts256, password: &secret, password_id: "id" };
    let mut watch = Watch { cancelled: &|| false, progress: &mut |_| () };
    k.r.change_encryption(top.id(), None, &change, &mut watch).unwrap();
    let pw = k.dir.path().join("pw");
    fs::write(&pw, "secret\n").unwrap();
    let with = ["--password-file", pw.to_str().unwrap()];
    k.refused(top.id(), &[], &["top.vdi", "encrypted", "--password-file"]);
    let daemon = k.serve(top.id(), &with);
    daemon.connect().mark(MIB, 5);
    daemon.stop();
    let daemon = k.serve(top.id(), &with);
    daemon.connect().assert_marked(MIB, 5);
    daemon.connect().assert_zero(2 * MIB);
    daemon.stop();
    let files = [top.location().unwrap(), k.base().location().unwrap()];
    assert!(contents(&files)[MIB as usize..][..4096] != pattern(5), "it is not encrypted");

    // straight from the machine's file
    let machine = Uuid::new_v4();
    top.attach(machine, None).unwrap();
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/machine.vbox"));
    let text = text.unwrap().replace("@BASE@", &k.base.to_string()).replace("@TOP@", &top.id().to_string());
    let store = k.base().property("CRYPT/KeyStore").unwrap().unwrap().replace('\n', "&#10;");
    let property = format!("><Property name=\"CRYPT/KeyStore\" value=\"{store}\"/>");
    let at = text.find(&k.base.to_string()).unwrap();
    let end = at + text[at..].find('>').unwrap();
    let text = text[..end].to_string() + &property + &text[end + 1..];
    let folder = k.dir.path().join("vm");
    fs::create_dir_all(folder.join("Snapshots")).unwrap();
    fs::rename(&files[1], folder.join("disk.vdi")).unwrap();
    fs::rename(&files[0], folder.join("Snapshots/{top}.vdi")).unwrap();
    let vbox = folder.join("vm.vbox");
    fs::write(&vbox, text).unwrap();
    let mut c = vdblk(&["--vbox"]);
    c.arg(&vbox).args(with);
    let daemon = Daemon::with_socket(c);
    daemon.connect().assert_marked(MIB, 5);
    daemon.stop();
}
