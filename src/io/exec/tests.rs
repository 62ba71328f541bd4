//! Promises of the executor, held by both engines.

use super::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};
use std::cell::{Cell, RefCell};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Instant;

const ENGINES: [Engine; 2] = [Engine::Ring, Engine::Poll];

fn sockets(flags: SocketFlags) -> (Arc<OwnedFd>, Arc<OwnedFd>) {
    let flags = flags | SocketFlags::CLOEXEC;
    let (a, b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    (Arc::new(a), Arc::new(b))
}

fn pipes(flags: PipeFlags) -> (Arc<OwnedFd>, Arc<OwnedFd>) {
    let (a, b) = pipe_with(flags | PipeFlags::CLOEXEC).unwrap();
    (Arc::new(a), Arc::new(b))
}

/// Every kind of stream: reading end, writing end.
fn streams() -> Vec<(Arc<OwnedFd>, Arc<OwnedFd>)> {
    vec![
        sockets(SocketFlags::empty()),
        sockets(SocketFlags::NONBLOCK),
        pipes(PipeFlags::empty()),
        pipes(PipeFlags::NONBLOCK),
    ]
}

async fn receive_all(fd: &Arc<OwnedFd>) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let (buf, n) = recv(fd, BytesMut::zeroed(50_000)).await;
        match n.unwrap() {
            0 => return all,
            n => all.extend_from_slice(&buf[..n]),
        }
    }
}

/// What other tasks of the thread leave behind for the main one.
fn shared<T: Default>() -> (Rc<RefCell<T>>, Rc<RefCell<T>>) {
    let one = Rc::new(RefCell::new(T::default()));
    (Rc::clone(&one), one)
}

async fn until(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "it never came true"
        );
        sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn every_byte_arrives_in_order_through_streams_of_every_kind() {
    for engine in ENGINES {
        for (reader, writer) in streams() {
            let data: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 / 3) as u8).collect();
            let parts: Vec<Bytes> = data.chunks(999).map(Bytes::copy_from_slice).collect();
            assert!(parts.len() > op::PARTS_MAX);
            let got = run(engine, async {
                spawn(async move { send_all(&writer, parts).await.unwrap() });
                receive_all(&reader).await
            });
            assert!(got.unwrap() == data, "{engine:?}");
        }
    }
}

#[test]
fn two_executors_on_two_threads_talk_over_a_socket() {
    for engine in ENGINES {
        let (a, b) = sockets(SocketFlags::empty());
        let echo = thread::spawn(move || {
            run(engine, async move {
                loop {
                    let (buf, n) = recv(&b, BytesMut::zeroed(4096)).await;
                    match n.unwrap() {
                        0 => return,
                        n => send_all(&b, vec![buf.freeze().slice(..n)]).await.unwrap(),
                    }
                }
            })
            .unwrap();
        });
        run(engine, async move {
            for i in 0..2000u32 {
                send_all(&a, vec![Bytes::copy_from_slice(&i.to_le_bytes())])
                    .await
                    .unwrap();
                let (buf, n) = recv(&a, BytesMut::zeroed(100)).await;
                assert_eq!(buf[..n.unwrap()], i.to_le_bytes());
            }
        })
        .unwrap();
        echo.join().unwrap();
    }
}

#[test]
fn writing_to_a_closed_stream_is_an_error_and_no_signal() {
    for engine in ENGINES {
        for (reader, writer) in streams() {
            drop(reader);
            let sent = run(engine, send_all(&writer, vec![Bytes::from_static(b"x")])).unwrap();
            assert_eq!(
                sent.unwrap_err().kind(),
                io::ErrorKind::BrokenPipe,
                "{engine:?}"
            );
        }
    }
}

#[test]
fn a_vectored_write_is_one_message() {
    for engine in ENGINES {
        let kind = SocketType::SEQPACKET;
        let (a, b) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let (a, b) = (Arc::new(a), Arc::new(b));
        run(engine, async move {
            let parts = vec![Bytes::from_static(b"head"), Bytes::from_static(b"body")];
            assert_eq!(write_vectored(&a, parts).await.unwrap(), 8);
            let (buf, n) = recv(&b, BytesMut::zeroed(100)).await;
            assert_eq!(&buf[..n.unwrap()], b"headbody");
        })
        .unwrap();
    }
}

#[test]
fn devices_and_eventfds_can_be_read() {
    for engine in ENGINES {
        run(engine, async {
            let zero = Arc::new(OwnedFd::from(std::fs::File::open("/dev/zero").unwrap()));
            let (buf, n) = recv(&zero, BytesMut::from(&b"rest"[..])).await;
            assert_eq!((n.unwrap(), &buf[..]), (4, &[0u8; 4][..]));
            let flags = rustix::event::EventfdFlags::CLOEXEC;
            let event = Arc::new(rustix::event::eventfd(0, flags).unwrap());
            let writer = Arc::clone(&event);
            spawn(async move {
                sleep(Duration::from_millis(5)).await;
                rustix::io::write(&*writer, &[3; 8]).unwrap();
            });
            readable(&event).await.unwrap();
            let (buf, n) = recv(&event, BytesMut::zeroed(8)).await;
            assert_eq!((n.unwrap(), &buf[..]), (8, &[3; 8][..]));
        })
        .unwrap();
    }
}

#[test]
fn the_end_of_a_process_can_be_awaited() {
    for engine in ENGINES {
        let mut child = std::process::Command::new("sleep")
            .arg("0.05")
            .spawn()
            .unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let flags = rustix::process::PidfdFlags::empty();
        let fd = Arc::new(rustix::process::pidfd_open(pid, flags).unwrap());
        run(engine, async { readable(&fd).await.unwrap() }).unwrap();
        assert!(child.try_wait().unwrap().is_some(), "{engine:?}");
    }
}

#[test]
fn connections_are_accepted_and_a_late_one_is_closed() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let listener = Arc::new(OwnedFd::from(listener));
        run(engine, async {
            assert!(
                timeout(Duration::from_millis(5), accept(&listener))
                    .await
                    .is_none()
            );
            let client = std::os::unix::net::UnixStream::connect(&path).unwrap();
            let server = Arc::new(accept(&listener).await.unwrap());
            let client = Arc::new(OwnedFd::from(client));
            send_all(&client, vec![Bytes::from_static(b"hello")])
                .await
                .unwrap();
            drop(client);
            assert_eq!(receive_all(&server).await, b"hello");
        })
        .unwrap();
        assert_eq!(Arc::strong_count(&listener), 1);
    }
}

#[test]
fn timers_fire_in_the_order_of_their_deadlines() {
    for engine in ENGINES {
        let (log, main_log) = shared::<Vec<u64>>();
        run(engine, async move {
            for ms in [30, 10, 20, 10, 0] {
                let log = Rc::clone(&log);
                spawn(async move {
                    let start = Instant::now();
                    sleep(Duration::from_millis(ms)).await;
                    assert!(start.elapsed() >= Duration::from_millis(ms));
                    log.borrow_mut().push(ms);
                });
            }
            until(|| main_log.borrow().len() == 5).await;
            assert_eq!(*main_log.borrow(), [0, 10, 10, 20, 30]);
        })
        .unwrap();
    }
}

#[test]
fn a_timeout_gives_up_and_a_fast_answer_passes() {
    for engine in ENGINES {
        run(engine, async {
            let (reader, _writer) = sockets(SocketFlags::empty());
            let never = recv(&reader, BytesMut::zeroed(1));
            assert!(timeout(Duration::from_millis(5), never).await.is_none());
            assert_eq!(timeout(Duration::from_secs(9), async { 7 }).await, Some(7));
        })
        .unwrap();
    }
}

#[test]
fn far_more_operations_than_the_queues_hold_all_complete() {
    const MANY: usize = 3 * 1024;
    for engine in ENGINES {
        let (reader, writer) = sockets(SocketFlags::empty());
        let (got, seen) = shared::<usize>();
        run(engine, async {
            for _ in 0..MANY {
                let (reader, got) = (Arc::clone(&reader), Rc::clone(&got));
                spawn(async move {
                    let (_, n) = recv(&reader, BytesMut::zeroed(1)).await;
                    *got.borrow_mut() += n.unwrap();
                });
            }
            sleep(Duration::from_millis(5)).await;
            rustix::io::write(&*writer, &[0; MANY]).unwrap();
            until(|| *seen.borrow() == MANY).await;
        })
        .unwrap();
    }
}

#[test]
fn idle_streams_do_not_keep_files_from_being_read() {
    let (reader, _writer) = sockets(SocketFlags::empty());
    run(Engine::Ring, async {
        for _ in 0..1000 {
            let reader = Arc::clone(&reader);
            spawn(async move { drop(recv(&reader, BytesMut::zeroed(1)).await) });
        }
        yield_now().await;
        let fd = Arc::new(OwnedFd::from(
            std::fs::File::open("/proc/self/exe").unwrap(),
        ));
        let witness: Arc<dyn Witness> = Arc::new(Counted(AtomicUsize::new(0)));
        let target = disk::Target {
            fd: &fd,
            witness: &witness,
            here: false,
        };
        let read = disk::read(target, BytesMut::zeroed(4), 0, 0);
        let (buf, n) = timeout(Duration::from_secs(20), read)
            .await
            .expect("it is read");
        assert_eq!((&buf[..], n.unwrap()), (&b"\x7fELF"[..], 4));
    })
    .unwrap();
}

#[test]
fn dropped_operations_are_cancelled_even_when_the_queues_are_full() {
    const MANY: usize = 2 * 1024;
    for engine in ENGINES {
        let (reader, writer) = sockets(SocketFlags::empty());
        run(engine, async {
            let mut all: Vec<_> = (0..MANY)
                .map(|_| Box::pin(recv(&reader, BytesMut::zeroed(1))))
                .collect();
            for future in &mut all {
                assert!(timeout(Duration::ZERO, future).await.is_none());
            }
            assert!(engine == Engine::Poll || Arc::strong_count(&reader) == MANY + 1);
            drop(all);
            until(|| Arc::strong_count(&reader) == 1).await;
            send_all(&writer, vec![Bytes::from_static(b"z")])
                .await
                .unwrap();
            let (buf, n) = recv(&reader, BytesMut::zeroed(1)).await;
            assert_eq!((&buf[..], n.unwrap()), (&b"z"[..], 1));
        })
        .unwrap();
    }
}

/// Memory that turns to 0xDD when its owner is dropped, and counts that.
struct Poisoned(&'static mut [u8], Arc<AtomicUsize>);

impl AsRef<[u8]> for Poisoned {
    fn as_ref(&self) -> &[u8] {
        self.0
    }
}

impl Drop for Poisoned {
    fn drop(&mut self) {
        self.0.fill(0xDD);
        self.1.fetch_add(1, SeqCst);
    }
}

struct Counted(AtomicUsize);

impl Witness for Counted {
    fn abandoned(&self) {}
    fn landed(&self, _: i32) {
        self.0.fetch_add(1, SeqCst);
    }
}

/// Starts direct writes and leaves the executor with all of them in flight.
fn leave_with_writes_in_flight(panicking: bool) {
    const COUNT: usize = 100;
    const SIZE: usize = 256 << 10;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let file = std::fs::File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .open(&path);
    let fd = Arc::new(OwnedFd::from(file.unwrap()));
    let direct = rustix::fs::OFlags::DIRECT;
    rustix::fs::fcntl_setfl(&*fd, direct).expect("the temporary directory takes O_DIRECT");
    let freed = Arc::new(AtomicUsize::new(0));
    let landed = Arc::new(Counted(AtomicUsize::new(0)));
    let witness: Arc<dyn Witness> = Arc::clone(&landed) as _;
    let leave = || {
        run(Engine::Ring, async {
            for i in 0..COUNT {
                let memory: &'static mut [u8] = Box::leak(Box::new([0x11u8; SIZE + 4096]));
                let head = memory.as_ptr().align_offset(4096);
                let memory = &mut memory[head..][..SIZE];
                let data = Bytes::from_owner(Poisoned(memory, Arc::clone(&freed)));
                let (fd, witness) = (Arc::clone(&fd), Arc::clone(&witness));
                spawn(async move {
                    let target = disk::Target {
                        fd: &fd,
                        witness: &witness,
                        here: false,
                    };
                    let _ = disk::write(target, data, (i * SIZE) as u64, false).await;
                });
            }
            yield_now().await;
            assert_eq!(freed.load(SeqCst), 0, "all are in flight");
            assert!(!panicking, "on purpose");
        })
    };
    let left = std::panic::catch_unwind(std::panic::AssertUnwindSafe(leave));
    assert_eq!(left.is_err(), panicking);
    assert_eq!(freed.load(SeqCst), COUNT);
    assert_eq!(landed.0.load(SeqCst), COUNT);
    let written = std::fs::read(&path).unwrap();
    assert!(written.len() == COUNT * SIZE && written.iter().all(|&b| b == 0x11));
    assert_eq!(Arc::strong_count(&fd), 1);
}

#[test]
fn memory_is_freed_only_after_the_kernel_is_done_with_it() {
    leave_with_writes_in_flight(false);
}

#[test]
fn memory_is_freed_only_after_the_kernel_is_done_also_on_a_panic() {
    leave_with_writes_in_flight(true);
}

#[test]
fn a_panicking_task_ends_the_run_and_the_thread_can_run_again() {
    for engine in ENGINES {
        let died = std::panic::catch_unwind(|| {
            run(engine, async {
                spawn(async { panic!("on purpose") });
                sleep(Duration::from_secs(60)).await;
            })
        });
        assert!(died.is_err());
        assert_eq!(run(engine, async { 5 }).unwrap(), 5);
    }
}

#[test]
fn a_second_executor_inside_the_first_is_refused() {
    for engine in ENGINES {
        assert!(run(engine, async { run(engine, async {}).is_err() }).unwrap());
    }
}

#[test]
fn tasks_left_over_are_dropped_and_new_ones_too() {
    struct Last(Rc<Cell<u32>>);
    impl Drop for Last {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
            let again = Rc::clone(&self.0);
            spawn(async move { again.set(100) });
        }
    }
    for engine in ENGINES {
        let dropped = Rc::new(Cell::new(0));
        run(engine, async {
            for _ in 0..3 {
                let last = Last(Rc::clone(&dropped));
                spawn(async move {
                    sleep(Duration::from_secs(60)).await;
                    drop(last);
                });
            }
            yield_now().await;
        })
        .unwrap();
        assert_eq!((dropped.get(), Rc::strong_count(&dropped)), (3, 1));
    }
}

#[test]
fn no_wake_from_another_thread_is_lost() {
    const ROUNDS: usize = 30_000;
    for engine in ENGINES {
        let there = Arc::new(tokio::sync::Notify::new());
        let back = Arc::new(tokio::sync::Notify::new());
        let (to, from) = (Arc::clone(&there), Arc::clone(&back));
        let other = thread::spawn(move || {
            run(engine, async move {
                for _ in 0..ROUNDS {
                    from.notified().await;
                    to.notify_one();
                }
            })
            .unwrap();
        });
        run(engine, async move {
            for i in 0..ROUNDS {
                back.notify_one();
                let came = timeout(Duration::from_secs(20), there.notified()).await;
                assert!(came.is_some(), "round {i} of {engine:?}");
            }
        })
        .unwrap();
        other.join().unwrap();
    }
}

#[test]
fn a_wake_comes_through_when_the_submission_queue_was_full() {
    for engine in ENGINES {
        let silent: Vec<_> = (0..128).map(|_| sockets(SocketFlags::empty())).collect();
        let (first, begin) = tokio::sync::oneshot::channel();
        let (second, end) = tokio::sync::oneshot::channel();
        let other = thread::spawn(move || {
            for gate in [first, second] {
                thread::sleep(Duration::from_millis(50));
                let _ = gate.send(());
            }
        });
        run(engine, async move {
            // Wakes this executor, so that its bell has to be armed again...
            begin.await.unwrap();
            // ...while the submission queue is full of what will never end.
            let mut waits: Vec<_> = silent
                .iter()
                .map(|(a, _)| Box::pin(recv(a, BytesMut::zeroed(8))))
                .collect();
            std::future::poll_fn(|cx| {
                assert!(waits.iter_mut().all(|w| w.as_mut().poll(cx).is_pending()));
                Poll::Ready(())
            })
            .await;
            let start = Instant::now();
            let late = timeout(Duration::from_secs(20), end).await;
            assert!(late.is_some(), "{engine:?}");
            assert!(start.elapsed() < Duration::from_secs(10), "{engine:?}");
        })
        .unwrap();
        other.join().unwrap();
    }
}

#[test]
fn many_threads_may_wake_many_tasks_at_once() {
    const TASKS: usize = 50;
    const EACH: usize = 2_000;
    for engine in ENGINES {
        let gates: Vec<_> = (0..TASKS)
            .map(|_| Arc::new(tokio::sync::Semaphore::new(0)))
            .collect();
        let wakers: Vec<_> = (0..4)
            .map(|_| {
                let gates = gates.clone();
                thread::spawn(move || {
                    for i in 0..EACH * TASKS / 4 {
                        gates[i * 7 % TASKS].add_permits(1);
                        if i % 64 == 0 {
                            thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let (done, seen) = shared::<usize>();
        run(engine, async {
            for gate in gates {
                let done = Rc::clone(&done);
                spawn(async move {
                    for _ in 0..EACH {
                        gate.acquire().await.unwrap().forget();
                    }
                    *done.borrow_mut() += 1;
                });
            }
            until(|| *seen.borrow() == TASKS).await;
        })
        .unwrap();
        wakers.into_iter().for_each(|w| w.join().unwrap());
    }
}

#[test]
fn a_lock_held_by_another_thread_does_not_stop_the_others() {
    for engine in ENGINES {
        let lock = Arc::new(tokio::sync::Mutex::new(0u32));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let lock = Arc::clone(&lock);
                thread::spawn(move || {
                    run(engine, async move {
                        for _ in 0..500 {
                            let mut n = lock.lock().await;
                            let seen = *n;
                            yield_now().await;
                            *n = seen + 1;
                        }
                    })
                    .unwrap();
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(*lock.try_lock().unwrap(), 1000);
    }
}

#[test]
fn a_sender_that_never_stops_does_not_starve_other_tasks() {
    for engine in ENGINES {
        run(engine, async {
            let zero = Arc::new(OwnedFd::from(std::fs::File::open("/dev/zero").unwrap()));
            spawn(async move {
                loop {
                    recv(&zero, BytesMut::zeroed(100)).await.1.unwrap();
                }
            });
            sleep(Duration::from_millis(10)).await;
        })
        .unwrap();
    }
}

#[test]
fn bad_descriptors_are_errors() {
    for engine in ENGINES {
        run(engine, async {
            let dir = Arc::new(OwnedFd::from(std::fs::File::open("/").unwrap()));
            let (_, n) = recv(&dir, BytesMut::zeroed(10)).await;
            assert!(n.is_err());
            assert!(
                send_all(&dir, vec![Bytes::from_static(b"x")])
                    .await
                    .is_err()
            );
            assert!(accept(&dir).await.is_err());
        })
        .unwrap();
    }
    let (reader, _writer) = sockets(SocketFlags::empty());
    let mut outside = pin!(recv(&reader, BytesMut::zeroed(1)));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let Poll::Ready((_, n)) = outside.as_mut().poll(&mut cx) else {
        panic!("it must not wait")
    };
    assert!(n.is_err());
    assert!(reader.as_fd().try_clone_to_owned().is_ok());
}

#[test]
fn this_machine_has_a_ring() {
    assert_eq!(Engine::detect(), (Engine::Ring, None));
}
