//! torture: runs the campaigns of ploop's testkit and says what they found.
//!
//! Every failure is one line with the seed that replays it. The last line of a command says what
//! was done. Exits with 1 when a promise was broken or a planted bug was missed.

use clap::{Parser, Subcommand};
use ploop::testkit::forest::{self, Answers};
use ploop::testkit::trees::Formats;
use ploop::testkit::{
    Engine, Report, changes, compacts, copies, crash, death, faults, grows, migrations, models,
    mutate, switches,
};
use ploop_formats::planted::Bug;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Parser)]
#[command(
    about = "Crash, kill, starve and confuse the engine, and see whether it keeps its promises"
)]
struct Args {
    #[command(subcommand)]
    campaign: Campaign,
}

#[derive(Subcommand)]
enum Campaign {
    /// The power goes after any operation, again and again.
    Crash(Effort),
    /// The process dies at any moment and its guest lives on.
    WorkerDeath(Effort),
    /// Long random sequences against the model.
    Model(Effort),
    /// The n-th operation fails, for every n.
    Faults(Effort),
    /// The disk gets layer upon layer while its guest writes, and the power goes or the process dies.
    Switch(Effort),
    /// The disk grows while its guest writes, and the power goes or the process dies.
    Grow(Effort),
    /// The disk is compacted while its guest writes, and the power goes or the process dies.
    Compact(Effort),
    /// A disk's tree is changed, and the power goes, the process dies or an operation fails.
    Changes(Effort),
    /// Random sequences of all verbs on several disks at once, against a model.
    Forest(Effort),
    /// A copy is kept by what a tracker says, and the process that marks dies.
    Copies(Effort),
    /// A disk goes from one folder to another, and the link is cut or a side dies.
    Migrations(Effort),
    /// Every planted bug and broken barrier must be caught.
    Mutate(Effort),
}

#[derive(clap::Args, Clone, Copy)]
struct Effort {
    /// Checks at least: crash states, deaths, sequences or faulty runs.
    #[arg(long, default_value_t = 20_000)]
    states: u64,
    /// The first run's seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads; 0 is one a core.
    #[arg(long, default_value_t = 0)]
    threads: u64,
}

/// Runs of different threads have seeds this far apart.
const STRIDE: u64 = 1 << 40;

impl Effort {
    fn threads(&self) -> u64 {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
            n => n,
        }
    }

    /// Shares the states among threads.
    fn share(&self, campaign: fn(u64, u64) -> Report) -> Report {
        let threads = self.threads();
        let (seed, states) = (self.seed, self.states.div_ceil(threads));
        let reports: Vec<Report> = std::thread::scope(|scope| {
            let spawn =
                |n: u64| scope.spawn(move || campaign(seed.wrapping_add(n * STRIDE), states));
            let running: Vec<_> = (0..threads).map(spawn).collect();
            running
                .into_iter()
                .map(|t| t.join().expect("a campaign panicked"))
                .collect()
        });
        reports
            .into_iter()
            .reduce(Report::join)
            .expect("at least one thread")
    }
}

fn timed(campaign: fn(u64, u64) -> Report, effort: Effort) -> bool {
    let start = Instant::now();
    let report = effort.share(campaign);
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{report}, {:.0} states/s",
        report.states as f64 / seconds.max(0.001)
    );
    report.failure.is_none()
}

fn power(effort: Effort) -> bool {
    let Effort { seed, states, .. } = effort;
    let planted = Bug::ALL
        .into_iter()
        .map(|b| mutate::bug::<Engine>(b, seed, states));
    let in_chains = Bug::OF_QCOW2
        .into_iter()
        .map(|b| mutate::bug_in_chains(b, seed, states));
    let mutations = mutate::mutations().into_iter();
    let broken = mutations.map(|m| mutate::barrier::<Engine>(m, seed, states));
    let (mut caught, mut missed) = (0, 0);
    for catch in planted.chain(in_chains).chain(broken) {
        println!("{catch}");
        *(if catch.by.is_some() {
            &mut caught
        } else {
            &mut missed
        }) += 1;
    }
    println!(
        "mutate: seed {}, {caught} caught, {missed} missed",
        effort.seed
    );
    missed == 0
}

fn main() -> ExitCode {
    let good = match Args::parse().campaign {
        Campaign::Crash(effort) => timed(crash::campaign::<Engine>, effort),
        Campaign::WorkerDeath(effort) => timed(death::campaign::<Engine>, effort),
        Campaign::Model(effort) => timed(models::campaign::<Engine>, effort),
        Campaign::Faults(effort) => timed(faults::campaign::<Engine>, effort),
        Campaign::Switch(effort) => timed(switches::campaign::<Engine>, effort),
        Campaign::Grow(effort) => timed(grows::campaign, effort),
        Campaign::Compact(effort) => timed(compacts::campaign, effort),
        Campaign::Changes(effort) => timed(
            |seed, states| changes::campaign(Formats::Ploop, seed, states),
            effort,
        ),
        Campaign::Forest(effort) => timed(
            |seed, sequences| forest::campaign(seed, sequences, &mut Answers::new()),
            effort,
        ),
        Campaign::Copies(effort) => timed(copies::campaign, effort),
        Campaign::Migrations(effort) => timed(
            |seed, states| migrations::campaign(Formats::Mixed, seed, states),
            effort,
        ),
        Campaign::Mutate(effort) => power(effort),
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
