//! Sizes on the command line and in tables: bytes, with K, M, G, T of 1024.

use ploop::image::grow::Wanted;

/// Parses a size in bytes.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    if digits.is_empty() {
        return Err("not a size; a whole number of bytes, or of K, M, G, T".into());
    }
    let shift = match &text[digits.len()..] {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        other => return Err(format!("{other:?} is not one of K, M, G, T")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "not a whole number of bytes, or of K, M, G, T".to_string())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".to_string())
}

/// Parses a size that a disk is to have, or with a `+` by how much it is to grow.
pub fn wanted(text: &str) -> Result<Wanted, String> {
    match text.strip_prefix('+') {
        Some(more) => parse(more).map(Wanted::By),
        None => parse(text).map(Wanted::To),
    }
}

/// A size for people, exact where it is a whole number of units.
pub fn show(bytes: u64) -> String {
    let units = ["B", "K", "M", "G", "T", "P"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match (unit, value.fract() == 0.0) {
        (0, _) => format!("{bytes} B"),
        (_, true) => format!("{value:.0}{}", units[unit]),
        (_, false) => format!("{value:.1}{}", units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024_and_nonsense_is_refused() {
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("4k"), Ok(4096));
        assert_eq!(parse("16T"), Ok(16 << 40));
        for bad in ["", "K", "-1", "1.5G", "1KB", "99999999T", "1G1"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn shown_sizes_read_back_where_they_are_exact() {
        assert_eq!(
            (show(0), show(1 << 30), show(1536)),
            ("0 B".into(), "1G".into(), "1.5K".into())
        );
    }
}
