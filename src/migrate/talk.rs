//! Talk: what the two sides of a migration say to each other, between the data.

use super::frame::Frame;
use super::record::{Place, Proof, Secret, Words};
use ploop_formats::guid::Guid;
use ploop_formats::{Error, Kind, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use uuid::Uuid;

/// Version of what is spoken.
pub const PROTO: u32 = 1;

/// What the source says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "lowercase")]
pub enum ToTarget {
    /// What is going to be sent.
    Hello(Hello),
    /// What follows is of this delta, from `from` on.
    Delta {
        /// Which of [`Hello::deltas`].
        index: usize,
        /// Bytes from the disk's start.
        from: u64,
    },
    /// All of the delta before `at` was sent: make it durable, and say so.
    Sync {
        /// Bytes from the disk's start.
        at: u64,
    },
    /// That was the delta. It is answered as the other.
    Whole,
    /// That was the disk: close it, check it, and be ready.
    End,
    /// The disk is yours: the source cannot be used any more.
    Go {
        /// The word that the target has the proof of.
        word: Secret,
    },
}

/// What is going to be sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTO`].
    pub proto: u32,
    /// Tells this migration from others.
    pub session: Uuid,
    /// The source's descriptor.
    pub descriptor: String,
    /// Its deltas, each after the one that it stands on.
    pub deltas: Vec<Delta>,
    /// What its points are called, as its side file has it.
    pub names: Option<String>,
    /// Of the word that the source will show.
    pub go: Proof,
}

/// A delta that is to be made anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// Which of the descriptor's.
    #[serde(with = "bare")]
    pub guid: Guid,
    /// Virtual size in bytes.
    pub size: u64,
    /// Format version of a ploop image.
    pub version: u8,
    /// Whether the entries of a qcow2 image tell of subclusters.
    pub subclusters: bool,
}

/// What the target says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "lowercase")]
pub enum ToSource {
    /// It knows what is going to be sent.
    Welcome {
        /// What it has of that already, durably so.
        have: Place,
        /// What it will be able to show.
        words: Words<Proof>,
    },
    /// What it was to make durable is. These come in the order in which they were asked for.
    Synced,
    /// It has all, checked.
    Ready,
    /// It has the disk.
    Done {
        /// The word for that.
        taken: Secret,
    },
    /// It cannot go on.
    Failed {
        /// Why.
        message: String,
    },
}

/// A message as a frame.
pub fn frame(message: &impl Serialize) -> Result<Frame> {
    let text = serde_json::to_vec(message).map_err(io::Error::from)?;
    Ok(Frame::Message(text.into()))
}

/// The message that a frame is.
pub fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T> {
    serde_json::from_slice(text)
        .map_err(|e| Error::new(Kind::Io, format!("a message of the stream: {e}")))
}

/// A GUID without braces.
mod bare {
    use ploop_formats::guid::Guid;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(guid: &Guid, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&guid.bare())
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Guid, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(D::Error::custom)
    }
}
