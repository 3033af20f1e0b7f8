//! The checksum of VHDX: CRC-32C (Castagnoli).

/// The polynomial, lowest power in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let (mut crc, mut bit) = (n as u32, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
};

fn update(crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, b| {
        let [low, ..] = crc.to_le_bytes();
        crc >> 8 ^ TABLE[usize::from(low ^ b)]
    })
}

/// Of a structure that holds its own checksum in four bytes at `own`, which count as zeros.
pub(super) fn checksum(bytes: &[u8], own: usize) -> u32 {
    let crc = update(!0, &bytes[..own]);
    let crc = update(crc, &[0; 4]);
    !update(crc, &bytes[own + 4..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_castagnoli_checksum() {
        assert_eq!(!update(!0, b"123456789"), 0xe306_9283);
        assert_eq!(!update(!0, &[0; 32]), 0x8a91_36aa);
        let bytes = [1, 2, 3, 4, 9, 9, 9, 9, 5];
        assert_eq!(checksum(&bytes, 4), !update(!0, &[1, 2, 3, 4, 0, 0, 0, 0, 5]));
    }
}
