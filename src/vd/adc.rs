//! Apple Data Compression: literals, and copies of what came before, in whole bytes.

/// Unpacks the beginning of `packed` until `out` is full; `None` if it cannot be such bytes.
///
/// The first byte of a code says which it is: 1nnnnnnn: n + 1 bytes follow as they are; 01nnnnnn: n + 4 bytes as they are
/// d + 1 before, d in the two bytes that follow; 00nnnndd: n + 3 bytes, d in its two bits and the byte that follows.
pub(super) fn unpack(mut packed: &[u8], out: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while at < out.len() {
        let (code, rest) = packed.split_first()?;
        packed = rest;
        let room = out.len() - at;
        if code & 0x80 != 0 {
            let len = usize::from(code & 0x7f) + 1;
            let bytes = packed.get(..len)?;
            let fits = len.min(room);
            out[at..at + fits].copy_from_slice(&bytes[..fits]);
            packed = &packed[len..];
            at += fits;
            continue;
        }
        let (len, back) = if code & 0x40 != 0 {
            let [high, low] = *packed.first_chunk()?;
            packed = &packed[2..];
            (usize::from(code & 0x3f) + 4, usize::from(u16::from_be_bytes([high, low])))
        } else {
            let (low, rest) = packed.split_first()?;
            packed = rest;
            (usize::from(code >> 2) + 3, usize::from(u16::from_be_bytes([code & 3, *low])))
        };
        let mut from = at.checked_sub(back + 1)?;
        for _ in 0..len.min(room) {
            // One by one: what is copied may be what this copy has written.
            out[at] = out[from];
            (at, from) = (at + 1, from + 1);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_does_what_it_says() {
        let packed = [0x82, b'a', b'b', b'c', 0x00, 0x02, 0x41, 0x00, 0x00, 0x80, b'x', 0x08, 0x0b];
        let mut out = [0; 17];
        unpack(&packed, &mut out).unwrap();
        assert_eq!(&out, b"abcabccccccxabcab");
        let mut part = [0; 8];
        unpack(&packed, &mut part).unwrap();
        assert_eq!(&part, b"abcabccc");
    }

    #[test]
    fn what_cannot_be_fails() {
        for packed in [
            &[][..],
            &[0x81, 1],
            &[0x00],
            &[0x40, 0],
            &[0x00, 0],
            &[0x80, 1, 0x00, 1],
            &[0x80, 1, 0x40, 0, 1],
        ] {
            assert_eq!(unpack(packed, &mut [0; 100]), None, "{packed:?}");
        }
    }
}
