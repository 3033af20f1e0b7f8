//! The trailer: the last 512 bytes of the file, which say where everything else is. Numbers are big endian.

use super::super::bytes::{be32, be64};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_DISK_BYTES, MAX_PLIST_BYTES, SECTOR_BYTES};
use crate::map::{ByteSource, HostOffset};
use std::ops::Range;

/// Bytes of the trailer.
const KOLY_BYTES: u64 = 512;
/// The only version there is.
const VERSION: u32 = 4;

/// What the trailer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Koly {
    /// The bytes of the file that chunks may lie in. Chunks say where they are from its start on.
    pub(super) data: Range<u64>,
    /// Where the property list begins, and its bytes.
    pub(super) plist: (HostOffset, usize),
    /// Sectors of the disk; 0: as many as the chunks say.
    pub(super) sectors: u64,
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

impl Koly {
    /// Reads and verifies the trailer.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub(super) fn read(source: &dyn ByteSource) -> Result<Self> {
        let mut raw = [0; KOLY_BYTES as usize];
        let at = source.len().checked_sub(KOLY_BYTES);
        if let Some(at) = at {
            source.read_at(HostOffset(at), &mut raw)?;
        }
        match at {
            Some(at) if raw.starts_with(b"koly") => Self::parse(&raw, at),
            _ => Err(no_koly(source)?),
        }
    }

    /// The trailer `raw`, which lies at `at`.
    fn parse(raw: &[u8; KOLY_BYTES as usize], at: u64) -> Result<Self> {
        let n32 = |at| be32(raw, at).expect("inside the trailer");
        let n64 = |at| be64(raw, at).expect("inside the trailer");
        if n32(4) != VERSION || u64::from(n32(8)) != KOLY_BYTES {
            let what = format!("the trailer has version {} and {} bytes, not 4 and 512", n32(4), n32(8));
            return Err(unsupported(what));
        }
        if n32(60) > 1 {
            return Err(unsupported(format!("it is one of {} segments of an image", n32(60))));
        }
        let (data_at, data_bytes) = (n64(24), n64(32));
        let data_end = data_at.checked_add(data_bytes).filter(|end| *end <= at);
        let data_end = data_end.ok_or_else(|| {
            corrupt(format!("the data at {data_at}, {data_bytes} bytes, reaches past the end of the file"))
        })?;
        let sectors = n64(492);
        if sectors > MAX_DISK_BYTES / SECTOR_BYTES {
            let what = format!("the disk has {sectors} sectors, at most {MAX_DISK_BYTES} bytes are possible");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        // Writers that leave the length out mean everything in front of the trailer.
        let data = data_at..if data_bytes == 0 { at } else { data_end };
        Ok(Koly { data, plist: plist_place(n64(216), n64(224), n64(48), at)?, sectors })
    }
}

/// The property list of `len` bytes at `off`, in front of the trailer at `koly_at`.
fn plist_place(off: u64, len: u64, rsrc_bytes: u64, koly_at: u64) -> Result<(HostOffset, usize)> {
    if len == 0 {
        let what = if rsrc_bytes > 0 {
            "its tables are in a resource fork, as before Mac OS X 10.2"
        } else {
            "the trailer names no property list"
        };
        return Err(unsupported(what));
    }
    if off.checked_add(len).is_none_or(|end| end > koly_at) {
        return Err(corrupt(format!(
            "the property list at {off}, {len} bytes, reaches past the end of the file"
        )));
    }
    match usize::try_from(len).ok().filter(|_| len <= MAX_PLIST_BYTES) {
        Some(bytes) => Ok((HostOffset(off), bytes)),
        None => {
            let what = format!("the property list has {len} bytes, at most {MAX_PLIST_BYTES} are read");
            Err(Error::new(ErrorKind::Limit, what))
        }
    }
}

/// Why there is no trailer.
fn no_koly(source: &dyn ByteSource) -> Result<Error> {
    let mut head = [0; 8];
    let len = source.len();
    if len >= 8 {
        source.read_at(HostOffset(0), &mut head)?;
        if head == *b"encrcdsa" {
            return Ok(unsupported("the image is encrypted"));
        }
        source.read_at(HostOffset(len - 8), &mut head)?;
        if head == *b"cdsaencr" {
            return Ok(unsupported("the image is encrypted"));
        }
    }
    Ok(Error::new(ErrorKind::NotThisFormat, "it has no DMG signature ('koly', 512 bytes before its end)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of `len` bytes whose trailer has these words of eight bytes, and is sound otherwise.
    fn file(len: usize, words: &[(usize, u64)]) -> Vec<u8> {
        let mut f = vec![0; len];
        let koly = &mut f[len - 512..];
        koly[..12].copy_from_slice(b"koly\0\0\0\x04\0\0\x02\0");
        for (at, value) in [(32, 4096u64), (216, 4096), (224, 100), (492, 8)].iter().chain(words) {
            koly[*at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        f
    }

    fn line(words: &[(usize, u64)]) -> String {
        Koly::read(&file(8192, words)).unwrap_err().to_string()
    }

    #[test]
    fn the_trailer_says_where_everything_is() {
        let k = Koly::read(&file(8192, &[])).unwrap();
        assert_eq!((k.data, k.plist, k.sectors), (0..4096, (HostOffset(4096), 100), 8));
        let all = Koly::read(&file(8192, &[(24, 16), (32, 0)])).unwrap();
        assert_eq!(all.data, 16..7680);
    }

    #[test]
    fn what_is_wrong_with_it_is_one_line() {
        assert!(line(&[(224, 0)]).contains("names no property list"));
        assert!(line(&[(224, 0), (48, 9)]).contains("resource fork"));
        assert!(line(&[(216, 7600)]).contains("property list at 7600"));
        assert!(line(&[(216, u64::MAX)]).contains("past the end"));
        assert!(line(&[(24, 7000)]).contains("data at 7000"));
        assert!(line(&[(492, 1 << 60)]).contains("sectors"));
        assert!(line(&[(56, 2)]).contains("one of 2 segments"));
        assert!(line(&[(4, 5 << 32)]).contains("version 5"));
        let e = Koly::read(&vec![0; 511]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NotThisFormat);
        let mut sealed = vec![0; 2048];
        sealed[..8].copy_from_slice(b"encrcdsa");
        assert!(Koly::read(&sealed).unwrap_err().to_string().contains("encrypted"));
    }

    #[test]
    fn a_property_list_is_not_larger_than_allowed() {
        struct Long;
        impl ByteSource for Long {
            fn len(&self) -> u64 {
                1 << 40
            }
            fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
                let f = file(512, &[(32, 0), (224, MAX_PLIST_BYTES + 1)]);
                buf.copy_from_slice(&f[..buf.len()]);
                assert_eq!(off.0, (1 << 40) - 512);
                Ok(())
            }
        }
        assert_eq!(Koly::read(&Long).unwrap_err().kind(), ErrorKind::Limit);
    }
}
