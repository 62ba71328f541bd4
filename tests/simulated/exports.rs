//! Bare images that are made of others, under power cuts and errors: at any moment the source is what
//! it was, and the new name is not there or is the whole image.
//!
//! `PLOOP_CHANGE_STATES` says how many states are tried.

use crate::campaign::{SEED, caught, count, holds};
use ploop::image::convert::content::{self, Form, Source, Wanted};
use ploop::image::snapshot::copy::{Window, Work};
use ploop::stack::{AnyLayer, Stack};
use ploop::testkit::report::{Report, Tally};
use ploop::testkit::trees::{CLUSTER, RULES};
use ploop_formats::folder::{Access, Folder};
use ploop_formats::layer::Layer;
use ploop_formats::ploop::Ploop;
use ploop_formats::qcow2::Qcow2;
use ploop_formats::qcow2::check::check;
use ploop_formats::qcow2::header::Compression;
use ploop_formats::raw::Raw;
use ploop_formats::store::fault::{Faults, Rule};
use ploop_formats::store::mutate::{Break, Mutation, Mutator};
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{Sim, SimFolder};
use ploop_formats::testkit::exec::{Exec, now};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Kind, buf};

type Checked<T = ()> = Result<T, String>;

/// States tried after one operation.
const PER_POINT: usize = 3;
/// Names: of the source, of the hidden file, and of what is made.
const SOURCE: &str = "source";
const ASIDE: &str = ".made.new";
const MADE: &str = "made";

/// So little at once that a small disk takes many steps.
const WINDOW: Window = Window {
    memory: CLUSTER,
    step: 4096,
    unsynced: 2 * CLUSTER,
};

struct World {
    folder: SimFolder,
    wanted: Wanted,
    bytes: Vec<u8>,
}

impl World {
    /// A raw file of some clusters, of noise, of one byte, and of nothing; and what is made of it.
    fn new(rng: &mut Rng) -> Self {
        let clusters = rng.range(1, 8);
        let mut pages = Pages::new(clusters * CLUSTER);
        for page in 0..clusters * CLUSTER / 4096 {
            let mut bytes = [0; 4096];
            match rng.below(4) {
                0 => bytes.fill(rng.below(255) as u8 + 1),
                1 => {
                    for word in bytes.chunks_mut(8) {
                        word.copy_from_slice(&rng.next().to_le_bytes());
                    }
                }
                _ => {}
            }
            pages.write(page * 4096, &bytes);
        }
        let folder = SimFolder::new(Sim::new(rng.next()), Mutator::new(), RULES);
        let bytes = pages.to_vec();
        folder.put(SOURCE, pages, RULES);
        let wanted = match rng.below(4) {
            0 => Wanted {
                form: Some(Form::Expanded),
                cluster: Some(CLUSTER),
                ..Wanted::default()
            },
            1 => Wanted {
                form: Some(Form::Raw),
                reserve: rng.one_in(2),
                ..Wanted::default()
            },
            n => Wanted {
                form: Some(Form::Qcow2),
                cluster: Some(*rng.pick(&[512, 4096, CLUSTER])),
                compress: (n == 2).then(|| *rng.pick(&[Compression::Deflate, Compression::Zstd])),
                reserve: n == 3 && rng.one_in(3),
                ..Wanted::default()
            },
        };
        Self {
            folder,
            wanted,
            bytes,
        }
    }

    /// What is found after a cut; it must be there when it is `done`.
    fn judge(&self, folder: &SimFolder, done: bool) -> Checked {
        folder.sim().instant(true);
        let source = now(read(folder, SOURCE, Form::Raw))?;
        if source != self.bytes {
            return Err("the source is another".into());
        }
        if !folder.names().contains_key(MADE) {
            return match done {
                true => Err("what was made is not there".into()),
                false => Ok(()),
            };
        }
        let form = self.wanted.form.expect("stated");
        match now(read(folder, MADE, form))? == self.bytes {
            true => Ok(()),
            false => Err(format!("{:?} reads as something else", self.wanted)),
        }
    }

    fn cut(&self, folder: &SimFolder, done: bool, rng: &mut Rng, tally: &mut Tally) -> Checked {
        for _ in 0..PER_POINT {
            tally.states += 1;
            let wreck = folder.crash(rng);
            let wreck = SimFolder::of(wreck, rng.next(), Mutator::new(), RULES);
            self.judge(&wreck, done)?;
        }
        Ok(())
    }
}

/// All that an image reads as. A qcow2 image has nothing to complain of.
async fn read(folder: &SimFolder, name: &str, form: Form) -> Checked<Vec<u8>> {
    let bytes = async {
        let file = folder.open(name, Access::Read).await?;
        let layer: AnyLayer<_> = match form {
            Form::Raw => AnyLayer::Raw(Raw::open_read(file, ClusterSize::new(CLUSTER)?)?),
            Form::Qcow2 => {
                let found = check(&file).await?.findings;
                assert!(found.is_empty(), "{found:?}");
                AnyLayer::Qcow2(Box::new(Qcow2::open_read(file, None).await?))
            }
            _ => AnyLayer::Ploop(Ploop::open_read(file).await?),
        };
        let size = usize::try_from(layer.geometry().size).expect("small");
        let stack = Stack::new(vec![layer])?;
        stack.read_any(0, buf::aligned(size)).await
    };
    let bytes = bytes.await;
    bytes
        .map(|b| b.to_vec())
        .map_err(|e| format!("{name}: {e}"))
}

async fn make(folder: SimFolder, wanted: Wanted, window: Window) -> ploop_formats::Result<()> {
    drop(folder.create(ASIDE).await?);
    let file = folder.open(SOURCE, Access::Read).await?;
    let source = Source::bare(AnyLayer::Raw(Raw::open_backing(
        file,
        ClusterSize::new(CLUSTER)?,
    )))?;
    let mut watch = ();
    let mut work = Work::new(&mut watch, &()).within(window);
    content::bare(&source, wanted, &folder, (ASIDE, MADE), &mut work)
        .await
        .map(drop)
}

/// One image that is made, cut everywhere; its barriers break as `mutator` says.
fn export(
    world: &World,
    window: Window,
    rng: &mut Rng,
    tally: &mut Tally,
    mutator: &Mutator,
) -> Checked {
    let folder = world.folder.through(mutator.clone(), Faults::new());
    let mut exec = Exec::new(folder.sim().clone(), rng.next());
    let done = exec.start(make(folder.clone(), world.wanted, window));
    exec.watch(&done, |_| world.cut(&folder, false, rng, tally))?;
    let outcome = done.take().unwrap_or(Ok(()));
    outcome.map_err(|e| format!("{:?}: {e}", world.wanted))?;
    let mut names = folder.names().into_keys();
    if names.any(|name| name == ASIDE) {
        return Err("the hidden file is left".into());
    }
    world.cut(&folder, true, rng, tally)
}

#[test]
fn a_bare_image_is_whole_or_not_there_after_any_cut() {
    let states = count("PLOOP_CHANGE_STATES", 20_000);
    holds(Report::campaign("exports", SEED, states, |seed, tally| {
        let mut rng = Rng::new(seed);
        let world = World::new(&mut rng);
        export(&world, WINDOW, &mut rng, tally, &Mutator::new())
    }));
}

/// The n-th operation fails, and all that follow, for every n: the name is not there, unless it is the
/// names that failed; then it may be, and is that of the whole image.
#[test]
fn an_error_in_any_operation_leaves_the_source_and_no_image() {
    let mut failures = 0;
    for seed in 0..40 {
        for error in [Kind::Io, Kind::NoSpace] {
            for after in 0.. {
                let mut rng = Rng::new(seed);
                let world = World::new(&mut rng);
                let faults = Faults::new();
                faults.set(Some(Rule {
                    only: None,
                    after,
                    error,
                    forever: true,
                }));
                let folder = world.folder.through(Mutator::new(), faults.clone());
                folder.sim().instant(true);
                let made = now(make(folder.clone(), world.wanted, WINDOW));
                if faults.failed() == 0 {
                    made.expect("nothing failed");
                    break;
                }
                failures += 1;
                let said = made.expect_err("an operation failed");
                assert!(said.kind() != Kind::Usage, "{said}");
                let is_there = world.folder.names().contains_key(MADE);
                world.judge(&world.folder, false).expect("whole or absent");
                // A change of a name that fails may have happened all the same.
                let of_names = said.to_string().contains("Name");
                assert!(!is_there || of_names, "{:?}: {said}", world.wanted);
            }
        }
    }
    println!("COUNT: {failures} failures");
}

/// The barriers of a small qcow2 image that protect something: behind its header, which all that it has
/// is written before, and behind its name.
const BARRIERS: [u64; 2] = [1, 2];

#[test]
fn every_barrier_of_a_bare_image_is_missed_when_it_is_gone() {
    for number in BARRIERS {
        let mutator = Mutator::new();
        let report = caught(50_000, |seed, tally| {
            mutator.set(Some(Mutation {
                covers: None,
                how: Break::Drop,
                only: Some(number),
            }));
            let mut rng = Rng::new(seed);
            let mut world = World::new(&mut rng);
            world.wanted = Wanted {
                form: Some(Form::Qcow2),
                ..Wanted::default()
            };
            export(&world, Window::default(), &mut rng, tally, &mutator)
        });
        println!(
            "an image without barrier {number}: {} states",
            report.states
        );
    }
}
