//! Descriptor chains of every kind against the parser: whatever a guest writes, it is answered, nothing outside its
//! memory is touched, and what is accepted is what was asked for.

use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vdblk::io::{BufSlice, total_len};
use vdblk::vhost::{Memory, MemoryView, RegionInfo};
use vdblk::virtio::{Action, ChainParser, DescriptorTable, GuestMemory, Refusal, Rules, Verdict};
use virtio_queue::desc::split::Descriptor;

const DISK: u64 = 1 << 20;
const RULES: Rules = Rules { size_bytes: DISK, read_only: false, discard: true };
/// Two regions side by side, a hole, one more.
const REGIONS: [(u64, u64); 3] = [(0x1000, 0x3000), (0x4000, 0x2000), (0x10000, 0x1000)];

struct Guest {
    files: Vec<File>,
    view: MemoryView,
}

impl Guest {
    fn new() -> Self {
        let files: Vec<File> = REGIONS
            .iter()
            .map(|(_, len)| {
                let f = tempfile::tempfile().unwrap();
                f.set_len(*len).unwrap();
                f
            })
            .collect();
        let regions = REGIONS.iter().zip(&files).map(|(&(guest_addr, len), f)| {
            (RegionInfo { guest_addr, len, user_addr: guest_addr, mmap_offset: 0 }, f.try_clone().unwrap())
        });
        let view = MemoryView::new(Arc::new(Memory::new(regions).unwrap()));
        Guest { files, view }
    }

    fn put(&self, mut gpa: u64, data: &[u8]) {
        for b in data {
            let i = REGIONS.iter().position(|(at, len)| (*at..*at + *len).contains(&gpa)).unwrap();
            self.files[i].write_all_at(&[*b], gpa - REGIONS[i].0).unwrap();
            gpa += 1;
        }
    }

    fn header(&self, gpa: u64, kind: u32, sector: u64) {
        self.put(gpa, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    }

    fn parse(&self, parser: &mut ChainParser, chain: &[Part]) -> Verdict {
        parser.parse(0, &Table(linked(chain)), &self.view, &RULES)
    }
}

/// Address, length, device-writable.
type Part = (u64, u32, bool);

fn linked(chain: &[Part]) -> Vec<Descriptor> {
    let last = chain.len() - 1;
    let one = |(i, &(addr, len, writable)): (usize, &Part)| {
        let flags = u16::from(i < last) | if writable { 2 } else { 0 };
        Descriptor::new(addr, len, flags, i as u16 + 1)
    };
    chain.iter().enumerate().map(one).collect()
}

struct Table(Vec<Descriptor>);

impl DescriptorTable for Table {
    fn size(&self) -> u16 {
        u16::try_from(self.0.len()).unwrap()
    }
    fn get(&self, index: u16) -> Descriptor {
        self.0[usize::from(index)]
    }
}

/// Memory that has nothing at hand.
struct LongWay<'a>(&'a MemoryView);

impl GuestMemory for LongWay<'_> {
    fn resolve(&self, gpa: u64, len: u32, out: &mut Vec<BufSlice>) -> bool {
        self.0.resolve(gpa, len, out)
    }
}

fn lens(b: &[BufSlice]) -> Vec<usize> {
    b.iter().map(|b| b.len()).collect()
}

#[test]
fn buffers_that_cross_neighbouring_regions_are_split() {
    let g = Guest::new();
    let mut p = ChainParser::new();
    g.header(0x3ff8, 0, 3);
    let v = g.parse(&mut p, &[(0x3ff8, 16, false), (0x3e00, 1024, true), (0x4fff, 513, true)]);
    assert!(v.action.is_ok_and(|a| matches!(a, Action::Read(r) if r.start().0 == 1536 && r.len() == 1536)));
    assert_eq!(lens(p.writable()), [512, 512, 512]);
    assert_eq!(total_len(p.writable()), 1536);
}

#[test]
fn a_header_in_many_pieces_shared_with_data() {
    let g = Guest::new();
    let mut p = ChainParser::new();
    g.header(0x1000, 1, 1);
    let chain = [
        (0x1000, 3, false),
        (0x1003, 12, false),
        (0x100f, 1 + 500, false),
        (0x2000, 12, false),
        (0x5000, 1, true),
    ];
    let v = g.parse(&mut p, &chain);
    assert!(matches!(v.action, Ok(Action::Write(r)) if r.len() == 512));
    assert_eq!(lens(p.readable()), [500, 12]);
    assert!(v.status.is_some_and(|s| s.len() == 1));
}

#[test]
fn the_status_byte_is_the_last_one_or_none() {
    let g = Guest::new();
    let mut p = ChainParser::new();
    g.header(0x1000, 0, 0);
    let head = (0x1000, 16, false);
    for (chain, why, has_status) in [
        (&[head, (0x2000, 512, true), (0x8000, 1, true)][..], Refusal::OutsideMemory, false),
        (&[head, (0x8000, 512, true), (0x2000, 1, true)], Refusal::OutsideMemory, true),
        (&[head, (0x2000, 512, true), (0x2000, 1, false)], Refusal::ReadableAfterWritable, false),
        (&[head, (0x2000, 512, true), (0x2000, 0, true)], Refusal::EmptyDescriptor, false),
        (&[head, (0x2000, 0, true), (0x2000, 513, true)], Refusal::EmptyDescriptor, true),
        (&[head], Refusal::NoStatus, false),
        (&[(0x1000, 15, false), (0x2000, 513, true)], Refusal::ShortHeader, true),
        (&[head, (0x2000, 512, true)], Refusal::BadData, true),
    ] {
        let v = g.parse(&mut p, chain);
        assert_eq!((v.action, v.status.is_some()), (Err(why), has_status), "{chain:x?}");
    }
}

#[test]
fn bounds_of_a_request() {
    let view = |regions: &[(u64, u64)]| {
        let region = |&(guest_addr, len): &(u64, u64)| {
            let f = tempfile::tempfile().unwrap();
            f.set_len(len).unwrap();
            (RegionInfo { guest_addr, len, user_addr: guest_addr, mmap_offset: 0 }, f)
        };
        MemoryView::new(Arc::new(Memory::new(regions.iter().map(region)).unwrap()))
    };
    let mut p = ChainParser::new();
    let rules = Rules { size_bytes: 1 << 40, ..RULES };
    let mut parse = |chain: &[Part], view: &MemoryView| p.parse(0, &Table(linked(chain)), view, &rules);
    // as long as a request may be, and one sector more
    let large = view(&[(0, 3 << 30)]);
    let most = u32::try_from(vdblk::limits::MAX_REQUEST_BYTES).unwrap();
    let v = parse(&[(0, 16, false), (4096, most, true), (0x100, 1, true)], &large);
    assert!(v.action.is_ok_and(|a| matches!(a, Action::Read(r) if r.len() == u64::from(most))));
    let v = parse(&[(0, 16, false), (4096, most + 512, true), (0x100, 1, true)], &large);
    assert_eq!((v.action, v.status.is_some()), (Err(Refusal::TooLong), true));
    // as many descriptors as a chain may have, and one more
    let mut chain = vec![(0, 16, false)];
    chain.extend((0..1022).map(|_| (4096, 512, true)));
    chain.push((0x100, 1, true));
    assert!(parse(&chain, &large).action.is_ok());
    chain.push((0x100, 1, true));
    assert_eq!(parse(&chain, &large), Verdict { status: None, action: Err(Refusal::Endless) });
    // descriptors that cross border upon border
    let patches: Vec<_> = (0..16).map(|i| (i * 0x1000, 0x1000)).collect();
    let patchwork = view(&patches);
    let mut chain = vec![(0, 16, false)];
    chain.extend((0..100).map(|_| (0, 0x10000, true)));
    chain.push((0x100, 1, true));
    assert!(parse(&chain, &patchwork).action.is_ok());
    chain.splice(1..1, (0..100).map(|_| (0, 0x10000, true)));
    let v = parse(&chain, &patchwork);
    assert_eq!((v.action, v.status.is_some()), (Err(Refusal::TooLong), true));
}

/// Numbers on the borders of what is there, and any others.
fn addr() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0x1000u64..0x6000,
        1 => 0x10000u64..0x11000,
        1 => prop::sample::select(vec![0, 0xfff, 0x1000, 0x3fff, 0x4000, 0x5fff, 0x6000, 0x11000, u64::MAX, u64::MAX - 15]),
        1 => any::<u64>(),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => prop::sample::select(vec![0u32, 1, 8, 15, 16, 17, 32, 48, 64, 512, 513, 528, 1024, 4096, 0x3000, 0x5000]),
        1 => 0u32..0x2000,
        1 => any::<u32>(),
    ]
}

fn descriptor(n: u16) -> impl Strategy<Value = Descriptor> {
    let flags = prop_oneof![6 => 0u16..4, 1 => 4u16..8, 1 => any::<u16>()];
    let next = prop_oneof![6 => 0..n, 1 => any::<u16>()];
    (addr(), len(), flags, next).prop_map(|(a, l, f, x)| Descriptor::new(a, l, f, x))
}

/// What holds for every verdict.
fn check(v: &Verdict, p: &ChainParser) -> Result<(), TestCaseError> {
    prop_assert!(v.status.is_none_or(|s| s.len() == 1));
    let Ok(action) = v.action else { return Ok(()) };
    prop_assert!(v.status.is_some());
    match action {
        Action::Read(r) => {
            prop_assert!(r.end().0 <= DISK && !r.is_empty());
            prop_assert_eq!(
                (r.len() % 512, total_len(p.writable()), total_len(p.readable())),
                (0, r.len(), 0)
            );
        }
        Action::Write(r) => {
            prop_assert!(r.end().0 <= DISK && !r.is_empty());
            prop_assert_eq!(
                (r.len() % 512, total_len(p.readable()), total_len(p.writable())),
                (0, r.len(), 0)
            );
        }
        Action::Discard | Action::WriteZeroes => {
            prop_assert!((1..=256).contains(&p.segments().len()));
            prop_assert!(p.segments().iter().all(|s| s.range.end().0 <= DISK));
        }
        Action::Identify => prop_assert!(total_len(p.writable()) > 0),
        Action::Flush => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    /// Any table, any head: an answer, and the writes it permits stay inside memory (each slice is read here).
    #[test]
    fn soup(table in prop::collection::vec(descriptor(16), 16), indirect in prop::collection::vec(descriptor(8), 8),
            kind in prop::sample::select(vec![0u32, 1, 2, 4, 8, 11, 13, 99]), sector in 0u64..2100, head in 0u16..16) {
        let g = Guest::new();
        for gpa in [0x1000, 0x2000, 0x3000, 0x4000] {
            g.header(gpa, kind, sector);
        }
        for (i, d) in indirect.iter().enumerate() {
            let raw = [&d.addr().0.to_le_bytes()[..], &d.len().to_le_bytes(), &d.flags().to_le_bytes(), &d.next().to_le_bytes()];
            g.put(0x5000 + 16 * i as u64, &raw.concat());
        }
        let mut table = table;
        table[7] = Descriptor::new(0x5000, 128, 4, 0);
        let mut p = ChainParser::new();
        let v = p.parse(head, &Table(table), &g.view, &RULES);
        check(&v, &p)?;
        for b in p.readable().iter().chain(p.writable()).chain(&v.status) {
            let mut copy = vec![0; b.len()];
            b.read(&mut copy);
            b.write(&copy);
        }
    }

    /// The short way for plain requests comes to the same as the long one, also where something is not as it should be.
    #[test]
    fn the_short_way_is_no_other_way(kind in prop::sample::select(vec![0u32, 1, 4, 8, 11, 13, 99]), sector in 0u64..2100,
                                     sectors in 0u32..4, write: bool, indirect: bool, wrong in prop::option::of((0usize..3, 0usize..4, any::<u64>()))) {
        let g = Guest::new();
        g.header(0x1000, kind, sector);
        g.put(0x2000, &[&9u64.to_le_bytes()[..], &8u32.to_le_bytes(), &[0; 4]].concat());
        let bytes = if kind > 4 { 16 } else { sectors * 512 };
        let mut chain = linked(&[(0x1000, 16, false), (0x2000, bytes, !write), (0x3800, 1, true)]);
        if let Some((which, field, value)) = wrong {
            let d = chain[which];
            let (mut addr, mut len, mut flags, mut next) = (d.addr().0, d.len(), d.flags(), d.next());
            match field {
                0 => addr = value % 0x12000,
                1 => len = (value % 0x2000) as u32,
                2 => flags = (value % 8) as u16,
                _ => next = (value % 4) as u16,
            }
            chain[which] = Descriptor::new(addr, len, flags, next);
        }
        if indirect {
            for (i, d) in chain.iter().enumerate() {
                let raw = [&d.addr().0.to_le_bytes()[..], &d.len().to_le_bytes(), &d.flags().to_le_bytes(), &d.next().to_le_bytes()];
                g.put(0x5000 + 16 * i as u64, &raw.concat());
            }
            chain = vec![Descriptor::new(0x5000, 48, 4, 0)];
        }
        // the view remembers a region now, which is what the short way asks for
        let warm = if indirect { 0x5000 } else { 0x1000 };
        prop_assert!(g.view.resolve(warm, 16, &mut Vec::new()));
        let (mut short, mut long) = (ChainParser::new(), ChainParser::new());
        let got = short.parse(0, &Table(chain.clone()), &g.view, &RULES);
        let want = long.parse(0, &Table(chain), &LongWay(&g.view), &RULES);
        prop_assert_eq!(got, want);
        if got.action.is_ok() {
            prop_assert_eq!((short.readable(), short.writable()), (long.readable(), long.writable()));
            prop_assert_eq!(short.segments(), long.segments());
        }
    }

    /// A legal request in any layout is accepted as what it is.
    #[test]
    fn every_layout_of_a_legal_request(sectors in 1u32..8, sector in 0u64..2040, write: bool,
                                       cuts in prop::collection::vec(1u32..600, 0..12), table: bool, behind: bool) {
        let g = Guest::new();
        let mut p = ChainParser::new();
        g.header(0x1000, u32::from(write), sector);
        let data = sectors * 512;
        let (readable, writable) = if write { (16 + data, 1) } else { (16, data + 1) };
        let mut chain = cut(0x1000, readable, &cuts, false);
        chain.extend(cut(0x3ff0, writable, &cuts, true));
        let v = if table {
            // all of it, or all but the first descriptor, in an indirect table
            let direct = usize::from(behind && chain.len() > 1);
            let entries = linked(&chain[direct..]);
            for (i, d) in entries.iter().enumerate() {
                let raw = [&d.addr().0.to_le_bytes()[..], &d.len().to_le_bytes(), &d.flags().to_le_bytes(), &d.next().to_le_bytes()];
                g.put(0x10000 + 16 * i as u64, &raw.concat());
            }
            let mut outer: Vec<Descriptor> = chain[..direct].iter().map(|c| Descriptor::new(c.0, c.1, 1, 1)).collect();
            outer.push(Descriptor::new(0x10000, 16 * entries.len() as u32, 4, 0));
            p.parse(0, &Table(outer), &g.view, &RULES)
        } else {
            g.parse(&mut p, &chain)
        };
        check(&v, &p)?;
        match v.action {
            Ok(Action::Write(r)) if write => prop_assert_eq!((r.start().0, r.len()), (sector * 512, u64::from(data))),
            Ok(Action::Read(r)) if !write => prop_assert_eq!((r.start().0, r.len()), (sector * 512, u64::from(data))),
            other => prop_assert!(false, "{other:?}"),
        }
    }
}

/// `len` bytes from `at` on, cut into descriptors.
fn cut(at: u64, len: u32, cuts: &[u32], writable: bool) -> Vec<Part> {
    let (mut done, mut out) = (0, Vec::new());
    for c in cuts.iter().chain([&len]) {
        let n = (*c).min(len - done);
        if n > 0 {
            out.push((at + u64::from(done), n, writable));
            done += n;
        }
    }
    out
}
