//! Answer: what a verb has to say.
//!
//! Results go to standard output, everything else to standard error. Every JSON object carries
//! `schema`, whose value changes only with a change that breaks readers.

use crate::report::{self, Output};
use serde_json::{Value, json};
use std::io::Write;
use std::mem::take;
use std::process::ExitCode;

/// What a verb has to say.
#[derive(Debug, Default)]
pub struct Answer {
    /// For people; empty prints nothing.
    pub text: String,
    /// For programs: an object, to which `schema` is added; null prints nothing.
    pub json: Value,
    /// Exit code.
    pub code: u8,
}

impl Answer {
    /// A success with something to say.
    pub fn new(text: impl Into<String>, json: Value) -> Self {
        Self {
            text: text.into(),
            json,
            code: 0,
        }
    }

    /// Says it on standard error; what is left to print is nothing.
    pub fn aside(mut self, output: Output) -> Self {
        let _ = writeln!(std::io::stderr(), "{}", self.take(output).trim_end());
        self
    }

    fn take(&mut self, output: Output) -> String {
        let (text, json) = (take(&mut self.text), take(&mut self.json));
        match output {
            Output::Text => text,
            Output::Json if json.is_null() => String::new(),
            Output::Json => with_schema(json).to_string(),
        }
    }

    /// Prints it, and gives the exit code.
    pub fn print(mut self, output: Output) -> ExitCode {
        let text = self.take(output);
        if !text.is_empty() {
            let mut out = std::io::stdout().lock();
            let end = if text.ends_with('\n') { "" } else { "\n" };
            if write!(out, "{text}{end}")
                .and_then(|()| out.flush())
                .is_err()
            {
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

/// Prints a wrong command line as JSON.
pub fn usage_error(message: &str) -> ExitCode {
    report::print_error(
        2,
        "usage",
        message.trim_end(),
        Some("see ploopctl --help"),
        Output::Json,
    );
    ExitCode::from(2)
}

/// Sends this process's log to standard error.
pub fn log_to_stderr() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(tracing::Level::WARN)
        .init();
}
