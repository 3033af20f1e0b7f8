//! AES in XTS mode (IEEE 1619): each data unit by itself, with its number as the tweak.

use super::SECTOR;
use super::locked::Locked;
use crate::error::{Error, ErrorKind, Result};
use aes::cipher::consts::U16;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use aes::{Aes128, Aes256, Block};
use std::fmt;

/// Bytes of a block.
const BLOCK: usize = 16;
/// Sectors that go through the cipher at a time.
const BATCH: usize = 8;

/// Both keys of one direction or the other, in the form the cipher works with: cleared when dropped.
#[allow(clippy::large_enum_variant)] // one of them, in pages of its own
enum Keys {
    Aes128 { data: Aes128, tweak: Aes128 },
    Aes256 { data: Aes256, tweak: Aes256 },
}

/// AES with keys of some length.
trait Aes: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> {}

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16>> Aes for C {}

/// A key of AES-XTS. Its round keys are in locked memory.
pub struct Xts {
    keys: Locked<Keys>,
}

impl fmt::Debug for Xts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Xts")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Encrypt,
    Decrypt,
}

impl Xts {
    /// The key for data and, behind it, the one for tweaks: 32 bytes for AES-128, 64 for AES-256.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for any other length.
    pub fn new(key: &[u8]) -> Result<Xts> {
        let (data, tweak) = key.split_at(key.len() / 2);
        let wrong =
            || Error::new(ErrorKind::InvalidArgument, format!("a key of {} bytes for AES-XTS", key.len()));
        let keys = match key.len() {
            32 => Locked::new(|| Keys::Aes128 { data: known(data), tweak: known(tweak) }),
            64 => Locked::new(|| Keys::Aes256 { data: known(data), tweak: known(tweak) }),
            _ => return Err(wrong()),
        };
        Ok(Xts { keys })
    }

    /// Encrypts sectors of 512 bytes, the first of which has the number `first`; the tweak is the number in 64 bits ("plain64").
    ///
    /// # Panics
    /// If the length is not a multiple of 512.
    pub fn encrypt_sectors(&self, first: u64, bytes: &mut [u8]) {
        self.sectors(Way::Encrypt, first, bytes);
    }

    /// The reverse.
    pub fn decrypt_sectors(&self, first: u64, bytes: &mut [u8]) {
        self.sectors(Way::Decrypt, first, bytes);
    }

    /// Encrypts one data unit of any number of whole blocks.
    ///
    /// # Panics
    /// If the length is not a multiple of 16.
    pub fn encrypt_unit(&self, tweak: u128, bytes: &mut [u8]) {
        self.unit(Way::Encrypt, tweak, bytes);
    }

    /// The reverse.
    pub fn decrypt_unit(&self, tweak: u128, bytes: &mut [u8]) {
        self.unit(Way::Decrypt, tweak, bytes);
    }

    fn sectors(&self, way: Way, first: u64, bytes: &mut [u8]) {
        assert!(bytes.len().is_multiple_of(SECTOR), "whole sectors are encrypted");
        match &*self.keys {
            Keys::Aes128 { data, tweak } => sectors(way, data, tweak, first, bytes),
            Keys::Aes256 { data, tweak } => sectors(way, data, tweak, first, bytes),
        }
    }

    fn unit(&self, way: Way, number: u128, bytes: &mut [u8]) {
        match &*self.keys {
            Keys::Aes128 { data, tweak } => unit(way, data, tweak, number, bytes),
            Keys::Aes256 { data, tweak } => unit(way, data, tweak, number, bytes),
        }
    }
}

fn known<C: KeyInit>(key: &[u8]) -> C {
    C::new_from_slice(key).expect("the length was looked at")
}

/// The next block's tweak: times x in GF(2^128). In halves: that is what the compiler makes the quickest code of.
fn next(tweak: u128) -> u128 {
    let (low, high) = (tweak as u64, (tweak >> 64) as u64);
    let carry = (high >> 63) * 0x87;
    u128::from((high << 1) | (low >> 63)) << 64 | u128::from((low << 1) ^ carry)
}

fn xor(bytes: &mut [u8], with: &[u8]) {
    bytes.iter_mut().zip(with).for_each(|(b, w)| *b ^= *w);
}

/// Tweaks of the blocks of a data unit, the first of which is `start`.
fn tweaks_from(start: &Block, out: &mut [u8]) {
    let mut tweak = u128::from_le_bytes((*start).into());
    for place in out.chunks_exact_mut(BLOCK) {
        place.copy_from_slice(&tweak.to_le_bytes());
        tweak = next(tweak);
    }
}

/// Several sectors at a time go through the cipher, which works on many blocks side by side.
fn sectors<C: Aes>(way: Way, data: &C, tweak: &C, first: u64, bytes: &mut [u8]) {
    for (batch, part) in (0u64..).step_by(BATCH).zip(bytes.chunks_mut(BATCH * SECTOR)) {
        let mut starts = [Block::default(); BATCH];
        for (n, start) in (0u64..).zip(&mut starts) {
            *start = Array(u128::from(first.wrapping_add(batch + n)).to_le_bytes());
        }
        tweak.encrypt_blocks(&mut starts);
        let mut tweaks = [0; BATCH * SECTOR];
        let tweaks = &mut tweaks[..part.len()];
        for (start, place) in starts.iter().zip(tweaks.chunks_exact_mut(SECTOR)) {
            tweaks_from(start, place);
        }
        through(way, data, tweaks, part);
    }
}

fn through<C: Aes>(way: Way, data: &C, tweaks: &[u8], bytes: &mut [u8]) {
    xor(bytes, tweaks);
    let (blocks, _) = Array::slice_as_chunks_mut(bytes);
    match way {
        Way::Encrypt => data.encrypt_blocks(blocks),
        Way::Decrypt => data.decrypt_blocks(blocks),
    }
    xor(bytes, tweaks);
}

fn unit<C: Aes>(way: Way, data: &C, tweak: &C, number: u128, bytes: &mut [u8]) {
    assert!(bytes.len().is_multiple_of(BLOCK), "a data unit has whole blocks");
    let mut start: Block = Array(number.to_le_bytes());
    tweak.encrypt_block(&mut start);
    let mut tweaks = vec![0; bytes.len()];
    tweaks_from(&start, &mut tweaks);
    through(way, data, &tweaks, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
    }

    /// Vectors 1 to 3 of IEEE 1619-2007, annex B: one data unit of 32 bytes.
    #[test]
    fn short_units_of_the_standard() {
        let cases = [
            ("00", "00", 0, "00", "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e"),
            (
                "11",
                "22",
                0x33_3333_3333,
                "44",
                "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0",
            ),
            (
                "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0",
                "22",
                0x33_3333_3333,
                "44",
                "af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89",
            ),
        ];
        for (one, two, number, plain, wanted) in cases {
            let long = |t: &str, n: usize| if t.len() == 2 { hex(&t.repeat(n)) } else { hex(t) };
            let key = [long(one, 16), long(two, 16)].concat();
            let xts = Xts::new(&key).unwrap();
            let mut bytes = long(plain, 32);
            xts.encrypt_unit(number, &mut bytes);
            assert_eq!(bytes, hex(wanted));
            xts.decrypt_unit(number, &mut bytes);
            assert_eq!(bytes, long(plain, 32));
        }
    }

    /// Vectors 4 (AES-128) and 10 (AES-256): sectors of 512 bytes, of which the standard prints all; here the first and the last
    /// block.
    #[test]
    fn sectors_of_the_standard() {
        let e = "27182818284590452353602874713526";
        let pi = "31415926535897932384626433832795";
        let short = hex(&format!("{e}{pi}"));
        let long = hex("2718281828459045235360287471352662497757247093699959574966967627\
             3141592653589793238462643383279502884197169399375105820974944592");
        let cases = [
            (short, 0, "27a7479befa1d476489f308cd4cfa6e2", "0a282df920147beabe421ee5319d0568"),
            (long, 0xff, "1c3b3a102f770386e4836c99e370cf9b", "c4f36ffda9fcea70b9c6e693e148c151"),
        ];
        for (key, number, first, last) in cases {
            let xts = Xts::new(&key).unwrap();
            let plain: Vec<u8> = (0..512u32).map(|i| (i % 256) as u8).collect();
            let mut bytes = plain.clone();
            xts.encrypt_sectors(number, &mut bytes);
            assert_eq!((&bytes[..16], &bytes[496..]), (&hex(first)[..], &hex(last)[..]));
            let mut unit = plain.clone();
            xts.encrypt_unit(u128::from(number), &mut unit);
            assert_eq!(bytes, unit);
            xts.decrypt_sectors(number, &mut bytes);
            assert_eq!(bytes, plain);
        }
    }

    #[test]
    fn many_sectors_are_each_by_itself() {
        let key: Vec<u8> = (0..64).collect();
        let xts = Xts::new(&key).unwrap();
        for count in [1usize, 7, 8, 9, 20] {
            let plain: Vec<u8> = (0..count * 512).map(|i| (i * 7 % 255) as u8).collect();
            let (mut all, mut each) = (plain.clone(), plain.clone());
            xts.encrypt_sectors(1 << 40, &mut all);
            for (n, sector) in (0u64..).zip(each.chunks_mut(512)) {
                xts.encrypt_unit(u128::from((1 << 40) + n), sector);
            }
            assert!(all == each && all != plain);
            xts.decrypt_sectors(1 << 40, &mut all);
            assert_eq!(all, plain);
        }
        assert!(Xts::new(&key[..48]).is_err() && Xts::new(&[]).is_err());
    }
}
