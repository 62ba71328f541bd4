//! View: what attached disks say of themselves, all asked together.
//!
//! No path of a disk is touched: a keeper that hangs, or a dead file server below one, is shown and
//! keeps nobody waiting for long.

use crate::attach::Attached;
use ploop::client;
use ploop::rundir::{Departure, Phase, State};
use ploop::serve::supervise::control::{Ask, Figures};
use ploop::serve::supervise::host::Footprint;
use ploop::{Kind, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

/// How long all keepers together may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// An attached disk, as its keeper sees it.
#[derive(Debug, Clone)]
pub struct View {
    /// The disk. Its state is what the keeper says, or wrote down last.
    pub disk: Attached,
    /// Whether its keeper answers.
    pub answers: bool,
    /// What it counts; none when it does not answer, or not in a way that we understand.
    pub figures: Option<Figures>,
}

/// Asks the keepers of all these disks. Those that went meanwhile are left out.
pub fn of(disks: Vec<Attached>) -> Vec<View> {
    let runs: Vec<PathBuf> = disks.iter().map(|d| d.run.clone()).collect();
    let answers = client::ask_all(&runs, &[Ask::State, Ask::Stat], PATIENCE);
    let views = disks.into_iter().zip(answers).filter_map(view);
    views.collect()
}

fn view((mut disk, answer): (Attached, Result<Vec<Value>>)) -> Option<View> {
    let answers = answer.is_ok();
    let figures = match answer {
        Ok(answers) => {
            let [state, figures]: [Value; 2] = answers.try_into().ok()?;
            if let Ok(state) = client::parse::<State>(state, "state") {
                let mountpoint = disk.state.mountpoint.take();
                disk.state = State {
                    mountpoint,
                    ..state
                };
            }
            client::parse(figures, "figures").ok()
        }
        // Hung up on by a keeper that lives is not gone: too many may have asked at once.
        Err(e) if e.kind() == Kind::NotFound && Departure::of(&disk.run).is_none() => return None,
        Err(_) => None,
    };
    Some(View {
        disk,
        answers,
        figures,
    })
}

/// Adds to a disk's object what its keeper counts of it as a whole, and its space.
pub fn tell(object: &mut Value, figures: Option<&Figures>) {
    let counters = figures.map(|f| &f.counters);
    object["in_flight"] = counters.map(|c| c.in_flight).into();
    object["hung"] = counters.map(|c| c.hung).into();
    object["oldest_s"] = counters.map(|c| c.oldest_s).into();
    let space = figures.and_then(|f| f.footprint);
    object["host_free"] = space.map(|s| s.host_free).into();
    object["host_size"] = space.map(|s| s.host_size).into();
    object["allocated"] = space.map(|s| s.allocated).into();
}

impl View {
    /// How the disk is, in one word: what an operator should know of it first.
    pub fn health(&self) -> &'static str {
        let state = &self.disk.state;
        match state.state {
            Phase::Failed => "failed",
            _ if !self.answers => "silent",
            Phase::Starting => "starting",
            Phase::Recovering => "recovering",
            Phase::Stopping => "stopping",
            Phase::Serving if state.host_low => "low",
            Phase::Serving if state.frozen => "frozen",
            Phase::Serving => "serving",
        }
    }

    /// Requests that have been waiting for long.
    pub fn hung(&self) -> u64 {
        self.figures.as_ref().map_or(0, |f| f.counters.hung)
    }

    /// What it takes and what is left on the host.
    pub fn footprint(&self) -> Option<Footprint> {
        self.figures.as_ref().and_then(|f| f.footprint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop::Error;
    use rustix::fs::{FlockOperation, flock};
    use serde_json::json;
    use std::fs::File;

    fn disk(run: &std::path::Path) -> Attached {
        Attached::sample(run, "/ct/1")
    }

    #[test]
    fn a_disk_is_left_out_only_when_its_keeper_is_gone() {
        let run = tempfile::tempdir().expect("temp dir");
        let hung_up = || Err(Error::new(Kind::NotFound, "the keeper is gone"));
        let lock = File::create(run.path().join("lock")).expect("lock");
        flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("locked");
        let seen = view((disk(run.path()), hung_up())).expect("it lives");
        assert_eq!(seen.health(), "silent");
        drop(lock);
        assert!(view((disk(run.path()), hung_up())).is_none());
    }

    #[test]
    fn a_keeper_whose_figures_are_not_understood_is_not_silent() {
        let run = tempfile::tempdir().expect("temp dir");
        let disk = disk(run.path());
        let answers = vec![json!(disk.state), json!({ "ops": 3 })];
        let seen = view((disk, Ok(answers))).expect("it lives");
        assert!(seen.answers && seen.figures.is_none());
        assert_eq!(seen.health(), "serving");
    }
}
