//! Removal: the steps in which a point of a running disk goes.
//!
//! One step is enough, unless the point carries the running top, and that has too much to be copied
//! while the guest waits. Then the top is frozen as a temporary point, which is merged into the one
//! that is to go; so that one is gone. What the guest wrote meanwhile is in the new top, which stands
//! on the temporary point, and with that it goes on, until little is left or it has taken too many
//! rounds: then the temporary point stays, to go once a frozen delta stands on it.

use super::changer::Made;
use crate::image::detached::random_guid;
use ploop_formats::guid::Guid;
use ploop_formats::{Error, Kind, Result};
use serde_json::{Value, json};

/// Rounds after which a guest is taken to write as fast as we copy.
const ROUNDS: u8 = 4;

/// A point on its way.
#[derive(Debug)]
pub(super) struct Removal {
    asked: Guid,
    /// What goes at present.
    target: Guid,
    rate: Option<u64>,
    rounds: u8,
    /// The top as it was when the round began.
    frozen: Option<Guid>,
    /// The longest time that the guest waited, in microseconds.
    stall_us: Option<u64>,
    /// What was asked for is gone.
    gone: bool,
    last: Option<Made>,
}

/// What is done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// The top is frozen as a temporary point.
    Freeze(Guid),
    /// A point goes, copying so many bytes a second at most.
    Remove(Guid, Option<u64>),
}

impl Removal {
    /// Of this point.
    pub const fn new(uuid: Guid, rate: Option<u64>) -> Self {
        Self {
            asked: uuid,
            target: uuid,
            rate,
            rounds: ROUNDS,
            frozen: None,
            stall_us: None,
            gone: false,
            last: None,
        }
    }

    /// The first step.
    pub const fn first(&self) -> Step {
        Step::Remove(self.target, self.rate)
    }

    /// The step after one that made this, and held the guest for so long.
    pub fn next(&mut self, made: Made, stall_us: Option<u64>) -> Option<Step> {
        self.stall_us = self.stall_us.max(stall_us);
        let step = match (&made, self.frozen) {
            (Made::TooMuch, _) if self.rounds > 0 => {
                self.rounds -= 1;
                let uuid = random_guid();
                self.frozen = Some(uuid);
                Some(Step::Freeze(uuid))
            }
            (Made::Top, _) => Some(self.first()),
            (Made::Merged { .. }, Some(frozen)) => {
                self.gone = true;
                self.frozen = None;
                self.target = frozen;
                Some(self.first())
            }
            _ => None,
        };
        self.last = Some(made);
        step
    }

    /// What came of it when a step failed: what was asked for may be done.
    pub fn failed(&self, why: Error) -> Result<Value> {
        if !self.gone || why.kind() == Kind::Poisoned {
            return Err(why);
        }
        tracing::warn!("a temporary snapshot stays for now: {why}");
        Ok(self.answer())
    }

    /// What came of it.
    pub fn answer(&self) -> Value {
        let (outcome, children) = match &self.last {
            _ if self.gone => ("merged", 0),
            Some(Made::Dropped) => ("dropped", 0),
            Some(Made::Marked(n)) => ("temporary", *n),
            Some(Made::TooMuch) => ("temporary", 1),
            _ => ("merged", 0),
        };
        json!({
            "uuid": self.asked.bare(),
            "outcome": outcome,
            "children": children,
            "stall_us": self.stall_us,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged() -> Made {
        Made::Merged { into: "a".into() }
    }

    fn begun() -> (Guid, Removal) {
        let uuid = random_guid();
        (uuid, Removal::new(uuid, Some(5)))
    }

    #[test]
    fn a_point_with_a_frozen_delta_on_it_goes_in_one_step() {
        let (uuid, mut removal) = begun();
        assert_eq!(removal.first(), Step::Remove(uuid, Some(5)));
        assert_eq!(removal.next(merged(), None), None);
        assert_eq!(removal.answer()["outcome"], "merged");
    }

    #[test]
    fn a_top_with_much_in_it_is_frozen_merged_and_folded() {
        let (uuid, mut removal) = begun();
        let Some(Step::Freeze(frozen)) = removal.next(Made::TooMuch, None) else {
            panic!("not frozen");
        };
        let next = removal.next(Made::Top, Some(7));
        assert_eq!(next, Some(Step::Remove(uuid, Some(5))));
        let next = removal.next(merged(), Some(2));
        assert_eq!(next, Some(Step::Remove(frozen, Some(5))));
        assert_eq!(removal.next(Made::Folded, Some(9)), None);
        let answer = removal.answer();
        assert_eq!(
            (&answer["outcome"], &answer["stall_us"]),
            (&json!("merged"), &json!(9))
        );
    }

    #[test]
    fn a_guest_that_writes_as_fast_as_we_copy_costs_a_few_rounds_and_a_temporary_point() {
        let (_, mut removal) = begun();
        let mut rounds = 0;
        let mut made = Made::TooMuch;
        while let Some(step) = removal.next(made, None) {
            made = match step {
                Step::Freeze(_) => Made::Top,
                Step::Remove(..) if removal.frozen.is_some() => merged(),
                Step::Remove(..) => Made::TooMuch,
            };
            rounds += u8::from(made == Made::TooMuch);
        }
        assert_eq!(rounds, ROUNDS);
        assert_eq!(removal.answer()["outcome"], "merged");
    }

    #[test]
    fn a_step_that_fails_is_an_error_only_while_the_point_is_there() {
        let (_, mut removal) = begun();
        let failure = || Error::new(Kind::Io, "x");
        removal.next(Made::TooMuch, None);
        assert!(removal.failed(failure()).is_err());
        removal.next(Made::Top, None);
        removal.next(merged(), None);
        assert!(removal.failed(failure()).is_ok());
    }
}
