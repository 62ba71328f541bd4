//! Report: how both binaries tell a failure, and how it becomes an exit code.

use ploop::serve::supervise::message::kind_name;
use ploop::{Error, Kind};
use serde_json::json;
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

/// Prints an error, and gives its exit code.
pub fn error(e: &Error, output: Output) -> ExitCode {
    let code = e.kind().exit_code();
    print_error(code, kind_name(e.kind()), &e.to_string(), hint(e), output);
    ExitCode::from(code)
}

/// Prints a failure as the user wants it.
pub fn print_error(code: u8, kind: &str, message: &str, hint: Option<&str>, output: Output) {
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
fn hint(e: &Error) -> Option<&'static str> {
    match e.kind() {
        Kind::Damaged if e.to_string().contains("DiskDescriptor.xml") => Some(
            "the images beside it are untouched: mend that file, or `ploopctl adopt` one of them",
        ),
        Kind::Damaged => {
            Some("`ploopctl check DISK` says more; `--repair` mends what can be mended")
        }
        Kind::Poisoned => {
            Some("an earlier write failed; `ploopctl recover DISK`, or detach and check it")
        }
        Kind::NoSpace => Some("free space on the file system that holds the disk's files"),
        Kind::ReadOnly => Some("`--read-only` serves or mounts what cannot be written"),
        Kind::Privilege if e.to_string().contains("CAP_SYS_ADMIN") => {
            Some("`init --fs none`, `serve`, `check`, `info`, `map` need no root")
        }
        // What lacks another capability says what to do without it.
        Kind::Privilege if e.to_string().contains("CAP_") => None,
        Kind::Privilege => Some("these files are another user's; be that user, or root"),
        _ => None,
    }
}
