//! Severity: how bad is what a check found, in the same words for every format.

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// Odd, but harmless and legal for somebody.
    Notice,
    /// Space is lost and data is not.
    Leak,
    /// A rule is broken.
    Error,
}
