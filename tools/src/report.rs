//! Report: what both binaries print, and how a failure becomes an exit code.
//!
//! Results go to standard output, everything else to standard error. Every JSON object carries
//! `schema`, whose value changes only with a change that breaks readers.

use ploop::serve::supervise::message::kind_name;
use ploop::{Error, Kind};
use serde_json::{Value, json};
use std::io::Write;
use std::process::ExitCode;

/// How results and errors are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// What a verb has to say.
#[derive(Debug, Default)]
pub struct Answer {
    /// For people; empty prints nothing.
    pub text: String,
    /// For programs: an object, to which `schema` is added.
    pub json: Value,
    /// Exit code.
    pub code: u8,
}

impl Answer {
    /// A success with something to say.
    pub fn new(text: impl Into<String>, json: Value) -> Self {
        Self { text: text.into(), json, code: 0 }
    }

    /// Prints it, and gives the exit code.
    pub fn print(self, output: Output) -> ExitCode {
        let text = match output {
            Output::Text => self.text,
            Output::Json => with_schema(self.json).to_string(),
        };
        if !text.is_empty() {
            let mut out = std::io::stdout().lock();
            let end = if text.ends_with('\n') { "" } else { "\n" };
            if write!(out, "{text}{end}").and_then(|()| out.flush()).is_err() {
                return ExitCode::from(1);
            }
        }
        ExitCode::from(self.code)
    }
}

fn with_schema(value: Value) -> Value {
    let mut object = match value {
        Value::Object(object) => object,
        _ => serde_json::Map::new(),
    };
    object.insert("schema".into(), json!(1));
    Value::Object(object)
}

/// Prints an error, and gives its exit code.
pub fn error(e: &Error, output: Output) -> ExitCode {
    let code = e.kind().exit_code();
    print_error(code, kind_name(e.kind()), &e.to_string(), hint(e.kind()), output);
    ExitCode::from(code)
}

/// Prints a wrong command line as JSON.
pub fn usage_error(message: &str) -> ExitCode {
    print_error(2, "usage", message.trim_end(), Some("see ploopctl --help"), Output::Json);
    ExitCode::from(2)
}

fn print_error(code: u8, kind: &str, message: &str, hint: Option<&str>, output: Output) {
    let text = match output {
        Output::Json => {
            let error = json!({ "code": code, "kind": kind, "message": message, "hint": hint });
            json!({ "schema": 1, "error": error }).to_string()
        }
        Output::Text => {
            let hint = hint.map(|h| format!("\nhint: {h}")).unwrap_or_default();
            format!("ploop: {message}{hint}")
        }
    };
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// The way out that most failures of a kind share.
fn hint(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Damaged => Some("`ploopctl check DISK` says what is wrong, `--repair` mends it"),
        Kind::Poisoned => Some("an earlier write failed; detach the disk, then `ploopctl check`"),
        Kind::NoSpace => Some("free space on the file system that holds the disk's files"),
        Kind::Privilege => Some("`init --fs none`, `serve`, `check`, `info`, `map` need no root"),
        _ => None,
    }
}

/// Sends this process's log to standard error.
pub fn log_to_stderr() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(tracing::Level::WARN)
        .init();
}
