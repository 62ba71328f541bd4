//! Space: what the keeper does while the host is low on it.
//!
//! The worker refuses new space by itself. The keeper says so once, shows it, tells a file system
//! on the device to give out no more, and looks twice a second whether that is over. It sleeps
//! until a worker reports that space is wanted and low.

use super::brake::Brake;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// How long nobody must have wanted space in vain before it is believed to be back: a quota is not
/// seen in what the host has. Doubled each time that it turns out not to be back, up to a minute.
const QUIET: Duration = Duration::from_millis(500);
const QUIET_MAX: Duration = Duration::from_secs(60);

/// Whether the host is low on space, and what was done about it.
#[derive(Debug, Default)]
pub(super) struct Space {
    low: Option<Low>,
    /// When it was last believed to be back, and after how long a quiet.
    back: Option<(Instant, Duration)>,
}

#[derive(Debug)]
struct Low {
    reported: Instant,
    next_look: Instant,
    quiet: Duration,
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

    /// A worker wanted space that is scarce; whether that can be seen, `is_seen` tells. True when
    /// this is news.
    pub(super) fn report(&mut self, now: Instant, is_seen: impl FnOnce() -> bool) -> bool {
        match &mut self.low {
            Some(low) => {
                low.reported = now;
                false
            }
            None => {
                let relapse = |(back, quiet): (Instant, Duration)| {
                    (now.duration_since(back) < quiet * 4 && !is_seen()).then_some(quiet * 2)
                };
                let quiet = self.back.and_then(relapse).unwrap_or(QUIET);
                self.low = Some(Low {
                    reported: now,
                    next_look: now,
                    quiet: quiet.min(QUIET_MAX),
                    brake: None,
                });
                true
            }
        }
    }

    /// Looks whether there is clearly enough, as `is_ample` tells, and sees to it meanwhile that the
    /// file system on `device` gives out no space. True when there is: that file system may go on.
    pub(super) fn look(
        &mut self,
        now: Instant,
        is_ample: impl FnOnce() -> bool,
        device: Option<&Path>,
    ) -> bool {
        let Some(low) = self.low.as_mut().filter(|low| low.next_look <= now) else {
            return false;
        };
        if is_ample() && now.duration_since(low.reported) >= low.quiet {
            if let Some(brake) = low.brake.take() {
                brake.release();
            }
            self.back = Some((now, low.quiet));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_that_is_back_only_to_be_gone_again_is_believed_in_ever_more_slowly() {
        let ample = || true;
        let (mut space, mut now) = (Space::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..9 {
            assert!(space.report(now, || false), "news");
            let reported = now;
            while !space.look(now, ample, None) {
                assert!(!space.report(reported, || false) && space.is_low());
                now += LOOK;
            }
            waits.push(now.duration_since(reported).as_millis());
            now += Duration::from_millis(100);
        }
        assert_eq!(
            waits,
            [500, 1000, 2000, 4000, 8000, 16000, 32000, 60000, 60000]
        );
        assert!(space.report(now, || true));
        assert!(!space.look(now, ample, None));
        assert!(
            space.look(now + QUIET, ample, None),
            "the host had less, and has more"
        );
    }
}
