//! The power of the campaigns, measured: every planted bug and every broken barrier must be caught.

use super::report::Tally;
use super::subject::{Bench, Subject};
use super::{Chains, OddChains, Stacked, compacts, crash, death, faults, grows, models, switches};
use ploop_formats::planted::{self, Bug};
use ploop_formats::store::mutate::{Break, Covers, Mutation};
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
    /// [`switches`].
    Switch,
    /// [`grows`], which has its own subject.
    Grow,
    /// [`compacts`], which has its own, too.
    Compact,
}

impl Campaign {
    const fn name(self) -> &'static str {
        match self {
            Campaign::Crash => "crash",
            Campaign::WorkerDeath => "worker-death",
            Campaign::Model => "model",
            Campaign::Faults => "faults",
            Campaign::Switch => "switch",
            Campaign::Grow => "grow",
            Campaign::Compact => "compact",
        }
    }

    fn run<S: Stacked>(self, seed: u64, tally: &mut Tally, bench: &Bench) -> Result<(), String> {
        match self {
            Campaign::Switch => switches::run::<S>(seed, tally, bench),
            _ => self.run_any::<S>(seed, tally, bench),
        }
    }

    /// Of a subject that does not switch.
    fn run_any<S: Subject>(
        self,
        seed: u64,
        tally: &mut Tally,
        bench: &Bench,
    ) -> Result<(), String> {
        match self {
            Campaign::Crash => crash::run::<S>(seed, tally, bench),
            Campaign::WorkerDeath => death::run::<S>(seed, tally, bench),
            Campaign::Model => models::run::<S>(seed, tally, bench),
            Campaign::Faults => faults::run::<S>(seed, tally),
            Campaign::Switch => Err("this subject does not switch".into()),
            Campaign::Grow => grows::run(seed, tally, bench),
            Campaign::Compact => compacts::run(seed, tally, bench),
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
            | Bug::CutBeforeOverlay
            | Bug::BitsUnsaid => Self::WorkerDeath,
            Bug::ReuseQuarantined | Bug::RewriteNamedTable => Self::Faults,
            Bug::SwitchWithoutSeal | Bug::HoldWithoutFlushes | Bug::StackBeforeAdmission => {
                Self::Switch
            }
            Bug::TableBeforeMoves | Bug::FreshAfterGrowth => Self::Grow,
            Bug::MovedBeforeCopy
            | Bug::MovedCountsAsFresh
            | Bug::OldPlaceFreeAtOnce
            | Bug::MoveUnderShared => Self::Compact,
            _ => Self::Crash,
        }
    }
}

/// One run of a campaign of some subject.
type Run = fn(Campaign, u64, &mut Tally, &Bench) -> Result<(), String>;

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
    campaigns: &[(Campaign, Run)],
) -> Catch {
    let mut catch = Catch {
        wrong,
        by: None,
        states: 0,
    };
    for (campaign, run) in campaigns {
        let mut tally = Tally::default();
        for number in 0.. {
            if tally.states >= states {
                break;
            }
            let seed = seed.wrapping_add(number);
            // Barriers are numbered from the start of a run.
            bench.mutator.set(bench.mutator.mutation());
            if let Err(message) = run(*campaign, seed, &mut tally, bench) {
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
pub fn bug<S: Stacked>(bug: Bug, seed: u64, states: u64) -> Catch {
    planted(bug, seed, states, &[Campaign::run::<S>])
}

/// The same, in chains of qcow2 images, and in those of odd ones.
pub fn bug_in_chains(bug: Bug, seed: u64, states: u64) -> Catch {
    let runs: [Run; 2] = [Campaign::run_any::<Chains>, Campaign::run_any::<OddChains>];
    planted(bug, seed, states, &runs)
}

fn planted(bug: Bug, seed: u64, states: u64, runs: &[Run]) -> Catch {
    let _planted = planted::plant(bug);
    let campaigns: Vec<_> = runs.iter().map(|run| (Campaign::of(bug), *run)).collect();
    hunt(
        format!("bug {bug:?}"),
        seed,
        states,
        &Bench::default(),
        &campaigns,
    )
}

/// Every way to break a barrier that must not go unnoticed: every name, dropped and stepped over,
/// each time and only once.
pub fn mutations() -> Vec<Mutation> {
    let names = [
        Covers::Data,
        Covers::Metadata,
        Covers::Length,
        Covers::Punch,
    ];
    let ways = names
        .into_iter()
        .flat_map(|covers| [(covers, Break::Drop), (covers, Break::Swap)]);
    ways.flat_map(|(covers, how)| {
        [None, Some(0), Some(1)].map(|only| Mutation {
            covers: Some(covers),
            how,
            only,
        })
    })
    .filter(|m| !is_harmless(m))
    .collect()
}

/// A length barrier protects the index that will name the new clusters. Stepping over it moves one
/// data write into a cluster that nothing names before the barrier has then happened.
fn is_harmless(mutation: &Mutation) -> bool {
    (mutation.covers, mutation.how) == (Some(Covers::Length), Break::Swap)
}

/// Breaks a barrier and looks for it with the campaigns that cut power or kill.
pub fn barrier<S: Stacked>(mutation: Mutation, seed: u64, states: u64) -> Catch {
    let bench = Bench::default();
    bench.mutator.set(Some(mutation));
    let campaigns = [Campaign::Crash, Campaign::WorkerDeath];
    let campaigns = campaigns.map(|campaign| (campaign, Campaign::run::<S> as Run));
    hunt(mutation.to_string(), seed, states, &bench, &campaigns)
}
