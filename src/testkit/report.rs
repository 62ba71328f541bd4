//! What a campaign says when it ends.

use std::fmt;

/// A broken promise, with what replays it.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Seed of the run that found it.
    pub seed: u64,
    /// Which of the run's checks it was.
    pub at: u64,
    /// What was found.
    pub message: String,
}

/// The outcome of a campaign.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Its name on the command line.
    pub name: &'static str,
    /// Seed of its first run; run number i has this plus i.
    pub seed: u64,
    /// Runs.
    pub runs: u64,
    /// Checks: crash states, deaths, sequences or faulty runs.
    pub states: u64,
    /// Guest requests carried out.
    pub requests: u64,
    /// The first broken promise.
    pub failure: Option<Failure>,
}

impl Report {
    /// The report of a campaign that has not begun.
    pub const fn new(name: &'static str, seed: u64) -> Self {
        Self {
            name,
            seed,
            runs: 0,
            states: 0,
            requests: 0,
            failure: None,
        }
    }

    /// Runs `run` with one seed after another until `states` checks were made, at least one run,
    /// or a promise was broken. A run gives its checks and requests, or what it found at which
    /// check.
    pub fn campaign(
        name: &'static str,
        seed: u64,
        states: u64,
        mut run: impl FnMut(u64, &mut Tally) -> Result<(), String>,
    ) -> Self {
        let mut report = Self::new(name, seed);
        while report.failure.is_none() && (report.states < states || report.runs == 0) {
            let seed = seed.wrapping_add(report.runs);
            let mut tally = Tally::default();
            let outcome = run(seed, &mut tally);
            report.runs += 1;
            report.states += tally.states;
            report.requests += tally.requests;
            report.failure = outcome.err().map(|message| Failure {
                seed,
                at: tally.states,
                message,
            });
        }
        report
    }

    /// This report and another of the same campaign as one.
    #[must_use]
    pub fn join(mut self, other: Self) -> Self {
        self.runs += other.runs;
        self.states += other.states;
        self.requests += other.requests;
        self.failure = self.failure.or(other.failure);
        self
    }
}

/// What a run has done so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Checks made.
    pub states: u64,
    /// Guest requests carried out.
    pub requests: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            seed,
            runs,
            states,
            requests,
            failure,
        } = self;
        if let Some(Failure { seed, at, message }) = failure {
            writeln!(
                f,
                "{name}: seed {seed} at {at}: {message}; replay: torture {name} --seed {seed} --states 1 --threads 1"
            )?;
        }
        let verdict = if failure.is_some() { "FAILED" } else { "ok" };
        write!(
            f,
            "{name}: {verdict}, seed {seed}, {runs} runs, {requests} requests, {states} states, {} violations",
            u8::from(failure.is_some())
        )
    }
}
