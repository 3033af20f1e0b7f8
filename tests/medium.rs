//! The registry of known media, by the library: the interface's attributes, methods and codes, and operations on files.

use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use uuid::Uuid;
use vdblk::format::Format;
use vdblk::io::{ImageLock, OpenHow, OsFile};
use vdblk::job::{CreateImage, NewSize, Watch, create_image};
use vdblk::medium::{Code, Fault, Medium, NewMedium, OpenMedium, Phase, Registry, State};

const MIB: u64 = 1 << 20;

fn scratch() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn open(dir: &Path) -> Registry {
    Registry::open(&dir.join("media.sqlite")).unwrap()
}

fn new(path: PathBuf) -> NewMedium {
    NewMedium {
        location: path,
        format: Format::Vdi,
        size_bytes: Some(8 * MIB),
        variant: None,
        parent: None,
        description: None,
        auto_reset: false,
    }
}

fn diff(path: PathBuf, parent: Uuid) -> NewMedium {
    NewMedium { parent: Some(parent), size_bytes: None, ..new(path) }
}

fn add<'r>(r: &'r Registry, path: &Path) -> Result<Medium<'r>, Fault> {
    r.open_medium(&OpenMedium { location: path.into(), ..OpenMedium::default() })
}

fn code<T>(result: Result<T, Fault>) -> Code {
    result.err().expect("refused").code()
}

fn unwatched<T>(f: impl FnOnce(&mut Watch<'_>) -> T) -> T {
    f(&mut Watch { cancelled: &|| false, progress: &mut |_| () })
}

/// Files in a folder, without the registry's.
fn files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|n| !n.starts_with("media.sqlite")).collect();
    names.sort();
    names
}

#[test]
fn ids_are_the_images_own() {
    let dir = scratch();
    let r = open(dir.path());
    for format in [Format::Vdi, Format::Vmdk, Format::Vhd, Format::Qcow2, Format::Raw] {
        let m = r.create(&NewMedium { format, ..new(dir.path().join(format!("new-{format}"))) }).unwrap();
        let info =
            vdblk::job::inspect_image(&vdblk::vd::ImageSpec { path: m.location().unwrap(), format: None });
        let info = info.unwrap().info;
        if let Some(own) = info.uuid {
            assert_eq!(own, m.id(), "{format}");
        }
        assert_eq!(m.state().unwrap(), State::Created, "{format}: {:?}", m.last_access_error());
        assert_eq!(m.description().unwrap(), None);
        assert_eq!(m.location().unwrap().extension().unwrap(), format.extensions()[0]);
    }
    assert_eq!(r.media().unwrap().len(), 5);
    assert!(files(dir.path()).iter().all(|n| !n.starts_with('.')), "a staging folder was left");
}

#[test]
fn descriptions_change_only_when_created() {
    let dir = scratch();
    let r = open(dir.path());
    let m = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    m.set_description(Some("the base")).unwrap();
    assert_eq!(m.description().unwrap().as_deref(), Some("the base"));
    m.lock_read().unwrap();
    assert_eq!(code(m.set_description(None)), Code::InvalidObjectState);
    m.unlock_read().unwrap();
    m.lock_write().unwrap();
    assert_eq!(code(m.set_description(None)), Code::InvalidObjectState);
    m.unlock_write().unwrap();
    fs::rename(m.location().unwrap(), dir.path().join("b.vdi")).unwrap();
    assert_eq!(m.state().unwrap(), State::Inaccessible);
    assert_eq!(code(m.set_description(None)), Code::InvalidObjectState);
    assert_eq!(m.description().unwrap().as_deref(), Some("the base"), "the last known one");
}

#[test]
fn reading_the_state_checks_the_file() {
    let dir = scratch();
    let r = open(dir.path());
    let m = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    let (path, away) = (m.location().unwrap(), dir.path().join("away"));
    assert_eq!((m.state().unwrap(), m.last_access_error().unwrap()), (State::Created, None));
    fs::rename(&path, &away).unwrap();
    assert_eq!(m.cached_state().unwrap(), State::Created, "nobody has looked");
    assert_eq!(m.state().unwrap(), State::Inaccessible);
    assert!(m.last_access_error().unwrap().unwrap().contains("a.vdi"));
    // Under a lock the state stays, and the error tells.
    m.lock_read().unwrap();
    assert_eq!(m.state().unwrap(), State::LockedRead);
    assert!(m.last_access_error().unwrap().is_some());
    fs::rename(&away, &path).unwrap();
    assert_eq!((m.state().unwrap(), m.last_access_error().unwrap()), (State::LockedRead, None));
    let unlocked = m.unlock_read().unwrap();
    assert_eq!(unlocked.after, State::Created, "what the check found meanwhile");
    fs::write(&path, "no image").unwrap();
    assert_eq!(m.state().unwrap(), State::Inaccessible);
}

#[test]
fn another_image_in_its_place_is_inaccessible() {
    let dir = scratch();
    let r = open(dir.path());
    let m = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    let path = m.location().unwrap();
    fs::remove_file(&path).unwrap();
    create_image(&CreateImage::new(&path, Format::Vdi, 8 * MIB)).unwrap();
    assert_eq!(m.state().unwrap(), State::Inaccessible);
    let why = m.last_access_error().unwrap().unwrap();
    assert!(why.contains(&m.id().to_string()) && why.contains("does not match the value"), "{why}");
}

#[test]
fn set_location_changes_the_record_alone() {
    let dir = scratch();
    let r = open(dir.path());
    let m = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    let other = r.create(&new(dir.path().join("other.vdi"))).unwrap();
    // Relative to the registry's folder, and with the extension of the format.
    m.set_location(Path::new("moved")).unwrap();
    let moved = vdblk::medium::absolute(&dir.path().join("moved.vdi"));
    assert_eq!(m.location().unwrap(), moved);
    assert_eq!(files(dir.path()), ["a.vdi", "other.vdi"]);
    assert_eq!(m.state().unwrap(), State::Inaccessible);
    fs::rename(dir.path().join("a.vdi"), &moved).unwrap();
    assert_eq!(m.state().unwrap(), State::Created);
    assert_eq!(code(m.set_location(&other.location().unwrap())), Code::InvalidArg);
    m.lock_write().unwrap();
    assert_eq!(code(m.set_location(Path::new("x"))), Code::InvalidObjectState);
}

#[test]
fn names_are_short_locations() {
    let dir = scratch();
    let r = open(dir.path());
    for folder in ["one", "two"] {
        r.create(&new(dir.path().join(folder).join("disk.vdi"))).unwrap();
    }
    let names: Vec<_> = r.media().unwrap().iter().map(|m| m.name()).collect();
    assert_eq!(names, ["disk.vdi", "disk.vdi"], "they need not be unique");
    let path = dir.path().join("two/disk.vdi");
    let m = r.find(path.to_str().unwrap()).unwrap();
    assert_eq!(
        (m.name().unwrap().as_str(), m.location().unwrap()),
        ("disk.vdi", vdblk::medium::absolute(&path))
    );
    assert_eq!(r.find(&m.id().braced().to_string()).unwrap().id(), m.id());
    assert_eq!(code(r.find("nothing.vdi")), Code::ObjectNotFound);
    assert_eq!(code(r.medium(Uuid::new_v4())), Code::ObjectNotFound);
}

#[test]
fn sizes_are_the_last_known_ones() {
    let dir = scratch();
    let r = open(dir.path());
    let m = r.create(&NewMedium { variant: Some("fixed".into()), ..new(dir.path().join("a.vdi")) }).unwrap();
    let len = fs::metadata(m.location().unwrap()).unwrap().len();
    assert_eq!((m.size().unwrap(), m.logical_size().unwrap()), (len, 8 * MIB));
    fs::remove_file(m.location().unwrap()).unwrap();
    assert_eq!(m.state().unwrap(), State::Inaccessible);
    assert_eq!((m.size().unwrap(), m.logical_size().unwrap()), (len, 8 * MIB));
}

#[test]
fn machines_and_their_snapshots() {
    let dir = scratch();
    let r = open(dir.path());
    let m = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    let [machine, other, s1, s2] = [(); 4].map(|()| Uuid::new_v4());
    assert_eq!((m.machine_ids().unwrap(), m.snapshot_ids(machine).unwrap()), (None, None));
    m.attach(machine, Some(s1)).unwrap();
    assert_eq!(m.machine_ids().unwrap(), Some(vec![machine]), "a snapshot alone counts");
    assert_eq!(m.snapshot_ids(machine).unwrap(), Some(vec![s1]));
    m.attach(machine, Some(s2)).unwrap();
    m.attach(machine, None).unwrap();
    assert_eq!(m.snapshot_ids(machine).unwrap(), Some(vec![machine, s1, s2]), "the machine's own id first");
    assert_eq!(m.snapshot_ids(other).unwrap(), None);
    assert_eq!(code(m.attach(machine, None)), Code::ObjectInUse);
    assert_eq!(code(m.attach(other, None)), Code::ObjectInUse);
    assert_eq!(code(m.detach(other, None)), Code::ObjectNotFound);
    for snapshot in [None, Some(s1), Some(s2)] {
        assert_eq!(code(m.close()), Code::ObjectInUse);
        m.detach(machine, snapshot).unwrap();
    }
    assert_eq!(m.machine_ids().unwrap(), None);
    assert_eq!(code(r.attach(Uuid::new_v4(), machine, None)), Code::AccessDenied, "only known media");
    // DVDs are counted.
    fs::write(dir.path().join("cd.iso"), vec![0; 1 << 16]).unwrap();
    let cd = add(&r, &dir.path().join("cd.iso")).unwrap();
    for _ in 0..2 {
        cd.attach(machine, None).unwrap();
    }
    cd.detach(machine, None).unwrap();
    assert_eq!(cd.machine_ids().unwrap(), Some(vec![machine]));
    cd.detach(machine, None).unwrap();
    assert_eq!(code(cd.lock_write()), Code::InvalidObjectState, "a DVD is never written");
}

#[test]
fn locks_return_both_states() {
    let dir = scratch();
    let (a, b) = (open(dir.path()), open(dir.path()));
    let m = a.create(&new(dir.path().join("a.vdi"))).unwrap();
    let first = m.lock_read().unwrap();
    assert_eq!((first.before, first.after), (State::Created, State::LockedRead));
    let seen = b.medium(m.id()).unwrap();
    assert_eq!(seen.cached_state().unwrap(), State::LockedRead);
    assert_eq!(seen.holders().unwrap()[0].pid, std::process::id());
    assert_eq!(code(seen.unlock_read()), Code::InvalidObjectState, "another client's");
    assert_eq!(code(seen.lock_write()), Code::InvalidObjectState);
    drop(a);
    assert_eq!(seen.cached_state().unwrap(), State::Created, "locks go with their client");
    let write = seen.lock_write().unwrap();
    assert_eq!((write.before, write.after), (State::Created, State::LockedWrite));
    assert_eq!(seen.unlock_write().unwrap().after, State::Created);
}

#[test]
fn a_file_that_others_write_is_locked() {
    let dir = scratch();
    let r = open(dir.path());
    let m = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    let file = OsFile::open(&m.location().unwrap(), OpenHow { write: true, ..OpenHow::default() }).unwrap();
    let lock = ImageLock::exclusive(&file, Duration::ZERO).unwrap();
    assert_eq!(m.state().unwrap(), State::LockedWrite);
    assert_eq!(code(m.lock_read()), Code::InvalidObjectState);
    assert_eq!(code(m.lock_write()), Code::InvalidObjectState);
    drop(lock);
    let _lock = ImageLock::shared(&file, Duration::ZERO).unwrap();
    assert_eq!(m.state().unwrap(), State::LockedRead);
    m.lock_read().unwrap();
}

#[test]
fn close_forgets_and_leaves_the_file() {
    let dir = scratch();
    let r = open(dir.path());
    let m = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    let id = m.id();
    let child = r.create(&diff(dir.path().join("b.vdi"), id)).unwrap();
    assert_eq!(code(m.close()), Code::ObjectInUse, "it has a child");
    child.lock_read().unwrap();
    assert_eq!(code(child.close()), Code::InvalidObjectState);
    child.unlock_read().unwrap();
    child.close().unwrap();
    assert_eq!(code(child.close()), Code::AccessDenied);
    assert_eq!(code(child.state()), Code::AccessDenied);
    assert_eq!(code(child.lock_read()), Code::AccessDenied);
    assert_eq!(code(child.location()), Code::AccessDenied);
    m.close().unwrap();
    assert_eq!(files(dir.path()), ["a.vdi", "b.vdi"]);
    // It can be opened again, with its parent.
    let again = add(&r, &dir.path().join("b.vdi")).unwrap();
    assert_eq!((again.id(), again.record().unwrap().parent), (child.id(), Some(id)));
    assert_eq!(r.media().unwrap().len(), 2);
}

#[test]
fn a_registry_that_is_none_is_refused() {
    let dir = scratch();
    let path = dir.path().join("text");
    fs::write(&path, "no registry ".repeat(1000)).unwrap();
    assert_eq!(code(Registry::open(&path)), Code::XmlError);
    assert_eq!(code(Registry::open(Path::new("/proc/nothing/r"))), Code::FileError);
}

#[test]
fn a_damaged_registry_is_an_error_at_most() {
    let dir = scratch();
    let r = open(dir.path());
    let base = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    r.create(&diff(dir.path().join("b.vdi"), base.id())).unwrap().attach(Uuid::new_v4(), None).unwrap();
    drop(r);
    let good = fs::read(dir.path().join("media.sqlite")).unwrap();
    let (mut errors, mut seed) = (0, 7u64);
    for round in 0..120 {
        let mut bytes = good.clone();
        for _ in 0..8 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = (seed >> 33) as usize % bytes.len();
            bytes[at] = (seed >> 20) as u8;
        }
        let path = dir.path().join(format!("media.sqlite-{round}"));
        fs::write(&path, bytes).unwrap();
        let looked = Registry::open(&path).and_then(|r| {
            for m in r.media()? {
                let m = r.medium(m.id)?;
                m.state()?;
                m.machine_ids()?;
                m.holders()?;
                r.chain(m.id())?;
                m.lock_read()?;
            }
            Ok(())
        });
        errors += u32::from(looked.is_err());
    }
    assert!(errors > 0, "no damage was noticed");
    assert_eq!(open(dir.path()).media().unwrap().len(), 2, "the good one is as it was");
}

#[test]
fn adding_twice_is_one_medium() {
    let dir = scratch();
    let r = open(dir.path());
    let path = dir.path().join("a.vdi");
    create_image(&CreateImage::new(&path, Format::Vdi, 8 * MIB)).unwrap();
    let m = add(&r, &path).unwrap();
    assert_eq!(add(&r, &path).unwrap().id(), m.id());
    let copy = dir.path().join("copy.vdi");
    fs::copy(&path, &copy).unwrap();
    let e = add(&r, &copy).err().unwrap();
    assert!(e.code() == Code::InvalidArg && e.to_string().contains("already exists"), "{e}");
    assert_eq!(code(add(&r, &dir.path().join("none.vdi"))), Code::FileError);
    assert_eq!(r.media().unwrap().len(), 1);
}

#[test]
fn diffs_stand_on_known_parents() {
    let dir = scratch();
    let r = open(dir.path());
    for format in [Format::Vdi, Format::Vhd, Format::Vmdk, Format::Qcow2, Format::Qed] {
        let base = r.create(&NewMedium { format, ..new(dir.path().join(format!("base-{format}"))) }).unwrap();
        let top = NewMedium { format, ..diff(dir.path().join(format!("top-{format}")), base.id()) };
        let top = r.create(&top).unwrap();
        assert_eq!(top.state().unwrap(), State::Created, "{format}: {:?}", top.last_access_error());
        assert_eq!(base.children().unwrap(), [top.id()]);
        // Forgotten and added again it finds its parent by itself.
        let path = top.location().unwrap();
        top.close().unwrap();
        assert_eq!(add(&r, &path).unwrap().record().unwrap().parent, Some(base.id()), "{format}");
    }
    let orphan = scratch();
    fs::copy(dir.path().join("top-vdi.vdi"), orphan.path().join("x.vdi")).unwrap();
    assert_eq!(code(add(&open(orphan.path()), &orphan.path().join("x.vdi"))), Code::ObjectNotFound);
    // Failures leave nothing.
    let before = files(dir.path());
    let wrong = NewMedium { variant: Some("no-such".into()), ..new(dir.path().join("wrong.vdi")) };
    assert!(r.create(&wrong).is_err());
    assert!(r.create(&new(dir.path().join("base-vdi.vdi"))).is_err(), "nothing is overwritten");
    assert_eq!(files(dir.path()), before);
    assert!(r.media().unwrap().iter().all(|m| m.phase == Phase::Created));
}

#[test]
fn chains_are_locked_all_or_none() {
    let dir = scratch();
    let (r, other) = (open(dir.path()), open(dir.path()));
    let base = r.create(&new(dir.path().join("0.vdi"))).unwrap();
    let mid = r.create(&diff(dir.path().join("1.vdi"), base.id())).unwrap();
    let top = r.create(&diff(dir.path().join("2.vdi"), mid.id())).unwrap();
    let ids: Vec<_> = r.chain(top.id()).unwrap().iter().map(|r| r.id).collect();
    assert_eq!(ids, [top.id(), mid.id(), base.id()]);
    r.lock_all(&ids, true).unwrap();
    let states = |r: &Registry| {
        ids.iter().map(|id| r.medium(*id).unwrap().cached_state().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(states(&other), [State::LockedWrite, State::LockedRead, State::LockedRead]);
    assert_eq!(code(other.lock_all(&ids, true)), Code::InvalidObjectState);
    // What is beneath is locked first, and given back when the leaf is refused.
    assert_eq!(other.medium(base.id()).unwrap().holders().unwrap().len(), 1);
    r.unlock_all(&ids, true).unwrap();
    assert_eq!(states(&other), [State::Created; 3]);
}

#[test]
fn delete_removes_files_and_record() {
    let dir = scratch();
    let r = open(dir.path());
    let base = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    let top = r.create(&diff(dir.path().join("b.vdi"), base.id())).unwrap();
    assert_eq!(code(r.delete(base.id())), Code::ObjectInUse);
    top.lock_read().unwrap();
    assert_eq!(code(r.delete(top.id())), Code::InvalidObjectState);
    top.unlock_read().unwrap();
    r.delete(top.id()).unwrap();
    assert_eq!((files(dir.path()), code(top.state())), (vec!["a.vdi".to_string()], Code::AccessDenied));
    let split =
        NewMedium { format: Format::Vmdk, variant: Some("split2g".into()), ..new(dir.path().join("s.vmdk")) };
    let split = r.create(&split).unwrap();
    assert!(files(dir.path()).len() > 2);
    r.delete(split.id()).unwrap();
    assert_eq!(files(dir.path()), ["a.vdi"]);
    fs::write(dir.path().join("cd.iso"), vec![0; 1 << 16]).unwrap();
    let cd = add(&r, &dir.path().join("cd.iso")).unwrap();
    assert_eq!(code(r.delete(cd.id())), Code::NotSupported);
    // A diff that nobody has made known would be lost.
    let stranger = r.create(&diff(dir.path().join("b.vdi"), base.id())).unwrap();
    stranger.close().unwrap();
    assert_eq!(code(r.delete(base.id())), Code::ObjectInUse);
}

#[test]
fn move_takes_the_file_along() {
    let dir = scratch();
    let r = open(dir.path());
    let split =
        NewMedium { format: Format::Vmdk, variant: Some("split2g".into()), ..new(dir.path().join("s.vmdk")) };
    let m = r.create(&split).unwrap();
    let before = files(dir.path());
    fs::create_dir(dir.path().join("to")).unwrap();
    unwatched(|w| r.move_to(m.id(), &dir.path().join("to"), w)).unwrap();
    assert_eq!((files(dir.path()), files(&dir.path().join("to"))), (vec!["to".to_string()], before));
    assert_eq!(m.state().unwrap(), State::Created, "{:?}", m.last_access_error());
    // In the same folder its parts keep their names.
    unwatched(|w| r.move_to(m.id(), &dir.path().join("to/renamed"), w)).unwrap();
    assert_eq!(m.name().unwrap(), "renamed.vmdk");
    assert_eq!(m.state().unwrap(), State::Created, "{:?}", m.last_access_error());
    let other = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    assert!(
        unwatched(|w| r.move_to(other.id(), &m.location().unwrap(), w)).is_err(),
        "nothing is overwritten"
    );
    fs::write(dir.path().join("b.vdi"), "precious").unwrap();
    assert_eq!(code(unwatched(|w| r.move_to(other.id(), &dir.path().join("b.vdi"), w))), Code::FileError);
    assert_eq!(fs::read_to_string(dir.path().join("b.vdi")).unwrap(), "precious");
    assert_eq!(other.state().unwrap(), State::Created);
    assert!(files(dir.path()).iter().all(|n| !n.starts_with('.')));
}

#[test]
fn move_leaves_links_alone_and_holes_empty() {
    let dir = scratch();
    let r = open(dir.path());
    let real = r.create(&new(dir.path().join("real/a.vdi"))).unwrap();
    real.close().unwrap();
    std::os::unix::fs::symlink("real/a.vdi", dir.path().join("link.vdi")).unwrap();
    let m = r
        .open_medium(&OpenMedium { location: dir.path().join("link.vdi"), ..OpenMedium::default() })
        .unwrap();
    // moved, it would name nothing
    let refused = unwatched(|w| r.move_to(m.id(), &dir.path().join("to/a.vdi"), w));
    assert_eq!(code(refused), Code::NotSupported);
    assert_eq!(m.state().unwrap(), State::Created);
    assert_eq!(files(dir.path()), ["link.vdi", "real"]);

    let Ok(memory) = tempfile::tempdir_in("/dev/shm") else {
        return eprintln!("skipped: no other file system");
    };
    let sparse =
        NewMedium { format: Format::Raw, size_bytes: Some(64 << 20), ..new(dir.path().join("s.img")) };
    let m = r.create(&sparse).unwrap();
    let mut told = 0;
    let to = memory.path().join("s.img");
    r.move_to(m.id(), &to, &mut Watch { cancelled: &|| false, progress: &mut |_| told += 1 }).unwrap();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&to).unwrap());
    assert!(blocks < 128, "{blocks} blocks of 512 bytes for nothing but a hole");
    let never = unwatched(|w| {
        r.move_to(
            m.id(),
            &dir.path().join("back.img"),
            &mut Watch { cancelled: &|| true, progress: w.progress },
        )
    });
    assert!(never.is_err() && to.exists() && m.state().unwrap() == State::Created);
    r.delete(m.id()).unwrap();
    assert!(!to.exists());
}

#[test]
fn clones_merges_and_resets() {
    let dir = scratch();
    let r = open(dir.path());
    let base = r.create(&new(dir.path().join("0.vdi"))).unwrap();
    let mid = r.create(&diff(dir.path().join("1.vdi"), base.id())).unwrap();
    let top = r.create(&diff(dir.path().join("2.vdi"), mid.id())).unwrap();
    let clone = unwatched(|w| r.clone_medium(top.id(), &new(dir.path().join("clone.vmdk.vdi")), w)).unwrap();
    assert_eq!((clone.state().unwrap(), clone.record().unwrap().parent), (State::Created, None));
    assert_eq!(top.cached_state().unwrap(), State::Created, "unlocked again");

    assert_eq!(code(r.reset(base.id())), Code::NotSupported);
    assert_eq!(code(r.reset(mid.id())), Code::ObjectInUse);
    r.reset(top.id()).unwrap();
    assert_eq!(top.state().unwrap(), State::Created, "{:?}", top.last_access_error());

    assert_eq!(code(unwatched(|w| r.merge(clone.id(), base.id(), w))), Code::InvalidArg);
    top.lock_read().unwrap();
    assert_eq!(code(unwatched(|w| r.merge(mid.id(), base.id(), w))), Code::InvalidObjectState);
    top.unlock_read().unwrap();
    unwatched(|w| r.merge(mid.id(), base.id(), w)).unwrap();
    assert_eq!(code(mid.state()), Code::AccessDenied);
    assert_eq!(top.record().unwrap().parent, Some(base.id()));
    assert_eq!(top.state().unwrap(), State::Created, "{:?}", top.last_access_error());
    // Upwards: the base goes.
    unwatched(|w| r.merge(base.id(), top.id(), w)).unwrap();
    assert_eq!((top.record().unwrap().parent, top.state().unwrap()), (None, State::Created));
    assert_eq!(files(dir.path()), ["2.vdi", "clone.vmdk.vdi"]);
    assert_eq!(r.media().unwrap().len(), 2);
}

#[test]
fn resize_and_compact_under_locks() {
    let dir = scratch();
    let (r, other) = (open(dir.path()), open(dir.path()));
    let m = r.create(&new(dir.path().join("a.vdi"))).unwrap();
    assert_eq!(unwatched(|w| r.resize(m.id(), NewSize::By(8 * MIB), false, w)).unwrap(), (8 * MIB, 16 * MIB));
    assert_eq!(m.logical_size().unwrap(), 16 * MIB);
    unwatched(|w| r.compact(m.id(), w)).unwrap();
    let child = r.create(&diff(dir.path().join("b.vdi"), m.id())).unwrap();
    assert_eq!(code(unwatched(|w| r.resize(m.id(), NewSize::By(MIB), false, w))), Code::ObjectInUse);
    r.delete(child.id()).unwrap();
    other.medium(m.id()).unwrap().lock_read().unwrap();
    assert_eq!(code(unwatched(|w| r.resize(m.id(), NewSize::By(MIB), false, w))), Code::InvalidObjectState);
    assert_eq!(code(unwatched(|w| r.compact(m.id(), w))), Code::InvalidObjectState);
}

/// Names between back-quotes and, behind the letter of their file, of tests.
#[test]
fn the_documents_name_what_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |p: &str| fs::read_to_string(root.join(p)).unwrap_or_else(|e| panic!("{p}: {e}"));
    let doc = read("docs/medium-api.md");
    let mut code = String::new();
    for e in fs::read_dir(root.join("src/medium")).unwrap() {
        let path = e.unwrap().path();
        if path.is_file() {
            code += &fs::read_to_string(path).unwrap();
        }
    }
    let tests = BTreeMap::from([
        ("S", read("src/medium/state/tests.rs")),
        ("M", read("tests/medium.rs")),
        ("T", read("tests/medium_serve.rs")),
        ("N", read("tests/medium_many.rs")),
        ("X", read("tests/medium_crypt.rs")),
    ]);
    let (mut rows, mut named) = (0, 0);
    for line in doc.lines().filter(|l| l.starts_with("| ") && !l.contains("| test |")) {
        rows += 1;
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let quoted = |text: &str| text.split('`').skip(1).step_by(2).map(str::to_string).collect::<Vec<_>>();
        let (letter, test) =
            cells.last().unwrap().split_once(' ').unwrap_or_else(|| panic!("no test: {line}"));
        let test = test.trim_matches('`');
        assert!(tests[letter].contains(&format!("fn {test}(")), "no test {letter} {test}: {line}");
        for item in quoted(cells[1]) {
            named += 1;
            let (of, name) = item.split_once("::").unwrap_or(("", &item));
            let there = ["fn ", "struct ", "enum "].iter().any(|k| code.contains(&format!("pub {k}{name}")));
            let is_variant = code.contains(&format!("    {name},")) || code.contains(&format!("    {name}("));
            assert!(there || (!of.is_empty() && is_variant), "no item {item}: {line}");
        }
    }
    assert!(rows > 50 && named > 50, "{rows} rows, {named} items");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Two clients of the real store, held against the state machine.
    #[test]
    fn the_store_does_what_the_state_machine_says(steps in prop::collection::vec((0usize..2, 0usize..4), 1..12)) {
        use vdblk::medium::{Call, Client, Standing};
        let dir = scratch();
        let clients = [open(dir.path()), open(dir.path())];
        let id = clients[0].create(&new(dir.path().join("a.vdi"))).unwrap().id();
        let mut model = Standing { phase: Phase::Created, ..Standing::new(vdblk::map::DeviceType::HardDisk) };
        for (who, what) in steps {
            let m = clients[who].medium(id).unwrap();
            let (call, done) = match what {
                0 => (Call::LockRead, m.lock_read()),
                1 => (Call::UnlockRead, m.unlock_read()),
                2 => (Call::LockWrite, m.lock_write()),
                _ => (Call::UnlockWrite, m.unlock_write()),
            };
            let answer = model.call(Client(who as i64), &call);
            let said = done.map(|c| (c.before, c.after)).map_err(|e| e.code());
            prop_assert_eq!(said, answer.outcome.map(|()| (answer.before, answer.after)).map_err(|r| r.code));
            prop_assert_eq!(m.cached_state().unwrap(), answer.after);
        }
    }
}
