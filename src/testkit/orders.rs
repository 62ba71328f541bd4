//! Every order: two requests at once, and each order in which the operations of both can land.
//!
//! Dice try long mixtures ([`super::models`]); here nothing is left to them. What a case is made of is
//! small, so that its orders can be counted.

use super::session::{Session, blind};
use super::subject::{Setup, Subject, Wish};
use ploop_formats::testkit::order::Order;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::workload::{Op, ZeroSpace};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

const WISH: Wish = Wish {
    min_layers: 1,
    max_layers: 2,
    max_clusters: 2,
};
/// Bytes of a file, which every order begins with a copy of.
const FILE_MAX: u64 = 128 << 10;
/// A case with more orders than that is not tried to its end.
const ORDERS_MAX: u64 = 20_000;

/// What was tried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tried {
    /// Pairs of requests on some disk.
    pub pairs: u64,
    /// Those that were tried in every order.
    pub whole: u64,
    /// Orders in all.
    pub orders: u64,
}

/// Tries every pair of requests on the disk of each seed in every order, or says what was broken.
pub fn campaign<S: Subject>(seeds: Range<u64>) -> Result<Tried, String> {
    let mut tried = Tried::default();
    for seed in seeds {
        run::<S>(seed, &mut tried).map_err(|e| format!("seed {seed}: {e}"))?;
    }
    Ok(tried)
}

/// Every pair of requests on the disk of one seed.
fn run<S: Subject>(seed: u64, tried: &mut Tried) -> Result<(), String> {
    let setup = roomy::<S>(seed);
    let ops = kinds(&setup);
    for first in &ops {
        for second in &ops {
            let pair = [first.clone(), second.clone()];
            let (orders, whole) = pair_of::<S>(&setup, &pair)?;
            tried.pairs += 1;
            tried.whole += u64::from(whole);
            tried.orders += orders;
        }
    }
    Ok(())
}

/// The first setup from this seed on whose written file is small, and may grow as it likes.
fn roomy<S: Subject>(seed: u64) -> Setup {
    let all = (0..).map(|n| S::setup(&mut Rng::new(seed * 1000 + n), &WISH));
    let small = |setup: &Setup| setup.files.iter().all(|(file, _)| file.len() < FILE_MAX);
    let mut roomy = all.filter(|setup| setup.is_roomy() && small(setup));
    roomy.next().expect("one in a few is roomy and small")
}

/// One request of each kind, around the end of the first cluster.
fn kinds(setup: &Setup) -> Vec<Op> {
    let (cluster, sectors) = (setup.cluster, setup.values.len());
    let within = |from: usize, to: usize| from.min(sectors - 1)..to.min(sectors);
    let whole = within(0, cluster);
    let write = |sectors| Op::Write {
        sectors,
        fua: false,
    };
    vec![
        write(within(0, 1)),
        write(within(cluster - 1, cluster + 1)),
        write(whole.clone()),
        Op::Zero {
            sectors: whole.clone(),
            space: ZeroSpace::Free,
            fua: false,
        },
        Op::Discard { sectors: whole },
        Op::Flush,
        Op::Read {
            sectors: within(0, 2 * cluster),
        },
    ]
}

/// How many orders two requests were tried in, and whether that were all.
fn pair_of<S: Subject>(setup: &Setup, pair: &[Op; 2]) -> Result<(u64, bool), String> {
    let order = Rc::new(RefCell::new(Order::default()));
    for tried in 1..=ORDERS_MAX {
        one::<S>(setup, pair, &order).map_err(|e| format!("{pair:?}, order {tried}: {e}"))?;
        if !order.borrow_mut().advance() {
            return Ok((tried, true));
        }
    }
    Ok((ORDERS_MAX, false))
}

/// One order, and what the disk holds after it and after a close.
fn one<S: Subject>(
    setup: &Setup,
    pair: &[Op; 2],
    order: &Rc<RefCell<Order>>,
) -> Result<(), String> {
    let mut session = Session::<S>::new(setup, 0);
    session.open(&mut blind)?;
    session.follow(Some(order.clone()));
    session.run(pair.to_vec(), 2, &mut blind)?;
    session.follow(None);
    session.check_all()?;
    session.close(&mut blind)?;
    session.open(&mut blind)?;
    session.check_all()?;
    session.close(&mut blind)
}
