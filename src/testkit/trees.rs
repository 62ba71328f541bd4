//! Trees: disks with snapshots and branches in simulated folders, and what each point of them must
//! read as.

use crate::image::change;
use crate::image::snapshot::layers;
use crate::image::target::DESCRIPTOR;
use crate::stack::Stack;
use ploop_formats::descriptor::{Chs, Descriptor, ImageType, LayerFormat, NewDisk};
use ploop_formats::folder::Folder;
use ploop_formats::guid::Guid;
use ploop_formats::layer::Layer;
use ploop_formats::ploop::Version;
use ploop_formats::store::mutate::Mutator;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{Rules, Sim, SimFolder};
use ploop_formats::testkit::image::Delta;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp::{self, Seen, Value, ZERO};
use ploop_formats::units::{ClusterSize, SECTOR};
use ploop_formats::{Error, Result, buf};
use std::collections::BTreeMap;

/// The smallest cluster that the format allows, so that a state is small.
pub const CLUSTER: u64 = 32 << 10;
const SECTORS: usize = (CLUSTER / SECTOR) as usize;

/// What files promise that are made while a tree lives.
pub const RULES: Rules = Rules {
    align: 1,
    metadata_end: CLUSTER,
    fresh_zero: true,
    max_len: u64::MAX,
    sealed: false,
};

/// The value of each sector.
pub type Content = Vec<Value>;

/// A disk and what all its points must read as.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Its descriptor.
    pub disk: Descriptor,
    /// What a guest reads at each point, the top included.
    pub contents: BTreeMap<Guid, Content>,
}

/// A GUID that dice choose.
pub fn guid(rng: &mut Rng) -> Guid {
    let mut bytes = [0; 16];
    for half in bytes.chunks_exact_mut(8) {
        half.copy_from_slice(&rng.next().to_le_bytes());
    }
    Guid::random(bytes)
}

/// Makes disks.
struct Maker<'a> {
    rng: &'a mut Rng,
    version: Version,
    clusters: u64,
    next: Value,
    files: BTreeMap<String, Vec<Option<Content>>>,
}

impl Maker<'_> {
    /// Clusters of a new file, each there once in `one_in` times.
    fn file(&mut self, name: &str, one_in: u64) {
        let mut clusters = Vec::new();
        for _ in 0..self.clusters {
            let there = self.rng.one_in(one_in);
            clusters.push(there.then(|| self.cluster()));
        }
        self.files.insert(name.into(), clusters);
    }

    fn cluster(&mut self) -> Content {
        (0..SECTORS)
            .map(|_| {
                self.next += 1;
                if self.rng.one_in(16) { ZERO } else { self.next }
            })
            .collect()
    }

    fn content(&self, disk: &Descriptor, point: Guid) -> Content {
        let mut content = vec![ZERO; self.clusters as usize * SECTORS];
        for image in disk.chain(point).expect("a point of the disk") {
            let layer = &self.files[&image.file];
            for (to, cluster) in content.chunks_mut(SECTORS).zip(layer) {
                if let Some(cluster) = cluster {
                    to.copy_from_slice(cluster);
                }
            }
        }
        content
    }

    fn pages(&mut self, name: &str, raw: bool, in_use: bool) -> Pages {
        let clusters = self.files[name].clone();
        if raw {
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

/// Makes a disk of up to `shots` points, and puts it into a folder of its own world.
pub fn make(rng: &mut Rng, shots: u64, mutator: Mutator) -> (SimFolder, Tree) {
    let version = *rng.pick(&[Version::V1, Version::V2]);
    let raw = rng.one_in(4);
    let (clusters, shots, seed) = (rng.range(2, 6), rng.range(1, shots), rng.next());
    let mut maker = Maker {
        rng,
        version,
        clusters,
        next: 0,
        files: BTreeMap::new(),
    };
    let kind = if raw {
        ImageType::Plain
    } else {
        ImageType::Compressed
    };
    let mut disk = first_disk(clusters, kind);
    maker.file("root.hds", if raw { 1 } else { 2 });
    for _ in 1..shots {
        let file = disk.new_file_name(guid(maker.rng));
        let frozen: Vec<Guid> = disk.shots().iter().map(|s| s.guid).collect();
        let to = *maker.rng.pick(&frozen);
        disk = match to == disk.top() || maker.rng.one_in(2) {
            true => disk.with_snapshot(guid(maker.rng), &file),
            false => disk.switched(to, &file),
        }
        .expect("a legal change");
        maker.file(&file, 3);
    }
    let folder = SimFolder::new(Sim::new(seed), mutator, RULES);
    for image in disk.images() {
        let top = image.guid == disk.top();
        let raw = disk.chain(image.guid).is_ok_and(|chain| {
            chain
                .last()
                .is_some_and(|last| last.format == LayerFormat::Raw)
        });
        let in_use = top && maker.rng.one_in(3);
        let pages = maker.pages(&image.file, raw, in_use);
        folder.put(&image.file, pages, RULES);
    }
    let mut text = Pages::new(0);
    let bytes = disk.encode();
    text.set_len(bytes.len() as u64);
    text.write(0, &bytes);
    folder.put(DESCRIPTOR, text, RULES);
    let contents = disk.shots().iter();
    let contents = contents.map(|s| (s.guid, maker.content(&disk, s.guid)));
    let contents = contents.collect();
    (folder, Tree { disk, contents })
}

/// What a guest reads at a point of a disk, whose top is opened as the next user would.
pub async fn content(folder: &SimFolder, disk: &Descriptor, point: Guid) -> Result<Content> {
    let mut all = Vec::new();
    for image in disk.chain(point)? {
        all.push(match image.guid == disk.top() {
            true => layers::open_write(folder, disk, &image).await?,
            false => layers::open_read(folder, disk, &image).await?,
        });
    }
    let stack = Stack::new(all)?;
    let len = stack.top().geometry().size;
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

/// Settles a folder and judges all that is in it: every point reads as one of `trees` says, which
/// is given back by its place.
pub async fn judge(folder: &SimFolder, trees: &[&Tree]) -> std::result::Result<usize, String> {
    let disk = change::settle(folder)
        .await
        .map_err(|e| format!("settling: {e}"))?;
    let points = |d: &Descriptor| {
        let mut all: Vec<Guid> = d.shots().iter().map(|s| s.guid).collect();
        all.sort();
        all
    };
    let strangers = strangers(folder, &disk);
    if !strangers.is_empty() {
        return Err(format!("files that nobody names: {strangers:?}"));
    }
    let mut why = format!("a disk that nobody asked for: {:?}", disk.shots());
    for (n, tree) in trees.iter().enumerate() {
        if points(&tree.disk) == points(&disk) {
            match reads_as(folder, &disk, tree).await {
                Ok(()) => return Ok(n),
                Err(e) => why = e,
            }
        }
    }
    Err(why)
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
