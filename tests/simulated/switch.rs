//! Switches: an open disk gets other layers while requests run.
//!
//! `PLOOP_SWITCH_STATES` says how many power cuts and deaths are tried.

use crate::campaign::{SEED, caught_in_engine, count, holds};
use bytes::{Bytes, BytesMut};
use ploop::device::Device;
use ploop::disk::Disk;
use ploop::hold::Hold;
use ploop::stack::{AnyLayer, Stack};
use ploop::testkit::{Engine, switches};
use ploop_formats::ledger::{Ledger, LocalWords};
use ploop_formats::planted::Bug;
use ploop_formats::ploop::{Ploop, Version};
use ploop_formats::store::sim::{Fate, Rules, Sim, SimStore};
use ploop_formats::testkit::exec::{Exec, now};
use ploop_formats::testkit::image::Delta;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::{Kind, Result, buf};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

#[test]
fn layer_upon_layer_while_the_guest_writes_and_whatever_ends_it_nothing_is_lost() {
    let states = count("PLOOP_SWITCH_STATES", 20_000);
    holds(switches::campaign::<Engine>(SEED, states));
}

#[test]
fn a_switch_from_a_top_that_was_not_sealed_is_caught() {
    caught_in_engine(Bug::SwitchWithoutSeal);
}

#[test]
fn a_flush_that_runs_while_the_disk_is_held_is_caught() {
    caught_in_engine(Bug::HoldWithoutFlushes);
}

#[test]
fn a_request_on_the_stack_of_before_its_admission_is_caught() {
    caught_in_engine(Bug::StackBeforeAdmission);
}

const CLUSTER: u64 = 32 << 10;
const CLUSTERS: u64 = 40;

type Waiting<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

fn poll<F: Future + ?Sized>(future: &mut Pin<Box<F>>) -> Option<F::Output> {
    let mut cx = Context::from_waker(Waker::noop());
    match future.as_mut().poll(&mut cx) {
        Poll::Ready(out) => Some(out),
        Poll::Pending => None,
    }
}

/// Lands whatever is in flight until `future` is done; none when it waits for something else.
fn finish<F: Future + ?Sized>(sim: &Sim, future: &mut Pin<Box<F>>) -> Option<F::Output> {
    let mut rng = Rng::new(1);
    loop {
        if let Some(out) = poll(future) {
            return Some(out);
        }
        if !sim.land(&mut rng) {
            return None;
        }
    }
}

/// Runs what waits for nobody else to its end.
fn done<F: Future>(sim: &Sim, future: F) -> F::Output {
    finish(sim, &mut Box::pin(future)).expect("it ends")
}

/// A new blank file of `clusters` clusters.
fn blank(sim: &Sim, clusters: u64) -> SimStore {
    let delta = Delta {
        version: Version::V2,
        cluster: CLUSTER,
        clusters: vec![None; clusters as usize],
        leaks: 0,
        in_use: false,
    };
    sim.file(delta.make(&mut Rng::new(1)), Rules::default())
}

fn written(store: &SimStore, slots: usize) -> Ploop<SimStore> {
    let ledger = Ledger::new(Arc::new(LocalWords::new(slots + 1)));
    store.sim().instant(true);
    let top = now(Ploop::open_write(store.clone(), ledger)).unwrap();
    store.sim().instant(false);
    top
}

fn read_only(store: &SimStore) -> Ploop<SimStore> {
    store.sim().instant(true);
    let layer = now(Ploop::open_read(store.clone())).unwrap();
    store.sim().instant(false);
    layer
}

/// A disk of one layer, its file and its world.
fn disk(slots: usize) -> (Sim, SimStore, Disk<SimStore>) {
    let sim = Sim::new(1);
    let store = blank(&sim, CLUSTERS);
    let layers = vec![AnyLayer::Ploop(written(&store, slots))];
    (sim, store, Disk::new(layers, false).unwrap())
}

/// The disk's layers with `old`, its top, opened anew and `top` above it.
fn upon(disk: &Disk<SimStore>, old: &SimStore, top: &SimStore) -> Stack<SimStore> {
    let stack = disk.stack();
    let lower = stack.layers().iter().take(stack.depth() - 1).cloned();
    let upper = [read_only(old), written(top, 64)].map(|l| Arc::new(AnyLayer::Ploop(l)));
    Stack::new(lower.chain(upper)).unwrap()
}

fn bytes(fill: u8) -> Bytes {
    let mut data = buf::aligned(4096);
    data.fill(fill);
    data.freeze()
}

fn write<'a>(disk: &'a Disk<SimStore>, cluster: u64, fill: u8) -> Waiting<'a, Result<()>> {
    Box::pin(disk.write(cluster * CLUSTER, bytes(fill), false))
}

fn read<'a>(disk: &'a Disk<SimStore>, cluster: u64) -> Waiting<'a, Result<BytesMut>> {
    Box::pin(disk.read(cluster * CLUSTER, buf::aligned(4096)))
}

/// A cluster of `file` as it is after a power cut that took all that was not durable.
fn survives(sim: &Sim, file: usize, cluster: u64) -> Vec<u8> {
    let (pages, rules) = sim.crash(file, &Fate::None).swap_remove(file);
    let after = Sim::of(vec![(pages, rules)], 1);
    after.instant(true);
    let layer = now(Ploop::open_read(after.stores().remove(0))).unwrap();
    let disk = Disk::new(vec![AnyLayer::Ploop(layer)], true).unwrap();
    now(read(&disk, cluster)).unwrap().to_vec()
}

#[test]
fn a_hold_waits_for_requests_in_flight_and_later_ones_wait_for_its_end() {
    let (sim, _, disk) = disk(64);
    let mut before = write(&disk, 0, 1);
    assert!(poll(&mut before).is_none());
    let mut hold = Box::pin(disk.hold());
    assert!(poll(&mut hold).is_none(), "a write is in flight");
    let mut later = [write(&disk, 0, 2), write(&disk, 7, 2)];
    let mut look = read(&disk, 3);
    finish(&sim, &mut before).unwrap().unwrap();
    let held = finish(&sim, &mut hold).unwrap();
    for write in &mut later {
        assert!(poll(write).is_none());
    }
    assert!(poll(&mut look).is_none());
    assert_eq!(sim.in_flight(), (0, 0), "somebody began");
    drop(held);
    for write in &mut later {
        finish(&sim, write).unwrap().unwrap();
    }
    finish(&sim, &mut look).unwrap().unwrap();
    let found = done(&sim, read(&disk, 0)).unwrap();
    assert_eq!(found[..], bytes(2)[..]);
}

#[test]
fn a_flush_that_runs_is_waited_for_and_one_that_comes_is_answered_by_the_new_top() {
    let (sim, old, disk) = disk(64);
    done(&sim, write(&disk, 0, 1)).unwrap();
    let mut running = Box::pin(disk.flush());
    assert!(poll(&mut running).is_none());
    let mut hold = Box::pin(disk.hold());
    assert!(poll(&mut hold).is_none(), "a flush runs");
    finish(&sim, &mut running).unwrap().unwrap();
    drop(finish(&sim, &mut hold).unwrap());
    // Written, not flushed; its flush is called while the disk is held.
    done(&sim, write(&disk, 1, 2)).unwrap();
    let hold = now(disk.hold());
    let mut waiting = Box::pin(disk.flush());
    let mut background = Box::pin(disk.write_back());
    assert!(poll(&mut waiting).is_none() && poll(&mut background).is_none());
    assert_eq!(sim.in_flight(), (0, 0));
    done(&sim, hold.seal()).unwrap();
    assert!(
        poll(&mut waiting).is_none(),
        "answered while the disk is held"
    );
    sim.seal(0, true);
    hold.switch(upon(&disk, &old, &blank(&sim, CLUSTERS)))
        .unwrap();
    finish(&sim, &mut waiting).unwrap().unwrap();
    finish(&sim, &mut background).unwrap().unwrap();
    assert_eq!(survives(&sim, 0, 0)[..], bytes(1)[..]);
    assert_eq!(survives(&sim, 0, 1)[..], bytes(2)[..]);
    done(&sim, write(&disk, 1, 3)).unwrap();
    done(&sim, disk.flush()).unwrap();
    assert_eq!(survives(&sim, 1, 1)[..], bytes(3)[..]);
    assert_eq!(sim.broken(), None);
}

#[test]
fn a_hold_that_is_let_go_changes_nothing() {
    let (sim, _, disk) = disk(64);
    done(&sim, write(&disk, 0, 1)).unwrap();
    let stack = disk.stack();
    let hold = now(disk.hold());
    let mut flush = Box::pin(disk.flush());
    assert!(poll(&mut flush).is_none());
    drop(hold);
    assert!(Arc::ptr_eq(&stack, &disk.stack()));
    finish(&sim, &mut flush).unwrap().unwrap();
    assert_eq!(survives(&sim, 0, 0)[..], bytes(1)[..]);
    {
        // Nor does one that gives up while it waits.
        let mut busy = write(&disk, 0, 2);
        assert!(poll(&mut busy).is_none());
        let mut hold = Box::pin(disk.hold());
        assert!(poll(&mut hold).is_none());
        drop(hold);
        finish(&sim, &mut busy).unwrap().unwrap();
    }
    done(&sim, write(&disk, 5, 3)).unwrap();
    done(&sim, disk.flush()).unwrap();
    assert_eq!(survives(&sim, 0, 0)[..], bytes(2)[..]);
}

#[test]
fn writers_that_wait_for_a_flush_do_not_keep_a_hold_waiting_forever() {
    for seed in 0..200 {
        let (sim, old, disk) = disk(1 + seed as usize % 3);
        let mut exec = Exec::new(sim.clone(), seed);
        let disk = Rc::new(disk);
        for n in 0..CLUSTERS {
            let disk = disk.clone();
            exec.spawn(async move {
                write(&disk, n, n as u8 + 1).await.unwrap();
                if n % 4 == 0 {
                    disk.flush().await.unwrap();
                }
            });
        }
        for _ in 0..seed {
            exec.step();
        }
        let (held, top) = (disk.clone(), blank(&sim, CLUSTERS));
        let switched = exec.block_on(async move {
            let hold = held.hold().await;
            hold.seal().await.unwrap();
            hold.switch(upon(&held, &old, &top)).unwrap();
        });
        assert!(switched.is_some() && exec.run(), "stuck, seed {seed}");
        for n in 0..CLUSTERS {
            let found = done(&sim, read(&disk, n)).unwrap();
            assert_eq!(found[..], bytes(n as u8 + 1)[..], "seed {seed}");
        }
    }
}

#[test]
fn what_two_stacks_share_moves_and_the_rest_of_the_old_one_is_gone() {
    let (sim, mut old, disk) = disk(64);
    for n in 0..5u64 {
        done(&sim, write(&disk, n, n as u8 + 1)).unwrap();
        let (stack, gone) = (disk.stack(), Arc::downgrade(&disk.stack()));
        let base = stack.layers()[0].clone();
        let hold = now(disk.hold());
        done(&sim, hold.seal()).unwrap();
        // The file may grow with its new layer.
        let top = blank(&sim, CLUSTERS + n);
        hold.switch(upon(&disk, &old, &top)).unwrap();
        assert_eq!(disk.size(), (CLUSTERS + n) * CLUSTER);
        assert_eq!(Arc::ptr_eq(&base, &disk.stack().layers()[0]), n > 0);
        drop(stack);
        assert!(gone.upgrade().is_none());
        old = top;
    }
    for n in 0..5 {
        let found = done(&sim, read(&disk, n)).unwrap();
        assert_eq!(found[..], bytes(n as u8 + 1)[..]);
    }
}

#[test]
fn a_sealed_top_without_a_successor_is_read_and_never_written() {
    let (sim, store, disk) = disk(64);
    done(&sim, write(&disk, 0, 1)).unwrap();
    let mut poisoned = Box::pin(disk.poisoned());
    let hold = now(disk.hold());
    done(&sim, hold.seal()).unwrap();
    sim.seal(0, true);
    assert!(poll(&mut poisoned).is_none());
    drop(hold);
    assert!(poll(&mut poisoned).is_some());
    let refused = [
        done(&sim, write(&disk, 0, 2)),
        done(&sim, disk.flush()),
        done(&sim, disk.discard(0, CLUSTER)),
        done(&sim, disk.close()),
    ];
    for answer in refused {
        assert_eq!(answer.unwrap_err().kind(), Kind::Poisoned);
    }
    let found = done(&sim, read(&disk, 0)).unwrap();
    assert_eq!(found[..], bytes(1)[..]);
    assert_eq!(sim.broken(), None);
    // Opened anew it goes on.
    sim.seal(0, false);
    let top = AnyLayer::Ploop(written(&store, 64));
    now(disk.hold()).switch(Stack::new([top]).unwrap()).unwrap();
    done(&sim, write(&disk, 0, 2)).unwrap();
}

#[test]
fn a_stack_that_a_guest_could_tell_or_that_would_lose_answers_is_refused() {
    let (sim, old, disk) = disk(64);
    let refused = |stack: Stack<SimStore>| {
        let error = now(disk.hold()).switch(stack).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        error.to_string()
    };
    let top = |store: &SimStore| Stack::new([AnyLayer::Ploop(written(store, 64))]).unwrap();
    assert!(refused(top(&blank(&sim, CLUSTERS - 1))).contains("bytes"));
    assert!(refused(top(&blank(&sim, CLUSTERS))).contains("not sealed"));
    let other = Delta {
        version: Version::V2,
        cluster: 2 * CLUSTER,
        clusters: vec![None; CLUSTERS as usize],
        leaks: 0,
        in_use: false,
    };
    let other = sim.file(other.make(&mut Rng::new(1)), Rules::default());
    assert!(refused(top(&other)).contains("clusters"));
    // The same top over other layers needs no seal, and is refused after one.
    let same = || Stack::new(disk.stack().layers().iter().cloned()).unwrap();
    now(disk.hold()).switch(same()).unwrap();
    done(&sim, write(&disk, 0, 1)).unwrap();
    let hold = now(disk.hold());
    done(&sim, hold.seal()).unwrap();
    assert!(refused_by(hold, same()).contains("is sealed"));
    now(disk.hold())
        .switch(upon(&disk, &old, &blank(&sim, CLUSTERS)))
        .unwrap();
    done(&sim, write(&disk, 0, 2)).unwrap();
}

fn refused_by(hold: Hold<'_, SimStore>, stack: Stack<SimStore>) -> String {
    hold.switch(stack).unwrap_err().to_string()
}

#[test]
fn a_read_only_disk_is_held_and_switched_and_never_written() {
    let (sim, store, disk) = disk(64);
    done(&sim, write(&disk, 0, 1)).unwrap();
    done(&sim, disk.close()).unwrap();
    sim.seal(0, true);
    let layer = || [AnyLayer::Ploop(read_only(&store))];
    let disk = Disk::new(layer(), true).unwrap();
    let hold = now(disk.hold());
    let mut look = read(&disk, 0);
    assert!(poll(&mut look).is_none());
    now(hold.seal()).unwrap();
    hold.switch(Stack::new(layer()).unwrap()).unwrap();
    let found = finish(&sim, &mut look).unwrap().unwrap();
    assert_eq!(found[..], bytes(1)[..]);
    now(disk.close()).unwrap();
    assert_eq!(sim.broken(), None);
}
