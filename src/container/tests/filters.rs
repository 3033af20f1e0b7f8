//! Filters: CRYPT in one direction, in both, twice, and what is prepared for it.

use super::*;
use crate::error::ErrorKind;
use crate::filter::{Cipher, KeyStore, Secret, Unallocated};
use crate::job::Watch;
use std::cell::{Cell, RefCell};

/// Knows keys and passwords, and keeps what it is told.
#[derive(Default)]
struct User {
    saved: RefCell<String>,
    told: RefCell<String>,
    refuses: bool,
}

impl CryptInterface for User {
    fn password(&self, id: &str) -> Result<Secret> {
        match id {
            "none" => Err(Error::of(Status::DekMissing, "no such password")),
            _ => Ok(Secret::copy_of(id.as_bytes())),
        }
    }

    fn key(&self, id: &str) -> Result<Secret> {
        let mut key = [0; 32];
        key.iter_mut().zip(id.bytes().cycle()).enumerate().for_each(|(n, (k, b))| *k = b ^ n as u8);
        Ok(Secret::copy_of(&key))
    }

    fn save(&self, _: &str, key_store: &str) -> Result<()> {
        if self.refuses {
            return Err(Error::new(ErrorKind::NoSpace, "nowhere to keep it"));
        }
        *self.saved.borrow_mut() = key_store.into();
        Ok(())
    }

    fn told(&self, id: &str, cipher: Cipher) {
        *self.told.borrow_mut() = format!("{id} {cipher}");
    }
}

const CIPHER: (&str, &str) = ("Algorithm", "AES-XTS128-PLAIN64");

fn try_add(c: &mut Container, user: &User, flags: FilterFlags, values: &[(&str, &str)]) -> Result<()> {
    let config = FilterConfig { values, crypt: Some(user), ..FilterConfig::default() };
    c.filter_add("crypt", flags, &config)
}

/// A key without a store, which is quick.
pub(super) fn add(c: &mut Container, flags: FilterFlags, id: &str) {
    try_add(c, &User::default(), flags, &[CIPHER, ("keyid", id)]).unwrap();
}

#[test]
fn a_key_store_is_made_kept_and_unlocked() {
    let f = Folder::new();
    let (user, both) = (User::default(), FilterFlags::DEFAULT);
    let mut c = hard_disk();
    let new = [("Algorithm", "AES-XTS256-PLAIN64"), ("KeyId", "one"), ("CreateKeyStore", "1")];
    let full = User { refuses: true, ..User::default() };
    assert_eq!(try_add(&mut c, &full, both, &new).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(c.filter_count(), (0, 0), "a key that nobody keeps is not used");
    try_add(&mut c, &user, both, &new).unwrap();
    c.create_base("RAW", &f.path("a.raw"), 4 * MIB, &CreateBase::default(), OpenFlags::NONE).unwrap();
    let data = pattern(1, 3 << 20);
    c.write(0, &data).unwrap();
    assert!(bytes(&c, 0, 3 << 20) == data);
    assert_eq!(bytes(&c, 3 * MIB, 512), [0; 512], "never written");
    c.close_all().unwrap();
    assert_eq!(c.filter_count(), (1, 1), "they are the container's");
    assert_eq!(KeyStore::parse(&user.saved.borrow()).unwrap().cipher(), Cipher::Xts256);
    let held = std::fs::read(f.path("a.raw")).unwrap();
    assert!(held[..3 << 20].chunks(16).zip(data.chunks(16)).all(|(h, d)| h != d));

    let store = user.saved.borrow().clone();
    let mut c = open(&f.path("a.raw"), "RAW", OpenFlags::READONLY);
    let there = [("KeyId", "one"), ("KeyStore", store.as_str())];
    try_add(&mut c, &user, FilterFlags::INFO | both, &there).unwrap();
    assert_eq!((user.told.borrow().as_str(), c.filter_count()), ("one AES-XTS256-PLAIN64", (0, 0)));
    assert!(bytes(&c, 0, 4 << 20) == held);
    try_add(&mut c, &user, FilterFlags::READ, &there).unwrap();
    assert!(bytes(&c, 0, 3 << 20) == data, "the open disk has it at once");
    let wrong = [("KeyId", "two"), ("KeyStore", store.as_str())];
    assert_eq!(status(try_add(&mut c, &user, both, &wrong)), Status::PasswordIncorrect);
    let unknown = [("KeyId", "none"), ("KeyStore", store.as_str())];
    assert_eq!(status(try_add(&mut c, &user, both, &unknown)), Status::DekMissing);
    let e = c.filter_add("CRYPT", both, &FilterConfig { values: &there, ..FilterConfig::default() });
    assert_eq!(status(e), Status::DekMissing, "nobody to ask");
    assert_eq!(c.filter_count(), (1, 0), "what fails adds nothing");
}

#[test]
fn filters_are_configured_by_known_keys() {
    let (user, both) = (User::default(), FilterFlags::DEFAULT);
    let mut c = hard_disk();
    let info = filter_info_one("Crypt").unwrap();
    assert_eq!((info.name, filter_info()), ("CRYPT", vec![info.clone()]));
    let keys: Vec<_> = info.config.iter().map(|k| k.key).collect();
    assert_eq!(keys, ["Algorithm", "KeyId", "KeyStore", "CreateKeyStore"]);
    let mut refused = |flags, values: &[(&str, &str)]| try_add(&mut c, &user, flags, values).unwrap_err();
    assert_eq!(refused(both, &[("Key", "x")]).status(), Some(Status::UnknownCfgValues));
    assert_eq!(refused(both, &[CIPHER]).status(), Some(Status::ValueNotFound), "KeyId is mandatory");
    assert_eq!(refused(both, &[("KeyId", "x")]).status(), Some(Status::ValueNotFound));
    let kinds = [
        refused(FilterFlags::NONE, &[CIPHER, ("KeyId", "x")]),
        refused(both, &[("Algorithm", "ROT13"), ("KeyId", "x")]),
        refused(both, &[CIPHER, ("KeyId", "x"), ("CreateKeyStore", "yes")]),
        refused(both, &[("KeyStore", "x"), ("KeyId", "x"), ("CreateKeyStore", "1")]),
    ];
    assert_eq!(kinds.map(|e| e.kind()), [ErrorKind::InvalidArgument; 4]);
    assert_eq!(refused(both, &[("KeyStore", "x!"), ("KeyId", "x")]).kind(), ErrorKind::NotThisFormat);
    let config = FilterConfig { crypt: Some(&user), ..FilterConfig::default() };
    assert_eq!(c.filter_add("XOR", both, &config).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(c.filter_count(), (0, 0));
    assert!(filter_info_one("").is_err());
}

/// Two filters nest; each direction loses its newest first.
#[test]
fn the_last_filter_of_a_direction_is_removed() {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", 4 * MIB);
    add(&mut c, FilterFlags::DEFAULT, "a");
    let a_only = pattern(2, 4096);
    c.write(MIB, &a_only).unwrap();
    add(&mut c, FilterFlags::DEFAULT, "b");
    let both = pattern(3, 70 << 10);
    c.write(0, &both).unwrap();
    assert!(bytes(&c, 0, 70 << 10) == both);
    c.filter_remove(FilterFlags::READ).unwrap();
    assert!(bytes(&c, MIB, 4096) == a_only && bytes(&c, 0, 70 << 10) != both);
    assert_eq!(c.filter_count(), (1, 2));
    c.filter_remove(FilterFlags::WRITE).unwrap();
    c.write(2 * MIB, &a_only).unwrap();
    assert!(bytes(&c, 2 * MIB, 4096) == a_only, "what is written now goes through the first alone");
    c.filter_remove(FilterFlags::READ).unwrap();
    assert_eq!(status(c.filter_remove(FilterFlags::DEFAULT)), Status::NotOpened, "none for reads");
    assert_eq!(c.filter_count(), (0, 1), "nothing is removed by half");
    assert_eq!(c.filter_remove(FilterFlags::INFO).unwrap_err().kind(), ErrorKind::InvalidArgument);
    c.filter_remove(FilterFlags::WRITE).unwrap();
    add(&mut c, FilterFlags::DEFAULT, "a");
    add(&mut c, FilterFlags::DEFAULT, "b");
    assert!(bytes(&c, 0, 70 << 10) == both, "the same order as before");
    c.filter_remove_all();
    assert_eq!(c.filter_count(), (0, 0));
    assert_eq!(status(c.filter_remove(FilterFlags::READ)), Status::NotOpened);
    assert!(bytes(&c, MIB, 4096) != a_only && bytes(&c, 0, 70 << 10) != both);
}

#[test]
fn space_that_was_never_written_shows_zeros_or_noise() {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", 4 * MIB);
    add(&mut c, FilterFlags::DEFAULT, "a");
    assert_eq!(bytes(&c, 0, 4096), [0; 4096]);
    c.filter_remove_all();
    let (user, values) = (User::default(), [CIPHER, ("KeyId", "a")]);
    let config = FilterConfig { values: &values, crypt: Some(&user), unallocated: Unallocated::VirtualBox };
    c.filter_add("CRYPT", FilterFlags::DEFAULT, &config).unwrap();
    let noise = bytes(&c, 0, 4096);
    assert!(noise != [0; 4096] && noise[..512] != noise[512..1024]);
    c.write(0, &[0; 4096]).unwrap();
    assert_eq!(bytes(&c, 0, 4096), [0; 4096], "zeros that were written are zeros");
}

/// A plain chain of two formats; what it shows.
fn plain(f: &Folder) -> (Container, Vec<u8>) {
    let mut c = with_base(f, "VDI", "a.vdi", 16 * MIB);
    c.write(0, &pattern(1, 9 << 20)).unwrap();
    diff(&mut c, "VMDK", &f.path("b.vmdk"));
    c.write(5 * MIB + 512, &pattern(2, 6 << 20)).unwrap();
    let all = bytes(&c, 0, 16 << 20);
    (c, all)
}

/// Read with this key all shows as before; without it nothing does.
fn shows(c: &mut Container, key: Option<&str>, all: &[u8]) {
    c.filter_remove_all();
    if let Some(key) = key {
        assert!(bytes(c, 0, 1 << 20) != all[..1 << 20], "it is encrypted");
        add(c, FilterFlags::DEFAULT, key);
    }
    assert!(bytes(c, 0, 16 << 20) == all);
}

#[test]
fn all_images_are_prepared_for_filters() {
    let f = Folder::new();
    assert_eq!(status(hard_disk().prepare_with_filters(unwatched!())), Status::NotOpened);
    let (mut c, all) = plain(&f);
    c.prepare_with_filters(unwatched!()).unwrap();
    shows(&mut c, None, &all);
    // Encrypted, with another key, and plain again.
    add(&mut c, FilterFlags::WRITE, "a");
    c.prepare_with_filters(unwatched!()).unwrap();
    shows(&mut c, Some("a"), &all);
    c.prepare_with_filters(unwatched!()).unwrap();
    shows(&mut c, Some("a"), &all);
    c.filter_remove(FilterFlags::WRITE).unwrap();
    add(&mut c, FilterFlags::WRITE, "b");
    c.prepare_with_filters(unwatched!()).unwrap();
    shows(&mut c, Some("b"), &all);
    c.close(false).unwrap();
    assert!(bytes(&c, 0, 5 << 20) == all[..5 << 20], "the base as well");
    c.open("VMDK", &f.path("b.vmdk"), OpenFlags::NONE).unwrap();
    c.filter_remove(FilterFlags::WRITE).unwrap();
    c.prepare_with_filters(unwatched!()).unwrap();
    c.filter_remove_all();
    assert!(bytes(&c, 0, 16 << 20) == all);
}

/// Ended in its midst nobody opens the images, and the same call completes it.
#[test]
fn preparing_that_was_ended_is_completed() {
    let f = Folder::new();
    let (mut c, all) = plain(&f);
    add(&mut c, FilterFlags::WRITE, "a");
    let steps = Cell::new(0);
    let cancelled = || steps.replace(steps.get() + 1) > 1;
    let e = c.prepare_with_filters(&mut Watch { cancelled: &cancelled, progress: &mut |_| () });
    assert_eq!(e.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(c.count(), 0);
    assert!(hard_disk().open("VDI", &f.path("a.vdi"), OpenFlags::READONLY).is_err(), "half of each");
    for (name, backend) in [("a.vdi", "VDI"), ("b.vmdk", "VMDK")] {
        c.open(backend, &f.path(name), OpenFlags::INFO).unwrap();
    }
    c.prepare_with_filters(unwatched!()).unwrap();
    c.set_open_flags(0, OpenFlags::READONLY).unwrap();
    c.set_open_flags(1, OpenFlags::NONE).unwrap();
    shows(&mut c, Some("a"), &all);
    assert_eq!(f.files(), ["a.vdi", "b.vmdk"], "no side file is left");
}

/// Copies go through the filters of both containers; what works on images as they are does not.
#[test]
fn work_on_images_keeps_what_filters_show() {
    let f = Folder::new();
    let (mut c, all) = plain(&f);
    let mut secret = hard_disk();
    add(&mut secret, FilterFlags::DEFAULT, "a");
    let to = |name: &str| CopyImage { path: Some(f.path(name)), ..CopyImage::default() };
    c.copy_to(0, &mut secret, &to("c.vmdk"), unwatched!()).unwrap_err(); // its name is another format's
    c.copy_to(0, &mut secret, &to("c.vdi"), unwatched!()).unwrap();
    let same = CopyImage { from_same: 0, to_same: 0, ..to("d.vmdk") };
    c.copy_to(1, &mut secret, &same, unwatched!()).unwrap();
    assert!(bytes(&secret, 0, 16 << 20) == all);
    secret.compact(0, unwatched!()).unwrap_or_else(|e| panic!("{e}"));
    secret.resize(20 * MIB, Geometry::default(), Geometry::default(), unwatched!()).unwrap();
    assert_eq!(bytes(&secret, 16 * MIB, 4096), [0; 4096]);
    secret.write(19 * MIB, &[7; 4096]).unwrap();
    secret.move_image(0, None, &f.path("moved.vdi"), true, unwatched!()).unwrap();
    secret.merge(1, 0, unwatched!()).unwrap();
    assert!(bytes(&secret, 0, 16 << 20) == all);
    assert_eq!(bytes(&secret, 19 * MIB, 4096), [7; 4096]);
    let mut back = hard_disk();
    secret.copy_to(LAST_IMAGE, &mut back, &to("plain.vdi"), unwatched!()).unwrap();
    assert!(bytes(&back, 0, 16 << 20) == all, "and plain again");
    let stream =
        CopyImage { flags: ImageFlags::VMDK_STREAM_OPTIMIZED, backend: Some("VMDK".into()), ..to("s.vmdk") };
    let mut target = hard_disk();
    secret.copy_to(LAST_IMAGE, &mut target, &stream, unwatched!()).unwrap();
    assert!(bytes(&target, 0, 16 << 20) == all);
    let mut filtered = hard_disk();
    add(&mut filtered, FilterFlags::DEFAULT, "b");
    let stream = CopyImage { path: Some(f.path("t.vmdk")), ..stream };
    let e = secret.copy_to(LAST_IMAGE, &mut filtered, &stream, unwatched!()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported, "it would be plain");
}
