//! Screen: standard output that is shown again and again.
//!
//! A terminal shows the last round only, cut to its size; anything else gets all of them.

use crate::report::Output;
use rustix::termios::tcgetwinsize;
use std::io::{self, IsTerminal, Write};

/// Where rounds are shown.
#[derive(Debug)]
pub struct Screen {
    terminal: bool,
    separate: bool,
    shown: bool,
}

/// To the upper left corner.
const HOME: &str = "\x1b[H";
/// What follows in this line, and below the last one, goes.
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";
/// Everything goes.
const CLEAR: &str = "\x1b[2J";

impl Screen {
    /// Standard output. JSON is never decorated.
    pub fn new(output: Output) -> Self {
        Self {
            terminal: output == Output::Text && io::stdout().is_terminal(),
            separate: output == Output::Text,
            shown: false,
        }
    }

    /// Shows the next round.
    pub fn show(&mut self, text: &str) -> io::Result<()> {
        let first = !std::mem::replace(&mut self.shown, true);
        let mut out = io::stdout().lock();
        if self.terminal {
            let size = tcgetwinsize(&out).ok();
            let (rows, columns) = size.map_or((24, 80), |s| (s.ws_row, s.ws_col));
            let start = if first { CLEAR } else { "" };
            let page = page(text, rows.into(), columns.into());
            write!(out, "{start}{HOME}{page}{CLEAR_BELOW}")?;
        } else {
            let start = if self.separate && !first { "\n" } else { "" };
            writeln!(out, "{start}{}", text.trim_end())?;
        }
        out.flush()
    }
}

/// What of a text fits, one line left for the shell's prompt.
fn page(text: &str, rows: usize, columns: usize) -> String {
    let lines = text.lines().take(rows.saturating_sub(1).max(1));
    let cut = |line: &str| line.chars().take(columns.max(1)).collect::<String>();
    lines.map(|line| cut(line) + CLEAR_LINE + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_never_scrolls_the_terminal() {
        let text = "12345678\n".repeat(50);
        let page = page(&text, 10, 4);
        assert_eq!(page.lines().count(), 9);
        assert!(page.lines().all(|l| l == "1234\x1b[K"));
    }
}
