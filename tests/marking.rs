//! Marks against seals: the recorder itself, in all orders in which no thread is stopped too often.

#[path = "../src/tracker/blocks.rs"]
#[allow(dead_code, reason = "the recorder needs some of it")]
mod blocks;
#[path = "../src/tracker/recorder.rs"]
mod recorder;

/// What the recorder is made of, as the model checker has it.
mod sync {
    pub use loom::sync::{Arc, Mutex, MutexGuard};

    pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().expect("never poisoned")
    }

    #[derive(Debug)]
    pub struct Current<T>(Mutex<Arc<T>>);

    impl<T> Current<T> {
        pub fn new(value: Arc<T>) -> Self {
            Self(Mutex::new(value))
        }

        pub fn load_full(&self) -> Arc<T> {
            Arc::clone(&lock(&self.0))
        }

        /// As the real one, whose guard is no count of the other's.
        pub fn load(&self) -> Arc<T> {
            self.load_full()
        }

        pub fn swap(&self, value: Arc<T>) -> Arc<T> {
            std::mem::replace(&mut lock(&self.0), value)
        }
    }
}

use blocks::{Blocks, Words};
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use recorder::Recorder;
use std::sync::atomic::AtomicUsize;
use sync::Arc;

#[derive(Debug)]
struct Memory([AtomicU64; 2]);

impl Words for Memory {
    fn count(&self) -> usize {
        2
    }

    fn load(&self, i: usize) -> u64 {
        self.0[i].load(Ordering::Acquire)
    }

    fn add(&self, i: usize, bits: u64) {
        self.0[i].fetch_or(bits, Ordering::AcqRel);
    }
}

type Set = Arc<Blocks<Memory>>;

const BLOCK: u64 = 4096;
/// How often a thread may be stopped in the middle of something: without a bound there is no end of orders.
const PREEMPTIONS: usize = 3;

fn set() -> Set {
    let memory = Memory([AtomicU64::new(0), AtomicU64::new(0)]);
    Arc::new(Blocks::new(memory, 12).expect("a set"))
}

/// A disk of two blocks, each of which is written once.
struct Model {
    disk: [AtomicU64; 2],
    /// Who has it has the disk to himself.
    held: sync::Mutex<()>,
    recorder: Recorder<Memory>,
    sets: [Set; 2],
}

impl Model {
    fn new() -> Self {
        let sets = [set(), set()];
        Self {
            disk: [AtomicU64::new(0), AtomicU64::new(0)],
            held: sync::Mutex::new(()),
            recorder: Recorder::new(vec![Arc::clone(&sets[0])]),
            sets,
        }
    }

    fn write(&self, block: usize) {
        let _marking = self.recorder.begin(block as u64 * BLOCK, BLOCK);
        let _admitted = sync::lock(&self.held);
        self.disk[block].store(1, Ordering::Release);
    }

    /// Replaces the sets while the disk is held, and what it is then: writes may have begun that come later.
    fn freeze(&self) -> [u64; 2] {
        let _held = sync::lock(&self.held);
        self.recorder.replace(vec![Arc::clone(&self.sets[1])]);
        self.read()
    }

    fn read(&self) -> [u64; 2] {
        [0, 1].map(|block: usize| self.disk[block].load(Ordering::Acquire))
    }

    fn marks(&self, set: usize) -> [bool; 2] {
        [0, 1].map(|block| self.sets[set].holds(block * BLOCK))
    }

    /// Seals, copies the disk, and looks at it once more, as whoever comes after this process died then.
    fn seal(&self) -> ([u64; 2], [bool; 2]) {
        self.recorder.replace(vec![Arc::clone(&self.sets[1])]);
        while !self.recorder.is_settled() {
            thread::yield_now();
        }
        let (sealed, copied) = (self.marks(0), self.read());
        let now = self.read();
        let later = self.marks(1);
        for block in 0..2 {
            assert!(
                copied[block] == now[block] || later[block],
                "block {block} was written after it was copied, and nobody knows"
            );
        }
        (copied, sealed)
    }
}

/// Has these blocks written by a thread each, and `beside` done meanwhile: what it returns is looked at
/// once all is over.
fn check<T>(writes: &'static [&'static [usize]], beside: fn(&Model) -> T, after: fn(&Model, T))
where
    T: 'static,
{
    let orders = std::sync::Arc::new(AtomicUsize::new(0));
    let counted = std::sync::Arc::clone(&orders);
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(PREEMPTIONS);
    model.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let model = Arc::new(Model::new());
        let writers: Vec<_> = writes
            .iter()
            .map(|blocks| {
                let model = Arc::clone(&model);
                thread::spawn(move || blocks.iter().for_each(|block| model.write(*block)))
            })
            .collect();
        let done = beside(&model);
        writers
            .into_iter()
            .for_each(|writer| writer.join().expect("a writer"));
        after(&model, done);
    });
    println!(
        "COUNT: marking: {} orders",
        orders.load(std::sync::atomic::Ordering::Relaxed)
    );
}

/// What was copied is what is there, but for what is marked again.
fn assert_known(model: &Model, copied: [u64; 2]) {
    let (disk, later) = (model.read(), model.marks(1));
    for block in 0..2 {
        assert!(copied[block] == disk[block] || later[block], "a lost write");
    }
}

fn check_seal(writes: &'static [&'static [usize]]) {
    check(writes, Model::seal, |model, (copied, sealed)| {
        assert_eq!(model.marks(0), sealed, "a set that was complete got more");
        assert_known(model, copied);
    });
}

#[test]
fn a_seal_beside_two_writers_of_different_blocks_loses_nothing() {
    check_seal(&[&[0], &[1]]);
}

#[test]
fn a_seal_beside_one_that_writes_twice_loses_nothing() {
    check_seal(&[&[0, 1]]);
}

#[test]
fn a_seal_beside_two_writers_of_one_block_loses_nothing() {
    check_seal(&[&[0], &[0]]);
}

#[test]
fn a_write_that_waits_while_the_sets_are_replaced_is_in_the_new_one() {
    check(&[&[0], &[1]], Model::freeze, assert_known);
}
