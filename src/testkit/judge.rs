//! Judge: what a run does to its session at every turn of it. The power goes, or the process dies.

use super::crash::{Cuts, Effort};
use super::death::Deaths;
use super::report::Tally;
use super::session::Session;
use super::subject::{Setup, Subject};
use ploop_formats::testkit::rng::Rng;

/// What was found, if anything was.
pub type Verdict = std::result::Result<(), String>;

/// Dice choose once which of the two it is.
pub struct Judge {
    /// Deaths, not power cuts.
    pub kills: bool,
    /// The power cuts.
    pub cuts: Cuts,
    deaths: Deaths,
}

impl Judge {
    /// A judge of what is set up so.
    pub fn new(setup: &Setup, rng: &mut Rng, effort: Effort) -> Self {
        Self {
            kills: rng.one_in(3),
            cuts: Cuts::new(setup, rng.next(), effort),
            deaths: Deaths::new(setup, rng.next()),
        }
    }

    /// Tries states of a session as it is now.
    pub fn look<S: Subject>(&mut self, session: &Session<S>) -> Verdict {
        match self.kills {
            true => self.deaths.maybe(session, 0),
            false => self.cuts.cut(session, 0),
        }
    }

    /// Counts what was tried.
    pub fn count<S: Subject>(&self, session: &Session<S>, tally: &mut Tally) {
        tally.states += self.cuts.tally.states + self.deaths.states;
        tally.requests += self.cuts.tally.requests + session.guest().called;
    }
}
