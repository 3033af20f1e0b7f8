//! Unpacking. The bytes come from a file that anybody may have made: what is wrong with them is an error of the request
//! that reads them, and no more memory is taken than the unit is long (and the codec's window, which is bounded).

use crate::error::Failure;
use crate::limits::MAX_UNPACK_WINDOW;
use crate::map::Codec;
use flate2::{Decompress, FlushDecompress, Status};
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use std::io::Read;

/// Unpacks the beginning of `packed` until `out` is full. What follows in `packed` is not looked at: formats tell the
/// length of packed units in sectors.
///
/// # Errors
/// [`Failure::Os`] with EIO where the bytes are no such stream, or end before `out` is full.
pub fn unpack(codec: Codec, packed: &[u8], out: &mut [u8]) -> Result<(), Failure> {
    let whole = match codec {
        Codec::Deflate => inflate(Decompress::new(false), packed, out),
        Codec::Zlib => inflate(Decompress::new(true), packed, out),
        Codec::Zstd => unpack_zstd(packed, out),
    };
    whole.ok_or(Failure::Os(libc::EIO))
}

fn inflate(mut stream: Decompress, packed: &[u8], out: &mut [u8]) -> Option<()> {
    let (mut from, mut to) = (0, 0);
    while to < out.len() {
        let (was_in, was_out) = (stream.total_in(), stream.total_out());
        let status = stream.decompress(packed.get(from..)?, &mut out[to..], FlushDecompress::None).ok()?;
        from += usize::try_from(stream.total_in() - was_in).ok()?;
        to += usize::try_from(stream.total_out() - was_out).ok()?;
        let stuck = stream.total_in() == was_in && stream.total_out() == was_out;
        if to < out.len() && (status == Status::StreamEnd || stuck) {
            return None;
        }
    }
    Some(())
}

fn unpack_zstd(packed: &[u8], out: &mut [u8]) -> Option<()> {
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(MAX_UNPACK_WINDOW);
    let mut stream = StreamingDecoder::new_with_decoder(packed, decoder).ok()?;
    stream.read_exact(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compress, Compression, FlushCompress};
    use proptest::prelude::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    fn pack(codec: Codec, bytes: &[u8]) -> Vec<u8> {
        if codec == Codec::Zstd {
            return compress_to_vec(bytes, CompressionLevel::Fastest);
        }
        let mut out = Vec::with_capacity(bytes.len() * 2 + 100);
        let mut c = Compress::new(Compression::best(), codec == Codec::Zlib);
        c.compress_vec(bytes, &mut out, FlushCompress::Finish).unwrap();
        out
    }

    const ALL: [Codec; 3] = [Codec::Deflate, Codec::Zlib, Codec::Zstd];

    fn bytes_of(seed: u64, len: usize) -> Vec<u8> {
        (0..len as u64).map(|i| (i.wrapping_mul(seed) >> (seed % 13)) as u8).collect()
    }

    #[test]
    fn what_follows_a_unit_is_not_looked_at_and_a_unit_that_ends_early_fails() {
        let bytes = bytes_of(77, 5000);
        for codec in ALL {
            let mut packed = pack(codec, &bytes);
            let mut out = vec![0; bytes.len() + 1];
            assert_eq!(unpack(codec, &packed, &mut out), Err(Failure::Os(libc::EIO)), "{codec:?}");
            packed.extend([0x55; 600]);
            out.truncate(bytes.len());
            assert_eq!(unpack(codec, &packed, &mut out), Ok(()));
            assert!(out == bytes, "{codec:?}");
            packed.truncate(20);
            assert!(unpack(codec, &packed, &mut out).is_err(), "{codec:?}");
            assert!(unpack(codec, &[], &mut out).is_err(), "{codec:?}");
        }
    }

    /// A frame that asks for a window of 2 GiB.
    #[test]
    fn no_window_is_larger_than_allowed() {
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x01, 0, 0];
        assert!(unpack(Codec::Zstd, &frame, &mut [0; 64]).is_err());
    }

    proptest! {
        #[test]
        fn damaged_units_fail_or_give_something(
            seed in any::<u64>(), len in 1usize..20_000, flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4),
        ) {
            let bytes = bytes_of(seed, len);
            for codec in ALL {
                let mut packed = pack(codec, &bytes);
                let whole = flips.iter().all(|(_, x)| *x == 0);
                for (at, x) in &flips {
                    let n = packed.len();
                    packed[at % n] ^= x;
                }
                let mut out = vec![0; len];
                let done = unpack(codec, &packed, &mut out);
                if whole {
                    prop_assert_eq!(done, Ok(()));
                    prop_assert!(out == bytes);
                }
            }
        }
    }
}
