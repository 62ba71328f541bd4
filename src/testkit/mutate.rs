//! The power of the campaigns, measured: every planted bug and every broken barrier must be caught.

use super::report::Tally;
use super::subject::{Bench, Subject};
use super::{crash, death, faults, models};
use ploop_formats::planted::{self, Bug};
use ploop_formats::store::mutate::{Covers, Mutation, Mutator};
use std::collections::BTreeSet;
use std::fmt;

/// A run of some campaign.
type Run = fn(u64, &mut Tally, &Bench) -> Result<(), String>;

/// Whether something wrong was noticed.
#[derive(Debug, Clone)]
pub struct Catch {
    /// What was wrong.
    pub wrong: String,
    /// Campaign and seed of the run that noticed it, and what it said.
    pub by: Option<(&'static str, u64, String)>,
    /// Checks until then.
    pub states: u64,
}

impl fmt::Display for Catch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.by {
            Some((campaign, seed, message)) => write!(
                f,
                "caught {} by {campaign}, seed {seed}, {} states: {message}",
                self.wrong, self.states
            ),
            None => write!(f, "MISSED {} in {} states", self.wrong, self.states),
        }
    }
}

/// Runs campaigns in turn, each until it made `states` checks, until one fails.
fn hunt(
    wrong: String,
    seed: u64,
    states: u64,
    bench: &Bench,
    runs: &[(&'static str, Run)],
) -> Catch {
    let mut catch = Catch {
        wrong,
        by: None,
        states: 0,
    };
    for (name, run) in runs {
        let mut tally = Tally::default();
        let mut number = 0;
        while tally.states < states {
            let seed = seed.wrapping_add(number);
            number += 1;
            bench.mutator.set(bench.mutator.mutation());
            let outcome = run(seed, &mut tally, bench);
            if let Err(message) = outcome {
                catch.states += tally.states;
                catch.by = Some((name, seed, message));
                return catch;
            }
        }
        catch.states += tally.states;
    }
    catch
}

fn all<S: Subject>() -> [(&'static str, Run); 4] {
    [
        ("model", models::run::<S>),
        ("worker-death", death::run::<S>),
        ("crash", crash::run::<S>),
        ("faults", |seed, tally, _| faults::run::<S>(seed, tally)),
    ]
}

/// Plants `bug` and looks for it with every campaign, up to `states` checks each.
pub fn bug<S: Subject>(bug: Bug, seed: u64, states: u64) -> Catch {
    let _planted = planted::plant(bug);
    hunt(
        format!("bug {bug:?}"),
        seed,
        states,
        &Bench::default(),
        &all::<S>(),
    )
}

/// Names of the barriers that ordinary runs need.
pub fn barriers<S: Subject>(seed: u64) -> BTreeSet<Covers> {
    let bench = Bench {
        mutator: Mutator::new(),
        ..Bench::default()
    };
    for run in 0..40 {
        // What is wrong with a run is the campaigns' business, not this one's.
        let _ = models::run::<S>(seed.wrapping_add(run), &mut Tally::default(), &bench);
    }
    bench
        .mutator
        .seen()
        .into_keys()
        .filter(|covers| *covers != Covers::default())
        .collect()
}

/// Breaks a barrier and looks for it with the campaigns that cut power or kill.
pub fn barrier<S: Subject>(mutation: Mutation, seed: u64, states: u64) -> Catch {
    let bench = Bench {
        mutator: Mutator::new(),
        ..Bench::default()
    };
    bench.mutator.set(Some(mutation));
    let name = match mutation {
        Mutation::Drop(covers) => format!("drop of the barrier after {covers}"),
        Mutation::Swap(covers) => format!("step before the barrier after {covers}"),
        other => format!("{other:?}"),
    };
    let [_, death, crash, _] = all::<S>();
    hunt(name, seed, states, &bench, &[crash, death])
}
