//! View: what attached disks say of themselves, all asked together.
//!
//! No path of a disk is touched: a keeper that hangs, or a dead file server below one, is shown and
//! keeps nobody waiting for long.

use crate::attach::Attached;
use ploop::client;
use ploop::rundir::{Phase, State};
use ploop::serve::supervise::control::{Ask, Figures};
use ploop::{Kind, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

/// How long all keepers together may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Left on a host that has nothing left: no cluster fits any more.
const FULL: u64 = 64 << 10;

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
        match (state.state, &self.figures) {
            (Phase::Failed, _) => "failed",
            _ if state.poisoned => "poisoned",
            (_, None) => "silent",
            (Phase::Recovering, _) => "recovering",
            (Phase::Starting, _) => "starting",
            (Phase::Stopping, _) => "stopping",
            (Phase::Serving, Some(figures)) => {
                let full = figures.space.is_some_and(|s| s.host_free < FULL);
                if full { "full" } else { "serving" }
            }
        }
    }

    /// Requests that have been waiting for long.
    pub fn hung(&self) -> u64 {
        self.figures.as_ref().map_or(0, |f| f.counters.hung)
    }
}
