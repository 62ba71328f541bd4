//! What is asked of a disk that is not attached, and which trees that leads through.

use super::alone;
use crate::image::change::settle;
use crate::image::clone::clone;
use crate::image::convert::content::{self, Form};
use crate::image::convert::version;
use crate::image::grow;
use crate::image::snapshot::copy::{Window, Work};
use crate::image::snapshot::{create, fold, layers, remove, switch};
use crate::testkit::trees::{self, Tree};
use ploop_formats::descriptor::{Descriptor, ImageRef, LayerFormat, Mark};
use ploop_formats::folder::{Access, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::Version;
use ploop_formats::store::sim::SimFolder;
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::SECTOR;
use std::sync::Arc;

/// How the names of files begin that are foretold.
pub(super) const NEW: &str = "new.";

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Finish or undo what another left, and nothing else.
    Settle,
    /// Freeze the top.
    Create(Guid),
    /// Go back to a point.
    Switch(Guid),
    /// Take a point away, or the top.
    Remove(Guid),
    /// Merge the top of a running disk into the point that it stands on.
    Fold(Guid),
    /// A new disk over a point, in a folder of this number.
    Clone(Guid, usize),
    /// A larger size, in clusters.
    Grow(u64),
    /// A smaller one.
    Shrink(u64),
    /// Change the format version of all deltas.
    Convert(Version),
    /// Write all of the disk anew, as one image.
    Flatten(Form),
}

/// What is by chance when a verb is carried out.
#[derive(Debug, Clone, Copy)]
pub struct Chance {
    /// Of the name of a new file.
    random: Guid,
    /// Of a copy.
    window: Window,
}

impl Chance {
    /// As dice want it.
    pub fn new(rng: &mut Rng) -> Self {
        Self {
            random: trees::guid(rng),
            window: trees::window(rng),
        }
    }
}

/// The kinds of verbs: a removal drops a leaf, marks what several stand on, merges one that carries
/// a frozen delta or the top, or drops the top. A fold merges the top of a running disk.
pub const KINDS: [&str; 14] = [
    "settle",
    "create",
    "switch",
    "drop",
    "mark",
    "merge",
    "merge-top",
    "drop-top",
    "fold",
    "clone",
    "grow",
    "shrink",
    "convert",
    "flatten",
];

/// Sizes that a disk grows to, in clusters: most need more of them for its table.
const SIZES: [u64; 4] = [7, 8177, 8180, 24_600];
/// Sizes that it shrinks to.
const SMALL: [u64; 4] = [1, 2, 3, 5];

impl Verb {
    /// A verb of a kind that the disk allows, if there is one. A clone is made in folder `to`.
    pub fn choose(
        kind: &str,
        disk: &Descriptor,
        folder: &SimFolder,
        to: usize,
        rng: &mut Rng,
    ) -> Option<Self> {
        let verb = |point| match kind {
            "switch" => Self::Switch(point),
            "clone" => Self::Clone(point, to),
            "fold" => Self::Fold(point),
            _ => Self::Remove(point),
        };
        let is_kind = |point: Guid| {
            let on: Vec<Guid> = disk.children(point).map(|shot| shot.guid).collect();
            let top = point == disk.top();
            match kind {
                "drop" => !top && on.is_empty(),
                "mark" => on.len() > 1,
                "merge" => on.len() == 1 && on[0] != disk.top(),
                "merge-top" | "fold" => on == [disk.top()],
                "drop-top" => top,
                _ => !top,
            }
        };
        match kind {
            "settle" => return Some(Self::Settle),
            "create" => return Some(Self::Create(trees::guid(rng))),
            "grow" => {
                let verb = Self::Grow(*rng.pick(&SIZES));
                return verb.is_legal(disk, folder).then_some(verb);
            }
            "shrink" => {
                let verb = Self::Shrink(*rng.pick(&SMALL));
                return verb.is_legal(disk, folder).then_some(verb);
            }
            "flatten" => {
                let forms = [Form::Expanded, Form::Preallocated, Form::Raw];
                let verb = Self::Flatten(*rng.pick(&forms));
                return verb.is_legal(disk, folder).then_some(verb);
            }
            "convert" => {
                let verb = Self::Convert(alone::other_version(folder, disk)?);
                return verb.is_legal(disk, folder).then_some(verb);
            }
            _ => {}
        }
        let points = disk.shots().iter().map(|shot| shot.guid);
        let points = points.filter(|point| is_kind(*point)).map(verb);
        let legal: Vec<Self> = points.filter(|v| v.is_legal(disk, folder)).collect();
        (!legal.is_empty()).then(|| *rng.pick(&legal))
    }

    /// Whether the disk in `folder` allows it.
    pub fn is_legal(self, disk: &Descriptor, folder: &SimFolder) -> bool {
        let marked = |guid| disk.shot(guid).is_none_or(|shot| shot.mark.is_some());
        let is_ploop = |all: Vec<ImageRef>| all.iter().all(|i| i.format == LayerFormat::Ploop);
        match self {
            Self::Settle => true,
            // What a file gains is zeros on every file system; here it is poison until it is flushed. A
            // raw base may be grown later, for a merge.
            Self::Grow(clusters) => {
                let has_raw = |all: Vec<ImageRef>| all.iter().any(|i| i.format == LayerFormat::Raw);
                disk.sectors() < clusters * trees::CLUSTER / SECTOR
                    && disk.chain(disk.top()).is_ok_and(|all| !has_raw(all))
            }
            // What is below would have to be small, too. A file that is cut is the old one or the new
            // one on every file system; here its old length may come back without what it held.
            Self::Shrink(clusters) => {
                disk.sectors() > clusters * trees::CLUSTER / SECTOR
                    && disk.images().len() == 1
                    && disk.chain(disk.top()).is_ok_and(is_ploop)
            }
            // A disk that has grown takes long to write anew.
            Self::Flatten(_) => disk.sectors() < SIZES[1] * trees::CLUSTER / SECTOR,
            Self::Create(uuid) => disk.shot(uuid).is_none(),
            Self::Switch(to) => !marked(to),
            Self::Clone(point, _) => disk
                .chain(point)
                .is_ok_and(|chain| !chain.iter().any(|image| marked(image.guid))),
            Self::Fold(point) => !is_shared(disk, folder, point),
            Self::Convert(_) => {
                let mut shots = disk.shots().iter();
                shots.all(|shot| !is_shared(disk, folder, shot.guid))
            }
            Self::Remove(point) => disk.shot(point).is_some_and(|shot| {
                let below = shot.parent;
                match disk.children(point).count() {
                    0 if point == disk.top() => {
                        let alone = disk.children(below).count() == 1;
                        alone && !marked(below) && !is_shared(disk, folder, below)
                    }
                    1 => !is_shared(disk, folder, point),
                    _ => true,
                }
            }),
        }
    }

    /// Carries it out.
    pub async fn carry_out(self, folder: SimFolder, chance: Chance) -> ploop_formats::Result<()> {
        let Chance { random, window } = chance;
        match self {
            Self::Settle => settle(&folder).await.map(|_| ()),
            Self::Create(uuid) => create::offline(&folder, uuid, random).await.map(|_| ()),
            Self::Switch(to) => switch::offline(&folder, to, random).await.map(|_| ()),
            Self::Remove(uuid) => {
                let mut watch = ();
                let mut work = Work::new(&mut watch, &()).within(window);
                remove::offline(&folder, uuid, &mut work).await.map(|_| ())
            }
            Self::Grow(clusters) => {
                let wanted = grow::Wanted::To(clusters * trees::CLUSTER);
                grow::offline(&folder, wanted).await.map(|_| ())
            }
            Self::Shrink(clusters) => {
                let wanted = grow::Wanted::Down(clusters * trees::CLUSTER);
                grow::offline(&folder, wanted).await.map(|_| ())
            }
            Self::Fold(lower) => fold(&folder, lower, window).await,
            Self::Flatten(form) => {
                let wanted = content::Wanted {
                    form: Some(form),
                    ..content::Wanted::default()
                };
                let mut watch = ();
                let mut work = Work::new(&mut watch, &()).within(window);
                let flat = content::in_place(&folder, wanted, true, random, &mut work);
                flat.await.map(drop)
            }
            Self::Convert(to) => version::offline(&folder, to, &mut ()).await.map(drop),
            Self::Clone(uuid, to) => {
                let to = folder.sibling(to);
                let source = settle(&folder).await?;
                clone(&folder, &source, uuid, &to, random).await.map(|_| ())
            }
        }
    }

    /// The disks that it leads through, one after another: the first is the old one, the last the
    /// new one.
    pub fn path(self, old: &Tree) -> Vec<Tree> {
        let (disk, top) = (&old.disk, old.disk.top());
        let file = format!("{NEW}{}", disk.images().len());
        let mut path = vec![old.clone()];
        let mut next = |disk: ploop_formats::Result<Descriptor>, point, like: Guid| {
            let mut tree = old.clone();
            tree.disk = disk.expect("a legal change");
            tree.contents.insert(point, old.contents[&like].clone());
            path.push(tree);
        };
        match self {
            Self::Settle | Self::Clone(..) | Self::Convert(_) => {}
            Self::Grow(clusters) => {
                let mut tree = old.clone();
                tree.grown = Some(clusters);
                path.push(tree);
            }
            // First the top is smaller, then the descriptor says so.
            Self::Shrink(clusters) => {
                let mut tree = old.clone();
                tree.grown = None;
                let content = tree.contents.get_mut(&top).expect("a top");
                content.truncate((clusters * trees::CLUSTER / SECTOR) as usize);
                path.push(tree.clone());
                tree.grown = Some(clusters);
                path.push(tree);
            }
            Self::Create(uuid) => next(disk.with_snapshot(uuid, &file), uuid, top),
            Self::Flatten(_) => next(alone::top_only(disk, &file), top, top),
            Self::Switch(to) => next(disk.switched(to, &file), top, to),
            Self::Remove(uuid) | Self::Fold(uuid) => match disk.children(uuid).count() {
                0 if uuid == top => {
                    let below = disk.shot(top).expect("a top").parent;
                    next(disk.without_top(), top, below);
                }
                0 => next(disk.without_leaf(uuid), top, top),
                n => {
                    let marked = disk.marked(uuid, Some(Mark::Temporary));
                    next(marked, top, top);
                    if n == 1 {
                        next(disk.dissolved(uuid), top, top);
                    }
                }
            },
        }
        path
    }

    /// The points whose files it may change: that of a merge, or the one that becomes the top, or
    /// all.
    pub fn targets(self, disk: &Descriptor) -> Vec<Guid> {
        let mut all = disk.shots().iter();
        match self {
            Self::Remove(uuid) if uuid == disk.top() => {
                all.filter(|s| s.guid == uuid).map(|s| s.parent).collect()
            }
            Self::Remove(uuid) | Self::Fold(uuid) => vec![uuid],
            Self::Convert(_) => all.by_ref().map(|shot| shot.guid).collect(),
            _ => Vec::new(),
        }
    }
}

/// As a worker and its changer do it, once the guest waits.
async fn fold(folder: &SimFolder, lower: Guid, window: Window) -> ploop_formats::Result<()> {
    let old = settle(folder).await?;
    let top = layers::open_write(folder, &old, &layers::image(&old, old.top())?).await?;
    let prepared = fold::prepare(folder, &old, lower).await?;
    let prepared = prepared.expect("a small top");
    let mut below = Vec::new();
    for image in old.chain(lower)? {
        below.push(Arc::new(layers::open_read(folder, &old, &image).await?));
    }
    let was = below.pop().expect("what the top stands on");
    let file = folder.open(&prepared.into, Access::Write).await?;
    let mut target = fold::open_target(file, &was, Ledger::local()).await?;
    top.close().await?;
    fold::fill(&top, &mut target, below, window).await?;
    prepared.change.commit().await?;
    Ok(())
}

fn is_shared(disk: &Descriptor, folder: &SimFolder, point: Guid) -> bool {
    let file = disk.image(point).map(|image| &image.file);
    let links = file.map(|file| now(folder.links(file)));
    matches!(links, Some(Ok(Some(n))) if n > 1)
}
