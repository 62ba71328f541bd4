//! Sizes as ploop takes them: a plain number is sectors, the rest is K, M, G, T of 1024 bytes.
//!
//! Numbers are read by the rules of C: `0x` before hexadecimal ones, `0` before octal ones.

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Parses a size; what it is in bytes.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no size: a number of sectors, or one of K, M, G, T");
    let unit = match text.char_indices().next_back() {
        Some((_, 'k' | 'K')) => 1 << 10,
        Some((_, 'm' | 'M')) => 1 << 20,
        Some((_, 'g' | 'G')) => 1 << 30,
        Some((_, 't' | 'T')) => 1 << 40,
        _ => SECTOR,
    };
    let digits = match unit {
        SECTOR => text,
        _ => text.get(..text.len() - 1).unwrap_or_default(),
    };
    let bytes = number(digits).and_then(|n| n.checked_mul(unit));
    bytes.ok_or_else(wrong)
}

/// Parses a number by the rules of C.
pub fn number(text: &str) -> Option<u64> {
    let (digits, base) = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if text.len() > 1 && text.starts_with('0') => (text, 8),
        None => (text, 10),
    };
    match digits.starts_with('+') {
        true => None,
        false => u64::from_str_radix(digits, base).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_number_is_sectors_and_bases_are_those_of_c() {
        for (text, bytes) in [
            ("1", 512),
            ("0", 0),
            ("2048", 1 << 20),
            ("1k", 1024),
            ("3M", 3 << 20),
            ("0x10", 16 * 512),
            ("010", 8 * 512),
            ("0x1G", 1 << 30),
            ("100t", 100 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "k",
            "-1",
            "+1",
            "1.5G",
            "08",
            "0x",
            "1KB",
            "1b",
            "99999999T",
            "1 G",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
