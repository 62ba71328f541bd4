//! Meter: how far a long verb is, on standard error.
//!
//! For people one line that is rewritten, on a terminal only, and only once it takes longer than a
//! second. For programs a JSON object a line, where `--progress json` asks for it.

use crate::cancel::Cancel;
use ploop::Result;
use ploop::formats::progress::{Progress, Watch};
use ploop::serve::supervise::control::Far;
use rustix::termios::tcgetwinsize;
use serde_json::{Value, json};
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// What takes no longer than this needs no progress.
const SHORT: Duration = Duration::from_secs(1);
/// Time between two rewritings of the line, and between two objects.
const PAUSE: Duration = Duration::from_millis(200);

/// Who is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ProgressArg {
    /// A terminal, after a second
    Auto,
    /// Programs: one object a line
    Json,
    /// Nobody
    None,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// One line of so many columns.
    Line(usize),
    Json,
    Silent,
}

/// Shows how far a verb is, and ends it when a signal came.
#[derive(Debug)]
pub struct Meter<'c> {
    cancel: &'c Cancel,
    style: Style,
    started: Instant,
    what: Option<String>,
    now: Option<Phase>,
    told: Option<Instant>,
    /// A line stands on the terminal.
    shown: bool,
}

#[derive(Debug)]
struct Phase {
    name: String,
    began: Instant,
    done: u64,
    total: Option<u64>,
}

impl<'c> Meter<'c> {
    /// Starts the clock.
    pub fn new(arg: ProgressArg, cancel: &'c Cancel) -> Self {
        let terminal = io::stderr().is_terminal();
        let columns = || tcgetwinsize(io::stderr()).map_or(80, |size| size.ws_col.into());
        let style = match arg {
            ProgressArg::Json => Style::Json,
            // Asked now: in a sandbox it could not be.
            ProgressArg::Auto if terminal => Style::Line(columns()),
            _ => Style::Silent,
        };
        Self {
            cancel,
            style,
            started: Instant::now(),
            what: None,
            now: None,
            told: None,
            shown: false,
        }
    }

    /// Whether anybody is told.
    pub fn is_wanted(&self) -> bool {
        self.style != Style::Silent
    }

    /// A phase of unknown length begins.
    pub fn begin(&mut self, phase: &str) -> Result<()> {
        self.at(phase, 0, None)
    }

    /// The same phase goes on.
    pub fn tick(&mut self) -> Result<()> {
        if self.is_due() {
            self.show();
        }
        self.cancel.check()
    }

    /// What a keeper tells of a phase of its own; none when it has no news.
    pub fn hear(&mut self, phase: &'static str, far: Option<Far>) -> Result<()> {
        match far {
            Some(Far { done, total }) => self.tell(Progress { phase, done, total }),
            None => self.tick(),
        }
    }

    /// What another process of ours told; whether it was that.
    pub fn relay(&mut self, line: &str) -> Result<bool> {
        let value: Value = serde_json::from_str(line).unwrap_or_default();
        let told = &value["progress"];
        let (Some(phase), Some(done)) = (told["phase"].as_str(), told["done"].as_u64()) else {
            return Ok(false);
        };
        if let Some(what) = told["file"].as_str() {
            self.what = Some(what.to_string());
        }
        self.at(phase, done, told["total"].as_u64())?;
        Ok(true)
    }

    fn at(&mut self, phase: &str, done: u64, total: Option<u64>) -> Result<()> {
        let now = Instant::now();
        let known = self
            .now
            .as_mut()
            .filter(|p| p.name == phase && p.done <= done);
        match known {
            Some(phase) => phase.done = done,
            None => {
                self.now = Some(Phase {
                    name: phase.to_string(),
                    began: now,
                    done,
                    total,
                });
                self.told = None;
            }
        }
        if self.is_due() || total == Some(done) {
            self.show();
        }
        self.cancel.check()
    }

    fn is_due(&self) -> bool {
        self.told.is_none_or(|t| t.elapsed() >= PAUSE)
    }

    fn show(&mut self) {
        let Some(phase) = &self.now else {
            return;
        };
        self.told = Some(Instant::now());
        let mut err = io::stderr().lock();
        // Whether somebody looks is not this verb's business.
        let _ = match self.style {
            Style::Silent => Ok(()),
            Style::Json => writeln!(err, "{}", phase.json(self.what.as_deref())),
            Style::Line(_) if self.started.elapsed() < SHORT => Ok(()),
            Style::Line(columns) => {
                self.shown = true;
                let line = phase.line(self.what.as_deref());
                let line: String = line.chars().take(columns.saturating_sub(1)).collect();
                write!(err, "\r{line}\x1b[K").and_then(|()| err.flush())
            }
        };
    }
}

impl Drop for Meter<'_> {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

impl Watch for Meter<'_> {
    fn tell(&mut self, progress: Progress) -> Result<()> {
        self.at(progress.phase, progress.done, Some(progress.total))
    }

    fn enter(&mut self, what: &str) {
        self.what = Some(what.to_string());
        self.now = None;
    }
}

impl Phase {
    /// Bytes a second.
    fn rate(&self) -> Option<u64> {
        let ms = u64::try_from(self.began.elapsed().as_millis()).ok()?;
        self.done
            .saturating_mul(1000)
            .checked_div(ms)
            .filter(|r| *r > 0)
    }

    /// Seconds to the end of the phase.
    fn eta(&self) -> Option<u64> {
        self.total?
            .checked_sub(self.done)?
            .checked_div(self.rate()?)
    }

    fn json(&self, what: Option<&str>) -> Value {
        json!({ "schema": 1, "progress": {
            "phase": self.name,
            "file": what,
            "done": self.done,
            "total": self.total,
            "rate": self.rate(),
            "eta": self.eta(),
        }})
    }

    fn line(&self, what: Option<&str>) -> String {
        use crate::size::show;
        let what = what.map(|w| format!("{w}: ")).unwrap_or_default();
        let Some(total) = self.total else {
            return format!("{what}{}, {} s", self.name, self.began.elapsed().as_secs());
        };
        let percent = self
            .done
            .saturating_mul(100)
            .checked_div(total)
            .unwrap_or(100);
        let rate = self.rate().map(|r| format!(", {}/s", show(r)));
        let eta = self.eta().map(|s| format!(", {s} s left"));
        format!(
            "{what}{} {percent}% ({} of {}){}{}",
            self.name,
            show(self.done),
            show(total),
            rate.unwrap_or_default(),
            eta.unwrap_or_default()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(done: u64, total: Option<u64>) -> Phase {
        Phase {
            name: "table".into(),
            began: Instant::now() - Duration::from_secs(10),
            done,
            total,
        }
    }

    #[test]
    fn a_line_tells_how_far_how_fast_and_how_long() {
        let line = phase(1 << 30, Some(4 << 30)).line(Some("root.hds"));
        assert!(
            line.starts_with("root.hds: table 25% (1G of 4G), 102."),
            "{line}"
        );
        assert!(line.ends_with("/s, 30 s left"), "{line}");
        assert_eq!(phase(0, None).line(None), "table, 10 s");
        let object = phase(5, Some(0)).json(None);
        assert_eq!(object["progress"]["eta"], Value::Null, "{object}");
    }

    #[test]
    fn progress_of_another_process_is_told_as_our_own_and_nothing_else_is() {
        let cancel = Cancel::never();
        let mut meter = Meter::new(ProgressArg::None, &cancel);
        let told = phase(7, Some(9)).json(Some("a")).to_string();
        assert!(meter.relay(&told).expect("not cancelled"));
        let now = meter.now.as_ref().expect("a phase");
        assert_eq!(
            (now.name.as_str(), now.done, now.total),
            ("table", 7, Some(9))
        );
        for other in ["", "{}", "ploop: no", "{\"progress\":{\"phase\":1}}"] {
            assert!(!meter.relay(other).expect("not cancelled"), "{other}");
        }
    }
}
