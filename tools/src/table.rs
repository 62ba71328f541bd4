//! Table: rows for people, in columns as wide as what is in them.

/// How a column stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Lines of a table, the heads first. The last column is never padded.
pub fn render<const N: usize>(heads: [(&str, Align); N], rows: &[[String; N]]) -> String {
    let width = |c: usize| {
        let cells = rows.iter().map(|row| row[c].chars().count());
        cells.max().unwrap_or(0).max(heads[c].0.len())
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: [&str; N]| {
        let padded = (0..N).map(|c| match heads[c].1 {
            Align::Left if c + 1 == N => cells[c].to_string(),
            Align::Left => format!("{:<1$}", cells[c], widths[c]),
            Align::Right => format!("{:>1$}", cells[c], widths[c]),
        });
        padded.collect::<Vec<_>>().join("  ") + "\n"
    };
    let head = line(heads.map(|(name, _)| name));
    let body = rows
        .iter()
        .map(|row| line(row.each_ref().map(String::as_str)));
    head + &body.collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = |a: &str, b: &str, c: &str| [a.into(), b.into(), c.into()];
        let heads = [
            ("NAME", Align::Left),
            ("N", Align::Right),
            ("PATH", Align::Left),
        ];
        let rows = [row("a", "1000", "/long/path"), row("abcde", "2", "/")];
        let text = render(heads, &rows);
        assert_eq!(
            text,
            "NAME      N  PATH\na      1000  /long/path\nabcde     2  /\n"
        );
    }
}
