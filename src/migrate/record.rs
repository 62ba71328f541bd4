//! Record: what either side of a migration has written down in the disk's directory.
//!
//! It is replaced as a whole, durably so. Who finds none knows of no migration.

use crate::image::members::{MIGRATION as FILE, MIGRATION_ASIDE as ASIDE};
use ploop_formats::folder::{self, Folder};
use ploop_formats::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// Bytes that are read at all.
const FILE_MAX: u64 = 64 << 10;

/// What is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "side", rename_all = "lowercase")]
pub enum Record {
    /// By who has the disk.
    Source(Source),
    /// By who makes it anew.
    Target(Target),
}

/// Of who has the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Which migration.
    pub session: Uuid,
    /// How far it is.
    pub phase: SourcePhase,
    /// Shown to the target once this side cannot be used any more.
    pub word: Secret,
    /// The word that proves that the disk came here, where it did.
    pub came: Option<Secret>,
}

/// How far the source is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "lowercase")]
pub enum SourcePhase {
    /// It sends.
    Sending,
    /// It cannot be used any more, if its descriptor is [`SEALED`](crate::image::members::SEALED).
    Sealed {
        /// What the target can show.
        words: Words<Proof>,
    },
    /// The target has said that it has the disk.
    Moved,
}

/// Of who makes it anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Which migration.
    pub session: Uuid,
    /// How far it is.
    pub phase: TargetPhase,
    /// Of the word that makes the disk this side's.
    pub go: Proof,
    /// What it can show.
    pub words: Words<Secret>,
}

/// What a target can show to its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Words<T> {
    /// That it has the disk.
    pub taken: T,
    /// That it has thrown its copy away, and will never have it.
    pub discarded: T,
}

impl Words<Secret> {
    /// New ones.
    pub fn random() -> Self {
        Self {
            taken: Secret::random(),
            discarded: Secret::random(),
        }
    }

    /// What proves them.
    pub fn proofs(&self) -> Words<Proof> {
        Words {
            taken: self.taken.proof(),
            discarded: self.discarded.proof(),
        }
    }
}

/// How far the target is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "lowercase")]
pub enum TargetPhase {
    /// It has what was sent up to here, durably so.
    Receiving {
        /// Up to where.
        have: Place,
    },
    /// It has all, checked, and waits for the word.
    Ready,
    /// It has thrown its copy away and never takes the word.
    Discarded,
}

/// A place in what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Place {
    /// Deltas before it.
    pub delta: usize,
    /// Bytes from the disk's start.
    pub at: u64,
}

/// A word that nobody guesses.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(String);

/// What tells whether a word is the right one, and not the word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof(String);

impl Secret {
    /// A new one.
    pub fn random() -> Self {
        Self(Uuid::new_v4().simple().to_string())
    }

    /// What proves it.
    pub fn proof(&self) -> Proof {
        Proof(hex(&Sha256::digest(&self.0)))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a word")
    }
}

impl fmt::Display for Secret {
    /// As it is shown to a human.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Secret {
    type Err = Infallible;

    fn from_str(word: &str) -> std::result::Result<Self, Infallible> {
        Ok(Self(word.trim().to_ascii_lowercase()))
    }
}

impl Proof {
    /// `Invalid` where `word` is another one.
    pub fn check(&self, word: &Secret) -> Result<()> {
        match word.proof() == *self {
            true => Ok(()),
            false => Err(Error::invalid("that is not the word of this migration")),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Record {
    /// The record of a folder; none where there is none. `Damaged` for what is not one.
    pub async fn read<F: Folder>(folder: &F) -> Result<Option<Self>> {
        let text = match folder::load(folder, FILE, FILE_MAX).await {
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            text => text?,
        };
        let record = serde_json::from_slice(&text);
        record
            .map(Some)
            .map_err(|e| Error::damaged(format!("{FILE}: {e}")))
    }

    /// Writes it down, in place of the one there was, durably so.
    pub async fn write<F: Folder>(&self, folder: &F) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self).map_err(std::io::Error::from)?;
        text.push(b'\n');
        folder.remove(ASIDE).await?;
        folder::save(folder, ASIDE, &text).await?;
        folder.rename(ASIDE, FILE).await?;
        folder.sync().await
    }
}
