//! Space: what the keeper does while the host is low on it.
//!
//! The worker refuses new space by itself. The keeper says so once, shows it, tells a file system
//! on the device to give out no more, and looks twice a second whether that is over. It sleeps
//! until a worker reports that space is wanted and low.

use super::brake::Brake;
use crate::io::room::{HostSpace, KeepFree};
use rustix::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// How long nobody must have wanted space in vain before it is believed to be back: a quota is not
/// seen in what the host has.
const QUIET: Duration = Duration::from_millis(500);

/// Whether the host is low on space, and what was done about it.
#[derive(Debug, Default)]
pub(super) struct Space {
    low: Option<Low>,
}

#[derive(Debug)]
struct Low {
    reported: Instant,
    next_look: Instant,
    brake: Option<Brake>,
}

impl Space {
    /// Whether the host is low on space.
    pub(super) const fn is_low(&self) -> bool {
        self.low.is_some()
    }

    /// When to look again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.low.as_ref().map(|low| low.next_look)
    }

    /// A worker wanted space that is scarce. True when this is news.
    pub(super) fn report(&mut self, now: Instant) -> bool {
        match &mut self.low {
            Some(low) => {
                low.reported = now;
                false
            }
            None => {
                self.low = Some(Low {
                    reported: now,
                    next_look: now,
                    brake: None,
                });
                true
            }
        }
    }

    /// Looks at the host, and sees to it that the file system on `device` gives out no space.
    /// True when there is enough again: that file system may go on.
    pub(super) fn look(
        &mut self,
        now: Instant,
        image: impl AsFd,
        keep: KeepFree,
        device: Option<&Path>,
    ) -> bool {
        let Some(low) = self.low.as_mut().filter(|low| low.next_look <= now) else {
            return false;
        };
        let ample = HostSpace::of(image).is_ok_and(|space| space.is_ample(keep));
        if ample && now.duration_since(low.reported) >= QUIET {
            if let Some(brake) = low.brake.take() {
                brake.release();
            }
            self.low = None;
            return true;
        }
        low.next_look = now + LOOK;
        // It may have been mounted, or mounted anew, since the last look.
        if !low.brake.as_ref().is_some_and(Brake::holds) {
            low.brake = device.and_then(Brake::pull);
        }
        false
    }
}
