//! Report: what a check found, as values.
//!
//! Bounded whatever an image claims: findings beyond a limit are counted, and neither kept nor put
//! into words.

use crate::Kind;
use crate::severity::Severity;

/// Findings kept in full; a broken table can have millions.
const KEPT_MAX: usize = 1000;

/// Which rule a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FindingKind {
    /// A reference to a place behind the end of the file.
    PastEnd,
    /// An entry that cannot be decoded: reserved bits, a place that is no start of a cluster,
    /// contradictions.
    BadEntry,
    /// A cluster that only one may have is named by another, too.
    Overlap,
    /// A refcount is below the number of references: a write may destroy what somebody else has.
    RefcountLow,
    /// A refcount is above the number of references.
    Leak,
    /// The COPIED flag of an active entry says something else than the references.
    Copied,
    /// An entry names another place of the external data file than the guest's.
    OutOfPlace,
    /// The snapshot table, or a first-level table that it names, cannot be read.
    BadSnapshot,
    /// The bitmap directory cannot be read.
    BadBitmap,
    /// The image is marked dirty.
    Dirty,
    /// The image is marked corrupt.
    Corrupt,
}

impl FindingKind {
    /// A stable name for programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PastEnd => "past-end",
            Self::BadEntry => "bad-entry",
            Self::Overlap => "overlap",
            Self::RefcountLow => "refcount-low",
            Self::Leak => "leak",
            Self::Copied => "copied",
            Self::OutOfPlace => "out-of-place",
            Self::BadSnapshot => "bad-snapshot",
            Self::BadBitmap => "bad-bitmap",
            Self::Dirty => "dirty",
            Self::Corrupt => "corrupt",
        }
    }

    /// How bad it is.
    pub const fn severity(self) -> Severity {
        match self {
            Self::Dirty => Severity::Notice,
            Self::Leak => Severity::Leak,
            _ => Severity::Error,
        }
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The rule.
    pub kind: FindingKind,
    /// How bad.
    pub severity: Severity,
    /// File offset in bytes: of the field or entry, or of the cluster.
    pub offset: u64,
    /// A sentence: what is wrong and what it means.
    pub text: String,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong, in the order of the check, as far as kept.
    pub findings: Vec<Finding>,
    /// What a repair did.
    pub repaired: Vec<Finding>,
    /// Findings that were counted and not kept.
    pub omitted: u64,
    /// Findings of severity [`Severity::Error`].
    pub errors: u64,
    /// Findings of severity [`Severity::Leak`]: clusters. Next to errors they may be what a broken
    /// entry named.
    pub leaks: u64,
    /// Findings of severity [`Severity::Notice`].
    pub notices: u64,
    /// Bytes of the clusters that nobody names and that are not free.
    pub leaked_bytes: u64,
    /// Clusters of the file that somebody names.
    pub used_clusters: u64,
}

impl Report {
    /// Whether nothing is broken and nothing is lost; notices do not count.
    pub const fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0
    }

    /// An exit code in the words of `ploopctl check`: 0 clean, 3 leaks only, 6 damaged.
    pub const fn exit_code(&self) -> u8 {
        match (self.errors, self.leaks) {
            (0, 0) => 0,
            (0, _) => 3,
            _ => Kind::Damaged.exit_code(),
        }
    }

    /// Adds what a repair did.
    pub(super) fn done(&mut self, kind: FindingKind, offset: u64, text: String) {
        self.repaired.push(Finding {
            kind,
            severity: kind.severity(),
            offset,
            text: format!("offset {offset:#x}: {text}"),
        });
    }

    /// Adds a finding; `text` is asked for when it is kept.
    pub(super) fn find(&mut self, kind: FindingKind, offset: u64, text: impl FnOnce() -> String) {
        let severity = kind.severity();
        let count = match severity {
            Severity::Notice => &mut self.notices,
            Severity::Leak => &mut self.leaks,
            Severity::Error => &mut self.errors,
        };
        *count = count.saturating_add(1);
        if self.findings.len() >= KEPT_MAX {
            self.omitted = self.omitted.saturating_add(1);
            return;
        }
        self.findings.push(Finding {
            kind,
            severity,
            offset,
            text: format!("offset {offset:#x}: {}", text()),
        });
    }
}
