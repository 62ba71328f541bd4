//! The copy campaign: beside the guest somebody keeps a copy of its disk by what a tracker says, and the
//! process dies at any moment.
//!
//! What the copy does not hold must be in a generation that was not acknowledged, or be recorded, whatever
//! landed of the requests that were not answered, and whether the guest asks again for them or not.

use super::engine::Engine;
use super::report::{Report, Tally};
use super::session::{Ground, Session, blind};
use super::subject::{Bench, BenchStore, Chain, Setup, Subject, Wish, copy_words};
use crate::device::Device;
use crate::disk::Disk;
use crate::io::memfd::SharedWords;
use crate::tracker::{Blocks, Recorder, Set, Tracked, words_for};
use ploop_formats::store::pages::Pages;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::{Result, buf};
use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

const WISH: Wish = Wish {
    min_layers: 1,
    max_layers: 3,
    max_clusters: 6,
};
/// Bytes of a block, as a power of two: clusters have eight of them.
const LOG2: u32 = 12;
const BLOCK: usize = 1 << LOG2;
/// A death at one operation in so many.
const DEATH_IN: u64 = 3;

/// The engine, and what is recorded of it.
#[derive(Debug)]
struct Recorded;

impl Subject for Recorded {
    type Device = Tracked<Disk<BenchStore>>;

    fn setup(rng: &mut Rng, wish: &Wish) -> Setup {
        Engine::setup(rng, wish)
    }

    async fn open(chain: Chain) -> Result<Self::Device> {
        let recorder = Arc::clone(&chain.recorder);
        Ok(Tracked::new(Arc::new(Engine::open(chain).await?), recorder))
    }

    async fn close(device: &Self::Device) -> Result<()> {
        Engine::close(device.device()).await
    }

    fn audit(top: &Pages) -> std::result::Result<(), String> {
        Engine::audit(top)
    }

    fn audit_open(top: &Pages) -> std::result::Result<(), String> {
        Engine::audit_open(top)
    }

    fn audit_closed(top: &Pages) -> std::result::Result<(), String> {
        Engine::audit_closed(top)
    }
}

/// What a keeper does; each step can be left out, to see that the campaign misses it.
#[derive(Debug, Clone, Copy)]
pub struct Keeper {
    /// A set is sealed only when nobody holds it.
    pub waits: bool,
    /// A set that was being sealed when the process died is joined with its successor.
    pub joins: bool,
}

impl Keeper {
    /// As it is.
    pub const WHOLE: Self = Self {
        waits: true,
        joins: true,
    };
}

/// What outlives the process: the tracker's sets, and the copy.
#[derive(Debug)]
struct Books {
    recording: Set,
    successor: Option<Set>,
    /// A generation that is not copied yet.
    sealed: Option<Set>,
    copy: Vec<u8>,
}

fn set(bytes: usize) -> Set {
    let words = words_for(bytes as u64, LOG2).unwrap();
    Arc::new(Blocks::new(SharedWords::create(words).unwrap(), LOG2).unwrap())
}

impl Books {
    /// Of a disk that nobody has copied yet.
    fn new(bytes: usize) -> Self {
        let all = set(bytes);
        all.add_all();
        Self {
            recording: set(bytes),
            successor: None,
            sealed: Some(all),
            copy: vec![0; bytes],
        }
    }

    /// As they are now: what the others mark later is not seen.
    fn fork(&self) -> Self {
        let fork = |old: &Set| {
            let new = set(self.copy.len());
            new.add_those_of(old);
            new
        };
        Self {
            recording: fork(&self.recording),
            successor: self.successor.as_ref().map(fork),
            sealed: self.sealed.as_ref().map(fork),
            copy: self.copy.clone(),
        }
    }

    /// The process is dead.
    fn inherit(&mut self, keeper: Keeper) {
        if let Some(successor) = self.successor.take_if(|_| keeper.joins) {
            self.recording.add_those_of(&successor);
        }
    }

    /// The first byte of the disk that the copy lacks, and nobody knows that.
    fn lost(&self, disk: &[u8]) -> Option<usize> {
        let mut blocks = disk.chunks(BLOCK).zip(self.copy.chunks(BLOCK)).enumerate();
        let is_lost = |(n, (disk, copy)): &(usize, (&[u8], &[u8]))| {
            let at = (n * BLOCK) as u64;
            let sealed = self.sealed.as_ref().is_some_and(|set| set.holds(at));
            disk != copy && !sealed && !self.recording.holds(at)
        };
        blocks.find(is_lost).map(|(n, _)| n * BLOCK)
    }
}

/// Lets others go first.
async fn pause() {
    let mut waited = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Copies what is sealed and seals, so many times.
async fn copy_on(
    ground: Ground<Tracked<Disk<BenchStore>>>,
    books: Rc<RefCell<Books>>,
    rounds: u64,
    keeper: Keeper,
) -> std::result::Result<(), String> {
    let recorder = Arc::clone(&ground.bench.recorder);
    let bytes = books.borrow().copy.len();
    for _ in 0..rounds {
        let sealed = books.borrow().sealed.clone();
        for run in sealed.iter().flat_map(|set| set.runs(0..bytes as u64)) {
            let (from, len) = (run.start as usize, (run.end - run.start) as usize);
            let read = ground.device.read(run.start, buf::aligned(len)).await;
            let read = read.map_err(|e| format!("copying: {e}"))?;
            books.borrow_mut().copy[from..from + len].copy_from_slice(&read);
        }
        books.borrow_mut().sealed = None;
        let next = set(bytes);
        books.borrow_mut().successor = Some(Arc::clone(&next));
        recorder.replace(vec![next]);
        while keeper.waits && !recorder.is_settled() {
            pause().await;
        }
        let mut books = books.borrow_mut();
        if let Some(next) = books.successor.take() {
            books.sealed = Some(std::mem::replace(&mut books.recording, next));
        }
    }
    Ok(())
}

/// Tries `states` deaths or more.
pub fn campaign(seed: u64, states: u64) -> Report {
    Report::campaign("copies", seed, states, |seed, tally| {
        run(seed, tally, Keeper::WHOLE)
    })
}

/// One run with a keeper that does so much.
pub fn run(seed: u64, tally: &mut Tally, keeper: Keeper) -> std::result::Result<(), String> {
    let mut rng = Rng::new(seed);
    let setup = Recorded::setup(&mut rng, &WISH);
    let bytes = setup.values.len() * 512;
    let books = Rc::new(RefCell::new(Books::new(bytes)));
    let bench = recording(&books.borrow());
    let mut session = Session::<Recorded>::with_bench(&setup, &bench, rng.next());
    session.open(&mut blind)?;
    let (rounds, beside) = (rng.range(1, 12), Rc::clone(&books));
    session.beside(move |ground| copy_on(ground, beside, rounds, keeper));
    let ops = setup.shape(rng.range(6, 40) as usize, 0).make(&mut rng);
    let depth = *rng.pick(&[1, 2, 4, 8, 16]);
    let mut dice = Rng::new(rng.next());
    let outcome = session.run(ops, depth, &mut |session: &Session<Recorded>| {
        if !dice.one_in(DEATH_IN) {
            return Ok(());
        }
        tally.states += 1;
        die(session, &books.borrow(), keeper, &mut dice)
    });
    tally.requests += session.guest().called;
    outcome?;
    judge(&session, &books.borrow())
}

fn recording(books: &Books) -> Bench {
    Bench {
        recorder: Arc::new(Recorder::new(vec![Arc::clone(&books.recording)])),
        ..Bench::default()
    }
}

/// What a successor finds if the process dies now.
fn die(
    dead: &Session<Recorded>,
    books: &Books,
    keeper: Keeper,
    rng: &mut Rng,
) -> std::result::Result<(), String> {
    let mut books = books.fork();
    books.inherit(keeper);
    let (words, model) = (copy_words(&dead.words()), dead.guest().model.clone());
    let seed = rng.next();
    let mut heir = dead.heir(dead.sim().fork(seed), words, model, seed);
    heir.replace_bench(Bench {
        raw_base: dead.bench().raw_base,
        ..recording(&books)
    });
    heir.fence(&mut blind)?;
    heir.open(&mut blind)?;
    if rng.one_in(2) {
        heir.resend(&[], &mut blind)?;
    }
    judge(&heir, &books).map_err(|e| format!("after a death: {e}"))
}

fn judge(session: &Session<Recorded>, books: &Books) -> std::result::Result<(), String> {
    match books.lost(&session.read_all()?) {
        Some(at) => Err(format!(
            "the copy lacks what is at byte {at}, and no set has it"
        )),
        None => Ok(()),
    }
}
