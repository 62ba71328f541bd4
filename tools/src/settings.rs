//! Settings: what an administrator wants otherwise than the defaults, in one file.
//!
//! `/etc/ploop/ploop.toml`, or what `--config` or `PLOOP_CONFIG` names. It may be absent. Options on
//! the command line win. A key that nobody knows is an error: a setting that is silently ignored is
//! worse than none. The keys are listed in `docs/SETTINGS.md`.

use crate::cmd::{CacheArg, SandboxArg, keep_free};
use clap::ValueEnum;
use ploop::io::room::KeepFree;
use ploop::serve::supervise::message::Destination;
use ploop::{Error, Kind, Result};
use serde::{Deserialize, Deserializer, de};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Where they are when nobody says otherwise.
pub const PLACE: &str = "/etc/ploop/ploop.toml";
/// Names another place.
const VARIABLE: &str = "PLOOP_CONFIG";

/// What the file says. `None` leaves the default in force.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Space that disks leave to the host.
    #[serde(deserialize_with = "space")]
    pub keep_free: Option<KeepFree>,
    /// Whether servers are confined.
    #[serde(deserialize_with = "word")]
    pub sandbox: Option<SandboxArg>,
    /// Where servers log that have no terminal.
    #[serde(deserialize_with = "word")]
    pub log: Option<LogArg>,
    /// For `mount`.
    pub mount: Verb,
    /// For `serve`.
    pub serve: Verb,
}

/// What differs between verbs.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Verb {
    /// Cache mode of the writable layer.
    #[serde(deserialize_with = "word")]
    pub cache: Option<CacheArg>,
}

/// Where servers log that have no terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogArg {
    /// The journal, else syslog, else a file.
    Auto,
    /// The journal.
    Journal,
    /// `/dev/log`.
    Syslog,
    /// A file in the run directory.
    File,
}

impl From<LogArg> for Destination {
    fn from(arg: LogArg) -> Self {
        match arg {
            LogArg::Auto => Self::Auto,
            LogArg::Journal => Self::Journal,
            LogArg::Syslog => Self::Syslog,
            LogArg::File => Self::File,
        }
    }
}

/// A word that an option of the same name takes, too.
fn word<'de, D: Deserializer<'de>, T: ValueEnum>(
    from: D,
) -> std::result::Result<Option<T>, D::Error> {
    let text = String::deserialize(from)?;
    let known = T::value_variants().iter().filter_map(T::to_possible_value);
    let known: Vec<String> = known.map(|v| v.get_name().to_string()).collect();
    let unknown = |_| de::Error::custom(format!("{text:?} is none of {}", known.join(", ")));
    T::from_str(&text, false).map(Some).map_err(unknown)
}

fn space<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Option<KeepFree>, D::Error> {
    let text = String::deserialize(from)?;
    let wrong = |e| de::Error::custom(format!("{text:?}: {e}; a size as \"1G\", or \"1%\""));
    keep_free(&text).map(Some).map_err(wrong)
}

/// What is no text file cannot be meant, either.
fn unreadable(e: std::io::Error) -> Error {
    match e.kind() {
        ErrorKind::InvalidData => Error::new(Kind::Usage, "not a text file in UTF-8"),
        ErrorKind::IsADirectory => Error::new(Kind::Usage, "a folder, not a file"),
        _ => Error::from(e),
    }
}

impl Settings {
    /// Reads the file in force: `named` on the command line, else in the environment, else at its
    /// place. Also says which, unless there is none.
    ///
    /// `NotFound` when a file that was named is absent, `Usage` with file, line and key when it says
    /// something that cannot be meant.
    pub fn read(named: Option<&Path>) -> Result<(Self, Option<PathBuf>)> {
        let variable = std::env::var_os(VARIABLE).filter(|v| !v.is_empty());
        let named = named.map(Path::to_path_buf).or(variable.map(PathBuf::from));
        let must_exist = named.is_some();
        let path = named.unwrap_or_else(|| PLACE.into());
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound && !must_exist => {
                return Ok((Self::default(), None));
            }
            Err(e) => return Err(unreadable(e).at(format!("settings {}", path.display()))),
        };
        let settings = Self::parse(&text).map_err(|e| e.at(path.display()))?;
        Ok((settings, Some(path)))
    }

    fn parse(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|e| {
            let before = e
                .span()
                .and_then(|s| text.get(..s.start))
                .unwrap_or_default();
            let number = before.matches('\n').count();
            let line = text.lines().nth(number).unwrap_or_default().trim();
            let said = e.message().replace("unknown field", "unknown key");
            let said = said.trim().replace('\n', " ");
            let what = format!("line {}: `{line}`: {said}", number + 1);
            Error::new(Kind::Usage, what)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_meant_are_refused_by_line_and_key() {
        let refused = |text: &str| {
            let e = Settings::parse(text).expect_err(text);
            assert_eq!(e.kind(), Kind::Usage);
            e.to_string()
        };
        let said = refused("sandbox = \"on\"\n\ncahce = \"none\"\n");
        assert!(
            said.starts_with("line 3: `cahce = \"none\"`: unknown key `cahce`"),
            "{said}"
        );
        let said = refused("[mount]\ncache = \"nono\"\n");
        assert!(
            said.contains("line 2: `cache = \"nono\"`") && said.contains("none, writeback"),
            "{said}"
        );
        let said = refused("[mount]\nsandbox = \"on\"\n");
        assert!(
            said.contains("line 2") && said.contains("unknown key `sandbox`"),
            "{said}"
        );
        for bad in [
            "log = 3",
            "keep-free = \"1.5G\"",
            "keep-free = 1",
            "[mount",
            "mount = 1",
            "log",
            "log = \"file\"\nlog = \"file\"",
        ] {
            assert!(refused(bad).contains("line "), "{bad}");
        }
    }

    #[test]
    fn nothing_said_is_nothing_set() {
        let settings = Settings::parse("# nothing\n[mount]\n").expect("valid");
        assert!(settings.log.is_none() && settings.mount.cache.is_none());
        let settings = Settings::parse("keep-free = \"2%\"\nlog = \"journal\"").expect("valid");
        assert_eq!(settings.keep_free, Some(KeepFree::Percent(2)));
        assert_eq!(settings.log, Some(LogArg::Journal));
    }
}
