//! The registry under many processes, under kill -9, with checks that hang; what comes from folders and from VirtualBox's files.

mod vdimg_support;

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use uuid::Uuid;
use vdblk::format::Format;
use vdblk::medium::{MediumType, NewMedium, OpenMedium, Phase, Prober, Registry, State};
use vdimg_support::*;

fn medium(dir: &Path, args: &str) -> Command {
    vdimg(dir, &format!("medium --registry media.sqlite {args}"))
}

fn list(dir: &Path) -> Vec<Value> {
    let text = succeeded("list", medium(dir, "list --no-check --output json").output().unwrap());
    serde_json::from_str(&text).expect("JSON")
}

fn word<'v>(v: &'v Value, key: &str) -> &'v str {
    v[key].as_str().unwrap_or_else(|| panic!("no {key} in {v}"))
}

#[test]
fn a_check_that_hangs_delays_no_other_medium() {
    let dir = scratch();
    let path = dir.path().join("media.sqlite");
    let script = "case \"$1\" in *hang*) exec sleep 60;; *) exec \"$0\" medium probe \"$@\";; esac";
    let program = ["sh", "-c", script, env!("CARGO_BIN_EXE_vdimg")].map(OsString::from).to_vec();
    let plain = Registry::open(&path).unwrap();
    for name in ["a", "b", "hang1", "hang2", "c"] {
        let new = NewMedium {
            location: dir.path().join(name),
            format: Format::Vdi,
            size_bytes: Some(MIB),
            variant: None,
            parent: None,
            description: None,
            auto_reset: false,
        };
        plain.create(&new).unwrap();
    }
    drop(plain);
    let r = Registry::open_with(&path, Prober::Process(program)).unwrap();
    r.set_check_limit(Duration::from_secs(10));
    let ids: Vec<_> = r.media().unwrap().iter().map(|m| m.id).collect();
    let start = Instant::now();
    std::thread::scope(|s| {
        let (dir, ids) = (dir.path(), &ids);
        let checking = s.spawn(move || {
            let r = r;
            r.check(ids).unwrap();
        });
        // Others use the registry meanwhile, and what hangs is locked and unlocked as ever.
        let locked = Instant::now();
        let out = medium(dir, "lock --read hang1.vdi --timeout 1 -- true").output().unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
        assert!(locked.elapsed() < Duration::from_secs(9), "{:?}", locked.elapsed());
        checking.join().unwrap();
    });
    assert!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
    for m in list(dir.path()) {
        let hangs = word(&m, "name").starts_with("hang");
        let expected = if hangs { "Inaccessible" } else { "Created" };
        assert_eq!(word(&m, "state"), expected, "{m}");
        assert_eq!(m["lastAccessError"].as_str().is_some_and(|e| e.contains("timed out")), hangs, "{m}");
    }
}

/// What one client does, forever, until it is killed; it tells what is done.
const BUSY: &str = r#"
m() { "$V" medium --registry media.sqlite "$@"; }
n=0
while :; do
  n=$((n + 1)); f="$W-$n.vdi"
  m create --size 1M $f >/dev/null && echo "made $f"
  case $((n % 5)) in
    0) echo "going $f"; m delete $f && echo "gone $f";;
    1) echo "going $f"; m move $f moved-$f && echo "gone $f" && echo "made moved-$f";;
    2) m create --parent $f child-$f >/dev/null && echo "made child-$f"
       m reset child-$f;;
    3) m create --parent $f mid-$f >/dev/null && m create --parent mid-$f top-$f >/dev/null && echo "made top-$f" &&
       echo "going mid-$f" && m merge mid-$f --into $f && echo "gone mid-$f";;
    4) m lock --write $f -- "$V" medium --registry media.sqlite list --no-check >/dev/null
       m clone $f clone-$f >/dev/null && echo "made clone-$f";;
  esac
done
"#;

/// A shell that leads a group of its own, so that it is killed with what it runs.
fn busy(dir: &Path, who: &str) -> Child {
    use std::os::unix::process::CommandExt;
    let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("log")).unwrap();
    let mut c = Command::new("sh");
    c.arg("-c").arg(BUSY).env("V", env!("CARGO_BIN_EXE_vdimg")).env("W", who).current_dir(dir);
    c.process_group(0).stdin(Stdio::null()).stdout(log).stderr(Stdio::null()).spawn().unwrap()
}

fn kill_group(mut child: Child) {
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: kill touches no memory; the group is that of a child that was not waited for.
    unsafe { libc::kill(-pid, libc::SIGKILL) };
    child.wait().unwrap();
}

/// What must hold after kills: no half-done operation, files and records agree, and what was told to be done is done.
fn assert_in_order(dir: &Path) {
    // What was killed holds its locks until the kernel has taken it down.
    let settled = |all: &[Value]| {
        all.iter().all(|m| {
            matches!(word(m, "state"), "Created" | "Inaccessible") && m["locks"] == Value::Array(vec![])
        })
    };
    let until = Instant::now() + Duration::from_secs(30);
    let mut all = list(dir);
    while !settled(&all) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
        all = list(dir);
    }
    for m in &all {
        assert!(matches!(word(m, "state"), "Created" | "Inaccessible"), "{m}");
        assert!(Path::new(word(m, "location")).exists(), "a record without a file: {m}");
        assert_eq!(m["locks"].as_array().map(Vec::len), Some(0), "{m}");
    }
    let known: BTreeSet<_> = all.iter().map(|m| word(m, "name").to_string()).collect();
    for e in fs::read_dir(dir).unwrap() {
        let name = e.unwrap().file_name().into_string().unwrap();
        assert!(!name.starts_with(".vdblk-"), "{name} was left");
        assert!(!name.ends_with(".vdi") || known.contains(&name), "{name} is a file without a record");
    }
    let mut told: BTreeMap<String, &str> = BTreeMap::new();
    let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
    for line in log.lines() {
        let (what, name) = line.split_once(' ').expect("a word and a name");
        told.insert(name.to_string(), what);
    }
    for (name, what) in told {
        match what {
            "gone" => assert!(!known.contains(&name), "{name} is gone"),
            "made" => assert!(known.contains(&name), "{name} was made, and is lost"),
            "going" => {
                // Moved without having been told.
                let moved = known.contains(&format!("moved-{name}"));
                assert!(!(moved && known.contains(&name)), "{name} is at two places");
                assert!(moved || known.contains(&name) || !dir.join(&name).exists(), "{name} is half gone");
            }
            other => panic!("{other}"),
        }
    }
    let out = medium(dir, "check").output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}{}", text(&out.stdout), text(&out.stderr));
}

#[test]
fn killed_at_any_moment_nothing_is_lost() {
    let dir = scratch();
    let mut rng = Rng(0x6d65_6469);
    let rounds = std::env::var("VDBLK_MEDIUM_KILLS").map_or(12, |n| n.parse().expect("a number"));
    for round in 0..rounds {
        let clients: Vec<_> = (0..2).map(|n| busy(dir.path(), &format!("r{round}c{n}"))).collect();
        std::thread::sleep(Duration::from_millis(150 + rng.below(900)));
        clients.into_iter().for_each(kill_group);
        assert_in_order(dir.path());
    }
    let made = list(dir.path()).len();
    assert!(made > 0, "the clients did nothing");
    println!("{made} media after {rounds} rounds of kills");
}

#[test]
fn eight_processes_share_a_registry() {
    let dir = scratch();
    // They make the file together as well.
    let script = r#"for n in 1 2 3; do
        "$V" medium --registry media.sqlite create --size 1M p$W-$n.vdi || exit 1
        "$V" medium --registry media.sqlite lock --read p$W-$n.vdi -- true || exit 1
        "$V" medium --registry media.sqlite add shared.vdi || exit 1
    done; "$V" medium --registry media.sqlite close p$W-1.vdi"#;
    ok(dir.path(), "create --format vdi --size 1M shared.vdi");
    let start = |n: u32| {
        let mut c = Command::new("sh");
        c.arg("-c").arg(script).env("V", env!("CARGO_BIN_EXE_vdimg")).env("W", n.to_string());
        c.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        c.spawn().unwrap()
    };
    let all: Vec<_> = (0..8).map(start).collect();
    for child in all {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
    }
    let names: BTreeSet<_> = list(dir.path()).iter().map(|m| word(m, "name").to_string()).collect();
    let mut expected: BTreeSet<_> = (0..8).flat_map(|p| [2, 3].map(|n| format!("p{p}-{n}.vdi"))).collect();
    expected.insert("shared.vdi".into());
    assert_eq!(names, expected);
}

#[test]
fn locks_of_commands_and_of_processes() {
    let dir = scratch();
    let d = dir.path();
    succeeded("create", medium(d, "create --size 1M a.vdi").output().unwrap());
    let state = || word(&list(d)[0], "state").to_string();
    let out = medium(d, "lock --write a.vdi -- sh -c true").output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    let out = medium(d, "lock --read a.vdi -- false").output().unwrap();
    assert_eq!(out.status.code(), Some(1), "the command's own status");
    let mut holder = medium(d, "lock --read a.vdi --output json")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    while state() != "LockedRead" && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(state(), "LockedRead");
    failed("write", 1, medium(d, "lock --write a.vdi").output().unwrap());
    drop(holder.stdin.take());
    let said: Value = serde_json::from_slice(&holder.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!((word(&said, "before"), word(&said, "after")), ("Created", "LockedRead"));
    assert_eq!(state(), "Created");
    // For a process: until it takes the lock back, or is gone.
    let mut sleeper = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = sleeper.id();
    for _ in 0..2 {
        succeeded("lock", medium(d, &format!("lock --read --pid {pid} a.vdi")).output().unwrap());
    }
    succeeded("unlock", medium(d, &format!("unlock --read --pid {pid} a.vdi")).output().unwrap());
    assert_eq!(state(), "LockedRead");
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert_eq!(state(), "Created");
}

#[test]
fn a_folder_is_scanned_into_chains() {
    let dir = scratch();
    let d = dir.path();
    fs::create_dir_all(d.join("vm/Snapshots")).unwrap();
    for (format, ext) in [("vdi", "vdi"), ("vhd", "vhd"), ("qcow2", "qcow2")] {
        ok(d, &format!("create --format {format} --size 8M vm/z.{ext}"));
        ok(d, &format!("create --format {format} --parent vm/z.{ext} vm/Snapshots/m.{ext}"));
        ok(
            d,
            &format!(
                "create --format {format} --parent vm/z.{ext} --parent vm/Snapshots/m.{ext} vm/Snapshots/a.{ext}"
            ),
        );
    }
    ok(d, "create --format vdi --size 8M gone.vdi");
    ok(d, "create --format vdi --parent gone.vdi vm/orphan.vdi");
    fs::remove_file(d.join("gone.vdi")).unwrap();
    fs::copy(d.join("vm/z.vdi"), d.join("vm/zz-copy.vdi")).unwrap();
    fs::write(d.join("vm/cd.iso"), vec![0; 1 << 16]).unwrap();
    fs::write(d.join("vm/broken.vdi"), "broken").unwrap();
    let out = succeeded("scan", medium(d, "scan vm --output json").output().unwrap());
    let done: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(done["added"].as_array().unwrap().len(), 10, "{done}");
    let left: BTreeMap<_, _> = done["left"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| {
            (Path::new(l[0].as_str().unwrap()).file_name().unwrap().to_str().unwrap(), l[1].as_str().unwrap())
        })
        .collect();
    assert_eq!(
        left.keys().copied().collect::<Vec<_>>(),
        ["broken.vdi", "orphan.vdi", "zz-copy.vdi"],
        "{left:?}"
    );
    assert!(
        left["orphan.vdi"].contains("parent") && left["zz-copy.vdi"].contains("already exists"),
        "{left:?}"
    );
    let tree = succeeded("tree", medium(d, "tree").output().unwrap());
    for ext in ["vdi", "vhd", "qcow2"] {
        let depth = |name: &str| {
            let line = tree
                .lines()
                .find(|l| l.contains(&format!("/{name}.{ext} ")))
                .unwrap_or_else(|| panic!("{tree}"));
            line.len() - line.trim_start().len()
        };
        assert_eq!([depth("z"), depth("m"), depth("a")], [0, 2, 4], "{tree}");
    }
    let again: Value =
        serde_json::from_str(&succeeded("scan", medium(d, "scan vm --output json").output().unwrap()))
            .unwrap();
    assert_eq!((again["added"].as_array().unwrap().len(), again["known"].as_array().unwrap().len()), (0, 10));
    let out = medium(d, "check").output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stdout));
}

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let (base, top) = ("12121212-0000-4000-8000-000000000007", "34343434-0000-4000-8000-000000000008");
    fs::read_to_string(path).unwrap().replace("@BASE@", base).replace("@TOP@", top)
}

/// All that is said of media, by UUID, without what only a look can tell.
fn said(r: &Registry) -> BTreeMap<Uuid, String> {
    let describe = |m: &vdblk::medium::Record| {
        let handle = r.medium(m.id).unwrap();
        let uses: Vec<_> = handle
            .machine_ids()
            .unwrap()
            .unwrap_or_default()
            .into_iter()
            .map(|machine| (machine, handle.snapshot_ids(machine).unwrap()))
            .collect();
        let kept =
            (&m.location, m.device, m.medium_type, &m.description, m.auto_reset, m.parent, &m.properties);
        (m.id, format!("{kept:?} {uses:?} {}", m.format.to_ascii_lowercase()))
    };
    r.media().unwrap().iter().map(describe).collect()
}

#[test]
fn settings_files_make_the_round_trip() {
    let dir = scratch();
    let d = fs::canonicalize(dir.path()).unwrap();
    fs::create_dir(d.join("vm")).unwrap();
    let (global, machine) = (d.join("VirtualBox.xml"), d.join("vm/vm.vbox"));
    fs::write(&global, fixture("VirtualBox.xml")).unwrap();
    fs::write(&machine, fixture("machine.vbox")).unwrap();
    let r = Registry::open(&d.join("media.sqlite")).unwrap();
    let done = r.import(&global).unwrap();
    assert_eq!((done.added.len(), done.machines.len(), done.left.len()), (7, 1, 1), "{done:?}");
    let first = said(&r);
    let base = r.find("12121212-0000-4000-8000-000000000007").unwrap();
    let record = base.record().unwrap();
    assert_eq!(record.description.as_deref(), Some("the <base> & its\nsecond line"));
    assert_eq!(record.properties["CRYPT/KeyId"], "a \"key\"");
    assert_eq!((record.phase, record.last_access_error), (Phase::Inaccessible, None), "nobody has looked");
    assert_eq!(record.location, d.join("vm/disk.vdi"));
    assert_eq!(base.cached_state().unwrap(), State::Inaccessible);
    let vm = Uuid::parse_str("11111111-2222-4333-8444-555555555555").unwrap();
    let before = Uuid::parse_str("aaaaaaaa-0000-4000-8000-000000000001").unwrap();
    assert_eq!(base.snapshot_ids(vm).unwrap(), Some(vec![before]));
    let top = r.find("34343434-0000-4000-8000-000000000008").unwrap();
    assert_eq!(
        (top.snapshot_ids(vm).unwrap(), top.record().unwrap().parent),
        (Some(vec![vm]), Some(base.id()))
    );
    let golden = r.find("eeeeeeee-0000-4000-8000-000000000005").unwrap();
    assert_eq!(golden.record().unwrap().medium_type, MediumType::Immutable);
    // Again: nothing changes.
    assert!(r.import(&global).unwrap().added.is_empty());
    assert_eq!(said(&r), first);

    // Into the files it came from: only the registries are written, and all else stays.
    for file in [&global, &machine] {
        let old = fs::read_to_string(file).unwrap();
        r.export(file, None).unwrap();
        let new = fs::read_to_string(file).unwrap();
        let outside = |t: &str| {
            let (before, rest) = t.split_once("<MediaRegistry>").unwrap();
            (before.to_string(), rest.split_once("</MediaRegistry>").unwrap().1.to_string())
        };
        assert_eq!(outside(&new), outside(&old), "{}", file.display());
        let mut previous = file.clone().into_os_string();
        previous.push("-prev");
        assert_eq!(fs::read_to_string(previous).unwrap(), old);
    }
    let second = Registry::open(&d.join("second.sqlite")).unwrap();
    second.import(&global).unwrap();
    assert_eq!(said(&second), first);

    // Into new ones.
    let (all, one) = (d.join("all.xml"), d.join("vm/new.vbox"));
    assert_eq!(r.export(&all, None).unwrap(), 7);
    r.export(&one, Some(vm)).unwrap();
    let third = Registry::open(&d.join("third.sqlite")).unwrap();
    third.import(&all).unwrap();
    third.import(&one).unwrap();
    assert_eq!(said(&third), first);
}

#[test]
fn a_bad_settings_file_changes_nothing() {
    let dir = scratch();
    let r = Registry::open(&dir.path().join("media.sqlite")).unwrap();
    let good = fixture("machine.vbox");
    let path = dir.path().join("m.vbox");
    for text in [
        good.replace("</VirtualBox>", ""),
        good.replace("type=\"Writethrough\"", "type=\"Sometimes\""),
        good.replace("bbbbbbbb-0000-4000-8000-000000000002}\" location", "bbbb}\" location"),
        good.replace("<Image uuid=\"{bbbbbbbb-0000", "<Image uuid=\"{bbbbbbbb-1111"),
        good.replace(" location=\"tools.iso\"", ""),
        good.replace("&amp;", "&unknown;"),
        String::from("<html/>"),
        String::new(),
    ] {
        fs::write(&path, &text).unwrap();
        assert!(r.import(&path).is_err(), "{text}");
        assert_eq!(r.media().unwrap(), []);
    }
    // Every prefix of it, and bytes that are no text.
    for n in (0..good.len()).step_by(97).filter(|n| good.is_char_boundary(*n)) {
        fs::write(&path, &good[..n]).unwrap();
        assert!(r.import(&path).is_err(), "{n} bytes");
    }
    fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    assert!(r.import(&path).is_err());
    let none = OpenMedium { location: path, ..OpenMedium::default() };
    assert!(r.open_medium(&none).is_err());
    assert_eq!(r.media().unwrap(), []);
}
