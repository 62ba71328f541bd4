//! The compact campaign: clusters move to the front of the top's file while its guest writes, and the
//! power goes or the process dies at any moment.
//!
//! The top has holes from the start, full of poison, and its guest makes more. It is compacted now and
//! then beside the guest, who may end it, or whenever it is opened: then whatever a cut leaves is
//! compacted again by who comes next, before anybody reads. When a guest has had its say, nothing may
//! be left to move, and the file has no holes.

use super::crash::Effort;
use super::engine::{Engine, Top};
use super::judge::{Judge, Verdict};
use super::report::{Report, Tally};
use super::session::{Ground, Session};
use super::subject::{Bench, BenchStore, Chain, Setup, Subject, Wish};
use super::switches::pause_for;
use crate::disk::Disk;
use crate::image::snapshot::copy::Work;
use crate::stack::AnyLayer;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::progress::{Progress, Watch};
use ploop_formats::store::Store;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::Sim;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::{Error, Kind, Result};

const WISH: Wish = Wish {
    min_layers: 1,
    max_layers: 3,
    max_clusters: 8,
};
const EFFORT: Effort = Effort {
    per_point: 3,
    live_in: 800,
    cycles: 1,
};
const TOP: Top = Top {
    one_in: 2,
    leaks: 6,
};
/// Compactions in one life.
const TIMES: u64 = 4;
/// Turns that others have before each, at most.
const PATIENCE: u64 = 60;

/// A disk that is compacted whenever it is opened, or only when somebody beside the guest says so.
#[derive(Debug)]
pub struct Compacter<const LIVE: bool>;

/// Tries `states` power cuts and deaths or more.
pub fn campaign(seed: u64, states: u64) -> Report {
    Report::campaign("compact", seed, states, |seed, tally| {
        run(seed, tally, &Bench::default())
    })
}

/// One run; barriers break as `bench` says.
pub fn run(seed: u64, tally: &mut Tally, bench: &Bench) -> Verdict {
    match seed % 3 {
        0 => live::<false>(seed, tally, bench),
        _ => live::<true>(seed, tally, bench),
    }
}

fn live<const LIVE: bool>(seed: u64, tally: &mut Tally, bench: &Bench) -> Verdict {
    let mut rng = Rng::new(seed);
    let setup = Compacter::<LIVE>::setup(&mut rng, &WISH);
    let mut session = Session::<Compacter<LIVE>>::with_bench(&setup, bench, rng.next());
    let mut judge = Judge::new(&setup, &mut rng, EFFORT);
    let mut look = |session: &Session<Compacter<LIVE>>| judge.look(session);
    let ops = setup.shape(rng.range(10, 60) as usize, 0).make(&mut rng);
    let depth = rng.range(1, 8);
    let lived = session.open(&mut look).and_then(|()| {
        if LIVE {
            let dice = Rng::new(rng.next());
            session.beside(|ground| now_and_then(ground, dice));
        }
        session.run(ops, depth, &mut look)?;
        session.check_all()?;
        let dice = Rng::new(rng.next());
        session.beside(|ground| at_last(ground, dice));
        session.run(Vec::new(), 1, &mut look)?;
        session.check_all()?;
        session.close(&mut look)
    });
    judge.count(&session, tally);
    lived
}

/// Goes on until it has been asked so often.
struct Patience(u64);

impl Watch for Patience {
    fn tell(&mut self, _: Progress) -> Result<()> {
        self.0 = self.0.checked_sub(1).ok_or_else(cancelled)?;
        Ok(())
    }
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "nobody waits any more")
}

/// Compacts a disk now and then, and cuts its file or does not.
async fn now_and_then(ground: Ground<Disk<BenchStore>>, mut rng: Rng) -> Verdict {
    for _ in 0..rng.range(1, TIMES) {
        pause_for(&mut rng, PATIENCE).await;
        let patience = match rng.one_in(3) {
            true => rng.below(6),
            false => u64::MAX,
        };
        let mut patience = Patience(patience);
        let mut work = Work::new(&mut patience, &());
        match ground.device.pack(&mut work).await {
            Err(e) if e.kind() == Kind::Cancelled => {}
            packed => ground.guest.borrow().excuse(packed.map(drop))?,
        }
        if rng.one_in(2) {
            cut(&ground).await?;
        }
    }
    Ok(())
}

/// Closes the top, which cuts its file, and goes on.
async fn cut(ground: &Ground<Disk<BenchStore>>) -> Verdict {
    let words = ground.head.borrow().words.clone();
    let hold = ground.device.hold().await;
    ground.head.borrow_mut().ending = true;
    let asked = ground.guest.borrow_mut().model.flush();
    let cut = hold.cut(Ledger::new(words)).await;
    ground.head.borrow_mut().ending = false;
    let mut guest = ground.guest.borrow_mut();
    if cut.is_ok() {
        guest.model.flushed(asked);
    }
    guest.excuse(cut)
}

/// Compacts a disk that nobody else uses: nothing is left to do, and its file has no holes.
async fn at_last(ground: Ground<Disk<BenchStore>>, mut rng: Rng) -> Verdict {
    pause_for(&mut rng, PATIENCE).await;
    let packed = ground.device.pack(&mut Work::new(&mut (), &())).await;
    packed.map_err(|e| format!("compacting an idle disk: {e}"))?;
    cut(&ground).await?;
    let stack = ground.device.stack();
    let AnyLayer::Ploop(top) = stack.top() else {
        unreachable!("the top is a delta");
    };
    let file = ground.head.borrow().top;
    let (packing, len) = (top.packing(), top_len(&ground.sim, file));
    let wanted = top.geometry().cluster.start(packing.end.0);
    match (packing.misplaced, len == wanted) {
        (0, true) => Ok(()),
        (left, _) => Err(format!(
            "{left} clusters are misplaced, and the file has {len} bytes in place of {wanted}"
        )),
    }
}

fn top_len(sim: &Sim, file: usize) -> u64 {
    sim.stores().swap_remove(file).info().len
}

impl<const LIVE: bool> Subject for Compacter<LIVE> {
    type Device = Disk<BenchStore>;

    fn setup(rng: &mut Rng, wish: &Wish) -> Setup {
        Engine::files(rng, wish, TOP)
    }

    async fn open(chain: Chain) -> Result<Disk<BenchStore>> {
        let disk = Engine::open(chain).await?;
        if !LIVE {
            match disk.pack(&mut Work::new(&mut (), &())).await {
                Err(e) if e.kind() != Kind::NoSpace => return Err(e),
                _ => {}
            }
        }
        Ok(disk)
    }

    async fn close(device: &Disk<BenchStore>) -> Result<()> {
        Engine::close(device).await
    }

    fn audit(top: &Pages) -> Verdict {
        Engine::audit(top)
    }

    fn audit_open(top: &Pages) -> Verdict {
        Engine::audit_open(top)
    }

    fn audit_closed(top: &Pages) -> Verdict {
        Engine::audit_closed(top)
    }
}
