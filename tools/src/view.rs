//! View: what attached disks say of themselves, all asked together.
//!
//! No path of a disk is touched: a keeper that hangs, or a dead file server below one, is shown and
//! keeps nobody waiting for long.

use crate::attach::Attached;
use ploop::client;
use ploop::rundir::{Phase, State};
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
    /// What it counts; none when it does not answer.
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
        Err(e) if e.kind() == Kind::NotFound => return None,
        Err(_) => None,
    };
    Some(View { disk, figures })
}

impl View {
    /// How the disk is, in one word: what an operator should know of it first.
    pub fn health(&self) -> &'static str {
        let state = &self.disk.state;
        match state.state {
            Phase::Failed => "failed",
            _ if self.figures.is_none() => "silent",
            Phase::Starting => "starting",
            Phase::Recovering => "recovering",
            Phase::Stopping => "stopping",
            Phase::Serving if state.host_low => "low",
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
