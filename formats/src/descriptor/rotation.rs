//! Rotation: what each operation on snapshots makes of the tree, of GUIDs and of file names.
//!
//! Owns the rules of ploop reference 2.3 (OpenVZ/ploop `lib/snapshot.c`, `lib/merge.c`). Every
//! method gives a new descriptor or an error; none touches a file. Which files to make, to merge
//! and to unlink, and in which order, is the caller's business: [`Descriptor::files_not_in`] says
//! what a change adds or drops.
//!
//! A new delta is a qcow2 image where the top is one, and else a ploop image.
//!
//! The new top always takes the old top's GUID. On an ordinary disk that is [`Guid::TOP`], or
//! becomes it with this very edit; a disk with a `Volume` keeps the random one that it has, which
//! is as legal.

use super::read::{canonical, check_file_name};
use super::{Descriptor, ImageType, Mark, Shot};
use crate::guid::Guid;
use crate::{Error, Kind, Result};
use std::collections::HashSet;

impl Descriptor {
    /// Freezes the top as snapshot `uuid`; `file` becomes the new, empty top above it. The old
    /// top's file keeps its place and is now called `uuid`; all that stood on the top stands on
    /// `uuid`.
    ///
    /// Fails with `Invalid` when `uuid` is one of the three reserved GUIDs or `file` is no legal
    /// name, with `Exists` when either is taken, and with `Unsupported` when the chain is as deep
    /// as ploop allows.
    pub fn with_snapshot(&self, uuid: Guid, file: &str) -> Result<Self> {
        self.check_new_guid(uuid)?;
        self.check_new_file(file)?;
        let (top, kind) = (self.top(), self.new_type());
        self.edit(|e| {
            e.rename(top, uuid)?;
            e.add(top, uuid, file, kind)?;
            e.set_top(top)
        })
    }

    /// Drops the top and its file; `file` is a new, empty top above `to`. No other GUID, parent or
    /// file changes.
    ///
    /// Fails with `NotFound`, with `Invalid` when `to` is the top or `file` is no legal name, with
    /// `Busy` when `to` is marked or a snapshot stands on the top, with `Exists` when `file` is
    /// taken (by the old top, too: the caller unlinks that one last), and with `Unsupported` when
    /// the chain of `to` is as deep as ploop allows.
    pub fn switched(&self, to: Guid, file: &str) -> Result<Self> {
        let shot = self.known(to)?;
        let top = self.top();
        if to == top {
            return Err(Error::invalid(format!("{to} is the top already")));
        }
        refuse_marked(shot)?;
        self.refuse_children(top, None)?;
        self.check_new_file(file)?;
        let kind = self.new_type();
        self.edit(|e| {
            e.remove(top)?;
            e.add(top, to, file, kind)?;
            e.set_top(top)
        })
    }

    /// Drops a snapshot that nothing stands on, and its file. Nothing else changes.
    ///
    /// Fails with `NotFound`, with `Invalid` for the top and with `Busy` when the snapshot has
    /// children.
    pub fn without_leaf(&self, uuid: Guid) -> Result<Self> {
        self.known(uuid)?;
        if uuid == self.top() {
            return Err(Error::invalid(format!(
                "{uuid} is the top: it goes only in favour of its parent"
            )));
        }
        self.refuse_children(uuid, None)?;
        self.edit(|e| e.remove(uuid))
    }

    /// Drops the top and its file; its parent is the top again: it keeps its file and its own
    /// parent, and takes the top's GUID.
    ///
    /// Fails with `Busy` when the top has no parent, or one that other children need or that is
    /// marked, and when a snapshot stands on the top.
    pub fn without_top(&self) -> Result<Self> {
        let top = self.top();
        let parent = self.known(top)?.parent;
        let Some(below) = self.shot(parent) else {
            return Err(Error::new(
                Kind::Busy,
                "the top is all that the disk has: there is no snapshot to go back to",
            ));
        };
        self.refuse_children(top, None)?;
        self.refuse_children(parent, Some(top))?;
        refuse_marked(below)?;
        self.edit(|e| {
            e.remove(top)?;
            e.rename(parent, top)?;
            e.set_top(top)
        })
    }

    /// `uuid` is merged into by its only child: the child keeps its GUID, its mark and its own
    /// children, and takes the file, the type and the parent of `uuid`, which goes. The file that
    /// the child had goes as well.
    ///
    /// The file of `uuid` must hold the child's data by then; that is the caller's business. Fails
    /// with `NotFound`, with `Invalid` for the top or a leaf, and with `Busy`, naming them, when
    /// there are several children.
    pub fn dissolved(&self, uuid: Guid) -> Result<Self> {
        let parent = self.known(uuid)?.parent;
        let image = self.image(uuid).ok_or_else(|| not_found(uuid))?;
        let child = self.children(uuid).next().filter(|_| uuid != self.top());
        let Some(&Shot { guid: child, .. }) = child else {
            return Err(Error::invalid(format!(
                "{uuid} is the top or a leaf: there is no child to merge into it"
            )));
        };
        if self.children(uuid).count() > 1 {
            self.refuse_children(uuid, None)?;
        }
        self.edit(|e| {
            e.remove(uuid)?;
            e.set_parent(child, parent)?;
            e.set_file(child, &image.file)?;
            e.set_type(child, image.kind)
        })
    }

    /// Marks a shot, or makes it an ordinary one again. No GUID, parent or file changes. Fails
    /// with `NotFound`, and with `Invalid` when the top would be marked.
    pub fn marked(&self, uuid: Guid, mark: Option<Mark>) -> Result<Self> {
        self.known(uuid)?;
        if uuid == self.top() && mark.is_some() {
            return Err(Error::invalid(format!(
                "{uuid} is the top, which cannot be marked temporary"
            )));
        }
        self.edit(|e| e.set_mark(uuid, mark))
    }

    /// The descriptor of a clone: the chain of `uuid`, in which every shot keeps its GUID, parent
    /// and file, and a new, empty top `file` above it. All other branches and the top are left
    /// out.
    ///
    /// Fails with `NotFound`, with `Invalid` when `file` is no legal name or the top, whose file is
    /// not frozen, is in the chain, with `Busy` when a shot of the chain is marked, with `Exists`
    /// when this descriptor names `file` already, and with `Unsupported` when the chain is as deep
    /// as ploop allows.
    pub fn cloned(&self, uuid: Guid, file: &str) -> Result<Self> {
        let chain: HashSet<Guid> = self.chain(uuid)?.iter().map(|layer| layer.guid).collect();
        let top = self.top();
        if chain.contains(&top) {
            return Err(Error::invalid(format!(
                "the top {top} may still change: make a snapshot and clone that"
            )));
        }
        let (kept, dropped): (Vec<&Shot>, Vec<&Shot>) = self
            .shots()
            .iter()
            .partition(|shot| chain.contains(&shot.guid));
        kept.into_iter().try_for_each(refuse_marked)?;
        self.check_new_file(file)?;
        let kind = self.new_type();
        self.edit(|e| {
            for shot in dropped {
                e.remove(shot.guid)?;
            }
            e.add(top, uuid, file, kind)?;
            e.set_top(top)
        })
    }

    /// Names of files that this descriptor names and `other` does not: of the old one, what a
    /// change drops; of the new one, what it adds. `./a` and `a` are one file.
    pub fn files_not_in<'a>(&'a self, other: &Self) -> impl Iterator<Item = &'a str> {
        let others = other.file_names();
        self.images()
            .iter()
            .map(|image| image.file.as_str())
            .filter(move |file| !others.contains(&canonical(file)))
    }

    /// A name for the file of a new image: that of the base's file and a random GUID, which has
    /// nothing to do with the GUID of a snapshot. Like ploop 9.x it does not pile such GUIDs up:
    /// one at the end of the base's name is replaced. The descriptor names no such file yet; that
    /// the directory has none is for the caller to see.
    pub fn new_file_name(&self, random: Guid) -> String {
        let base = self.image(self.base().guid).map(|image| &image.file);
        let stem = base.map_or("", |file| without_guid(file));
        let names = self.file_names();
        let mut guid = random;
        loop {
            let name = format!("{stem}.{guid}");
            if !names.contains(&canonical(&name)) {
                return name;
            }
            guid = Guid::random(guid.uuid().as_u128().wrapping_add(1).to_be_bytes());
        }
    }

    /// Type of a new delta: where the top is a qcow2 image, it is one as well. Else it is a ploop
    /// image, and called what the base is called, as ploop writes it.
    fn new_type(&self) -> ImageType {
        let kind = |guid| self.image(guid).map(|image| image.kind);
        match (kind(self.top()), kind(self.base().guid)) {
            (Some(ImageType::QCow2), _) => ImageType::QCow2,
            (_, Some(ImageType::Plain)) => ImageType::Plain,
            _ => ImageType::Compressed,
        }
    }

    fn file_names(&self) -> HashSet<String> {
        let images = self.images().iter();
        images.map(|image| canonical(&image.file)).collect()
    }

    fn known(&self, guid: Guid) -> Result<&Shot> {
        self.shot(guid).ok_or_else(|| not_found(guid))
    }

    /// Refuses a shot that something else than `except` stands on. That may be the top: what stands
    /// on it would be left on other content when another image takes the top's GUID.
    fn refuse_children(&self, uuid: Guid, except: Option<Guid>) -> Result<()> {
        let others: Vec<String> = self
            .children(uuid)
            .filter(|shot| Some(shot.guid) != except)
            .map(|shot| shot.guid.to_string())
            .collect();
        if others.is_empty() {
            return Ok(());
        }
        let others = others.join(", ");
        Err(Error::new(
            Kind::Busy,
            format!("{uuid} is needed by {others}: delete first what is needed no more"),
        ))
    }

    fn check_new_guid(&self, uuid: Guid) -> Result<()> {
        if [Guid::NONE, Guid::TOP, Guid::BACKUP].contains(&uuid) {
            return Err(Error::invalid(format!(
                "{uuid} is reserved and cannot name a snapshot"
            )));
        }
        match self.shot(uuid) {
            None => Ok(()),
            Some(_) => Err(Error::new(
                Kind::Exists,
                format!("there is a snapshot {uuid} already"),
            )),
        }
    }

    fn check_new_file(&self, file: &str) -> Result<()> {
        // What would be damage in a file that was read is here the caller's argument.
        check_file_name(file).map_err(|e| Error::invalid(e.to_string()))?;
        match self.file_names().contains(&canonical(file)) {
            false => Ok(()),
            true => Err(Error::new(
                Kind::Exists,
                format!("the disk has a file {file:?} already"),
            )),
        }
    }
}

/// A file name without the `.{GUID}` at its end, if there is one.
fn without_guid(file: &str) -> &str {
    match file.rsplit_once('.') {
        Some((stem, guid)) if Guid::parse(guid).is_ok() => stem,
        _ => file,
    }
}

fn refuse_marked(shot: &Shot) -> Result<()> {
    match shot.mark {
        None => Ok(()),
        Some(mark) => Err(Error::new(
            Kind::Busy,
            format!(
                "snapshot {} is marked {}: the operation that marked it must be finished first",
                shot.guid,
                mark.as_str()
            ),
        )),
    }
}

fn not_found(guid: Guid) -> Error {
    Error::new(Kind::NotFound, format!("there is no snapshot {guid}"))
}
