//! Sizes as people write and read them.

use crate::error::{Error, ErrorKind, Result};

/// Parses a number of bytes with an optional suffix of 1024s: `b`, `k`, `M`, `G`, `T`, `P` in either case, as qemu-img
/// does. Fractions are taken where they come out at whole bytes (`1.5G`).
///
/// # Errors
/// [`ErrorKind::InvalidArgument`].
pub fn parse_size(text: &str) -> Result<u64> {
    let bad = || {
        Error::new(ErrorKind::InvalidArgument, format!("'{text}' is not a size"))
            .hint("a number of bytes, or with a suffix such as 512M or 10G")
    };
    let trimmed = text.trim();
    let digits = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match trimmed[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err(bad()),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let is_number = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !is_number(whole) || !is_number(fraction) || fraction.len() > 12 {
        return Err(bad());
    }
    let unit = 1u128 << shift;
    let whole: u128 = whole.parse().map_err(|_| bad())?;
    let ten = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
    let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| bad())? };
    if !(part * unit).is_multiple_of(ten) {
        return Err(bad());
    }
    let bytes = whole.checked_mul(unit).and_then(|b| b.checked_add(part * unit / ten)).ok_or_else(bad)?;
    u64::try_from(bytes).map_err(|_| bad())
}

/// A number of bytes for people.
pub fn human_bytes(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let power = (bytes.max(1).ilog2() / 10).min(5);
    if power == 0 {
        return format!("{bytes} bytes");
    }
    let tenths = (u128::from(bytes) * 10) >> (10 * power);
    let unit = units[power as usize];
    let short = if tenths.is_multiple_of(10) {
        format!("{} {unit}", tenths / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    };
    format!("{short} ({bytes} bytes)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in
            [(512, "512 bytes"), (1 << 20, "1 MiB (1048576 bytes)"), (3 << 29, "1.5 GiB (1610612736 bytes)")]
        {
            assert_eq!(human_bytes(bytes), text);
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("512", 512),
            ("0", 0),
            ("4k", 4096),
            ("512M", 512 << 20),
            ("10G", 10 << 30),
            ("1.5g", 3 << 29),
            ("2T", 2 << 40),
            ("1PiB", 1 << 50),
            (" 7b ", 7),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for bad in
            ["", "G", "-1", "1x", "1.3", "0x10", "99999999T", "1e9", "1..5", "18446744073709551616", "1 G x"]
        {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
