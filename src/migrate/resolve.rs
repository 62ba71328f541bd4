//! Resolve: what to do with a disk whose migration was cut off between its two sides.
//!
//! Each side knows what it has written down and nothing of the other. What one may do depends on a
//! word that only the other can show: the source's, that it cannot be used any more; the target's,
//! that it has thrown its copy away.

use super::receive::become_disk;
use super::record::{Proof, Record, Secret, Source, SourcePhase, TargetPhase, Words};
use crate::image::change::{self, is_delta};
use crate::image::members::{DELETED, INCOMING, MIGRATION, MIGRATION_ASIDE, SEALED};
use crate::image::snapshot::names;
use crate::image::target::DESCRIPTOR;
use ploop_formats::folder::{self, Folder};
use ploop_formats::{Error, Kind, Result};
use uuid::Uuid;

/// How a side stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Which migration; none where there was none.
    pub session: Option<Uuid>,
    /// What this side is.
    pub side: Side,
    /// The word that the other side wants to see, where it may be shown.
    pub word: Option<Secret>,
}

/// What a side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// A disk that can be used: its migration has not come to its end, or this is where it ended.
    Usable,
    /// A source that cannot be used, and does not know whether the target has the disk.
    Sealed,
    /// A source whose target said that it has the disk.
    Moved,
    /// A target that has a part of the disk.
    Receiving,
    /// A target that has all of it, and waits for the word.
    Ready,
    /// A target that has thrown its copy away.
    Discarded,
}

/// How the side in a folder stands. `NotFound` where nothing is of a migration, and no disk.
pub async fn standing<F: Folder>(folder: &F) -> Result<Standing> {
    let record = Record::read(folder).await?;
    let is_usable = folder::has(folder, DESCRIPTOR).await?;
    let (session, side, word) = match record {
        None if is_usable => (None, Side::Usable, None),
        None => {
            let what = "neither a disk nor what a migration left";
            return Err(Error::new(Kind::NotFound, what));
        }
        Some(Record::Source(source)) => match source.phase {
            // The word is worth nothing before the source cannot be used.
            _ if is_usable => (Some(source.session), Side::Usable, None),
            SourcePhase::Moved => (Some(source.session), Side::Moved, None),
            SourcePhase::Sending | SourcePhase::Sealed { .. } => {
                (Some(source.session), Side::Sealed, Some(source.word))
            }
        },
        Some(Record::Target(target)) => {
            let (side, word) = match target.phase {
                // The descriptor has its name: nothing else proves that it has the disk.
                _ if is_usable => (Side::Usable, Some(target.words.taken)),
                TargetPhase::Receiving { .. } => (Side::Receiving, None),
                TargetPhase::Ready => (Side::Ready, None),
                TargetPhase::Discarded => (Side::Discarded, Some(target.words.discarded)),
            };
            (Some(target.session), side, word)
        }
    };
    Ok(Standing {
        session,
        side,
        word,
    })
}

/// Makes a target that is ready the one that has the disk: the source has shown its word.
pub async fn go<F: Folder>(folder: &F, word: &Secret) -> Result<()> {
    match (standing(folder).await?.side, Record::read(folder).await?) {
        (Side::Ready, Some(Record::Target(target))) => become_disk(folder, &target, word).await,
        (side, _) => Err(side.refuse("only a target that is ready takes the word of its source")),
    }
}

/// Makes a sealed source usable again: the target has shown that its copy is thrown away.
pub async fn back<F: Folder>(folder: &F, word: &Secret) -> Result<()> {
    let (_, words) = sealed(folder).await?;
    words.discarded.check(word)?;
    folder.rename(SEALED, DESCRIPTOR).await?;
    folder.sync().await?;
    folder.remove(MIGRATION).await
}

/// Writes down that the target has the disk, which it has shown.
pub async fn gone<F: Folder>(folder: &F, word: &Secret) -> Result<()> {
    let (mut source, words) = sealed(folder).await?;
    words.taken.check(word)?;
    source.phase = SourcePhase::Moved;
    Record::Source(source).write(folder).await
}

/// A source that cannot be used, and does not know whether the target has the disk; what that can show.
async fn sealed<F: Folder>(folder: &F) -> Result<(Source, Words<Proof>)> {
    let side = standing(folder).await?.side;
    match (side, Record::read(folder).await?) {
        (Side::Sealed, Some(Record::Source(source))) => match source.phase.clone() {
            SourcePhase::Sealed { words } => Ok((source, words)),
            SourcePhase::Sending | SourcePhase::Moved => Err(side.refuse(NOT_SEALED)),
        },
        _ => Err(side.refuse(NOT_SEALED)),
    }
}

const NOT_SEALED: &str = "only a sealed source takes a word of its target";

/// Makes a source whose disk has gone one that is being deleted: `delete` finishes it.
pub async fn give_up<F: Folder>(folder: &F) -> Result<()> {
    match standing(folder).await?.side {
        Side::Moved => {
            folder.rename(SEALED, DELETED).await?;
            folder.sync().await
        }
        side => Err(side.refuse("only a source whose disk has gone is deleted so")),
    }
}

/// Throws away what a target has received; the word that proves it.
///
/// In order: that the word of the source is never taken is written down, durably so; then the files
/// go. What is left of them when this is cut goes when it is asked for again.
pub async fn discard<F: Folder>(folder: &F) -> Result<Secret> {
    let side = standing(folder).await?.side;
    let record = Record::read(folder).await?;
    let (Side::Receiving | Side::Ready | Side::Discarded, Some(Record::Target(mut target))) =
        (side, record)
    else {
        return Err(side.refuse("only a target that has not got the disk throws its copy away"));
    };
    target.phase = TargetPhase::Discarded;
    let word = target.words.discarded.clone();
    Record::Target(target).write(folder).await?;
    if let Ok(disk) = change::read(folder, INCOMING).await {
        let files = disk.images().iter().map(|image| image.file.as_str());
        for file in files.filter(|file| is_delta(file)) {
            folder.remove(file).await?;
        }
    }
    for file in [names::FILE, MIGRATION_ASIDE, INCOMING] {
        folder.remove(file).await?;
    }
    folder.sync().await?;
    Ok(word)
}

impl Side {
    fn refuse(self, rule: &str) -> Error {
        Error::new(Kind::Busy, format!("this is {}; {rule}", self.describe()))
    }

    /// For programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Usable => "usable",
            Self::Sealed => "sealed",
            Self::Moved => "moved",
            Self::Receiving => "receiving",
            Self::Ready => "ready",
            Self::Discarded => "discarded",
        }
    }

    /// In a few words.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Usable => "a disk that can be used",
            Self::Sealed => "a sealed source",
            Self::Moved => "a source whose disk has gone",
            Self::Receiving => "a target that has a part of the disk",
            Self::Ready => "a target that is ready",
            Self::Discarded => "a target that has thrown its copy away",
        }
    }
}
