//! The power of the campaigns, measured: every planted bug and every broken barrier must be caught.

use super::report::Tally;
use super::subject::{Bench, Subject};
use super::{crash, death, faults, models};
use ploop_formats::planted::{self, Bug};
use ploop_formats::store::mutate::{Covers, Mutation, Mutator};
use std::collections::BTreeSet;
use std::fmt;

/// A campaign, by the name that `torture` knows it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Campaign {
    /// [`crash`].
    Crash,
    /// [`death`].
    WorkerDeath,
    /// [`models`].
    Model,
    /// [`faults`].
    Faults,
}

impl Campaign {
    const fn name(self) -> &'static str {
        match self {
            Campaign::Crash => "crash",
            Campaign::WorkerDeath => "worker-death",
            Campaign::Model => "model",
            Campaign::Faults => "faults",
        }
    }

    fn run<S: Subject>(self, seed: u64, tally: &mut Tally, bench: &Bench) -> Result<(), String> {
        match self {
            Campaign::Crash => crash::run::<S>(seed, tally, bench),
            Campaign::WorkerDeath => death::run::<S>(seed, tally, bench),
            Campaign::Model => models::run::<S>(seed, tally, bench),
            Campaign::Faults => faults::run::<S>(seed, tally),
        }
    }

    /// The campaign that is there for such bugs.
    pub const fn of(bug: Bug) -> Self {
        match bug {
            Bug::FreshForReused | Bug::CopyUpUnderShared | Bug::DiscardExposesParent => Self::Model,
            Bug::PublishBeforeData
            | Bug::LedgerAfterAnswer
            | Bug::NoFence
            | Bug::CleanMarkBeforeSync
            | Bug::CutBeforeOverlay => Self::WorkerDeath,
            Bug::ReuseQuarantined => Self::Faults,
            _ => Self::Crash,
        }
    }
}

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
fn hunt<S: Subject>(
    wrong: String,
    seed: u64,
    states: u64,
    bench: &Bench,
    campaigns: &[Campaign],
) -> Catch {
    let mut catch = Catch {
        wrong,
        by: None,
        states: 0,
    };
    for campaign in campaigns {
        let mut tally = Tally::default();
        for number in 0.. {
            if tally.states >= states {
                break;
            }
            let seed = seed.wrapping_add(number);
            // Barriers are numbered from the start of a run.
            bench.mutator.set(bench.mutator.mutation());
            if let Err(message) = campaign.run::<S>(seed, &mut tally, bench) {
                catch.by = Some((campaign.name(), seed, message));
                break;
            }
        }
        catch.states += tally.states;
        if catch.by.is_some() {
            break;
        }
    }
    catch
}

/// Plants `bug` and looks for it with the campaign that is there for it, up to `states` checks.
pub fn bug<S: Subject>(bug: Bug, seed: u64, states: u64) -> Catch {
    let _planted = planted::plant(bug);
    hunt::<S>(
        format!("bug {bug:?}"),
        seed,
        states,
        &Bench::default(),
        &[Campaign::of(bug)],
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
    hunt::<S>(
        name,
        seed,
        states,
        &bench,
        &[Campaign::Crash, Campaign::WorkerDeath],
    )
}
