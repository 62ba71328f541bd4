//! What a campaign tests: something that opens a disk on simulated files.

use crate::device::Device;
use crate::io::memfd::SharedWords;
use crate::tracker::Recorder;
use ploop_formats::Result;
use ploop_formats::ledger::{Ledger, LocalWords, Words};
use ploop_formats::store::fault::{FaultStore, Faults};
use ploop_formats::store::mutate::{MutateStore, Mutator};
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{Rules, Sim, SimStore};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp::Value;
use ploop_formats::testkit::workload::Shape;
use std::sync::Arc;

/// The store under every subject: simulated, failing by rule, with barriers that can be broken.
pub type BenchStore = MutateStore<FaultStore<SimStore>>;

/// The files of a disk, base first, and what its guest reads from them.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Contents and promises of the files; only the last is written.
    pub files: Vec<(Pages, Rules)>,
    /// Whether the lowest file is a flat image.
    pub raw_base: bool,
    /// One value a guest sector.
    pub values: Vec<Value>,
    /// Sectors of a cluster.
    pub cluster: usize,
    /// Words for pending mappings.
    pub slots: usize,
}

impl Setup {
    /// A workload for it: so many requests, of which so many in a thousand reopen the disk.
    pub fn shape(&self, ops: usize, reopens: u64) -> Shape {
        Shape {
            sectors: self.values.len(),
            cluster: self.cluster,
            ops,
            reopens,
        }
    }

    /// Whether the written file may grow as it likes.
    pub fn is_roomy(&self) -> bool {
        self.files
            .last()
            .is_some_and(|(_, rules)| rules.max_len == u64::MAX)
    }
}

/// What a campaign wants of a setup.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// Layers at least.
    pub min_layers: u64,
    /// Layers at most.
    pub max_layers: u64,
    /// Clusters of the guest at most.
    pub max_clusters: u64,
}

/// Files that are about to be opened.
#[derive(Debug)]
pub struct Chain {
    /// Base first.
    pub stores: Vec<BenchStore>,
    /// Whether the lowest is a flat image.
    pub raw_base: bool,
    /// What a predecessor had answered.
    pub ledger: Ledger,
    /// Who marks what is written, where somebody does.
    pub recorder: Arc<Recorder<SharedWords>>,
}

/// Something that opens a disk on simulated files.
#[allow(async_fn_in_trait, reason = "everything runs on one thread")]
pub trait Subject: 'static {
    /// The disk.
    type Device: Device + 'static;

    /// Files that dice choose.
    fn setup(rng: &mut Rng, wish: &Wish) -> Setup;

    /// Opens the files for writing, after whatever end.
    async fn open(chain: Chain) -> Result<Self::Device>;

    /// Closes a disk on which nothing runs.
    async fn close(device: &Self::Device) -> Result<()>;

    /// Judges the written file by itself.
    fn audit(top: &Pages) -> std::result::Result<(), String>;

    /// Judges what a power cut leaves of the written file of an open disk.
    fn audit_open(top: &Pages) -> std::result::Result<(), String>;

    /// Judges the written file after a close.
    fn audit_closed(top: &Pages) -> std::result::Result<(), String>;
}

/// What stands between a subject and its files, the same for every opening.
#[derive(Debug, Clone, Default)]
pub struct Bench {
    /// Which operations fail.
    pub faults: Faults,
    /// Which barriers are broken.
    pub mutator: Mutator,
    /// Whether the lowest file is a flat image.
    pub raw_base: bool,
    /// Who marks what is written, where somebody does.
    pub recorder: Arc<Recorder<SharedWords>>,
}

impl Bench {
    /// The files of `sim` up to number `top`, to be opened. Faults and mutations concern the written
    /// one only.
    pub fn chain(&self, sim: &Sim, top: usize, words: &Arc<LocalWords>) -> Chain {
        let mut stores: Vec<BenchStore> = sim.stores().into_iter().take(top).map(plain).collect();
        stores.push(self.written(sim, top));
        Chain {
            stores,
            raw_base: self.raw_base,
            ledger: Ledger::new(words.clone()),
            recorder: self.recorder.clone(),
        }
    }

    /// A file of `sim` that is written.
    pub fn written(&self, sim: &Sim, file: usize) -> BenchStore {
        let store = sim.stores().swap_remove(file);
        let metadata_end = store.rules().metadata_end;
        // Where tables may be anywhere no failure of a write says whether it was of metadata.
        let known = Some(metadata_end).filter(|end| *end != u64::MAX);
        let store = FaultStore::with_metadata(store, self.faults.clone(), known.unwrap_or(0));
        MutateStore::new(store, self.mutator.clone(), metadata_end)
    }
}

/// A file that is only read.
pub fn plain(store: SimStore) -> BenchStore {
    MutateStore::new(FaultStore::new(store, Faults::new()), Mutator::new(), 0)
}

/// Words for a ledger of `slots` slots.
pub fn words(slots: usize) -> Arc<LocalWords> {
    Arc::new(LocalWords::new(slots + 1))
}

/// The words as they are now, for a successor: what happens to the others is not seen.
pub fn copy_words(words: &LocalWords) -> Arc<LocalWords> {
    let copy = LocalWords::new(words.count());
    (0..words.count()).for_each(|i| copy.store(i, words.load(i)));
    Arc::new(copy)
}
