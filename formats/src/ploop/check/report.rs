//! Report: what a check found, as values.
//!
//! Bounded whatever an image claims: findings beyond a limit are counted and not kept.

use crate::Kind;
use crate::ploop::header::HEADER_LEN;
pub use crate::severity::Severity;

/// Findings kept in full; a broken table can have a billion.
const KEPT_MAX: usize = 1000;

/// What a repair can do about a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grade {
    /// Mend it, and whatever can be read reads the same afterwards.
    Safe,
    /// Give up what an entry names and nobody can read any more: its cluster then reads as the layers
    /// below have it, or as zeros, and nobody is told an error.
    Loss,
    /// Nothing.
    None,
}

impl Grade {
    /// A stable name for programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Safe => "safe",
            Self::Loss => "loss",
            Self::None => "none",
        }
    }
}

/// Which rule a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FindingKind {
    /// An entry names a cluster past the end of the file.
    PastEnd,
    /// An entry names a place in the header clusters.
    InHeader,
    /// An entry names a cluster that another one names too.
    Duplicate,
    /// A v1 entry is not a multiple of the cluster.
    Misaligned,
    /// A slot behind the end of the device is not 0.
    BeyondDevice,
    /// The file ends inside its table.
    ShortFile,
    /// The file length is not a multiple of the cluster.
    RaggedTail,
    /// The table has no entry for some clusters of the size.
    ShortTable,
    /// The image was not closed.
    Unclean,
    /// A conversion between format versions was interrupted.
    Converting,
    /// Clusters behind the last one in use.
    TailLeak,
    /// Clusters between those in use, with data that nothing names.
    MiddleLeak,
    /// The `Empty` flag says something else than the table.
    EmptyFlag,
    /// The first data cluster is 0, or later than it need be.
    DataOffset,
    /// An extension pointer that must not be trusted.
    StaleExtension,
    /// The format extension is damaged.
    BadExtension,
    /// The format extension has a feature that must be understood and is not.
    UnknownFeature,
}

impl FindingKind {
    /// A stable name for programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PastEnd => "past-end",
            Self::InHeader => "in-header",
            Self::Duplicate => "duplicate",
            Self::Misaligned => "misaligned",
            Self::BeyondDevice => "beyond-device",
            Self::ShortFile => "short-file",
            Self::RaggedTail => "ragged-tail",
            Self::ShortTable => "short-table",
            Self::Unclean => "unclean",
            Self::Converting => "converting",
            Self::TailLeak => "tail-leak",
            Self::MiddleLeak => "middle-leak",
            Self::EmptyFlag => "empty-flag",
            Self::DataOffset => "data-offset",
            Self::StaleExtension => "stale-extension",
            Self::BadExtension => "bad-extension",
            Self::UnknownFeature => "unknown-feature",
        }
    }

    /// What a repair can do about it.
    pub const fn grade(self) -> Grade {
        match self {
            Self::PastEnd | Self::InHeader | Self::ShortFile => Grade::Loss,
            Self::Converting | Self::UnknownFeature => Grade::None,
            _ => Grade::Safe,
        }
    }

    /// How bad it is; a ragged tail is worse when something is in it.
    pub(super) const fn severity(self) -> Severity {
        match self {
            Self::EmptyFlag | Self::DataOffset | Self::StaleExtension => Severity::Notice,
            Self::TailLeak | Self::MiddleLeak | Self::RaggedTail => Severity::Leak,
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
    /// BAT slot, where it is about one.
    pub entry: Option<u64>,
    /// File offset in bytes: of the field or slot, or of the space that is lost.
    pub offset: u64,
    /// A sentence: what is wrong and what it means, or what was done about it.
    pub text: String,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong, in the order of the check, as far as kept.
    pub findings: Vec<Finding>,
    /// What a repair did, in its order, as far as kept.
    pub repaired: Vec<Finding>,
    /// Findings and repairs that were counted and not kept.
    pub omitted: u64,
    /// Findings of severity [`Severity::Error`].
    pub errors: u64,
    /// Findings of severity [`Severity::Leak`].
    pub leaks: u64,
    /// Findings of severity [`Severity::Notice`].
    pub notices: u64,
    /// Bytes that the leaks hold.
    pub leaked_bytes: u64,
    /// Clusters in use.
    pub used_clusters: u64,
}

impl Report {
    /// Whether nothing is broken and nothing is lost; notices do not count.
    pub const fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0
    }

    /// The exit code of `ploopctl check`: 0 clean, 3 leaks only, 6 damaged.
    pub const fn exit_code(&self) -> u8 {
        match (self.errors, self.leaks) {
            (0, 0) => 0,
            (0, _) => 3,
            _ => Kind::Damaged.exit_code(),
        }
    }

    /// Adds a finding of the severity that its kind has.
    pub(super) fn find(&mut self, kind: FindingKind, at: Place, text: String) {
        self.find_as(kind, kind.severity(), at, text);
    }

    /// Adds a finding.
    pub(super) fn find_as(
        &mut self,
        kind: FindingKind,
        severity: Severity,
        at: Place,
        text: String,
    ) {
        let count = match severity {
            Severity::Notice => &mut self.notices,
            Severity::Leak => &mut self.leaks,
            Severity::Error => &mut self.errors,
        };
        *count = count.saturating_add(1);
        keep(
            &mut self.findings,
            &mut self.omitted,
            finding(kind, severity, at, text),
        );
    }

    /// Notes what a repair did.
    pub(super) fn done(&mut self, kind: FindingKind, at: Place, text: String) {
        let finding = finding(kind, kind.severity(), at, text);
        keep(&mut self.repaired, &mut self.omitted, finding);
    }
}

fn keep(list: &mut Vec<Finding>, omitted: &mut u64, finding: Finding) {
    if list.len() < KEPT_MAX {
        list.push(finding);
    } else {
        *omitted = omitted.saturating_add(1);
    }
}

fn finding(kind: FindingKind, severity: Severity, at: Place, text: String) -> Finding {
    match at {
        Place::Byte(offset) => Finding {
            kind,
            severity,
            entry: None,
            offset,
            text: format!("offset {offset:#x}: {text}"),
        },
        Place::Slot(slot) => {
            let offset = slot.saturating_mul(4).saturating_add(HEADER_LEN);
            let text = format!("BAT entry {slot} (offset {offset:#x}): {text}");
            Finding {
                kind,
                severity,
                entry: Some(slot),
                offset,
                text,
            }
        }
    }
}

/// Where a finding is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    Byte(u64),
    Slot(u64),
}
