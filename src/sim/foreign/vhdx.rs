//! Other programs that write to a VHDX. QEMU writes a log that was left to its places before anything else, and puts a new block
//! behind the end of the file. Hyper-V leaves blocks in which only some sectors are there.

use super::super::Rng;
use super::super::bytes::Bytes;
use super::super::past::{Past, fill};
use super::{Order, carry_out};
use crate::probe::small::unit;
use std::collections::BTreeMap;

const MIB: u64 = 1 << 20;
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
/// Where our new images have what regions and items would tell.
const METADATA: u64 = 2 * MIB;
const TABLE: u64 = 3 * MIB;
const SECTOR: usize = 4096;
/// Sectors that a block of bits speaks of; behind the entries of their blocks stands its own.
const CHUNK_SECTORS: u64 = unit(MIB) * 8;

fn bytes_at(b: &Bytes, at: u64, len: usize) -> Vec<u8> {
    let mut v = vec![0; len];
    b.read(at, &mut v);
    v
}

fn n32(v: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(v[at..at + 4].try_into().expect("four"))
}

fn n64(v: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(v[at..at + 8].try_into().expect("eight"))
}

/// The checksum bit by bit, of bytes that hold it at 4.
fn sum(v: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    let byte = |crc: u32, (i, b): (usize, &u8)| {
        let b = if (4..8).contains(&i) { 0 } else { *b };
        (0..8).fold(crc ^ u32::from(b), |crc, _| step(crc))
    };
    !v.iter().enumerate().fold(!0, byte)
}

fn is_good(v: &[u8]) -> bool {
    n32(v, 4) == sum(v)
}

/// An entry of the log.
struct Logged {
    at: u64,
    number: u64,
    len: u64,
    tail: u64,
    sectors: Vec<(u64, Vec<u8>)>,
}

fn logged(ring: &[u8], at: usize, id: &[u8]) -> Option<Logged> {
    let len = n32(ring, at + 8) as usize;
    let ours = &ring[at..at + 4] == b"loge" && &ring[at + 32..at + 48] == id;
    // ours are never cut in two by the end of the ring
    let whole = ring.get(at..at + len).filter(|w| ours && w.len() >= SECTOR && is_good(w))?;
    let (number, count) = (n64(whole, 16), n32(whole, 24) as usize);
    let described = (64 + 32 * count).next_multiple_of(SECTOR);
    let sector = |i: usize| {
        let d = &whole[64 + 32 * i..][..32];
        let mut bytes = whole[described + i * SECTOR..][..SECTOR].to_vec();
        bytes[..8].copy_from_slice(&d[8..16]);
        bytes[SECTOR - 4..].copy_from_slice(&d[4..8]);
        (n64(d, 16), bytes)
    };
    let sectors = (0..count).map(sector).collect();
    Some(Logged { at: at as u64, number, len: len as u64, tail: n32(whole, 12).into(), sectors })
}

/// The file behind the replay of its log.
fn replayed(b: &Bytes) -> Bytes {
    let headers = HEADERS.map(|at| bytes_at(b, at, SECTOR));
    let newest = headers.iter().filter(|h| is_good(h)).max_by_key(|h| n64(h, 8));
    let Some(mut header) = newest.cloned().filter(|h| h[48..64] != [0; 16]) else { return b.clone() };
    let ring = bytes_at(b, n64(&header, 72), n32(&header, 68) as usize);
    let entry = |at: usize| logged(&ring, at, &header[48..64]).map(|e| (e.at, e));
    let entries: BTreeMap<u64, Logged> = (0..ring.len()).step_by(SECTOR).filter_map(entry).collect();
    let mut best: Vec<&Logged> = Vec::new();
    for from in entries.keys() {
        let (mut run, mut at) = (Vec::<&Logged>::new(), *from);
        while let Some(e) = entries.get(&at).filter(|e| run.last().is_none_or(|l| l.number + 1 == e.number)) {
            run.push(e);
            at = (at + e.len) % ring.len() as u64;
        }
        let counts = run.last().is_some_and(|last| last.tail == *from);
        if counts && run.last().map(|e| e.number) > best.last().map(|e| e.number) {
            best = run;
        }
    }
    let mut done = b.clone();
    best.iter().flat_map(|e| &e.sectors).for_each(|(at, bytes)| done.write(*at, bytes));
    let number = n64(&header, 8);
    for (at, n) in HEADERS.into_iter().zip(1..) {
        header[8..16].copy_from_slice(&(number + n).to_le_bytes());
        header[48..64].fill(0);
        let sum = sum(&header);
        header[4..8].copy_from_slice(&sum.to_le_bytes());
        done.write(at, &header);
    }
    done
}

pub(in super::super) fn block_bytes(b: &Bytes) -> u64 {
    n32(&bytes_at(b, METADATA + (64 << 10), 4), 0).into()
}

fn blocks(b: &Bytes) -> u32 {
    let size = n64(&bytes_at(b, METADATA + (64 << 10) + 8, 8), 0);
    u32::try_from(size.div_ceil(block_bytes(b))).expect("a small disk")
}

fn entry_at(block: u32) -> u64 {
    TABLE + u64::from(block) * 8
}

fn free_in(b: &Bytes) -> Vec<u32> {
    let is_free = |block: &u32| n64(&bytes_at(b, entry_at(*block), 8), 0) & 7 < 6;
    (0..blocks(b)).filter(is_free).collect()
}

/// The guest blocks without a place, all in the first chunk.
pub(in super::super) fn free_blocks(b: &Bytes) -> Vec<u32> {
    free_in(&replayed(b))
}

fn place(b: &Bytes) -> u64 {
    b.len().next_multiple_of(unit(MIB))
}

/// Adds `block` with these bytes; `after` sees the file after each write.
pub(in super::super) fn append(
    b: &mut Bytes,
    block: u32,
    data: &[u8],
    order: Order,
    after: &mut dyn FnMut(&Bytes),
) -> bool {
    *b = replayed(b);
    after(b);
    let at = place(b);
    let writes = [(at, data.to_vec()), (entry_at(block), (at | 6).to_le_bytes().to_vec())];
    carry_out(b, &writes, at + block_bytes(b), order, after);
    true
}

/// Blocks in which some sectors are there and others are not, in a new diff; under those that are not lies what nobody wrote.
pub(in super::super) fn add_parts(b: &mut Bytes, past: &mut [Past], rng: &mut Rng) {
    let (size, per_block) = (block_bytes(b), block_bytes(b) / 512);
    let mut bits = vec![0u8; SECTOR];
    for block in free_in(b) {
        if !rng.chance(40) {
            continue;
        }
        let at = place(b);
        let mut data = vec![0xd1; usize::try_from(size).expect("small")];
        for i in 0..per_block {
            let sector = u64::from(block) * per_block + i;
            let n = usize::try_from(sector).expect("small");
            let Some(p) = past.get_mut(n) else { break };
            if rng.chance(50) {
                bits[n / 8] |= 1 << (n % 8);
                let value = 1 + rng.below(1000);
                let i = usize::try_from(i).expect("small");
                fill(&mut data[i * 512..(i + 1) * 512], sector, value);
                *p = Past::known(value);
            }
        }
        b.write(at, &data);
        b.write(entry_at(block), &(at | 7).to_le_bytes());
    }
    let at = place(b);
    b.write(at, &bits);
    b.set_len(at + unit(MIB));
    b.write(TABLE + CHUNK_SECTORS / per_block * 8, &(at | 6).to_le_bytes());
}
