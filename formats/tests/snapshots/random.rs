//! Random operations on random disks: what is written is what ploop would load, and what each
//! operation promises.

use crate::model::{Files, Op};
use crate::rules::{self, BACKUP, Disk, NONE, TOP};
use ploop_formats::descriptor::{Descriptor, Mark};
use ploop_formats::guid::Guid;
use ploop_formats::testkit::rng::Rng;
use std::collections::BTreeMap;

const SEEDS: u64 = 1000;
const OPERATIONS: usize = 30;

/// How often each operation ended how.
type Tally = BTreeMap<(&'static str, String), u64>;

#[test]
fn every_operation_gives_the_tree_that_ploop_would_and_writes_what_ploop_loads() {
    let mut tally = Tally::new();
    for seed in 0..SEEDS {
        run(seed, &mut tally);
    }
    // Each answer that is documented was seen, so that none was judged by nothing.
    for (name, answers) in [
        ("snapshot", &["Ok", "Invalid", "Exists", "Unsupported"][..]),
        (
            "switch",
            &["Ok", "NotFound", "Invalid", "Busy", "Exists", "Unsupported"],
        ),
        (
            "leaf",
            &["Ok", "NotFound", "Invalid", "Busy", "Unsupported"],
        ),
        ("top", &["Ok", "Busy"]),
        (
            "dissolve",
            &["Ok", "NotFound", "Invalid", "Busy", "Unsupported"],
        ),
        ("mark", &["Ok", "NotFound", "Invalid", "Unsupported"]),
        ("clone", &["Ok", "NotFound", "Invalid", "Busy", "Exists"]),
    ] {
        for answer in answers {
            let seen = tally.get(&(name, answer.to_string())).copied();
            assert!(seen.unwrap_or(0) >= 3, "{name}: {answer}: {tally:#?}");
        }
    }
}

fn run(seed: u64, tally: &mut Tally) {
    let mut rng = Rng::new(seed);
    let text = start(&mut rng);
    let mut disk = Descriptor::parse(text.as_bytes()).unwrap();
    let mut model = rules::load(&text).unwrap();
    let mut files = Files(
        model
            .shots
            .values()
            .map(|row| (row.file.clone(), vec![rng.next()]))
            .collect(),
    );
    for _ in 0..OPERATIONS {
        let op = operation(&mut rng, &disk, &model);
        let place = format!("seed {seed}: {op:?} on\n{}", text_of(&disk));
        let before = disk.clone();
        let answer = op.apply(&disk);
        assert_eq!(disk, before, "{place}");
        let said = answer
            .as_ref()
            .map_or_else(|e| format!("{:?}", e.kind()), |_| "Ok".into());
        *tally.entry((op.name(), said)).or_default() += 1;
        match (answer, op.expected(&model)) {
            (Ok(new), Ok(expected)) => {
                judge(&new, &expected, &place);
                let (dropped, added) = (disk.files_not_in(&new), new.files_not_in(&disk));
                let (dropped, added): (Vec<_>, Vec<_>) = (dropped.collect(), added.collect());
                let mut moved = files.clone();
                moved.follow(&op, &model, &expected, &dropped, &added);
                // Work goes on with the original or with the clone.
                if !matches!(op, Op::Clone(..)) || rng.one_in(4) {
                    (disk, model, files) = (new, expected, moved);
                }
            }
            (Err(e), Err(kind)) => assert_eq!(e.kind(), kind, "{e}: {place}"),
            (answer, expected) => panic!("{answer:?} but expected {expected:?}: {place}"),
        }
        files
            .0
            .get_mut(&model.shots[&model.top].file)
            .unwrap()
            .push(rng.next());
        if rng.one_in(4) {
            (disk, model) = annotated(&mut rng, &disk, &model);
        }
    }
}

/// What was written is what was meant, by ploop's rules and by our own.
fn judge(new: &Descriptor, expected: &Disk, place: &str) {
    let written = text_of(new);
    let loaded = rules::load(&written).unwrap_or_else(|rule| panic!("{rule}: {place}"));
    assert_eq!(&loaded, expected, "{place}");
    assert_eq!(
        &Descriptor::parse(written.as_bytes()).unwrap(),
        new,
        "{place}"
    );
}

fn text_of(disk: &Descriptor) -> String {
    String::from_utf8(disk.encode()).unwrap()
}

/// Puts a comment or an element that nobody knows somewhere between two others.
fn annotated(rng: &mut Rng, disk: &Descriptor, model: &Disk) -> (Descriptor, Disk) {
    let mut text = text_of(disk);
    let places = [
        "<Image>",
        "<Shot>",
        "<Storage>",
        "<Snapshots>",
        "</Image>",
        "</Shot>",
        "</File>",
    ];
    let name = rng.pick(&places);
    let found: Vec<usize> = text
        .match_indices(name)
        .map(|(at, _)| at + name.len())
        .collect();
    if found.is_empty() {
        return (disk.clone(), model.clone());
    }
    let note = match rng.below(3) {
        0 => format!("<!-- note {} -->", rng.next()),
        1 => format!("\n  <Note number='{}'/>", rng.next()),
        _ => format!("<Note><Inner>{}</Inner></Note>\n", rng.next()),
    };
    text.insert_str(*rng.pick(&found), &note);
    let noted = rules::load(&text).unwrap();
    let bare = |disk: &Disk| {
        let mut disk = disk.clone();
        disk.shots.values_mut().for_each(|row| row.extras.clear());
        (disk.shots, disk.top)
    };
    assert_eq!(bare(&noted), bare(model));
    (Descriptor::parse(text.as_bytes()).unwrap(), noted)
}

fn fresh(rng: &mut Rng) -> Guid {
    let (high, low) = (rng.next().to_be_bytes(), rng.next().to_be_bytes());
    Guid::random([high, low].concat().try_into().unwrap())
}

fn known(rng: &mut Rng, model: &Disk) -> String {
    let known: Vec<&String> = model.shots.keys().collect();
    rng.pick(&known).to_string()
}

/// A GUID to operate on: one that is there, as a rule.
fn chosen(rng: &mut Rng, model: &Disk) -> String {
    match rng.below(20) {
        0 => fresh(rng).to_string(),
        1 => rng.pick(&[NONE, TOP, BACKUP]).to_string(),
        2 => model.top.clone(),
        _ => known(rng, model),
    }
}

/// A GUID for a new snapshot: a new one, as a rule.
fn new_name(rng: &mut Rng, model: &Disk) -> String {
    match rng.below(20) {
        0 => known(rng, model),
        1 => rng.pick(&[NONE, TOP, BACKUP]).to_string(),
        _ => fresh(rng).to_string(),
    }
}

/// A file for a new top: one that may be made, as a rule.
fn new_file(rng: &mut Rng, disk: &Descriptor, model: &Disk) -> String {
    let taken = |rng: &mut Rng| model.shots[&known(rng, model)].file.clone();
    match rng.below(30) {
        0 => taken(rng),
        1 => format!("./{}", taken(rng)),
        2 => rng.pick(&["", "/a", "../a", "a/.."]).to_string(),
        _ => disk.new_file_name(fresh(rng)),
    }
}

fn operation(rng: &mut Rng, disk: &Descriptor, model: &Disk) -> Op {
    let file = new_file(rng, disk, model);
    let mark = *rng.pick(&[
        None,
        Some(Mark::Temporary),
        Some(Mark::TemporaryZero),
        Some(Mark::TemporaryZeroSwap),
    ]);
    match rng.below(20) {
        0..7 => Op::Snapshot(new_name(rng, model), file),
        7..11 => Op::Switch(chosen(rng, model), file),
        11..13 => Op::Leaf(chosen(rng, model)),
        13..15 => Op::Top,
        15..17 => Op::Dissolve(chosen(rng, model)),
        17..19 => Op::Mark(chosen(rng, model), mark),
        _ => Op::Clone(chosen(rng, model), file),
    }
}

/// A tree to begin with; the parent of number 0 is none.
struct Tree {
    guids: Vec<String>,
    parents: Vec<usize>,
    top: usize,
    /// The top's shot is left out.
    implied: bool,
}

impl Tree {
    /// A tree with branches or a deep chain; its top is the standard one or foreign, and one that
    /// something stands on now and then.
    fn any(rng: &mut Rng) -> Self {
        let deep = rng.one_in(50);
        let count = if deep { 126 } else { rng.range(1, 7) as usize };
        let below = |rng: &mut Rng, n: usize| match n {
            0 => 0,
            n if deep => n - 1,
            n => rng.below(n as u64) as usize,
        };
        let mut tree = Self {
            guids: (0..count).map(|_| fresh(rng).to_string()).collect(),
            parents: (0..count).map(|n| below(rng, n)).collect(),
            top: count - 1,
            implied: false,
        };
        if rng.one_in(8) {
            tree.top = rng.below(count as u64) as usize;
        }
        if !rng.one_in(4) {
            tree.guids[tree.top] = TOP.into();
            tree.implied = count > 1 && tree.top == count - 1 && rng.one_in(4);
        } else if rng.one_in(4) && count > 1 {
            tree.guids[(tree.top + 1) % count] = TOP.into();
        }
        tree
    }

    fn parent(&self, n: usize) -> &str {
        match n {
            0 => NONE,
            n => &self.guids[self.parents[n]],
        }
    }

    /// What `TopGUID` says.
    fn named(&self) -> &str {
        match self.implied {
            true => self.parent(self.top),
            false => &self.guids[self.top],
        }
    }

    /// All images and all shots, as text.
    fn write(&self, rng: &mut Rng) -> (String, String) {
        let kind = *rng.pick(&["Compressed", "Plain"]);
        let (mut images, mut shots) = (String::new(), String::new());
        for (n, guid) in self.guids.iter().enumerate() {
            let mut case = |guid: &str| match rng.one_in(3) {
                true => guid.to_uppercase(),
                false => guid.to_string(),
            };
            let (one, two, parent) = (case(guid), case(guid), case(self.parent(n)));
            images += &format!(
                "      <Image>\n        <GUID>{one}</GUID>\n        <Type>{kind}</Type>\n        \
                 <File>a &amp; b.{{{n}}}</File>\n      </Image>\n"
            );
            if !self.implied || n != self.top {
                shots += &format!(
                    "    <Shot>\n      <GUID>{two}</GUID>\n      \
                     <ParentGUID>{parent}</ParentGUID>\n    </Shot>\n"
                );
            }
        }
        (images, shots)
    }
}

/// A disk as some tool of either generation may have left it.
fn start(rng: &mut Rng) -> String {
    let tree = Tree::any(rng);
    let ((images, shots), named) = (tree.write(rng), tree.named());
    let volume = "    <Volume>\n      <ReadOnly>0</ReadOnly>\n    </Volume>\n";
    let (root, volume) = *rng.pick(&[
        ("Parallels_disk_image", ""),
        ("Virtuozzo_disk_image", ""),
        ("Virtuozzo_disk_image", volume),
    ]);
    let text = format!(
        "<?xml version=\"1.0\"?>\n<{root} Version=\"1.0\">\n  <Disk_Parameters>\n    \
         <Disk_size>131072</Disk_size>\n    <Padding>0</Padding>\n    <Vendor><Odd/></Vendor>\n  \
         </Disk_Parameters>\n  <StorageData>\n{volume}    <Storage>\n      <Start>0</Start>\n      \
         <End>131072</End>\n      <Blocksize>2048</Blocksize>\n{images}    </Storage>\n  \
         </StorageData>\n  <Snapshots>\n    <TopGUID>{named}</TopGUID>\n{shots}  </Snapshots>\n\
         </{root}>\n"
    );
    // Some tools write no white space at all.
    match rng.one_in(4) {
        true => text.lines().map(str::trim).collect(),
        false => text,
    }
}
