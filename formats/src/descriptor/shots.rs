//! Shots: the snapshot tree, which exists only when it is one.
//!
//! Owns the rules among shots and images of ploop reference 2.2: one shot for each image, one
//! base, parents that exist, no cycle, bounded depth, a top that is there and is not temporary.

use super::{Image, Shot};
use crate::guid::Guid;
use crate::{Error, Result, limits};
use std::collections::{HashMap, HashSet};

/// A snapshot tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shots {
    all: Vec<Shot>,
    top: Guid,
    base: Shot,
    /// The last shot is not in the text: see [`missing_top`].
    implied: bool,
}

impl Shots {
    /// Checks the shots of a text against its images.
    pub(super) fn new(mut all: Vec<Shot>, top: Option<Guid>, images: &[Image]) -> Result<Self> {
        if images.is_empty() {
            return Err(Error::damaged("the disk has no image"));
        }
        let missing = missing_top(&all, top, images)?;
        all.extend(missing);
        let top = if missing.is_some() {
            Guid::TOP
        } else {
            top.unwrap_or(Guid::TOP)
        };
        let parents = parents(&all)?;
        check_images(&parents, images)?;
        let base = only_base(&all)?;
        check_chains(&all, &parents)?;
        check_top(&all, top)?;
        Ok(Self {
            all,
            top,
            base,
            implied: missing.is_some(),
        })
    }

    pub(super) fn all(&self) -> &[Shot] {
        &self.all
    }

    pub(super) const fn top(&self) -> Guid {
        self.top
    }

    pub(super) const fn base(&self) -> &Shot {
        &self.base
    }

    pub(super) fn find(&self, guid: Guid) -> Option<&Shot> {
        self.all.iter().find(|shot| shot.guid == guid)
    }

    /// The top shot that the text leaves out, if it does.
    pub(super) fn implied(&self) -> Option<&Shot> {
        self.all.last().filter(|_| self.implied)
    }
}

/// The top shot, when the text has one shot less than images: older tools leave it out. It stands
/// on the shot that the text calls top, or on the only leaf, or on nothing when it is alone.
fn missing_top(shots: &[Shot], top: Option<Guid>, images: &[Image]) -> Result<Option<Shot>> {
    if shots.len().checked_add(1) != Some(images.len()) {
        return Ok(None);
    }
    let named = top.filter(|top| shots.iter().any(|shot| shot.guid == *top));
    let parents: HashSet<Guid> = shots.iter().map(|shot| shot.parent).collect();
    let mut leaves = shots
        .iter()
        .map(|shot| shot.guid)
        .filter(|guid| !parents.contains(guid));
    let parent = match (named, leaves.next(), leaves.next()) {
        (Some(named), ..) => named,
        (None, Some(leaf), None) => leaf,
        (None, None, _) => Guid::NONE,
        (None, Some(_), Some(_)) => {
            return Err(Error::damaged(
                "one image has no shot, and several snapshots could be its parent",
            ));
        }
    };
    Ok(Some(Shot {
        guid: Guid::TOP,
        parent,
        mark: None,
    }))
}

/// The parent of each shot.
fn parents(shots: &[Shot]) -> Result<HashMap<Guid, Guid>> {
    let mut parents = HashMap::with_capacity(shots.len());
    for shot in shots {
        if shot.guid.is_none() {
            return Err(Error::damaged(format!(
                "a shot has the GUID {}",
                Guid::NONE
            )));
        }
        if parents.insert(shot.guid, shot.parent).is_some() {
            return Err(Error::damaged(format!(
                "two shots have the GUID {}",
                shot.guid
            )));
        }
    }
    Ok(parents)
}

fn check_images(parents: &HashMap<Guid, Guid>, images: &[Image]) -> Result<()> {
    if let Some(image) = images
        .iter()
        .find(|image| !parents.contains_key(&image.guid))
    {
        return Err(Error::damaged(format!("image {} has no shot", image.guid)));
    }
    if images.len() != parents.len() {
        return Err(Error::damaged(format!(
            "{} images and {} shots: a snapshot has no image",
            images.len(),
            parents.len()
        )));
    }
    Ok(())
}

fn only_base(shots: &[Shot]) -> Result<Shot> {
    let mut bases = shots.iter().filter(|shot| shot.parent.is_none());
    match (bases.next(), bases.next()) {
        (Some(base), None) => Ok(*base),
        (None, _) => Err(Error::damaged("no shot is the base: each has a parent")),
        (Some(a), Some(b)) => Err(Error::damaged(format!(
            "two shots without a parent, {} and {}: a disk has one base",
            a.guid, b.guid
        ))),
    }
}

/// Every chain ends at the base within the depth that ploop allows.
fn check_chains(shots: &[Shot], parents: &HashMap<Guid, Guid>) -> Result<()> {
    for shot in shots {
        let (mut depth, mut below) = (1usize, shot.parent);
        while !below.is_none() {
            depth = depth.saturating_add(1);
            if depth > limits::DEPTH_MAX {
                return Err(too_deep(shot.guid, parents));
            }
            below = *parents.get(&below).ok_or_else(|| {
                Error::damaged(format!(
                    "shot {}: its ancestor {below} is no shot",
                    shot.guid
                ))
            })?;
        }
    }
    Ok(())
}

/// A chain above the limit is either that or a circle.
fn too_deep(start: Guid, parents: &HashMap<Guid, Guid>) -> Error {
    let (mut seen, mut next) = (HashSet::new(), start);
    while seen.insert(next) {
        match parents.get(&next) {
            Some(parent) => next = *parent,
            None => {
                return Error::unsupported(format!(
                    "snapshot {start} stands on {} images; ploop allows {}: merge some of them",
                    seen.len().saturating_sub(1),
                    limits::DEPTH_MAX
                ));
            }
        }
    }
    Error::damaged(format!(
        "shot {start}: its ancestors form a circle at {next}"
    ))
}

fn check_top(shots: &[Shot], top: Guid) -> Result<()> {
    if top == Guid::BACKUP {
        return Err(Error::damaged(format!(
            "the top has the GUID reserved for backups, {top}"
        )));
    }
    match shots.iter().find(|shot| shot.guid == top) {
        None => Err(Error::damaged(format!("TopGUID {top} names no shot"))),
        Some(shot) if shot.mark.is_some() => Err(Error::damaged(format!(
            "the top {top} is marked temporary: an interrupted operation must be finished first"
        ))),
        Some(_) => Ok(()),
    }
}
