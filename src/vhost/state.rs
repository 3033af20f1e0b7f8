//! What a device takes along to another host (VHOST_USER_PROTOCOL_F_DEVICE_STATE): little. The disk's contents are
//! shared or copied by others, rings and memory are the front-end's. There remains what a driver has changed in the
//! config space, and enough to refuse a state that is another disk's.
//!
//! | bytes | |
//! |---|---|
//! | 8 | `vdblkdev` |
//! | 4 | version, little-endian as all numbers here: 1 |
//! | 4 | flags; bit 0: the cache is write-back. The others are 0 |
//! | 8 | size of the disk in bytes |

use super::sys;
use std::fs::File;
use std::io::{self, Read, Write};

const MAGIC: [u8; 8] = *b"vdblkdev";
const VERSION: u32 = 1;
const WRITE_BACK: u32 = 1;
const STATE_BYTES: usize = 24;

/// The state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceState {
    pub(super) write_back: bool,
    pub(super) size_bytes: u64,
}

impl DeviceState {
    fn encode(self) -> Vec<u8> {
        let flags = if self.write_back { WRITE_BACK } else { 0 };
        [&MAGIC[..], &VERSION.to_le_bytes(), &flags.to_le_bytes(), &self.size_bytes.to_le_bytes()].concat()
    }

    fn decode(raw: &[u8]) -> Result<Self, &'static str> {
        let raw: &[u8; STATE_BYTES] = raw.try_into().map_err(|_| "it has another length")?;
        let [magic @ .., v0, v1, v2, v3, f0, f1, f2, f3, s0, s1, s2, s3, s4, s5, s6, s7] = raw;
        if *magic != MAGIC {
            return Err("it is no state of this kind of device");
        }
        if u32::from_le_bytes([*v0, *v1, *v2, *v3]) != VERSION {
            return Err("its version is not known");
        }
        let flags = u32::from_le_bytes([*f0, *f1, *f2, *f3]);
        if flags & !WRITE_BACK != 0 {
            return Err("it has flags that are not known");
        }
        let size_bytes = u64::from_le_bytes([*s0, *s1, *s2, *s3, *s4, *s5, *s6, *s7]);
        Ok(DeviceState { write_back: flags & WRITE_BACK != 0, size_bytes })
    }
}

/// A transfer that the front-end has asked for and not yet asked the result of.
#[derive(Debug)]
pub(super) enum Transfer {
    Saved(io::Result<()>),
    /// The front-end writes to the other end, closes it, and asks.
    Loading(File),
}

impl Transfer {
    /// Writes the state. The front-end reads when it likes: what does not fit the pipe at once is an error.
    pub(super) fn save(state: DeviceState, mut to: File) -> Self {
        Transfer::Saved(sys::set_nonblocking(&to).and_then(|()| to.write_all(&state.encode())))
    }

    /// The result; of a load, the state.
    pub(super) fn end(self) -> io::Result<Option<DeviceState>> {
        let file = match self {
            Transfer::Saved(result) => return result.map(|()| None),
            Transfer::Loading(file) => file,
        };
        // all of it is there, or the front-end has asked too early
        sys::set_nonblocking(&file)?;
        let mut raw = Vec::with_capacity(STATE_BYTES + 1);
        let most = u64::try_from(STATE_BYTES + 1).map_err(io::Error::other)?;
        file.take(most).read_to_end(&mut raw)?;
        let bad =
            |why| io::Error::new(io::ErrorKind::InvalidData, format!("the device's state is refused: {why}"));
        DeviceState::decode(&raw).map(Some).map_err(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn load(raw: &[u8]) -> io::Result<Option<DeviceState>> {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(raw).unwrap();
        drop(writer);
        Transfer::Loading(OwnedFd::from(reader).into()).end()
    }

    #[test]
    fn states_come_back_as_they_went() {
        for write_back in [false, true] {
            let state = DeviceState { write_back, size_bytes: 0x1234_5678_9abc };
            let (mut reader, writer) = io::pipe().unwrap();
            assert!(Transfer::save(state, OwnedFd::from(writer).into()).end().unwrap().is_none());
            let mut raw = Vec::new();
            reader.read_to_end(&mut raw).unwrap();
            assert_eq!(load(&raw).unwrap(), Some(state));
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let good = DeviceState { write_back: true, size_bytes: 512 }.encode();
        assert!(
            load(&good[..23]).is_err() && load(&[&good[..], &[0]].concat()).is_err() && load(&[]).is_err()
        );
        for at in [0, 7, 8, 11, 12, 15] {
            let mut raw = good.clone();
            raw[at] ^= 2;
            assert!(load(&raw).is_err(), "byte {at}");
        }
        let (reader, _writer) = io::pipe().unwrap();
        assert!(Transfer::Loading(OwnedFd::from(reader).into()).end().is_err(), "asked too early");
        let state = DeviceState { write_back: true, size_bytes: 512 };
        let null = File::open("/dev/null").unwrap();
        assert!(Transfer::save(state, null).end().is_err(), "not open for writing");
    }
}
