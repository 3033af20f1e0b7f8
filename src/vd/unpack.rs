//! Unpacking. The bytes come from a file that anybody may have made: what is wrong with them is an error of the request
//! that reads them, and no more memory is taken than the unit is long (and the codec's window, which is bounded).

use super::adc;
use crate::error::Failure;
use crate::limits::{MAX_UNIT_BYTES, MAX_UNPACK_WINDOW};
use crate::map::Codec;
use bzip2::bufread::BzDecoder;
use flate2::{Decompress, FlushDecompress, Status};
use lzfse_rust::LzfseRingDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use std::io::Read;

/// What an xz stream may take beside its window, in KiB.
const XZ_OVERHEAD_KIB: u64 = 256;

/// Unpacks the beginning of `packed` until `out` is full. What follows the stream in `packed` is not looked at: formats
/// tell the length of packed units in sectors.
///
/// # Errors
/// [`Failure::Os`] with EIO where the bytes are no such stream, or end before `out` is full; where the stream ends in a checksum
/// of everything before it (zlib, bzip2, xz) also if it does not end there or the checksum is another.
pub fn unpack(codec: Codec, packed: &[u8], out: &mut [u8]) -> Result<(), Failure> {
    let whole = match codec {
        Codec::Deflate => inflate(Decompress::new(false), packed, out),
        Codec::Zlib => inflate_checked(packed, out, 0),
        Codec::ZlibPadded => inflate_checked(packed, out, u64::from(MAX_UNIT_BYTES)),
        Codec::Zstd => unpack_zstd(packed, out),
        Codec::Adc => adc::unpack(packed, out),
        Codec::Bzip2 => whole_stream(BzDecoder::new(packed), out),
        Codec::Lzfse => LzfseRingDecoder::default().reader_bytes(packed).read_exact(out).ok(),
        Codec::Xz => whole_stream(XzReader::new_mem_limit(packed, false, xz_limit_kib()), out),
    };
    whole.ok_or(Failure::Os(libc::EIO))
}

fn inflate(mut stream: Decompress, packed: &[u8], out: &mut [u8]) -> Option<()> {
    let (mut from, mut to) = (0, 0);
    while to < out.len() {
        let (read, made, status) = inflate_some(&mut stream, packed.get(from..)?, &mut out[to..])?;
        (from, to) = (from + read, to + made);
        if to < out.len() && (status == Status::StreamEnd || (read, made) == (0, 0)) {
            return None;
        }
    }
    Some(())
}

/// The same of a stream with a checksum behind it, to its end: at most `most_behind` bytes more than fit.
fn inflate_checked(packed: &[u8], out: &mut [u8], most_behind: u64) -> Option<()> {
    let (mut stream, mut from, mut to, mut behind) = (Decompress::new(true), 0, 0, [0; 512]);
    loop {
        let full = to == out.len();
        let into = if full { &mut behind[..] } else { &mut out[to..] };
        let (read, made, status) = inflate_some(&mut stream, packed.get(from..)?, into)?;
        from += read;
        to += if full { 0 } else { made };
        let too_much = stream.total_out() > out.len() as u64 + most_behind;
        match status {
            _ if too_much => return None,
            Status::StreamEnd => return (to == out.len()).then_some(()),
            _ if (read, made) == (0, 0) => return None,
            _ => {}
        }
    }
}

/// Bytes read, bytes made, and how the stream stands.
fn inflate_some(stream: &mut Decompress, packed: &[u8], out: &mut [u8]) -> Option<(usize, usize, Status)> {
    let (was_in, was_out) = (stream.total_in(), stream.total_out());
    let status = stream.decompress(packed, out, FlushDecompress::None).ok()?;
    let read = usize::try_from(stream.total_in() - was_in).ok()?;
    Some((read, usize::try_from(stream.total_out() - was_out).ok()?, status))
}

/// Everything the stream has, and that is as much as fits.
fn whole_stream(mut stream: impl Read, out: &mut [u8]) -> Option<()> {
    stream.read_exact(out).ok()?;
    // The checksum is looked at on the way to the end.
    matches!(stream.read(&mut [0]), Ok(0)).then_some(())
}

fn xz_limit_kib() -> u32 {
    u32::try_from(MAX_UNPACK_WINDOW / 1024 + XZ_OVERHEAD_KIB).expect("limits::MAX_UNPACK_WINDOW")
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
    use bzip2::bufread::BzEncoder;
    use flate2::{Compress, Compression, FlushCompress};
    use lzma_rust2::{XzOptions, XzWriter};
    use proptest::prelude::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};
    use std::io::Write;

    fn pack(codec: Codec, bytes: &[u8]) -> Vec<u8> {
        match codec {
            Codec::Deflate | Codec::Zlib | Codec::ZlibPadded => deflate(codec, bytes),
            Codec::Zstd => compress_to_vec(bytes, CompressionLevel::Fastest),
            Codec::Adc => bytes.chunks(128).flat_map(|c| [&[0x7f + c.len() as u8], c].concat()).collect(),
            Codec::Bzip2 => {
                let mut out = Vec::new();
                BzEncoder::new(bytes, bzip2::Compression::best()).read_to_end(&mut out).unwrap();
                out
            }
            Codec::Lzfse => {
                let mut out = Vec::new();
                lzfse_rust::encode_bytes(bytes, &mut out).unwrap();
                out
            }
            Codec::Xz => xz(bytes, 6),
        }
    }

    fn xz(bytes: &[u8], preset: u32) -> Vec<u8> {
        let mut stream = XzWriter::new(Vec::new(), XzOptions::with_preset(preset)).unwrap();
        stream.write_all(bytes).unwrap();
        stream.finish().unwrap()
    }

    fn deflate(codec: Codec, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len() * 2 + 100);
        let mut c = Compress::new(Compression::best(), codec != Codec::Deflate);
        c.compress_vec(bytes, &mut out, FlushCompress::Finish).unwrap();
        out
    }

    const ALL: [Codec; 8] = [
        Codec::Deflate,
        Codec::Zlib,
        Codec::ZlibPadded,
        Codec::Zstd,
        Codec::Adc,
        Codec::Bzip2,
        Codec::Lzfse,
        Codec::Xz,
    ];

    /// Those with a checksum behind all they hold.
    const CHECKED: [Codec; 3] = [Codec::Zlib, Codec::Bzip2, Codec::Xz];

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
            assert_eq!(unpack(codec, &packed, &mut out), Ok(()), "{codec:?}");
            assert!(out == bytes, "{codec:?}");
            packed.truncate(20);
            assert!(unpack(codec, &packed, &mut out).is_err(), "{codec:?}");
            assert!(unpack(codec, &[], &mut out).is_err(), "{codec:?}");
        }
    }

    #[test]
    fn a_unit_that_is_filled_up_is_read_to_its_checksum() {
        let mut bytes = bytes_of(77, 700);
        bytes.resize(70_000, 0);
        let (mut packed, mut out) = (pack(Codec::Zlib, &bytes), vec![1; 700]);
        assert!(unpack(Codec::Zlib, &packed, &mut out).is_err());
        assert_eq!(unpack(Codec::ZlibPadded, &packed, &mut out), Ok(()));
        assert!(out == bytes[..700]);
        let last = packed.len() - 1;
        packed[last] ^= 1;
        assert!(unpack(Codec::ZlibPadded, &packed, &mut out).is_err());
        let endless = pack(Codec::Zlib, &vec![0; 5 << 20]);
        assert!(unpack(Codec::ZlibPadded, &endless, &mut out).is_err(), "more than any unit has");
    }

    /// A frame that asks for a window of 2 GiB.
    #[test]
    fn no_window_is_larger_than_allowed() {
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x01, 0, 0];
        assert!(unpack(Codec::Zstd, &frame, &mut [0; 64]).is_err());
        let (bytes, mut out) = (bytes_of(77, 5000), vec![0; 5000]);
        assert_eq!(unpack(Codec::Xz, &xz(&bytes, 6), &mut out), Ok(()), "8 MiB");
        assert!(unpack(Codec::Xz, &xz(&bytes, 9), &mut out).is_err(), "64 MiB");
    }

    #[test]
    fn a_checksum_is_looked_at() {
        let bytes = bytes_of(77, 5000);
        for codec in CHECKED {
            let sound = pack(codec, &bytes);
            let mut out = vec![0; bytes.len()];
            assert!(unpack(codec, &sound, &mut out[1..]).is_err(), "{codec:?}: longer than the unit");
            for at in 0..sound.len() {
                let mut packed = sound.clone();
                packed[at] ^= 0x10;
                let read = unpack(codec, &packed, &mut out);
                assert!(read.is_err() || out == bytes, "{codec:?}: bytes that are not right, by byte {at}");
                assert!(
                    unpack(codec, &sound[..at], &mut out).is_err(),
                    "{codec:?}: {at} bytes of {}",
                    sound.len()
                );
            }
        }
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
