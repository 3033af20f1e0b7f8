//! VirtualBox's own test scenarios, with smaller disks, and a model in memory beside the container.

use super::*;
use crate::sim::Rng;

/// A disk and what it has to show.
struct Modelled {
    c: Container,
    model: Vec<u8>,
    rng: Rng,
}

impl Modelled {
    fn new(c: Container, seed: u64) -> Self {
        let size = usize::try_from(c.size(LAST_IMAGE).unwrap()).unwrap();
        let model = bytes(&c, 0, size);
        Modelled { c, model, rng: Rng(seed) }
    }

    fn write(&mut self, at: usize, data: &[u8]) {
        self.c.write(at as u64, data).unwrap();
        self.model[at..at + data.len()].copy_from_slice(data);
    }

    /// So many requests of `len` bytes at any multiple of that in a range, every other of them a write.
    fn random(&mut self, (from, to): (u64, u64), len: usize, requests: usize) {
        for n in 0..requests {
            let blocks = (to - from) / len as u64;
            let at = (from + self.rng.draw() % blocks * len as u64) as usize;
            if n % 2 == 0 {
                let data = pattern(self.rng.draw(), len);
                self.write(at, &data);
            } else {
                assert!(bytes(&self.c, at as u64, len) == self.model[at..at + len], "at {at}");
            }
        }
    }

    fn verify(&self) {
        let shown = bytes(&self.c, 0, self.model.len());
        let wrong = shown.iter().zip(&self.model).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "the first wrong byte");
    }
}

/// tstVDIo: a dynamic base written from start to end, and two diffs with random requests, in each format with diffs.
#[test]
fn io_in_all_formats() {
    for backend in ["VDI", "VMDK", "VHD", "Parallels", "QED", "QCOW", "QCOW2", "VHDX"] {
        let f = Folder::new();
        let ext = backend_info_one(backend).unwrap().extensions[0].extension;
        let mut m = Modelled::new(with_base(&f, backend, &format!("0.{ext}"), 10 * MIB), 1);
        for at in (0..10 << 20).step_by(64 << 10) {
            let data = pattern(at as u64, 64 << 10);
            m.write(at, &data);
        }
        m.verify();
        for n in 1..3 {
            diff(&mut m.c, backend, &f.path(&format!("{n}.{ext}")));
            m.random((0, 10 * MIB), 64 << 10, 60);
            m.c.flush().unwrap();
            m.verify();
        }
        while m.c.count() > 0 {
            m.c.close(true).unwrap();
        }
        assert!(f.files().is_empty(), "{backend}: {:?}", f.files());
    }
}

/// tstIoUnaligned: one sector that is aligned to nothing larger.
#[test]
fn a_single_unaligned_sector() {
    let f = Folder::new();
    let mut m = Modelled::new(with_base(&f, "VDI", "a.vdi", 4 * MIB), 1);
    m.write(3584, &[7; 512]);
    m.verify();
}

/// tstVDMultBackends: a VDI with diffs of other formats over it.
#[test]
fn a_chain_of_several_back_ends() {
    let f = Folder::new();
    let mut m = Modelled::new(with_base(&f, "VDI", "0.vdi", 16 * MIB), 9);
    m.random((0, 16 * MIB), 64 << 10, 100);
    for (n, backend) in ["VMDK", "VHD", "VMDK", "VHDX", "VDI"].into_iter().enumerate() {
        let ext = backend_info_one(backend).unwrap().extensions[0].extension;
        diff(&mut m.c, backend, &f.path(&format!("{}.{ext}", n + 1)));
        m.random((0, 16 * MIB), 64 << 10, 40);
    }
    m.verify();
}

/// tstVDDiscard: halves of blocks, whole blocks, and blocks in two parts.
#[test]
fn discards_by_halves_and_in_parts() {
    let f = Folder::new();
    let mut m = Modelled::new(with_base(&f, "VDI", "a.vdi", 32 * MIB), 2);
    let data = pattern(1, 30 << 20);
    m.write(0, &data);
    m.c.set_open_flags(0, OpenFlags::DISCARD).unwrap();
    let half = MIB / 2;
    let lists: [Vec<(u64, u64)>; 5] = [
        (0..5).map(|n| (n * MIB, half)).collect(),
        (6..11).map(|n| (n * MIB + half, half)).collect(),
        vec![(half, half)],
        vec![(20 * MIB, MIB)],
        vec![(21 * MIB, half), (21 * MIB + half, half)],
    ];
    for ranges in lists {
        m.c.discard(&ranges).unwrap();
        for (off, len) in ranges {
            m.model[off as usize..(off + len) as usize].fill(0);
        }
        m.verify();
    }
    m.random((0, 32 * MIB), 64 << 10, 100);
    m.verify();
}

/// tstVD: what is written to the base and to a diff, in segments of any length, survives a merge into the base; in three formats.
#[test]
fn write_and_merge() {
    for backend in ["VDI", "VMDK", "VHD"] {
        let f = Folder::new();
        let ext = backend_info_one(backend).unwrap().extensions[0].extension;
        let mut m = Modelled::new(with_base(&f, backend, &format!("a.{ext}"), 64 * MIB), 5);
        for layer in 0..2u8 {
            for _ in 0..30 {
                let len = (1 + m.rng.draw() % 1024) as usize * 512;
                let at = (m.rng.draw() % ((64 * MIB - len as u64) / 512)) as usize * 512;
                let value = (m.rng.draw() % 128) as u8 + layer * 128;
                m.write(at, &vec![value; len]);
            }
            if layer == 0 {
                diff(&mut m.c, backend, &f.path(&format!("b.{ext}")));
            }
        }
        m.c.merge(LAST_IMAGE, 0, unwatched!()).unwrap();
        assert_eq!(m.c.count(), 1);
        m.verify();
    }
}

/// tstVDShareable is `open_flags::shareable_lets_two_write_a_fixed_image`; tstVDCopy and tstVDCompact are in `jobs`.
/// tstVDResize: data at the end, another size, data behind it; in all variants of VMDK.
#[test]
fn resize_in_all_variants() {
    let split = ImageFlags::VMDK_SPLIT_2G;
    for flags in [ImageFlags::NONE, ImageFlags::FIXED, split, split | ImageFlags::FIXED] {
        let f = Folder::new();
        let mut c = hard_disk();
        let like = CreateBase { flags, ..CreateBase::default() };
        c.create_base("VMDK", &f.path("a.vmdk"), 40 * MIB, &like, OpenFlags::NONE).unwrap();
        let mut m = Modelled::new(c, 3);
        m.random((10 * MIB, 20 * MIB), 64 << 10, 60);
        let resized = m.c.resize(60 * MIB, Geometry::default(), Geometry::default(), unwatched!());
        if flags.contains(split) {
            // A gap beside VirtualBox, which adds extents.
            assert_eq!(resized.unwrap_err().kind(), crate::ErrorKind::Unsupported);
            m.verify();
            continue;
        }
        resized.unwrap();
        m.model.resize(60 << 20, 0);
        m.random((40 * MIB, 50 * MIB), 64 << 10, 60);
        m.verify();
    }
}

/// tstVDSnap: the life of snapshots. Segments into the top, then a snapshot or a merge, forwards or backwards, whatever chance says.
#[test]
fn snapshots_come_and_go() {
    for seed in 0..4 {
        let f = Folder::new();
        let mut m = Modelled::new(with_base(&f, "VMDK", "0.vmdk", 10 * MIB), seed);
        let mut made = 1;
        for _ in 0..14 {
            for _ in 0..6 {
                let len = (1 + m.rng.draw() % 256) as usize * 512;
                let at = (m.rng.draw() % ((10 * MIB - len as u64) / 512)) as usize * 512;
                let data = pattern(m.rng.draw(), len);
                m.write(at, &data);
            }
            let count = m.c.count() as u64;
            if count < 3 || m.rng.chance(50) {
                diff(&mut m.c, "VMDK", &f.path(&format!("{made}.vmdk")));
                made += 1;
            } else {
                let from = (m.rng.draw() % count) as u32;
                let to = (from + 1 + (m.rng.draw() % (count - 1)) as u32) % count as u32;
                m.c.merge(from, to, unwatched!()).unwrap();
            }
            m.verify();
        }
        assert_eq!(f.files().len(), m.c.count(), "no file is left over");
    }
}

/// Much of what a container does, in any order, against a model; behind filters, too.
#[test]
fn random_lives_against_a_model() {
    for seed in 0..6u64 {
        let f = Folder::new();
        let backends = ["VDI", "VMDK", "VHD", "QCOW2"];
        let mut m = Modelled::new(
            with_base(&f, backends[seed as usize % 4], &format!("0.{}", ext(seed)), 6 * MIB),
            seed,
        );
        if seed % 2 == 1 {
            super::filters::add(&mut m.c, FilterFlags::DEFAULT, "key");
        }
        // What each image below the top shows.
        let mut beneath: Vec<Vec<u8>> = Vec::new();
        for step in 1..40u64 {
            let size = m.model.len() as u64;
            match m.rng.draw() % 15 {
                0..4 => m.random((0, size), 32 << 10, 6),
                4 if m.c.count() < 5 => {
                    let which = m.rng.draw();
                    let name = format!("{step}.{}", ext(which));
                    beneath.push(m.model.clone());
                    diff(&mut m.c, backends[which as usize % 4], &f.path(&name));
                }
                5 if m.c.count() > 1 => {
                    m.c.close(true).unwrap();
                    m.model = beneath.pop().unwrap();
                }
                6 if m.c.count() > 2 => {
                    m.c.merge(1, 2, unwatched!()).unwrap();
                    beneath.remove(1);
                }
                7 => m.c.set_open_flags(LAST_IMAGE, OpenFlags::HONOR_SAME | OpenFlags::DISCARD).unwrap(),
                8 => {
                    let at = m.rng.draw() % (size / 65536) * 65536;
                    m.write(at as usize, &[0; 65536]);
                }
                9 => {
                    m.c.set_open_flags(LAST_IMAGE, OpenFlags::DISCARD).unwrap();
                    let at = m.rng.draw() % (size / 65536) * 65536;
                    m.c.discard(&[(at, 65536)]).unwrap();
                    // Zeros, or what was there: told by the tests of discards.
                    m.write(at as usize, &pattern(step, 65536));
                }
                10 => unless_unsupported(m.c.compact(LAST_IMAGE, unwatched!()).map(drop)),
                11 if m.c.count() == 1 => {
                    let none = Geometry::default();
                    let resized = m.c.resize(size + MIB, none, none, unwatched!());
                    if resized.is_ok() {
                        m.model.resize((size + MIB) as usize, 0);
                    }
                    unless_unsupported(resized);
                }
                12 => {
                    let n = (m.rng.draw() % m.c.count() as u64) as u32;
                    let old = m.c.filename(n).unwrap().to_path_buf();
                    let name = f.path(&format!("m{step}")).with_extension(old.extension().unwrap());
                    m.c.move_image(n, None, &name, m.rng.chance(50), unwatched!()).unwrap();
                    assert!(!old.exists());
                }
                13 => {
                    let mut to = hard_disk();
                    let path = Some(f.path(&format!("c{step}.vdi")));
                    let how = CopyImage { backend: Some("VDI".into()), path, ..CopyImage::default() };
                    m.c.copy_to(LAST_IMAGE, &mut to, &how, unwatched!()).unwrap();
                    assert!(bytes(&to, 0, m.model.len()) == m.model);
                    to.close(true).unwrap();
                }
                _ => m.c.flush().unwrap(),
            }
            m.verify();
        }
    }
}

fn unless_unsupported(done: Result<()>) {
    if let Err(e) = done {
        assert_eq!(e.kind(), crate::ErrorKind::Unsupported, "{e}");
    }
}

fn ext(which: u64) -> &'static str {
    ["vdi", "vmdk", "vhd", "qcow2"][which as usize % 4]
}
