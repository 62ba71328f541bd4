//! What the simulator promises its users, and what it refuses to promise the engine.

use super::*;
use crate::testkit::exec::{Exec, now};
use std::collections::BTreeSet;

fn world(len: u64) -> SimStore {
    let sim = Sim::new(1);
    sim.instant(true);
    sim.file(
        Pages::new(len),
        Rules {
            metadata_end: 512,
            ..Rules::default()
        },
    )
}

fn put(store: &SimStore, at: u64, byte: u8, len: usize) {
    now(store.write_at(at, Bytes::from(vec![byte; len]), Reach::Cache)).unwrap();
}

/// Every content that sector `n` can have after a crash now.
fn outcomes(store: &SimStore, n: u64) -> BTreeSet<u8> {
    let fates = store.sim().fates(0, 64, &mut Rng::new(3));
    let first = |fate: &Fate| {
        store.sim().crash(0, fate)[0]
            .0
            .to_vec()
            .get(n as usize * 512)
            .copied()
    };
    fates.iter().filter_map(first).collect()
}

#[test]
fn any_version_since_the_last_flush_may_survive_but_none_before_it() {
    let store = world(2048);
    put(&store, 0, 1, 512);
    now(store.flush()).unwrap();
    put(&store, 0, 2, 512);
    put(&store, 0, 3, 512);
    assert_eq!(outcomes(&store, 0), [1, 2, 3].into());
    now(store.flush()).unwrap();
    assert_eq!(outcomes(&store, 0), [3].into());
}

#[test]
fn sectors_of_one_write_survive_independently() {
    let store = world(2048);
    put(&store, 0, 7, 1024);
    let fates = store.sim().fates(0, 0, &mut Rng::new(3));
    let both = |fate: &Fate| {
        let all = store.sim().crash(0, fate)[0].0.to_vec();
        (all[0], all[512])
    };
    let seen: BTreeSet<(u8, u8)> = fates.iter().map(both).collect();
    assert_eq!(seen, [(0, 0), (0, 7), (7, 0), (7, 7)].into());
}

#[test]
fn a_flush_covers_what_was_answered_before_its_call_and_nothing_later() {
    let sim = Sim::new(1);
    let store = sim.file(Pages::new(1024), Rules::default());
    let mut exec = Exec::new(sim.clone(), 5);
    let early = store.clone();
    exec.block_on(async move {
        early
            .write_at(0, Bytes::from(vec![1; 512]), Reach::Cache)
            .await
    });
    // The flush is asked for first, yet the write may land before it: it is not covered.
    let (flusher, writer) = (store.clone(), store.clone());
    let mut flush = Box::pin(async move { flusher.flush().await });
    let mut write = Box::pin(async move {
        writer
            .write_at(512, Bytes::from(vec![2; 512]), Reach::Cache)
            .await
    });
    let mut cx = Context::from_waker(Waker::noop());
    assert!(flush.as_mut().poll(&mut cx).is_pending());
    assert!(write.as_mut().poll(&mut cx).is_pending());
    let mut rng = Rng::new(9);
    while sim.land(&mut rng) {}
    assert_eq!(outcomes(&store, 0), [1].into());
    assert_eq!(outcomes(&store, 1), [0, 2].into());
}

#[test]
fn a_length_that_was_not_flushed_may_be_lost_and_its_space_is_poison() {
    let store = world(1024);
    now(store.set_len(2048)).unwrap();
    assert_eq!(store.pages().to_vec()[1024..], [0; 1024]);
    assert_eq!(outcomes(&store, 3), [POISON].into());
    let lens: BTreeSet<u64> = store
        .sim()
        .fates(0, 8, &mut Rng::new(3))
        .iter()
        .map(|f| store.sim().crash(0, f)[0].0.len())
        .collect();
    assert_eq!(lens, [1024, 2048].into());
    now(store.flush()).unwrap();
    assert_eq!(outcomes(&store, 3), [0].into());
}

#[test]
fn a_punch_that_was_not_flushed_may_give_the_old_bytes_back() {
    let store = world(1024);
    put(&store, 512, 9, 512);
    now(store.flush()).unwrap();
    now(store.punch(512, 512, Space::Free)).unwrap();
    assert_eq!(outcomes(&store, 1), [0, 9].into());
    now(store.flush()).unwrap();
    assert_eq!(outcomes(&store, 1), [0].into());
}

#[test]
fn bytes_past_a_cut_may_come_back_when_the_file_grows_again_without_a_flush() {
    let store = world(1024);
    put(&store, 512, 9, 512);
    now(store.flush()).unwrap();
    now(store.set_len(512)).unwrap();
    now(store.set_len(1024)).unwrap();
    assert_eq!(store.pages().to_vec()[512], 0);
    assert_eq!(outcomes(&store, 1), [0, 9].into());
}

#[test]
fn a_durable_write_survives_at_once_and_alone() {
    let store = world(2048);
    put(&store, 0, 1, 2048);
    now(store.write_at(512, Bytes::from(vec![2; 512]), Reach::Durable)).unwrap();
    assert_eq!(outcomes(&store, 0), [0, 1].into());
    assert_eq!(outcomes(&store, 1), [2].into());
    assert_eq!(outcomes(&store, 2), [0, 1].into());
    put(&store, 512, 3, 512);
    assert_eq!(outcomes(&store, 1), [2, 3].into());
}

#[test]
fn an_unanswered_write_is_old_new_or_torn_but_metadata_is_never_torn() {
    let sim = Sim::new(1);
    let rules = Rules {
        metadata_end: 512,
        ..Rules::default()
    };
    let store = sim.file(Pages::new(1024), rules);
    let mut cx = Context::from_waker(Waker::noop());
    let writer = store.clone();
    let mut write = Box::pin(async move {
        writer
            .write_at(0, Bytes::from(vec![5; 1024]), Reach::Cache)
            .await
    });
    assert!(write.as_mut().poll(&mut cx).is_pending());
    assert_eq!(outcomes(&store, 0), [0, 5].into());
    let data = outcomes(&store, 1);
    assert!(
        data.contains(&0) && data.contains(&5) && data.len() > 2,
        "{data:?}"
    );
}

#[test]
fn orphans_land_late_until_settled_and_never_after() {
    let mut late = BTreeSet::new();
    for seed in 0..32 {
        let sim = Sim::new(1);
        let store = sim.file(Pages::new(512), Rules::default());
        let mut cx = Context::from_waker(Waker::noop());
        let mut write = Box::pin(store.write_at(0, Bytes::from_static(&[5; 512]), Reach::Cache));
        assert!(write.as_mut().poll(&mut cx).is_pending());
        let after = sim.fork(seed);
        let heir = after.stores().remove(0);
        assert_eq!(after.in_flight(), (0, 1));
        assert_eq!(heir.pages().to_vec()[0], 0);
        Exec::new(after.clone(), seed)
            .block_on(async move { heir.settle().await })
            .unwrap();
        assert_eq!(after.in_flight(), (0, 0));
        late.insert(after.stores()[0].pages().to_vec()[0]);
        assert_eq!(sim.in_flight(), (1, 0), "the first world goes on");
    }
    assert_eq!(late, [0, 5].into());
}

#[test]
fn a_dropped_future_leaves_its_write_in_flight() {
    let sim = Sim::new(1);
    let store = sim.file(Pages::new(512), Rules::default());
    let mut cx = Context::from_waker(Waker::noop());
    let mut write = Box::pin(store.write_at(0, Bytes::from_static(&[5; 512]), Reach::Cache));
    assert!(write.as_mut().poll(&mut cx).is_pending());
    drop(write);
    assert_eq!(sim.in_flight(), (0, 1));
    assert!(sim.land(&mut Rng::new(1)));
    assert_eq!(store.pages().to_vec()[0], 5);
}

#[test]
fn one_seed_gives_one_history() {
    let history = |seed| {
        let sim = Sim::new(seed);
        let store = sim.file(Pages::new(8192), Rules::default());
        let mut exec = Exec::new(sim, seed);
        for task in 0..8u8 {
            let store = store.clone();
            exec.spawn(async move {
                for _ in 0..4 {
                    let data = Bytes::from(vec![task + 1; 4096]);
                    store
                        .write_at(u64::from(task % 3) * 512, data, Reach::Cache)
                        .await
                        .unwrap();
                    store.flush().await.unwrap();
                }
            });
        }
        assert!(exec.run());
        store.pages().to_vec()
    };
    assert_eq!(history(11), history(11));
    assert!(
        (0..20).any(|seed| history(seed) != history(11)),
        "dice change nothing"
    );
}

#[test]
fn a_sealed_file_tells_on_who_changes_it() {
    let sim = Sim::new(1);
    sim.instant(true);
    let store = sim.file(
        Pages::new(512),
        Rules {
            sealed: true,
            ..Rules::default()
        },
    );
    assert_eq!(sim.broken(), None);
    put(&store, 0, 1, 512);
    assert!(sim.broken().is_some());
}

#[test]
fn a_part_of_a_sector_is_never_mixed_with_an_older_rest() {
    let store = world(512);
    put(&store, 0, 1, 512);
    put(&store, 0, 2, 4);
    let fates = store.sim().fates(0, 64, &mut Rng::new(3));
    for fate in fates {
        let all = store.sim().crash(0, &fate)[0].0.to_vec();
        assert_ne!((all[0], all[511]), (2, 0), "{fate:?}");
    }
}
