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
    // A rename that is seen may still be lost, and with it all that would be decided by it.
    folder.sync().await?;
    let is_usable = folder::has(folder, DESCRIPTOR).await?;
    let (session, side, word) = match Record::read(folder).await? {
        None if is_usable => (None, Side::Usable, None),
        // The word is worth nothing before the source cannot be used.
        Some(Record::Source(source)) if is_usable => {
            (Some(source.session), Side::Usable, source.came)
        }
        // The descriptor has its name: nothing else proves that it has the disk.
        Some(Record::Target(target)) if is_usable => {
            (Some(target.session), Side::Usable, Some(target.words.taken))
        }
        Some(Record::Source(source)) => match source.phase {
            SourcePhase::Moved => (Some(source.session), Side::Moved, source.came),
            SourcePhase::Sealed { .. } if folder::has(folder, SEALED).await? => {
                (Some(source.session), Side::Sealed, Some(source.word))
            }
            SourcePhase::Sealed { .. } | SourcePhase::Sending => return Err(nothing()),
        },
        Some(Record::Target(target)) => match target.phase {
            TargetPhase::Receiving { .. } => (Some(target.session), Side::Receiving, None),
            TargetPhase::Ready => (Some(target.session), Side::Ready, None),
            TargetPhase::Discarded => {
                let word = target.words.discarded;
                (Some(target.session), Side::Discarded, Some(word))
            }
        },
        None => return Err(nothing()),
    };
    Ok(Standing {
        session,
        side,
        word,
    })
}

fn nothing() -> Error {
    let what = "neither a disk nor what a migration left";
    Error::new(Kind::NotFound, what)
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
    let side = standing(folder).await?.side;
    match side {
        // It was begun before.
        Side::Moved if folder::has(folder, DELETED).await? => Ok(()),
        Side::Moved => {
            folder.rename(SEALED, DELETED).await?;
            folder.sync().await
        }
        _ => Err(side.refuse("only a source whose disk has gone is deleted so")),
    }
}

/// Throws away what a target has received.
///
/// In order: that the word of the source is never taken is written down, durably so; then the files
/// go. What is left of them when this is cut goes when it is asked for again. The record stays: its
/// source may want to see the word that it has. One that never was ready no source waits for, and
/// nothing is left of it.
pub async fn discard<F: Folder>(folder: &F) -> Result<()> {
    let side = standing(folder).await?.side;
    let record = Record::read(folder).await?;
    let (Side::Receiving | Side::Ready | Side::Discarded, Some(Record::Target(mut target))) =
        (side, record)
    else {
        return Err(side.refuse("only a target that has not got the disk throws its copy away"));
    };
    if side == Side::Ready {
        target.phase = TargetPhase::Discarded;
        Record::Target(target).write(folder).await?;
    }
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
    if side == Side::Receiving {
        folder.remove(MIGRATION).await?;
        folder.sync().await?;
    }
    Ok(())
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
