//! Changes of cases: any bytes, and VDIs by their fields.

use crate::common::hostile::{Choices, Random};

/// Changes some bytes of a case, its length included.
pub(crate) fn bytes(case: &mut Vec<u8>, r: &mut Random, max: usize) {
    for _ in 0..1 + r.below(4) {
        let (at, n) = (r.below(case.len() as u64 + 1) as usize, 1 + r.below(16) as usize);
        let end = (at + n).min(case.len());
        match r.below(7) {
            0 => case.truncate(at),
            1 => drop(case.drain(at..end)),
            2 => {
                let copy = case[at..end].to_vec();
                let to = r.below(case.len() as u64 + 1) as usize;
                case.splice(to..to, copy);
            }
            3 => {
                let new: Vec<u8> = (0..n).map(|_| r.next() as u8).collect();
                case.splice(at..at, new);
            }
            4 => {
                let word = r.number().to_le_bytes();
                let n = [1, 2, 4, 8][r.below(4) as usize].min(case.len() - at);
                case[at..at + n].copy_from_slice(&word[..n]);
            }
            _ if at < case.len() => case[at] = r.next() as u8,
            _ => case.push(r.next() as u8),
        }
    }
    case.truncate(max);
}

/// Fields of headers 1.x and 0.x: where, and their bytes.
const FIELDS_V1: [(usize, usize); 19] = [
    (0x40, 4),
    (0x44, 4),
    (0x48, 4),
    (0x4c, 4),
    (0x50, 4),
    (0x154, 4),
    (0x158, 4),
    (0x168, 4),
    (0x170, 8),
    (0x178, 4),
    (0x17c, 4),
    (0x180, 4),
    (0x184, 4),
    (0x188, 8),
    (0x198, 8),
    (0x1a8, 8),
    (0x1b8, 8),
    (0x1d4, 4),
    (0x54, 4),
];
const FIELDS_V0: [(usize, usize); 10] = [
    (0x44, 4),
    (0x48, 4),
    (0x4c, 4),
    (0x15c, 4),
    (0x160, 8),
    (0x168, 4),
    (0x16c, 4),
    (0x170, 4),
    (0x174, 8),
    (0x194, 8),
];

/// A number that a field of a VDI may have trouble with.
fn number(r: &mut Random, now: u64) -> u64 {
    match r.below(8) {
        0 => [0, 1, 2, 4, 384, 400, 472, 512][r.below(8) as usize],
        1 => 1 << r.below(64),
        2 => (1u64 << r.below(64)).wrapping_sub(1),
        3 => u64::MAX - r.below(3),
        4 => now.wrapping_add(r.below(5)).wrapping_sub(2),
        5 => now.wrapping_mul(2),
        6 => now / 2,
        _ => r.next(),
    }
}

/// Changes a VDI by its fields and its table, or by any bytes.
pub(crate) fn image(case: &mut Vec<u8>, r: &mut Random, max: usize) {
    if case.len() < 512 {
        return bytes(case, r, max);
    }
    for _ in 0..1 + r.below(3) {
        match r.below(8) {
            0 | 1 => field(case, r),
            2..=4 => (0..1 + r.below(4)).for_each(|_| entry(case, r)),
            5 => script(case, r),
            6 => length(case, r, max),
            _ if r.below(4) == 0 => return bytes(case, r, max),
            _ => {}
        }
        if case.len() < 512 {
            return;
        }
    }
    case.truncate(max);
}

fn is_old(case: &[u8]) -> bool {
    case[0x46..0x48] == [0, 0]
}

fn u32_at(case: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(case[at..at + 4].try_into().unwrap())
}

fn field(case: &mut [u8], r: &mut Random) {
    let fields = if is_old(case) { &FIELDS_V0[..] } else { &FIELDS_V1[..] };
    let (at, n) = fields[r.below(fields.len() as u64) as usize];
    let mut word = [0; 8];
    word[..n].copy_from_slice(&case[at..at + n]);
    let new = number(r, u64::from_le_bytes(word)).to_le_bytes();
    case[at..at + n].copy_from_slice(&new[..n]);
}

/// One entry of the table: a place twice, a place that cannot be, none.
fn entry(case: &mut [u8], r: &mut Random) {
    let (table, blocks) = match is_old(case) {
        true => (420, u32_at(case, 0x16c)),
        false => (u32_at(case, 0x154), u32_at(case, 0x180)),
    };
    if blocks == 0 {
        return;
    }
    let at = |r: &mut Random| table as usize + 4 * (r.below(u64::from(blocks).min(4096)) as usize);
    let (to, from) = (at(r), at(r));
    let value = match r.below(6) {
        0 if from + 4 <= case.len() => u32_at(case, from),
        1 => u32::MAX - r.below(4) as u32,
        2 => blocks.wrapping_add(r.below(4) as u32).wrapping_sub(2),
        3 => number(r, u64::from(blocks)) as u32,
        _ => r.below(u64::from(blocks).min(64)) as u32,
    };
    if to + 4 <= case.len() {
        case[to..to + 4].copy_from_slice(&value.to_le_bytes());
    }
}

/// Other requests, another stack.
fn script(case: &mut [u8], r: &mut Random) {
    for _ in 0..1 + r.below(12) {
        case[r.below(64) as usize] = r.next() as u8;
    }
}

fn length(case: &mut Vec<u8>, r: &mut Random, max: usize) {
    let len = match r.below(3) {
        0 => case.len().saturating_sub(1 + r.below(5000) as usize),
        1 => (case.len() + 1 + r.below(9000) as usize).min(max),
        _ => (case.len() / 512).saturating_sub(r.below(20) as usize) * 512,
    };
    case.resize(len, 0x99);
}

/// Changes that know where a VMDK of one file has its numbers: header, directories and tables, as sparse images of ours
/// have them.
pub(crate) fn vmdk(case: &mut Vec<u8>, r: &mut Random, max: usize) {
    const HEADER: [usize; 13] = [4, 8, 12, 20, 28, 36, 44, 48, 56, 64, 72, 73, 77];
    // directories, their tables, and how long they are
    const TABLES: [(usize, u64); 4] = [(21 * 512, 2), (22 * 512, 24), (26 * 512, 2), (27 * 512, 24)];
    if case.len() < 32 * 512 {
        return bytes(case, r, max);
    }
    for _ in 0..1 + r.below(3) {
        let sectors = case.len() as u64 / 512;
        let value = match r.below(5) {
            0 => r.below(4) as u32,
            1 | 2 => r.below(sectors + 8) as u32,
            3 => (r.below(sectors / 8 + 2) * 8) as u32,
            _ => r.next() as u32,
        };
        match r.below(8) {
            0 => {
                let at = HEADER[r.below(HEADER.len() as u64) as usize];
                case[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            1..=4 => {
                let (from, len) = TABLES[r.below(4) as usize];
                let at = from + 4 * r.below(len) as usize;
                case[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            5 => (448..512).for_each(|i| case[i] = r.next() as u8),
            6 => case.resize((case.len() + 512 * r.below(24) as usize).saturating_sub(4096).min(max), 0),
            _ if r.below(4) == 0 => return bytes(case, r, max),
            _ => {}
        }
        if case.len() < 32 * 512 {
            return;
        }
    }
}

/// Changes that know where a QED or a QCOW has its numbers: the header, the first level, the tables that it names.
pub(crate) fn levels(case: &mut Vec<u8>, r: &mut Random, max: usize) {
    // where, and how many bytes
    const QED: [(usize, usize); 11] =
        [(4, 4), (8, 4), (12, 4), (16, 8), (24, 8), (32, 8), (40, 8), (48, 8), (56, 4), (60, 4), (16, 1)];
    const QCOW: [(usize, usize); 8] = [(4, 4), (8, 8), (16, 4), (24, 8), (32, 1), (33, 1), (36, 4), (40, 8)];
    if case.len() < 512 {
        return bytes(case, r, max);
    }
    let big = case.starts_with(b"QFI");
    let get = |case: &[u8], at: usize, n: usize| {
        let raw = case.get(at..at + n).unwrap_or_default();
        let shift = |(value, i): (u64, usize), b: &u8| match big {
            true => (value << 8 | u64::from(*b), i + 1),
            false => (value | u64::from(*b) << (8 * i), i + 1),
        };
        raw.iter().fold((0, 0), shift).0
    };
    let put = |case: &mut [u8], at: usize, n: usize, value: u64| {
        let raw = if big { value.to_be_bytes() } else { value.to_le_bytes() };
        let raw = if big { &raw[8 - n..] } else { &raw[..n] };
        if let Some(to) = case.get_mut(at..at + n) {
            to.copy_from_slice(raw);
        }
    };
    for _ in 0..1 + r.below(3) {
        let l1 = get(case, 40, 8).min(max as u64) as usize;
        let first = get(case, l1, 8).min(max as u64) as usize;
        let cluster = if big { 1 << (case[32] & 31) } else { get(case, 4, 4).max(1) };
        let place = r.below(case.len() as u64 / cluster + 3).wrapping_mul(cluster);
        match r.below(8) {
            0 => {
                let fields = if big { &QCOW[..] } else { &QED[..] };
                let (at, n) = fields[r.below(fields.len() as u64) as usize];
                let value = number(r, get(case, at, n));
                put(case, at, n, value);
            }
            1 => put(case, l1 + 8 * r.below(4) as usize, 8, place),
            2..=4 => put(case, first + 8 * r.below(32) as usize, 8, place),
            5 => {
                let value = number(r, place);
                put(case, first + 8 * r.below(32) as usize, 8, value);
            }
            6 => (0..1 + r.below(12)).for_each(|_| case[448 + r.below(64) as usize] = r.next() as u8),
            _ if r.below(3) == 0 => length(case, r, max),
            _ if r.below(4) == 0 => return bytes(case, r, max),
            _ => {}
        }
        if case.len() < 512 {
            return;
        }
    }
    case.truncate(max);
}
