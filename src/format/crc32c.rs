//! The checksum of VHDX and of cache images: CRC-32C (Castagnoli).

/// The polynomial, lowest power in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// What a byte does to the sum, `TABLES[n]` with `n` bytes behind it.
static TABLES: [[u32; 256]; 8] = {
    let mut tables = [[0; 256]; 8];
    let mut n = 0;
    while n < 256 {
        let (mut crc, mut bit) = (n as u32, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        tables[0][n] = crc;
        n += 1;
    }
    let mut behind = 1;
    while behind < 8 {
        let mut n = 0;
        while n < 256 {
            let crc: u32 = tables[behind - 1][n];
            tables[behind][n] = crc >> 8 ^ tables[0][(crc & 0xff) as usize];
            n += 1;
        }
        behind += 1;
    }
    tables
};

/// Eight bytes at a time: opening an image sums up 136 KiB.
fn update(crc: u32, bytes: &[u8]) -> u32 {
    let (eights, rest) = bytes.as_chunks::<8>();
    let crc = eights.iter().fold(crc, |crc, eight| {
        let [a, b, c, d, ..] = crc.to_le_bytes();
        let [e, f, g, h, i, j, k, l] = *eight;
        let mixed = [a ^ e, b ^ f, c ^ g, d ^ h, i, j, k, l];
        mixed.iter().zip(TABLES.iter().rev()).fold(0, |sum, (b, table)| sum ^ table[usize::from(*b)])
    });
    rest.iter().fold(crc, |crc, b| {
        let [low, ..] = crc.to_le_bytes();
        crc >> 8 ^ TABLES[0][usize::from(low ^ b)]
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
        let long: Vec<u8> = (0..=255).collect();
        let one_by_one = long.iter().fold(!0, |crc, b| update(crc, &[*b]));
        assert_eq!(update(!0, &long), one_by_one);
        let bytes = [1, 2, 3, 4, 9, 9, 9, 9, 5];
        assert_eq!(checksum(&bytes, 4), !update(!0, &[1, 2, 3, 4, 0, 0, 0, 0, 5]));
    }
}
