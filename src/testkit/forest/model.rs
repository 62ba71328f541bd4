//! The model: disks as ploop's rules want them, said a second time. It knows what each point holds,
//! in which file, and what every verb answers; it reads no image and no descriptor.

use crate::testkit::trees::Content;
use ploop_formats::Kind;
use ploop_formats::guid::Guid;
use std::collections::BTreeMap;

/// A file that several disks may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Which file of the world it is.
    pub place: usize,
    /// Its name, the same in every folder.
    pub name: String,
    /// A flat image.
    pub raw: bool,
}

impl File {
    /// A delta that a verb has just made: the world tells its place and name.
    fn new() -> Self {
        Self {
            place: usize::MAX,
            name: String::new(),
            raw: false,
        }
    }

    /// Whether nobody has looked yet where it is.
    pub const fn is_new(&self) -> bool {
        self.place == usize::MAX
    }
}

/// A point of a disk, or its top.
#[derive(Debug, Clone)]
pub struct Point {
    /// Its name; the top's is always [`Guid::TOP`].
    pub guid: Guid,
    /// What it stands on.
    pub parent: Option<Guid>,
    /// Where its own changes are.
    pub file: File,
    /// What a guest reads at it. Of one that is marked nobody asks.
    pub content: Content,
    /// It is to go, and nobody may go back to it.
    pub marked: bool,
}

/// A disk: its points, the top among them, in the order of their making.
#[derive(Debug, Clone)]
pub struct Disk {
    /// All of them; never empty.
    pub points: Vec<Point>,
}

/// What a verb answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It is done.
    Done,
    /// The point's file is gone.
    Dropped,
    /// What stood on the point took its file.
    Merged,
    /// So many stand on it: it is marked.
    Marked(usize),
    /// So many marked points went.
    Went(usize),
}

/// An answer, or the kind of its error.
pub type Answered = Result<Answer, Kind>;

/// All disks, by their folders.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// Each.
    pub disks: BTreeMap<usize, Disk>,
}

impl Disk {
    /// The point of this name.
    pub fn point(&self, guid: Guid) -> Option<&Point> {
        self.points.iter().find(|point| point.guid == guid)
    }

    fn at(&self, guid: Guid) -> usize {
        let at = self.points.iter().position(|point| point.guid == guid);
        at.expect("a point of the disk")
    }

    fn at_mut(&mut self, guid: Guid) -> &mut Point {
        let at = self.at(guid);
        &mut self.points[at]
    }

    /// What is written to.
    pub fn top(&self) -> &Point {
        self.point(Guid::TOP).expect("every disk has a top")
    }

    /// Replaces what a guest reads.
    pub fn write(&mut self, content: Content) {
        self.at_mut(Guid::TOP).content = content;
    }

    /// The points that stand on one.
    pub fn children(&self, guid: Guid) -> Vec<Guid> {
        let all = self.points.iter();
        let all = all.filter(|point| point.parent == Some(guid));
        all.map(|point| point.guid).collect()
    }

    /// A point and all below it, the base first.
    pub fn chain(&self, guid: Guid) -> Vec<&Point> {
        let mut chain = Vec::new();
        let mut next = self.point(guid);
        while let Some(point) = next {
            chain.push(point);
            next = point.parent.and_then(|parent| self.point(parent));
        }
        chain.reverse();
        chain
    }

    fn put_top(&mut self, on: Guid, content: Content) {
        self.points.push(Point {
            guid: Guid::TOP,
            parent: Some(on),
            file: File::new(),
            content,
            marked: false,
        });
    }

    fn drop_point(&mut self, guid: Guid) -> Point {
        let at = self.at(guid);
        self.points.remove(at)
    }

    fn create(&mut self, uuid: Guid) -> Answered {
        if [Guid::NONE, Guid::TOP, Guid::BACKUP].contains(&uuid) {
            return Err(Kind::Invalid);
        }
        if self.point(uuid).is_some() {
            return Err(Kind::Exists);
        }
        let top = self.at_mut(Guid::TOP);
        top.guid = uuid;
        let content = top.content.clone();
        self.put_top(uuid, content);
        Ok(Answer::Done)
    }

    fn switch(&mut self, to: Guid) -> Answered {
        let point = self.point(to).ok_or(Kind::NotFound)?;
        if to == Guid::TOP {
            return Err(Kind::Invalid);
        }
        if point.marked {
            return Err(Kind::Busy);
        }
        let content = point.content.clone();
        self.drop_point(Guid::TOP);
        self.put_top(to, content);
        Ok(Answer::Done)
    }

    /// The only child takes the file and the place of `lower`.
    fn merge(&mut self, lower: Guid, shared: &dyn Fn(&File) -> bool, cut: bool) -> Answered {
        let children = self.children(lower);
        if children.len() != 1 || shared(&self.at_mut(lower).file) {
            return Err(Kind::Busy);
        }
        if cut {
            self.at_mut(lower).marked = true;
            return Err(Kind::Cancelled);
        }
        let gone = self.drop_point(lower);
        let child = self.at_mut(children[0]);
        (child.file, child.parent) = (gone.file, gone.parent);
        Ok(Answer::Merged)
    }

    fn remove(&mut self, uuid: Guid, shared: &dyn Fn(&File) -> bool, cut: bool) -> Answered {
        self.point(uuid).ok_or(Kind::NotFound)?;
        match self.children(uuid).len() {
            0 if uuid == Guid::TOP => self.drop_top(shared),
            0 => {
                self.drop_point(uuid);
                Ok(Answer::Dropped)
            }
            1 => self.merge(uuid, shared, cut),
            n => {
                self.at_mut(uuid).marked = true;
                Ok(Answer::Marked(n))
            }
        }
    }

    fn drop_top(&mut self, shared: &dyn Fn(&File) -> bool) -> Answered {
        let below = self.top().parent.ok_or(Kind::Busy)?;
        let point = self.point(below).expect("parents are points");
        if self.children(below).len() > 1 || point.marked || shared(&point.file) {
            return Err(Kind::Busy);
        }
        self.drop_point(Guid::TOP);
        self.at_mut(below).guid = Guid::TOP;
        Ok(Answer::Dropped)
    }

    /// Each marked point that can go is tried once, the oldest first.
    fn temporaries(&mut self, shared: &dyn Fn(&File) -> bool) -> Answered {
        let (mut went, mut failed, mut tried) = (0, None, Vec::new());
        loop {
            let ripe = |point: &&Point| {
                let few = self.children(point.guid).len() < 2;
                point.marked && few && !tried.contains(&point.guid)
            };
            let Some(guid) = self.points.iter().find(ripe).map(|point| point.guid) else {
                return failed.map_or(Ok(Answer::Went(went)), Err);
            };
            tried.push(guid);
            match self.remove(guid, shared, false) {
                Ok(_) => went += 1,
                Err(kind) => failed = failed.or(Some(kind)),
            }
        }
    }

    fn cloned(&self, uuid: Guid) -> Result<Self, Kind> {
        let point = self.point(uuid).ok_or(Kind::NotFound)?;
        if uuid == Guid::TOP {
            return Err(Kind::Invalid);
        }
        let chain: Vec<Guid> = self.chain(uuid).iter().map(|point| point.guid).collect();
        let kept = self.points.iter().filter(|p| chain.contains(&p.guid));
        let mut clone = Self {
            points: kept.cloned().collect(),
        };
        if clone.points.iter().any(|point| point.marked) {
            return Err(Kind::Busy);
        }
        clone.put_top(uuid, point.content.clone());
        Ok(clone)
    }
}

/// What is asked of a disk.
#[derive(Debug, Clone)]
pub enum Verb {
    /// Freeze the top.
    Create(Guid),
    /// Go back to a point.
    Switch(Guid),
    /// Take a point away; a merge is given up when it has told so often how far it is.
    Remove(Guid, Option<u64>),
    /// Merge what stands on a point into it, or give that up.
    Merge(Guid, Option<u64>),
    /// Take away what is marked and can go.
    Temporaries,
    /// Another disk over a point, in a folder that is free.
    Clone(Guid, usize),
    /// The whole disk goes.
    Forget,
    /// Its guest works; whether the disk is closed afterwards.
    Write(bool),
}

impl Verb {
    /// A word for it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Switch(_) => "switch",
            Self::Remove(..) => "remove",
            Self::Merge(..) => "merge",
            Self::Temporaries => "temporaries",
            Self::Clone(..) => "clone",
            Self::Forget => "forget",
            Self::Write(_) => "write",
        }
    }
}

impl World {
    /// How many disks have a file.
    pub fn links(&self, file: &File) -> u64 {
        let points = self.disks.values().flat_map(|disk| &disk.points);
        points.filter(|p| p.file.place == file.place).count() as u64
    }

    /// Does to disk number `own` what a verb does. `cut` says that a merge was given up.
    pub fn apply(&mut self, own: usize, verb: &Verb, cut: bool) -> Answered {
        let before = self.clone();
        let shared = |file: &File| before.links(file) > 1;
        let disk = self.disks.get_mut(&own).expect("a disk");
        match *verb {
            Verb::Create(uuid) => disk.create(uuid),
            Verb::Switch(to) => disk.switch(to),
            Verb::Remove(uuid, _) => disk.remove(uuid, &shared, cut),
            Verb::Merge(lower, _) => disk.merge(lower, &shared, cut),
            Verb::Temporaries => disk.temporaries(&shared),
            Verb::Clone(uuid, to) => {
                let clone = disk.cloned(uuid)?;
                self.disks.insert(to, clone);
                Ok(Answer::Done)
            }
            Verb::Forget => {
                self.disks.remove(&own);
                Ok(Answer::Done)
            }
            Verb::Write(_) => Ok(Answer::Done),
        }
    }

    /// Files that a verb may write to: the top, to close it, and what is merged into.
    pub fn may_change(&self, own: usize, verb: &Verb) -> Vec<usize> {
        let disk = &self.disks[&own];
        let top = disk.top().file.place;
        let target = |guid: Guid| disk.point(guid).filter(|_| disk.children(guid).len() == 1);
        let alone = |point: &&Point| self.links(&point.file) == 1;
        let goes = |point: &Point| {
            let top = disk
                .children(point.guid)
                .contains(&Guid::TOP)
                .then_some(top);
            let own = Some(point).filter(alone).map(|point| point.file.place);
            own.into_iter().chain(top)
        };
        match *verb {
            Verb::Create(_) | Verb::Write(_) => vec![top],
            Verb::Remove(guid, _) | Verb::Merge(guid, _) => {
                target(guid).into_iter().flat_map(goes).collect()
            }
            Verb::Temporaries => {
                let marked = disk.points.iter().filter(|point| point.marked);
                marked.flat_map(goes).chain([top]).collect()
            }
            Verb::Switch(_) | Verb::Clone(..) | Verb::Forget => Vec::new(),
        }
    }
}
