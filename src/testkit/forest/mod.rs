//! The forest campaign: random sequences of every verb on several disks at once, whose branches,
//! marked points and clones are written to and changed between them.
//!
//! A model ([`model`]) says by ploop's rules what each verb answers and what is left. After each
//! verb every point of every disk reads as it must, the descriptors say what the model says, no
//! file changed that was not to change, each has as many names as disks have it, and no folder has
//! a file more.

pub mod model;

use super::report::Report;
use super::trees::{self, CLUSTER, Content, RULES};
use crate::device::{Device, Zero};
use crate::image::change;
use crate::image::clone::clone;
use crate::image::snapshot::copy::Work;
use crate::image::snapshot::remove::Removed;
use crate::image::snapshot::{create, layers, merge, remove, switch};
use crate::image::target::DESCRIPTOR;
use crate::stack::Stack;
use model::{Answer, Answered, Disk, File, Point, Verb, World};
use ploop_formats::descriptor::{Descriptor, ImageType};
use ploop_formats::folder::Folder;
use ploop_formats::guid::Guid;
use ploop_formats::ploop::Version;
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::store::mutate::Mutator;
use ploop_formats::store::sim::{Sim, SimFolder};
use ploop_formats::testkit::exec::now;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp::{self, Seen, Value, ZERO};
use ploop_formats::units::SECTOR;
use ploop_formats::{Error, Kind, buf};
use std::collections::BTreeMap;

/// Disks at once.
const DISKS: usize = 4;
/// A disk that has more points than this gets no more.
const POINTS: usize = 12;

/// How often each verb ended how.
pub type Answers = BTreeMap<String, u64>;

type Checked<T = ()> = Result<T, String>;

/// Tries so many sequences.
pub fn campaign(seed: u64, sequences: u64, answers: &mut Answers) -> Report {
    Report::campaign("forest", seed, sequences, |seed, tally| {
        tally.states += 1;
        let mut forest = Forest::plant(seed);
        let verbs = forest.rng.range(20, 120);
        for _ in 0..verbs {
            tally.requests += 1;
            let judged = forest.step(answers);
            judged.map_err(|e| format!("{e}\n  {}", forest.history.join("\n  ")))?;
        }
        Ok(())
    })
}

struct Forest {
    rng: Rng,
    folder: SimFolder,
    model: World,
    version: Version,
    clusters: u64,
    next: Value,
    history: Vec<String>,
}

/// Ends a merge that has told so often how far it is.
struct Cut {
    left: Option<u64>,
    cut: bool,
}

impl Watch for Cut {
    fn tell(&mut self, _: Progress) -> ploop_formats::Result<()> {
        match &mut self.left {
            Some(0) => {
                self.cut = true;
                Err(Error::new(Kind::Cancelled, "given up"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Forest {
    /// One or two disks of one delta or raw image each.
    fn plant(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let sim = Sim::new(rng.next());
        sim.instant(true);
        let version = *rng.pick(&[Version::V1, Version::V2]);
        let mut forest = Self {
            folder: SimFolder::new(sim, Mutator::new(), RULES),
            model: World::default(),
            version,
            clusters: rng.range(2, 5),
            next: 0,
            rng,
            history: Vec::new(),
        };
        for own in 0..forest.rng.range(1, 2) as usize {
            forest.plant_one(own);
        }
        forest
    }

    fn plant_one(&mut self, own: usize) {
        let raw = self.rng.one_in(3);
        let (folder, name) = (self.folder.sibling(own), "root.hds");
        let file = trees::first_file(&mut self.rng, self.version, self.clusters, raw, self.next);
        self.next += file.values;
        folder.put(name, file.pages, RULES);
        folder.put(DESCRIPTOR, trees::text(&file.disk.encode()), RULES);
        let point = Point {
            guid: Guid::TOP,
            parent: None,
            file: File {
                place: folder.names()[name],
                name: name.into(),
                raw,
            },
            content: file.content,
            marked: false,
        };
        let disk = Disk {
            points: vec![point],
        };
        self.model.disks.insert(own, disk);
    }

    /// One verb, predicted and judged.
    fn step(&mut self, answers: &mut Answers) -> Checked {
        let own = {
            let all: Vec<usize> = self.model.disks.keys().copied().collect();
            *self.rng.pick(&all)
        };
        let verb = self.choose(own);
        let open = self.model.may_change(own, &verb);
        for place in 0..self.folder.sim().stores().len() {
            self.folder.sim().seal(place, !open.contains(&place));
        }
        self.history.push(format!("disk {own}: {verb:?}"));
        let (answer, cut) = self.carry_out(own, &verb)?;
        let said = format!("{} {answer:?}", verb.name());
        self.history.push(format!("  {said}"));
        *answers.entry(said).or_default() += 1;
        let expected = self.model.apply(own, &verb, cut);
        if answer != expected {
            return Err(format!("{answer:?}, where {expected:?} is right"));
        }
        self.judge()
    }

    /// A point that is there, as a rule; rather one that several stand on, or that is marked.
    fn point(&mut self, own: usize) -> Guid {
        let disk = &self.model.disks[&own];
        let frozen = disk.points.iter().filter(|point| point.guid != Guid::TOP);
        let (odd, even): (Vec<&Point>, Vec<&Point>) =
            frozen.partition(|point| point.marked || disk.children(point.guid).len() > 1);
        let rng = &mut self.rng;
        match rng.below(20) {
            0 => trees::guid(rng),
            1..3 => Guid::TOP,
            3..9 if !odd.is_empty() => rng.pick(&odd).guid,
            _ if !even.is_empty() => rng.pick(&even).guid,
            _ => Guid::TOP,
        }
    }

    fn choose(&mut self, own: usize) -> Verb {
        let point = self.point(own);
        let free = (0..DISKS).find(|n| !self.model.disks.contains_key(n));
        let (many, large) = (
            self.model.disks.len() > 1,
            self.model.disks[&own].points.len() > POINTS,
        );
        let rng = &mut self.rng;
        let cut = rng.one_in(4).then(|| rng.below(2));
        match rng.below(100) {
            0..24 if !large => Verb::Create(match rng.below(20) {
                0 => point,
                1 => *rng.pick(&[Guid::NONE, Guid::TOP, Guid::BACKUP]),
                _ => trees::guid(rng),
            }),
            24..38 => Verb::Switch(point),
            38..54 => Verb::Remove(point, cut),
            54..62 => Verb::Merge(point, cut),
            62..66 => Verb::Temporaries,
            66..73 if free.is_some() => Verb::Clone(point, free.unwrap_or(own)),
            73..75 if many => Verb::Forget,
            _ => Verb::Write(!rng.one_in(3)),
        }
    }

    /// The product's answer, and whether a merge was given up.
    fn carry_out(&mut self, own: usize, verb: &Verb) -> Checked<(Answered, bool)> {
        let folder = self.folder.sibling(own);
        let random = trees::guid(&mut self.rng);
        let mut watch = Cut {
            left: match verb {
                Verb::Remove(_, left) | Verb::Merge(_, left) => *left,
                _ => None,
            },
            cut: false,
        };
        let mut work = Work::new(&mut watch, &()).within(trees::window(&mut self.rng));
        let done = |_| Answer::Done;
        let answer = match *verb {
            Verb::Create(uuid) => now(create::offline(&folder, uuid, random)).map(done),
            Verb::Switch(to) => now(switch::offline(&folder, to, random)).map(done),
            Verb::Remove(uuid, _) => now(remove::offline(&folder, uuid, &mut work)).map(said),
            Verb::Merge(lower, _) => {
                now(merge::offline(&folder, lower, &mut work)).map(|_| Answer::Merged)
            }
            Verb::Temporaries => now(remove::temporaries(&folder, &mut work)).map(Answer::Went),
            Verb::Clone(uuid, to) => {
                let (source, to) = (now(change::settle(&folder)), self.folder.sibling(to));
                let source = source.map_err(|e| e.to_string())?;
                now(clone(&folder, &source, uuid, &to, random)).map(done)
            }
            Verb::Forget => {
                let mut names = folder.names().into_keys();
                let gone = names.try_for_each(|name| now(folder.remove(&name)));
                gone.map(|()| Answer::Done)
            }
            Verb::Write(close) => {
                self.write(own, close)?;
                Ok(Answer::Done)
            }
        };
        Ok((answer.map_err(|e| e.kind()), watch.cut))
    }

    /// A guest works on the top of a disk, which is closed then, or left as its process died.
    fn write(&mut self, own: usize, close: bool) -> Checked {
        let folder = self.folder.sibling(own);
        let mut content = self.model.disks[&own].top().content.clone();
        let worked = now(async {
            let descriptor = change::read(&folder, DESCRIPTOR).await?;
            let mut all = Vec::new();
            for image in descriptor.chain(descriptor.top())? {
                all.push(match image.guid == descriptor.top() {
                    true => layers::open_write(&folder, &descriptor, &image).await?,
                    false => layers::open_read(&folder, &descriptor, &image).await?,
                });
            }
            let disk = crate::disk::Disk::new(all, false)?;
            for _ in 0..self.rng.range(1, 6) {
                self.request(&disk, &mut content).await?;
            }
            match close {
                true => disk.close().await,
                false => disk.flush().await,
            }
        });
        worked.map_err(|e| format!("writing: {e}"))?;
        let disk = self.model.disks.get_mut(&own).expect("a disk");
        disk.write(content);
        Ok(())
    }

    async fn request<D: Device>(
        &mut self,
        disk: &D,
        content: &mut Content,
    ) -> ploop_formats::Result<()> {
        let (first, count) = self.range(content.len() as u64);
        let (at, len) = (first * SECTOR, count * SECTOR);
        let there = first as usize..(first + count) as usize;
        match self.rng.below(5) {
            0..3 => {
                self.next += 1;
                content[there].fill(self.next);
                let data = stamp::run(first, count, self.next);
                disk.write(at, data, self.rng.one_in(8)).await
            }
            3 => {
                content[there].fill(ZERO);
                let how = *self.rng.pick(&[Zero::MayFree, Zero::Allocate]);
                disk.zero(at, len, how, false).await
            }
            _ => {
                disk.discard(at, len).await?;
                let left = disk.read(at, buf::aligned(len as usize)).await?;
                for (value, left) in content[there].iter_mut().zip(values(&left, first)?) {
                    if left != ZERO && left != *value {
                        let what = format!("a discard left {left} of {value}");
                        return Err(Error::damaged(what));
                    }
                    *value = left;
                }
                Ok(())
            }
        }
    }

    /// Sectors from `first` on: whole clusters, or any.
    fn range(&mut self, sectors: u64) -> (u64, u64) {
        let unit = *self.rng.pick(&[1, 8, CLUSTER / SECTOR]);
        let units = sectors / unit;
        let first = self.rng.below(units);
        let most = (units - first).min(*self.rng.pick(&[1, 2, 200]));
        (first * unit, self.rng.range(1, most) * unit)
    }

    /// Everything that is there is what the model says.
    fn judge(&mut self) -> Checked {
        if let Some(broken) = self.folder.sim().broken() {
            return Err(broken);
        }
        self.adopt()?;
        for own in 0..DISKS {
            let folder = self.folder.sibling(own);
            let names: Vec<String> = folder.names().into_keys().collect();
            let Some(disk) = self.model.disks.get(&own) else {
                match names.is_empty() {
                    true => continue,
                    false => return Err(format!("folder {own} has {names:?}, and no disk")),
                }
            };
            let judged = self.judge_names(&folder, disk).and_then(|()| {
                let said = now(change::read(&folder, DESCRIPTOR)).map_err(|e| e.to_string())?;
                judge_text(&said, disk)?;
                judge_points(&folder, &said, disk)
            });
            judged.map_err(|e| format!("disk {own}: {e}"))?;
        }
        Ok(())
    }

    /// Finds the files that a verb made.
    fn adopt(&mut self) -> Checked {
        for (own, disk) in &mut self.model.disks {
            let names = self.folder.sibling(*own).names();
            let known = |name: &str| disk.points.iter().any(|point| point.file.name == name);
            let strange = |name: &&String| *name != DESCRIPTOR && !known(name);
            let new: Vec<String> = names.keys().filter(strange).cloned().collect();
            let mut wanted = disk.points.iter_mut().filter(|point| point.file.is_new());
            match (wanted.next(), new.as_slice()) {
                (None, []) => {}
                (Some(point), [name]) => {
                    point.file.place = names[name];
                    point.file.name = name.clone();
                }
                (wanted, _) => {
                    let wanted = wanted.is_some();
                    return Err(format!("disk {own}: a new top: {wanted}, but: {new:?}"));
                }
            }
        }
        Ok(())
    }

    fn judge_names(&self, folder: &SimFolder, disk: &Disk) -> Checked {
        let mut names = folder.names();
        if names.remove(DESCRIPTOR).is_none() {
            return Err("it has no descriptor".into());
        }
        let files = disk.points.iter().map(|point| &point.file);
        let wanted = files.clone().map(|file| (file.name.clone(), file.place));
        let wanted: BTreeMap<String, usize> = wanted.collect();
        if names != wanted {
            return Err(format!("it has {names:?}, not {wanted:?}"));
        }
        for file in files {
            let (links, wanted) = (now(folder.links(&file.name)), self.model.links(file));
            if !matches!(links, Ok(Some(links)) if links == wanted) {
                return Err(format!("{} has {links:?} names, not {wanted}", file.name));
            }
        }
        Ok(())
    }
}

const fn said(removed: Removed) -> Answer {
    match removed {
        Removed::Dropped => Answer::Dropped,
        Removed::Merged => Answer::Merged,
        Removed::Marked(n) => Answer::Marked(n),
    }
}

/// A descriptor says what the model says.
fn judge_text(said: &Descriptor, disk: &Disk) -> Checked {
    let shown = |guid, parent, marked, file: &str, raw| {
        format!("{guid} on {parent:?} is {file} {raw} {marked}")
    };
    let of_model = |point: &Point| {
        let file = &point.file;
        shown(point.guid, point.parent, point.marked, &file.name, file.raw)
    };
    let mut wanted: Vec<String> = disk.points.iter().map(of_model).collect();
    let mut found = Vec::new();
    for shot in said.shots() {
        let parent = Some(shot.parent).filter(|parent| !parent.is_none());
        let image = said.image(shot.guid).ok_or("a shot without an image")?;
        // By ploop's exception the deltas of a plain disk are plain, too, but for the lowest.
        let raw = image.kind == ImageType::Plain && parent.is_none();
        found.push(shown(
            shot.guid,
            parent,
            shot.mark.is_some(),
            &image.file,
            raw,
        ));
    }
    wanted.sort();
    found.sort();
    match said.top() == Guid::TOP && found == wanted {
        true => Ok(()),
        false => Err(format!("it says {found:#?}, not {wanted:#?}")),
    }
}

/// Every point that is not marked reads as the model says.
fn judge_points(folder: &SimFolder, said: &Descriptor, disk: &Disk) -> Checked {
    for point in disk.points.iter().filter(|point| !point.marked) {
        let read = now(read(folder, said, point.guid));
        let read = read.map_err(|e| format!("reading {}: {e}", point.guid))?;
        let wanted = &point.content;
        if let Some(n) = (0..wanted.len()).find(|n| read.get(*n) != Some(&wanted[*n])) {
            let (is, should) = (read.get(n), wanted[n]);
            return Err(format!(
                "{}: sector {n} is {is:?}, not {should}",
                point.guid
            ));
        }
    }
    Ok(())
}

/// What a reader finds at a point. Nothing is changed by it, whatever end the top had.
async fn read(
    folder: &SimFolder,
    disk: &Descriptor,
    point: Guid,
) -> ploop_formats::Result<Content> {
    let mut all = Vec::new();
    for image in disk.chain(point)? {
        all.push(layers::open_read(folder, disk, &image).await?);
    }
    let stack = Stack::new(all)?;
    let len = crate::image::change::size(disk) as usize;
    let bytes = stack.read(0, buf::aligned(len), stack.depth()).await?;
    values(&bytes, 0)
}

fn values(bytes: &[u8], first: u64) -> ploop_formats::Result<Content> {
    let sectors = bytes.chunks_exact(SECTOR as usize).zip(first..);
    let value = |(sector, n)| match stamp::look(sector, n) {
        Seen::Value(value) => Ok(value),
        seen => Err(Error::damaged(format!("sector {n}: {seen:?}"))),
    };
    sectors.map(value).collect()
}
