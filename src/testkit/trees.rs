//! Trees: disks with snapshots and branches in simulated folders, and what each point of them must
//! read as.

use crate::image::change;
use crate::image::snapshot::copy::Window;
use crate::image::snapshot::layers;
use crate::image::target::DESCRIPTOR;
use crate::stack::Stack;
use ploop_formats::descriptor::{Chs, Descriptor, ImageType, LayerFormat, Mark, NewDisk};
use ploop_formats::folder::Folder;
use ploop_formats::guid::Guid;
use ploop_formats::layer::Layer;
use ploop_formats::ploop::Version;
use ploop_formats::store::mutate::Mutator;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{Rules, Sim, SimFolder};
use ploop_formats::testkit::image::Delta;
use ploop_formats::testkit::qcow2::{Held, Image, audit};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp::{self, Seen, Value, ZERO};
use ploop_formats::units::{ClusterSize, SECTOR};
use ploop_formats::{Error, Result, buf};
use std::collections::{BTreeMap, BTreeSet};

/// The smallest cluster that the format allows, so that a state is small.
pub const CLUSTER: u64 = 32 << 10;
const SECTORS: usize = (CLUSTER / SECTOR) as usize;
/// Sectors of a subcluster.
const PIECE: usize = SECTORS / 32;

/// What files promise that are made while a tree lives.
pub const RULES: Rules = Rules {
    align: 1,
    metadata_end: CLUSTER,
    fresh_zero: true,
    max_len: u64::MAX,
    sealed: false,
};

/// Formats of a disk's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Formats {
    /// Ploop deltas, on a raw base or not.
    Ploop,
    /// Qcow2 images at any place among them.
    Mixed,
}

impl Formats {
    /// What files promise: metadata of qcow2 may be anywhere.
    pub const fn rules(self) -> Rules {
        match self {
            Self::Ploop => RULES,
            Self::Mixed => Rules {
                metadata_end: u64::MAX,
                ..RULES
            },
        }
    }
}

/// What a file has of a cluster: the value of each sector that is there.
type Cluster = Vec<Option<Value>>;

/// All of a cluster, if it is there.
fn whole(cluster: &Cluster) -> Option<Content> {
    cluster.iter().copied().collect()
}

/// Puts what a file has over what is below it.
fn lay_over(to: &mut [Value], cluster: &Cluster) {
    for (to, value) in to.iter_mut().zip(cluster) {
        *to = value.unwrap_or(*to);
    }
}

/// The value of each sector.
pub type Content = Vec<Value>;

/// A disk and what all its points must read as.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Its descriptor.
    pub disk: Descriptor,
    /// What a guest reads at each point, the top included; zeros behind that.
    pub contents: BTreeMap<Guid, Content>,
    /// Clusters that it has, when it has grown or shrunk.
    pub grown: Option<u64>,
}

/// Clusters of a disk that are read; behind them are zeros, whatever size it has.
const READ_MAX: u64 = 8;

/// A GUID that dice choose.
pub fn guid(rng: &mut Rng) -> Guid {
    let mut bytes = [0; 16];
    for half in bytes.chunks_exact_mut(8) {
        half.copy_from_slice(&rng.next().to_le_bytes());
    }
    Guid::random(bytes)
}

/// How much of a copy is under way at once: all, or so little that it waits, copies a cluster in
/// parts, and is made durable in between.
pub fn window(rng: &mut Rng) -> Window {
    if !rng.one_in(3) {
        return Window::default();
    }
    let step = *rng.pick(&[CLUSTER / 4, CLUSTER, 4 * CLUSTER]);
    Window {
        memory: step * rng.range(1, 3),
        step,
        unsynced: CLUSTER * rng.range(1, 6),
    }
}

/// Makes disks.
struct Maker<'a> {
    rng: &'a mut Rng,
    formats: Formats,
    version: Version,
    clusters: u64,
    next: Value,
    files: BTreeMap<String, Vec<Cluster>>,
    /// Those that may have a cluster in part.
    extended: BTreeSet<String>,
}

impl Maker<'_> {
    /// Clusters of a new file, each there once in `one_in` times.
    fn file(&mut self, name: &str, one_in: u64) {
        let mut clusters = Vec::new();
        for _ in 0..self.clusters {
            let there = self.rng.one_in(one_in);
            let zero = there && self.formats == Formats::Mixed && self.rng.one_in(6);
            clusters.push(match there {
                _ if zero => vec![Some(ZERO); SECTORS],
                true => self.cluster(),
                false => vec![None; SECTORS],
            });
        }
        self.files.insert(name.into(), clusters);
    }

    fn cluster(&mut self) -> Cluster {
        (0..SECTORS)
            .map(|_| {
                self.next += 1;
                Some(if self.rng.one_in(16) { ZERO } else { self.next })
            })
            .collect()
    }

    /// Has some clusters of a file be there in part.
    fn part(&mut self, name: &str) {
        self.extended.insert(name.into());
        for cluster in self.files.get_mut(name).expect("a file") {
            if whole(cluster).is_none() || self.rng.one_in(3) {
                continue;
            }
            for piece in cluster.chunks_mut(PIECE) {
                match self.rng.below(4) {
                    0..2 => piece.fill(None),
                    2 => piece.fill(Some(ZERO)),
                    _ => {}
                }
            }
        }
    }

    fn content(&self, disk: &Descriptor, point: Guid) -> Content {
        let mut content = vec![ZERO; self.clusters as usize * SECTORS];
        for image in disk.chain(point).expect("a point of the disk") {
            let layer = &self.files[&image.file];
            for (to, cluster) in content.chunks_mut(SECTORS).zip(layer) {
                lay_over(to, cluster);
            }
        }
        content
    }

    fn pages(&mut self, name: &str, format: LayerFormat, in_use: bool) -> Pages {
        let clusters = self.files[name].clone();
        if format == LayerFormat::Qcow2 {
            return self.qcow2(name, clusters);
        }
        let clusters: Vec<Option<Content>> = clusters.iter().map(whole).collect();
        if format == LayerFormat::Raw {
            let mut pages = Pages::new(self.clusters * CLUSTER);
            let sectors = clusters.into_iter();
            let sectors = sectors.flat_map(|c| c.unwrap_or_else(|| vec![ZERO; SECTORS]));
            for (n, value) in sectors.enumerate().filter(|(_, v)| *v != ZERO) {
                pages.write(n as u64 * SECTOR, &stamp::run(n as u64, 1, value));
            }
            return pages;
        }
        let delta = Delta {
            version: self.version,
            cluster: CLUSTER,
            clusters,
            leaks: self.rng.below(3) as u32,
            in_use,
        };
        delta.make(self.rng)
    }

    fn qcow2(&mut self, name: &str, clusters: Vec<Cluster>) -> Pages {
        let (snapshot, mut all) = (self.rng.one_in(3), Vec::new());
        for cluster in clusters {
            let held = match whole(&cluster) {
                None if cluster.iter().all(Option::is_none) => Held::Nothing,
                None => Held::Parts(cluster),
                Some(values) if values.iter().all(|value| *value == ZERO) => Held::Zero {
                    place: self.rng.one_in(2),
                },
                Some(values) if self.rng.one_in(4) => Held::Packed(values),
                Some(values) => Held::Data(values),
            };
            all.push((held, self.rng.one_in(2)));
        }
        let image = Image {
            version: 3,
            extended: self.extended.contains(name),
            behind: 0,
            log2: CLUSTER.trailing_zeros(),
            order: *self.rng.pick(&[3, 4, 6]),
            clusters: all,
            snapshot,
            free: self.rng.below(3) as u32,
            leaks: self.rng.below(3) as u32,
            counted_first: false,
            skip: 0,
        };
        image.make(self.rng)
    }
}

fn first_disk(clusters: u64, kind: ImageType) -> Descriptor {
    Descriptor::new_disk(&NewDisk {
        sectors: clusters * CLUSTER / SECTOR,
        cluster: ClusterSize::new(CLUSTER).expect("a legal size"),
        kind,
        file: "root.hds",
        preallocated: false,
        chs: Chs {
            cylinders: 1,
            heads: 16,
            sectors: 63,
        },
    })
    .expect("a new disk")
}

/// A disk that has no point yet.
#[derive(Debug)]
pub struct First {
    /// Its descriptor.
    pub disk: Descriptor,
    /// Its only file.
    pub pages: Pages,
    /// What a guest reads.
    pub content: Content,
    /// Numbers that its values took.
    pub values: Value,
}

/// Makes a disk of one file, `root.hds`, whose values are numbered from above `next`.
pub fn first_file(rng: &mut Rng, version: Version, clusters: u64, raw: bool, next: Value) -> First {
    let mut maker = Maker {
        rng,
        formats: Formats::Ploop,
        version,
        clusters,
        next,
        files: BTreeMap::new(),
        extended: BTreeSet::new(),
    };
    let kind = if raw {
        ImageType::Plain
    } else {
        ImageType::Compressed
    };
    let disk = first_disk(clusters, kind);
    maker.file("root.hds", if raw { 1 } else { 2 });
    let content = maker.content(&disk, disk.top());
    let in_use = maker.rng.one_in(4);
    let format = match raw {
        true => LayerFormat::Raw,
        false => LayerFormat::Ploop,
    };
    let pages = maker.pages("root.hds", format, in_use);
    First {
        disk,
        pages,
        content,
        values: maker.next - next,
    }
}

/// A file of these bytes.
pub fn text(bytes: &[u8]) -> Pages {
    let mut text = Pages::new(0);
    text.set_len(bytes.len() as u64);
    text.write(0, bytes);
    text
}

/// Folder of the other disk that may have files of a made one.
pub const OTHER: usize = 3;

/// Makes a disk of up to `shots` points, and puts it into a folder of its own world. Some points
/// are marked, and may have taken in a part of what stands on them; some files another disk has, too.
pub fn make(rng: &mut Rng, formats: Formats, shots: u64) -> (SimFolder, Tree) {
    let version = *rng.pick(&[Version::V1, Version::V2]);
    let raw = rng.one_in(4);
    let (clusters, shots, seed) = (rng.range(2, 6), rng.range(1, shots), rng.next());
    let mut maker = Maker {
        rng,
        formats,
        version,
        clusters,
        next: 0,
        files: BTreeMap::new(),
        extended: BTreeSet::new(),
    };
    let disk = maker.grow(raw, shots);
    let disk = maker.mix(disk);
    let shared = maker.share(&disk);
    let disk = maker.mark(disk, &shared);
    let rules = formats.rules();
    let folder = SimFolder::new(Sim::new(seed), Mutator::new(), rules);
    for image in disk.images() {
        let top = image.guid == disk.top();
        let format = layers::image(&disk, image.guid).expect("its own").format;
        let in_use = top && maker.rng.one_in(3);
        let pages = maker.pages(&image.file, format, in_use);
        folder.put(&image.file, pages, rules);
    }
    folder.put(DESCRIPTOR, text(&disk.encode()), rules);
    let other = folder.sibling(OTHER);
    for file in shared {
        other.put_link(&folder, &file);
    }
    let contents = disk.shots().iter();
    let contents = contents.map(|s| (s.guid, maker.content(&disk, s.guid)));
    let contents = contents.collect();
    let grown = None;
    let tree = Tree {
        disk,
        contents,
        grown,
    };
    (folder, tree)
}

impl Maker<'_> {
    /// A disk with branches, and its files.
    fn grow(&mut self, raw: bool, shots: u64) -> Descriptor {
        let kind = if raw {
            ImageType::Plain
        } else {
            ImageType::Compressed
        };
        let mut disk = first_disk(self.clusters, kind);
        self.file("root.hds", if raw { 1 } else { 2 });
        for _ in 1..shots {
            let file = disk.new_file_name(guid(self.rng));
            let all: Vec<Guid> = disk.shots().iter().map(|s| s.guid).collect();
            let to = *self.rng.pick(&all);
            disk = match to == disk.top() || self.rng.one_in(2) {
                true => disk.with_snapshot(guid(self.rng), &file),
                false => disk.switched(to, &file),
            }
            .expect("a legal change");
            self.file(&file, 3);
        }
        disk
    }

    /// Has some files be qcow2 images, where that is wanted, and some of these have clusters in part.
    fn mix(&mut self, mut disk: Descriptor) -> Descriptor {
        if self.formats == Formats::Ploop {
            return disk;
        }
        let images = disk.images().to_vec();
        for image in images {
            let is = layers::image(&disk, image.guid).expect("its own").format;
            if is == LayerFormat::Ploop && !self.rng.one_in(4) {
                let mixed = disk.edit(|e| e.set_type(image.guid, ImageType::QCow2));
                disk = mixed.expect("a legal change");
                if self.rng.one_in(2) {
                    self.part(&image.file);
                }
            }
        }
        disk
    }

    /// Files that another disk has, too: those of a point, once in three times.
    fn share(&mut self, disk: &Descriptor) -> Vec<String> {
        let frozen: Vec<Guid> = disk.shots().iter().map(|s| s.guid).collect();
        let frozen: Vec<Guid> = frozen.into_iter().filter(|g| *g != disk.top()).collect();
        if frozen.is_empty() || !self.rng.one_in(3) {
            return Vec::new();
        }
        let chain = disk.chain(*self.rng.pick(&frozen)).expect("a point");
        chain.into_iter().map(|image| image.file).collect()
    }

    /// Marks points; those that nobody shares may be merged into already, in part.
    fn mark(&mut self, mut disk: Descriptor, shared: &[String]) -> Descriptor {
        let frozen: Vec<Guid> = disk.shots().iter().map(|s| s.guid).collect();
        for point in frozen.into_iter().filter(|g| *g != Guid::TOP) {
            if !self.rng.one_in(5) {
                continue;
            }
            disk = disk
                .marked(point, Some(Mark::Temporary))
                .expect("not the top");
            let mut children = disk.children(point);
            let file = |guid| disk.image(guid).expect("an image").file.clone();
            if let (Some(child), None) = (children.next(), children.next())
                && !shared.contains(&file(point))
            {
                let below = self.content(&disk, point);
                self.take_in(&file(child.guid), &file(point), &below);
            }
        }
        disk
    }

    /// Has a lower file take in some clusters of an upper one; at the lower one a guest reads `below`.
    fn take_in(&mut self, upper: &str, lower: &str, below: &Content) {
        let parts = self.extended.contains(lower);
        for (n, below) in below.chunks(SECTORS).enumerate() {
            let cluster = self.files[upper][n].clone();
            if cluster.iter().all(Option::is_none) || !self.rng.one_in(2) {
                continue;
            }
            let to = &mut self.files.get_mut(lower).expect("a file")[n];
            if !parts {
                *to = below.iter().copied().map(Some).collect();
            }
            for (to, value) in to.iter_mut().zip(cluster) {
                *to = value.or(*to);
            }
        }
    }
}

/// What a guest reads at the beginning of a point of a disk, whose top is opened as the next user
/// would. Fails unless all that is behind it is zeros.
pub async fn content(folder: &SimFolder, disk: &Descriptor, point: Guid) -> Result<Content> {
    let mut all = Vec::new();
    for image in disk.chain(point)? {
        all.push(match image.guid == disk.top() {
            true => layers::open_write(folder, disk, &image).await?,
            false => layers::open_read(folder, disk, &image).await?,
        });
    }
    let stack = Stack::new(all)?;
    let size = stack.top().geometry().size;
    let len = size.min(READ_MAX * CLUSTER);
    if !stack.reads_zero(len, size, stack.depth()).await? {
        return Err(Error::damaged("more than there was before it grew"));
    }
    let bytes = stack
        .read(0, buf::aligned(len as usize), stack.depth())
        .await?;
    let sectors = bytes.chunks_exact(SECTOR as usize);
    let values = sectors
        .zip(0..)
        .map(|(sector, n)| match stamp::look(sector, n) {
            Seen::Value(value) => Ok(value),
            seen => Err(Error::damaged(format!("sector {n} of {point}: {seen:?}"))),
        });
    values.collect()
}

/// Names that a settled folder may have.
pub fn strangers(folder: &SimFolder, disk: &Descriptor) -> Vec<String> {
    let names = folder.names().into_keys();
    let known =
        |name: &String| name == DESCRIPTOR || disk.images().iter().any(|image| image.file == *name);
    names.filter(|name| !known(name)).collect()
}

/// The tree alone: each point, what it stands on, whether it is marked.
pub fn shape(disk: &Descriptor) -> Vec<(Guid, Guid, bool)> {
    let shots = disk.shots().iter();
    let mut all: Vec<_> = shots
        .map(|s| (s.guid, s.parent, s.mark.is_some()))
        .collect();
    all.sort();
    all
}

/// Settles a folder and judges all that is in it: its tree is one of `trees`, each point reads as
/// that says. Its place among them.
pub async fn judge(folder: &SimFolder, trees: &[&Tree]) -> std::result::Result<usize, String> {
    let disk = change::settle(folder)
        .await
        .map_err(|e| format!("settling: {e}"))?;
    let strangers = strangers(folder, &disk);
    if !strangers.is_empty() {
        return Err(format!("files that nobody names: {strangers:?}"));
    }
    for image in disk.images().iter().filter(|i| i.kind == ImageType::QCow2) {
        let pages = folder.pages(&image.file).ok_or("a file that is missing")?;
        audit(&pages).map_err(|e| format!("{}: {e}", image.file))?;
    }
    let found = shape(&disk);
    let mut why = format!("a disk that nobody asked for: {found:?}");
    for (place, tree) in trees.iter().enumerate() {
        if shape(&tree.disk) == found {
            let sized = has_size(folder, &disk, tree.grown).await;
            let judged = match sized {
                Ok(()) => reads_as(folder, &disk, tree).await,
                Err(e) => Err(e),
            };
            match judged {
                Ok(()) => return Ok(place),
                Err(e) => why = e,
            }
        }
    }
    Err(why)
}

/// Whether descriptor and top agree on the size of a disk that has grown.
async fn has_size(
    folder: &SimFolder,
    disk: &Descriptor,
    grown: Option<u64>,
) -> std::result::Result<(), String> {
    let Some(clusters) = grown else {
        return Ok(());
    };
    let top = layers::image(disk, disk.top()).map_err(|e| e.to_string())?;
    let top = layers::open_read(folder, disk, &top).await;
    let top = top.map_err(|e| e.to_string())?.geometry().size;
    match (top, change::size(disk)) == (clusters * CLUSTER, clusters * CLUSTER) {
        true => Ok(()),
        false => Err(format!(
            "{top} bytes, {} in the descriptor",
            change::size(disk)
        )),
    }
}

/// Whether a point reads as it should, and as zeros behind that.
pub fn agree(read: &Content, wanted: &Content) -> bool {
    let zero = |n: usize| wanted.len() <= n && read[n] == ZERO;
    let same = |n: usize| wanted.get(n) == Some(&read[n]);
    read.len() >= wanted.len() && (0..read.len()).all(|n| same(n) || zero(n))
}

async fn reads_as(
    folder: &SimFolder,
    disk: &Descriptor,
    tree: &Tree,
) -> std::result::Result<(), String> {
    for shot in disk.shots().iter().filter(|s| s.mark.is_none()) {
        let read = content(folder, disk, shot.guid).await;
        let read = read.map_err(|e| format!("reading {}: {e}", shot.guid))?;
        let wanted = &tree.contents[&shot.guid];
        if let Some(n) = (0..wanted.len()).find(|n| read.get(*n) != Some(&wanted[*n])) {
            let (is, should) = (read.get(n), wanted[n]);
            return Err(format!("{}: sector {n} is {is:?}, not {should}", shot.guid));
        }
        if !agree(&read, wanted) {
            return Err(format!("{}: more than there was before it grew", shot.guid));
        }
    }
    Ok(())
}

/// The bytes of every frozen file of a disk, but for those that may be merged into.
pub fn sealed(folder: &SimFolder, disk: &Descriptor) -> BTreeMap<String, Pages> {
    let frozen = disk.shots().iter();
    let frozen = frozen.filter(|s| s.mark.is_none() && s.guid != disk.top());
    let files = frozen.filter_map(|s| disk.image(s.guid));
    let files = files.filter_map(|i| Some((i.file.clone(), folder.pages(&i.file)?)));
    files.collect()
}

/// Whether two files hold the same.
pub fn same(a: &Pages, b: &Pages) -> bool {
    let bytes = |pages: &Pages| {
        let mut all = vec![0; pages.len() as usize];
        pages.read(0, &mut all);
        all
    };
    a.len() == b.len() && bytes(a) == bytes(b)
}

/// Whether `folder` is a disk.
pub async fn is_disk(folder: &SimFolder) -> bool {
    folder.links(DESCRIPTOR).await.is_ok_and(|n| n.is_some())
}
