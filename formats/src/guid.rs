//! Guid: the name of an image in a descriptor.
//!
//! Owns the text forms and the three well-known values. It makes no random numbers: that is a
//! system call, so the caller brings the bytes. Being a value, two spellings of one GUID are
//! equal whatever their case; how a file spells it is kept by the descriptor, not here.
//!
//! Source: ploop reference 2.2 (OpenVZ/ploop `lib/di.c`, `lib/xml.c`).

use crate::{Error, Result};
use std::fmt;
use std::str::FromStr;
use uuid::{Builder, Uuid};

/// A GUID: 16 bytes, written `{8-4-4-4-12}` in a descriptor and without braces for people.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Guid(Uuid);

impl Guid {
    /// The parent of a base: all zeros, so that its text has no case.
    pub const NONE: Self = Self(Uuid::nil());
    /// The writable top of a normal disk.
    pub const TOP: Self = Self(Uuid::from_u128(0x5fba_abe3_6958_40ff_92a7_860e_329a_ab41));
    /// Reserved for backups: may not be the top.
    pub const BACKUP: Self = Self(Uuid::from_u128(0x7047_18e1_2314_44c8_9087_d78e_d36b_0f4e));

    /// Parses the descriptor's form: 38 characters, braces and hyphens included.
    pub fn parse(text: &str) -> Result<Self> {
        text.strip_prefix('{')
            .and_then(|rest| rest.strip_suffix('}'))
            .and_then(hyphenated)
            .ok_or_else(|| not_a_guid(text))
    }

    /// A version 4 GUID made of 16 random bytes.
    pub const fn random(bytes: [u8; 16]) -> Self {
        Self(Builder::from_random_bytes(bytes).into_uuid())
    }

    /// The form that people type: 36 characters, no braces.
    pub fn bare(self) -> String {
        self.0.hyphenated().to_string()
    }

    /// The UUID.
    pub const fn uuid(self) -> Uuid {
        self.0
    }

    /// Whether this is [`Guid::NONE`], the parent of a base.
    pub const fn is_none(self) -> bool {
        self.0.is_nil()
    }
}

/// The 36 characters between the braces. The `uuid` crate would take other spellings too, which
/// ploop does not.
fn hyphenated(text: &str) -> Option<Guid> {
    if text.len() != 36 {
        return None;
    }
    Uuid::try_parse(text).ok().map(Guid)
}

fn not_a_guid(text: &str) -> Error {
    let shown: String = text.chars().take(64).collect();
    Error::invalid(format!(
        "{shown:?} is not a GUID: expected 8-4-4-4-12 hexadecimal digits, as in {}",
        Guid::TOP
    ))
}

/// Parses what people type: with or without braces.
impl FromStr for Guid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text).or_else(|e| hyphenated(text).ok_or(e))
    }
}

/// Writes the descriptor's form: braces, lower case.
impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{}}}", self.0.hyphenated())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn well_known_values_are_spelled_as_ploop_spells_them() {
        assert_eq!(
            Guid::NONE.to_string(),
            "{00000000-0000-0000-0000-000000000000}"
        );
        assert_eq!(
            Guid::TOP.to_string(),
            "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
        );
        assert_eq!(
            Guid::BACKUP.to_string(),
            "{704718e1-2314-44c8-9087-d78ed36b0f4e}"
        );
        assert!(Guid::NONE.is_none() && !Guid::TOP.is_none());
    }

    #[test]
    fn case_does_not_matter_and_braces_only_on_the_command_line() {
        let upper = "{5FBAABE3-6958-40FF-92A7-860E329AAB41}";
        assert_eq!(Guid::parse(upper).unwrap(), Guid::TOP);
        assert_eq!(upper.parse::<Guid>().unwrap(), Guid::TOP);
        assert_eq!(Guid::TOP.bare().parse::<Guid>().unwrap(), Guid::TOP);
        assert!(Guid::parse(&Guid::TOP.bare()).is_err());
    }

    #[test]
    fn other_spellings_of_a_uuid_are_refused() {
        for text in [
            "",
            "{}",
            "{5fbaabe3695840ff92a7860e329aab41}",
            "5fbaabe3695840ff92a7860e329aab41",
            "urn:uuid:5fbaabe3-6958-40ff-92a7-860e329aab41",
            "{5fbaabe3-6958-40ff-92a7-860e329aab4g}",
            "{5fbaabe36-958-40ff-92a7-860e329aab41}",
            " {5fbaabe3-6958-40ff-92a7-860e329aab41}",
            "{5fbaabe3-6958-40ff-92a7-860e329aab41",
        ] {
            assert!(Guid::parse(text).is_err(), "{text}");
            assert!(text.parse::<Guid>().is_err(), "{text}");
        }
    }

    #[test]
    fn random_bytes_become_a_version_4_guid() {
        let guid = Guid::random([0xFF; 16]);
        assert_eq!(guid.to_string(), "{ffffffff-ffff-4fff-bfff-ffffffffffff}");
        assert_eq!(Guid::parse(&guid.to_string()).unwrap(), guid);
    }
}
