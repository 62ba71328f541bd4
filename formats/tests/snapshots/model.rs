//! What each operation makes of a tree, said a second time: over the rule model's disks, and as
//! what a guest would read from each snapshot.

use crate::rules::{BACKUP, Disk, NONE, Row, TOP};
use ploop_formats::descriptor::{Descriptor, Mark};
use ploop_formats::guid::Guid;
use ploop_formats::{Kind, Result, limits};
use std::collections::BTreeMap;

/// An operation with its arguments; GUIDs are in lower case.
#[derive(Debug, Clone)]
pub enum Op {
    Snapshot(String, String),
    Switch(String, String),
    Leaf(String),
    Top,
    Dissolve(String),
    Mark(String, Option<Mark>),
    Clone(String, String),
}

impl Op {
    /// The crate's answer.
    pub fn apply(&self, disk: &Descriptor) -> Result<Descriptor> {
        let guid = |text: &str| Guid::parse(text).unwrap();
        match self {
            Self::Snapshot(u, file) => disk.with_snapshot(guid(u), file),
            Self::Switch(to, file) => disk.switched(guid(to), file),
            Self::Leaf(u) => disk.without_leaf(guid(u)),
            Self::Top => disk.without_top(),
            Self::Dissolve(u) => disk.dissolved(guid(u)),
            Self::Mark(u, mark) => disk.marked(guid(u), *mark),
            Self::Clone(u, file) => disk.cloned(guid(u), file),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::Snapshot(..) => "snapshot",
            Self::Switch(..) => "switch",
            Self::Leaf(..) => "leaf",
            Self::Top => "top",
            Self::Dissolve(..) => "dissolve",
            Self::Mark(..) => "mark",
            Self::Clone(..) => "clone",
        }
    }

    /// The answer that is right.
    pub fn expected(&self, disk: &Disk) -> std::result::Result<Disk, Kind> {
        self.refusal(disk).map_or(Ok(()), Err)?;
        let mut new = Disk {
            implied: false,
            ..disk.clone()
        };
        match self {
            Self::Snapshot(u, file) => {
                rename(&mut new, &disk.top, u);
                put_top(&mut new, disk, u, file);
            }
            Self::Switch(to, file) => {
                new.shots.remove(&disk.top);
                put_top(&mut new, disk, to, file);
            }
            Self::Leaf(u) => drop(new.shots.remove(u)),
            Self::Top => {
                let top = new.shots.remove(&disk.top).unwrap();
                rename(&mut new, &top.parent, &disk.top);
            }
            Self::Dissolve(u) => {
                let gone = new.shots.remove(u).unwrap();
                let child = disk.children(u)[0];
                let row = new.shots.get_mut(child).unwrap();
                (row.file, row.parent, row.kind) = (gone.file, gone.parent, gone.kind);
            }
            Self::Mark(u, mark) => {
                new.shots.get_mut(u).unwrap().mark = mark.map(|mark| mark.as_str().into());
            }
            Self::Clone(u, file) => {
                let chain = disk.chain(u);
                new.shots.retain(|guid, _| chain.contains(&guid.as_str()));
                put_top(&mut new, disk, u, file);
            }
        }
        if new
            .shots
            .keys()
            .any(|guid| new.chain(guid).len() > limits::DEPTH_MAX)
        {
            return Err(Kind::Unsupported);
        }
        if !disk.volume && new.top != TOP {
            if new.shots.contains_key(TOP) {
                return Err(Kind::Unsupported);
            }
            let foreign = new.top.clone();
            rename(&mut new, &foreign, TOP);
        }
        Ok(new)
    }

    fn refusal(&self, disk: &Disk) -> Option<Kind> {
        let marked = |guid: &str| disk.shots[guid].mark.is_some();
        let named = |guid: &String| disk.shots.contains_key(guid);
        let is_top = |guid: &String| *guid == disk.top;
        let needed = |guid: &str, n: usize| disk.children(guid).len() > n;
        let rules: Vec<(bool, Kind)> = match self {
            Self::Snapshot(u, _) => vec![
                ([NONE, TOP, BACKUP].contains(&u.as_str()), Kind::Invalid),
                (named(u), Kind::Exists),
            ],
            Self::Switch(u, _) | Self::Leaf(u) | Self::Dissolve(u) | Self::Clone(u, _)
                if !named(u) =>
            {
                vec![(true, Kind::NotFound)]
            }
            Self::Mark(u, mark) => vec![
                (!named(u), Kind::NotFound),
                (is_top(u) && mark.is_some(), Kind::Invalid),
            ],
            Self::Switch(to, _) => vec![
                (is_top(to), Kind::Invalid),
                (marked(to) || needed(&disk.top, 0), Kind::Busy),
            ],
            Self::Leaf(u) => vec![(is_top(u), Kind::Invalid), (needed(u, 0), Kind::Busy)],
            Self::Top => {
                let parent = disk.shots[&disk.top].parent.as_str();
                let busy = parent == NONE || needed(&disk.top, 0) || needed(parent, 1);
                vec![(busy || marked(parent), Kind::Busy)]
            }
            Self::Dissolve(u) => vec![
                (is_top(u) || !needed(u, 0), Kind::Invalid),
                (needed(u, 1), Kind::Busy),
            ],
            Self::Clone(u, _) => vec![
                (disk.chain(u).contains(&disk.top.as_str()), Kind::Invalid),
                (disk.chain(u).into_iter().any(marked), Kind::Busy),
            ],
        };
        let first = rules.into_iter().find(|(broken, _)| *broken);
        first
            .map(|(_, kind)| kind)
            .or_else(|| self.file_refusal(disk))
    }

    fn file_refusal(&self, disk: &Disk) -> Option<Kind> {
        let (Self::Snapshot(_, file) | Self::Switch(_, file) | Self::Clone(_, file)) = self else {
            return None;
        };
        let plain = |file: &str| file.trim_start_matches("./").to_string();
        if file.is_empty() || file.starts_with('/') || file.contains("..") {
            Some(Kind::Invalid)
        } else {
            let mut files = disk.shots.values().map(|row| plain(&row.file));
            files
                .any(|other| other == plain(file))
                .then_some(Kind::Exists)
        }
    }
}

fn rename(disk: &mut Disk, from: &str, to: &str) {
    let row = disk.shots.remove(from).unwrap();
    assert!(disk.shots.insert(to.into(), row).is_none());
    for row in disk.shots.values_mut().filter(|row| row.parent == from) {
        row.parent = to.into();
    }
    if disk.top == from {
        disk.top = to.into();
    }
}

/// A new, empty top: ploop labels it with the type of the base.
fn put_top(new: &mut Disk, old: &Disk, parent: &str, file: &str) {
    let base = &old.shots[old.children(NONE)[0]];
    let row = Row {
        parent: parent.into(),
        file: file.into(),
        kind: base.kind.clone(),
        mark: None,
        extras: Vec::new(),
    };
    assert!(new.shots.insert(old.top.clone(), row).is_none());
    new.top = old.top.clone();
}

/// What each file holds: the writes that reached it.
#[derive(Debug, Clone, Default)]
pub struct Files(pub BTreeMap<String, Vec<u64>>);

impl Files {
    /// What a guest reads from each shot: all writes to its chain, base first.
    fn contents(&self, disk: &Disk) -> BTreeMap<String, Vec<u64>> {
        let read = |guid: &String| {
            let files = disk
                .chain(guid)
                .into_iter()
                .rev()
                .map(|g| &disk.shots[g].file);
            files.flat_map(|file| self.0[file].clone()).collect()
        };
        disk.shots
            .keys()
            .map(|guid| (guid.clone(), read(guid)))
            .collect()
    }

    /// Does with the files what the caller of an operation does, and holds the operation to what
    /// it promises about contents.
    pub fn follow(&mut self, op: &Op, old: &Disk, new: &Disk, dropped: &[&str], added: &[&str]) {
        let mut contents = self.contents(old);
        let top = contents.remove(&old.top).unwrap();
        match op {
            Op::Snapshot(u, _) => drop(contents.insert(u.clone(), top.clone())),
            Op::Leaf(u) | Op::Dissolve(u) => drop(contents.remove(u)),
            Op::Clone(u, _) => contents.retain(|guid, _| old.chain(u).contains(&guid.as_str())),
            Op::Switch(..) | Op::Top | Op::Mark(..) => {}
        }
        let top = match op {
            Op::Switch(to, _) | Op::Clone(to, _) => contents[to].clone(),
            Op::Top => contents.remove(&old.shots[&old.top].parent).unwrap(),
            _ => top,
        };
        contents.insert(new.top.clone(), top);
        if let Op::Dissolve(u) = op {
            let above = self.0[&old.shots[old.children(u)[0]].file].clone();
            self.0.get_mut(&old.shots[u].file).unwrap().extend(above);
        }
        self.0.retain(|file, _| !dropped.contains(&file.as_str()));
        self.0
            .extend(added.iter().map(|file| (file.to_string(), Vec::new())));
        assert_eq!(self.contents(new), contents, "{op:?}");
        let mut files: Vec<&String> = new.shots.values().map(|row| &row.file).collect();
        files.sort_unstable();
        assert!(self.0.keys().eq(files), "{op:?}");
    }
}
