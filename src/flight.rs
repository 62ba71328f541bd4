//! Flight control: overlapping requests on one cluster are serial, all others run in parallel.
//!
//! A request is admitted for a range of guest clusters, shared or exclusive. Shared requests use
//! the mapping as it is; an exclusive one may change it, and waits until nothing is in flight on
//! its clusters. Admission is first come, first served and all at once, so requests cannot wait
//! for each other in a circle. No thread blocks: a waiting request is a pending future.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// How a request uses its clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Reads, and writes to clusters that have their place.
    Shared,
    /// Anything that changes where a cluster is.
    Exclusive,
}

/// An admitted or waiting range of clusters, ends included.
#[derive(Debug, Clone, Copy)]
struct Range {
    first: u64,
    last: u64,
    mode: Mode,
}

impl Range {
    fn conflicts(&self, other: &Range) -> bool {
        let overlap = self.first <= other.last && other.first <= self.last;
        overlap && (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive)
    }
}

#[derive(Debug, Default)]
struct State {
    active: Vec<(u64, Range)>,
    waiting: VecDeque<(Range, oneshot::Sender<Admitted>)>,
    next: u64,
}

impl State {
    /// Whether `range` may start now, behind the waiting requests that came before it.
    fn is_free(&self, range: &Range, ahead: usize) -> bool {
        !self.active.iter().any(|(_, a)| a.conflicts(range))
            && !self
                .waiting
                .iter()
                .take(ahead)
                .any(|(w, _)| w.conflicts(range))
    }

    fn start(&mut self, range: Range) -> u64 {
        self.next += 1;
        self.active.push((self.next, range));
        self.next
    }
}

/// The requests of one disk.
#[derive(Debug, Clone, Default)]
pub struct Flight {
    state: Arc<Mutex<State>>,
}

/// A request in flight. Dropping it lets those that wait for it go.
#[derive(Debug)]
#[must_use = "a request that is not held is not in flight"]
pub struct Admitted {
    id: u64,
    flight: Flight,
}

impl Flight {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing in flight or ahead in the queue conflicts with clusters
    /// `first ..= last`.
    pub async fn admit(&self, first: u64, last: u64, mode: Mode) -> Admitted {
        let range = Range { first, last, mode };
        let turn = {
            let mut state = self.lock();
            if state.is_free(&range, usize::MAX) {
                return Admitted {
                    id: state.start(range),
                    flight: self.clone(),
                };
            }
            let (grant, turn) = oneshot::channel();
            state.waiting.push_back((range, grant));
            turn
        };
        turn.await
            .expect("a waiting request is granted or still queued")
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut granted = Vec::new();
        let mut state = self.flight.lock();
        if let Some(i) = state.active.iter().position(|(id, _)| *id == self.id) {
            state.active.swap_remove(i);
        }
        let mut ahead = 0;
        while let Some((range, _)) = state.waiting.get(ahead) {
            let range = *range;
            if state.is_free(&range, ahead) {
                let id = state.start(range);
                if let Some((_, grant)) = state.waiting.remove(ahead) {
                    granted.push((
                        grant,
                        Admitted {
                            id,
                            flight: self.flight.clone(),
                        },
                    ));
                }
            } else {
                ahead += 1;
            }
        }
        drop(state);
        for (grant, admitted) in granted {
            // A requester that is gone drops its admission here, which lets the next one go.
            let _ = grant.send(admitted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn shared_requests_overlap_and_an_exclusive_one_waits_for_all_of_them() {
        let flight = Flight::default();
        let Poll::Ready(a) = poll(pin!(flight.admit(0, 3, Mode::Shared))) else {
            panic!("waits")
        };
        let Poll::Ready(b) = poll(pin!(flight.admit(2, 5, Mode::Shared))) else {
            panic!("waits")
        };
        let mut c = pin!(flight.admit(3, 3, Mode::Exclusive));
        assert!(poll(c.as_mut()).is_pending());
        drop(a);
        assert!(poll(c.as_mut()).is_pending());
        drop(b);
        assert!(poll(c.as_mut()).is_ready());
    }

    #[test]
    fn nobody_overtakes_a_waiting_request_that_it_conflicts_with() {
        let flight = Flight::default();
        let Poll::Ready(a) = poll(pin!(flight.admit(0, 0, Mode::Shared))) else {
            panic!("waits")
        };
        let mut writer = pin!(flight.admit(0, 1, Mode::Exclusive));
        assert!(poll(writer.as_mut()).is_pending());
        let mut late = pin!(flight.admit(1, 1, Mode::Shared));
        assert!(
            poll(late.as_mut()).is_pending(),
            "cluster 1 is free, but the writer came first"
        );
        assert!(poll(pin!(flight.admit(2, 2, Mode::Exclusive))).is_ready());
        drop(a);
        let Poll::Ready(w) = poll(writer.as_mut()) else {
            panic!("waits")
        };
        assert!(poll(late.as_mut()).is_pending());
        drop(w);
        assert!(poll(late.as_mut()).is_ready());
    }

    #[test]
    fn a_request_that_gives_up_while_it_waits_blocks_nobody() {
        let flight = Flight::default();
        let Poll::Ready(a) = poll(pin!(flight.admit(0, 0, Mode::Exclusive))) else {
            panic!("waits")
        };
        {
            let mut gone = pin!(flight.admit(0, 0, Mode::Exclusive));
            assert!(poll(gone.as_mut()).is_pending());
        }
        drop(a);
        assert!(poll(pin!(flight.admit(0, 0, Mode::Exclusive))).is_ready());
    }
}
