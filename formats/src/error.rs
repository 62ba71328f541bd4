//! The one error type of the workspace: a stable kind for programs, a sentence for people.
//!
//! A kind decides the errno that a guest sees and the exit code of a command, in one table here.
//! Messages name the file, the offset and the rule that was broken; outer layers add context with
//! [`Error::at`].

use std::fmt;

/// Result of this workspace.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a program cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The storage below failed (EIO).
    Io,
    /// No space, or no quota left, in the storage below. May succeed later.
    NoSpace,
    /// The table of pending changes is full: a flush makes room. Never reaches a guest.
    Pending,
    /// The image breaks a rule of its format.
    Damaged,
    /// The image, or the request, is legal but not something that this program does.
    Unsupported,
    /// The command line, or the settings, cannot be meant; nothing was looked at.
    Usage,
    /// The caller's argument is wrong: out of range, misaligned, contradictory.
    Invalid,
    /// A write reached something that is open read-only.
    ReadOnly,
    /// Somebody else uses it.
    Busy,
    /// There is no such file, disk or snapshot.
    NotFound,
    /// It is there already.
    Exists,
    /// A privilege is missing; the message names it.
    Privilege,
    /// It did not happen in time.
    TimedOut,
    /// The user cancelled it and nothing changed.
    Cancelled,
    /// An earlier failure forbids success until the disk is closed and checked.
    Poisoned,
}

impl Kind {
    /// The errno that a guest or a client sees, as Linux numbers it.
    pub const fn errno(self) -> i32 {
        match self {
            Kind::Io | Kind::Damaged | Kind::Poisoned => 5,
            Kind::NoSpace => 28,
            Kind::Pending => 11,
            Kind::Unsupported => 95,
            Kind::Invalid | Kind::Usage => 22,
            Kind::ReadOnly | Kind::Privilege => 1,
            Kind::Busy => 16,
            Kind::NotFound => 2,
            Kind::Exists => 17,
            Kind::TimedOut => 110,
            Kind::Cancelled => 125,
        }
    }

    /// The exit code of `ploopctl` (documented in its manual page).
    pub const fn exit_code(self) -> u8 {
        match self {
            Kind::Pending => 1,
            Kind::Invalid | Kind::Exists | Kind::ReadOnly => 1,
            Kind::Usage => 2,
            Kind::Busy => 4,
            Kind::Io | Kind::NoSpace | Kind::Poisoned => 5,
            Kind::Damaged => 6,
            Kind::Unsupported => 7,
            Kind::Privilege => 8,
            Kind::TimedOut => 9,
            Kind::Cancelled => 10,
            Kind::NotFound => 11,
        }
    }
}

/// An error: its kind, and where and what went wrong.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
}

impl Error {
    /// An error with a sentence for people.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: shorten(message.into()),
        }
    }

    /// The image breaks a format rule; say where and which.
    pub fn damaged(message: impl Into<String>) -> Self {
        Self::new(Kind::Damaged, message)
    }

    /// The caller asked for something senseless.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    /// Legal, but not done here.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, message)
    }

    /// An earlier flush failed.
    pub fn poisoned() -> Self {
        Self::new(
            Kind::Poisoned,
            "an earlier flush failed: detach the disk and check it",
        )
    }

    /// Puts the place (a file, an operation) in front of the message, unless it is there already. The
    /// message stays bounded.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        let place = format!("{place}: ");
        if !self.message.starts_with(&place) {
            self.message = shorten(place + &self.message);
        }
        self
    }

    /// What went wrong, for a program.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Makes a failure that must not be retried: whatever a failed flush says, what it covered
    /// may be lost.
    #[must_use]
    pub fn into_final(mut self) -> Self {
        if self.kind == Kind::NoSpace {
            self.kind = Kind::Io;
        }
        self
    }

    /// A copy for a second waiter of the same failed work.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self {
            kind: self.kind,
            message: self.message.clone(),
        }
    }
}

/// Bytes at either end of a message that are kept when it is longer than both: it may quote what an
/// image says, and goes to logs and clients.
const ENDS: usize = 1000;

fn shorten(message: String) -> String {
    let border = |at: usize| (0..=at).rev().find(|n| message.is_char_boundary(*n));
    let tail = message.len().saturating_sub(ENDS);
    match (border(ENDS), border(tail)) {
        (Some(head), Some(tail)) if head < tail => {
            let part = |range: Option<&str>| range.unwrap_or_default().to_string();
            let (head, tail) = (part(message.get(..head)), part(message.get(tail..)));
            format!("{head} [...] {tail}")
        }
        _ => message,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(source: std::io::Error) -> Self {
        use std::io::ErrorKind as E;
        let kind = match source.kind() {
            E::StorageFull | E::QuotaExceeded | E::FileTooLarge => Kind::NoSpace,
            E::NotFound => Kind::NotFound,
            E::AlreadyExists => Kind::Exists,
            E::PermissionDenied => Kind::Privilege,
            E::InvalidInput => Kind::Invalid,
            E::ReadOnlyFilesystem => Kind::ReadOnly,
            E::TimedOut => Kind::TimedOut,
            E::Unsupported => Kind::Unsupported,
            E::ResourceBusy | E::WouldBlock | E::ExecutableFileBusy => Kind::Busy,
            _ => Kind::Io,
        };
        Self::new(kind, source.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_does_not_grow_with_what_it_quotes() {
        let short = "x".repeat(2 * ENDS);
        assert_eq!(Error::invalid(&short).to_string(), short);
        for letter in ["x", "\u{e9}", "\u{20ac}"] {
            let long = format!("file {}: rule", letter.repeat(1 << 20));
            let said = Error::invalid(long).to_string();
            assert!(said.len() < 2100 && said.starts_with("file ") && said.ends_with(": rule"));
        }
        let place = "x".repeat(1 << 20);
        let said = Error::invalid("rule").at(place).at("file").to_string();
        assert!(said.len() < 2100 && said.starts_with("file: ") && said.ends_with(": rule"));
    }
}
