//! Clients that come, stall, vanish and share; servers that stop.

use super::client::*;
use super::disk::{Disk, wait_until};
use super::serving::{Serving, for_each_engine, for_each_style};
use bytes::BufMut;
use ploop::Kind;
use ploop::io::exec::{self, Engine};
use ploop::serve::nbd::{Export, Options, Server};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

#[test]
fn a_client_that_vanishes_in_any_phase_harms_nobody() {
    for_each_style(|serving, style| {
        let mut good = serving.client(Style::Structured);
        let mut whole = Vec::new();
        whole.put_u32(3);
        let agree = if style == Style::Extended { 11 } else { 8 };
        if style != Style::Simple {
            whole.extend(option(agree, b""));
        }
        whole.extend(option(7, &info_data("", &[3])));
        whole.extend(request(style, 0, READ, 1, 0, 65536));
        let flags = if style == Style::Extended {
            PAYLOAD_LEN
        } else {
            0
        };
        whole.extend(request(style, flags, WRITE, 2, 0, 6000));
        whole.extend([9; 6000]);
        whole.extend(request(style, 0, FLUSH, 3, 0, 0));
        let cuts = (0..whole.len()).filter(|cut| *cut < 200 || cut % 501 == 0);
        for cut in cuts {
            let mut client = serving.connect();
            client.put(&whole[..cut]);
            drop(client);
        }
        good.check_in_step();
        drop(good);
        wait_until("everybody to leave", || serving.server.connections() == 0);
    });
}

#[test]
fn a_client_that_stalls_harms_nobody() {
    for_each_style(|serving, style| {
        let stalled: Vec<_> = [0, 3, 4, 11, 20]
            .into_iter()
            .map(|cut| {
                let mut client = serving.connect();
                let whole = [&3u32.to_be_bytes()[..], &option(7, &info_data("", &[]))].concat();
                client.put(&whole[..cut]);
                client
            })
            .collect();
        let mut half_header = serving.client(style);
        half_header.put(&request(style, 0, READ, 1, 0, 1)[..13]);
        let mut half_payload = serving.client(style);
        half_payload.send(0, WRITE, 1, 0, 100_000, &[1; 50_000]);
        serving.check();
        drop(stalled);
        half_payload.put(&[1; 50_000]);
        assert_eq!(half_payload.reply(0).errno, 0);
        half_payload.check_in_step();
    });
}

#[test]
fn a_flood_of_requests_is_answered_in_full() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        let mut stream = client.stream.try_clone().unwrap();
        let count = 3000u64;
        let flags = if style == Style::Extended {
            PAYLOAD_LEN
        } else {
            0
        };
        let writer = std::thread::spawn(move || {
            for cookie in 0..count {
                let at = cookie % 1000 * 4096;
                let len = 1 + cookie * 37 % 4096;
                let mut bytes = match cookie % 3 {
                    0 => request(style, 0, READ, cookie, at, 4096),
                    1 => request(style, flags, WRITE, cookie, at, len),
                    _ => request(style, 0, FLUSH, cookie, 0, 0),
                };
                if cookie % 3 == 1 {
                    bytes.resize(bytes.len() + len as usize, 0);
                }
                stream.write_all(&bytes).unwrap();
            }
        });
        let mut seen = vec![false; count as usize];
        for expected in 0..count {
            // The disk answers at once, so answers keep the order of requests.
            let reply = client.reply(if expected % 3 == 0 { 4096 } else { 0 });
            assert_eq!(reply.errno, 0);
            assert!(!std::mem::replace(&mut seen[reply.cookie as usize], true));
        }
        writer.join().unwrap();
        client.check_in_step();
    });
}

#[test]
fn requests_that_wait_do_not_hold_up_others_and_are_answered_when_done() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        let before = serving.disk.started();
        serving.disk.close_gate();
        for cookie in 0..100 {
            client.write(0, cookie, cookie * 4096, &[cookie as u8; 4096]);
        }
        serving.disk.wait_started(before + 100);
        let mut other = serving.client(style);
        other.send(0, CACHE, 1, 0, 512, b"");
        assert_eq!(other.reply(0).errno, 0);
        serving.disk.open_gate();
        let mut cookies: Vec<_> = (0..100).map(|_| client.reply(0).cookie).collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..100).collect::<Vec<_>>());
        client.check_in_step();
    });
}

#[test]
fn what_one_client_can_make_the_server_hold_is_bounded() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        serving.disk.close_gate();
        let mut many = serving.client(Style::Simple);
        for cookie in 0..200 {
            many.send(0, READ, cookie, 0, 512, b"");
        }
        serving.disk.wait_started(128);
        let mut large = serving.client(Style::Simple);
        for cookie in 0..10 {
            large.send(0, READ, cookie, 0, u64::from(4 * MIB), b"");
        }
        serving.disk.wait_started(128 + 4);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(serving.disk.started(), 128 + 4);
        serving.disk.open_gate();
        for _ in 0..200 {
            assert_eq!(many.reply(512).errno, 0);
        }
        for _ in 0..10 {
            assert_eq!(large.reply(u64::from(4 * MIB)).errno, 0);
        }
        serving.check();
    });
}

#[test]
fn a_client_that_does_not_read_its_answers_is_not_read_from() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut deaf = serving.client(Style::Simple);
        // In one piece: of many, the socket holds fewer than the server leaves unread.
        let asks = (0..400).flat_map(|n| request(Style::Simple, 0, READ, n, 0, u64::from(MIB)));
        deaf.put(&asks.collect::<Vec<_>>());
        std::thread::sleep(Duration::from_millis(200));
        let started = serving.disk.started();
        assert!(
            started < 64,
            "{started} MiB were read for somebody who takes none"
        );
        serving.check();
        for _ in 0..400 {
            assert_eq!(deaf.reply(u64::from(MIB)).errno, 0);
        }
        deaf.check_in_step();
    });
}

#[test]
fn what_was_admitted_is_done_though_its_client_is_gone() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        let before = serving.disk.started();
        serving.disk.close_gate();
        let pattern = [style as u8 + 1; 8192];
        for cookie in 0..8 {
            client.write(0, cookie, cookie * 8192, &pattern);
        }
        serving.disk.wait_started(before + 8);
        drop(client);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(
            serving.server.connections(),
            1,
            "a session ends after its requests"
        );
        serving.disk.open_gate();
        wait_until("the session to end", || serving.server.connections() == 0);
        assert!(
            serving.disk.data.lock().unwrap()[..65536]
                .iter()
                .all(|b| *b == pattern[0])
        );
    });
}

#[test]
fn disconnect_finishes_and_answers_what_is_in_flight() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        let before = serving.disk.started();
        serving.disk.close_gate();
        client.write(0, 1, 0, &[1; 512]);
        client.send(0, DISC, 2, 0, 0, b"");
        client.send(0, READ, 3, 0, 512, b"");
        serving.disk.wait_started(before + 1);
        serving.disk.open_gate();
        assert_eq!(client.reply(0).cookie, 1);
        client.expect_end();
    });
}

#[test]
fn stop_answers_what_is_in_flight_and_closes_every_connection() {
    for_each_engine(|engine| {
        let mut serving = Serving::plain(engine);
        let mut silent = serving.connect();
        let mut idle = serving.client(Style::Structured);
        let mut busy = serving.client(Style::Extended);
        serving.disk.close_gate();
        busy.write(0, 77, 0, &[1; 4096]);
        serving.disk.wait_started(1);
        serving.server.stop();
        silent.expect_end();
        idle.expect_end();
        assert!(!serving.thread.as_ref().unwrap().is_finished());
        serving.disk.open_gate();
        let reply = busy.reply(0);
        assert_eq!((reply.cookie, reply.errno), (77, 0));
        busy.expect_end();
        serving.join().unwrap();
        assert_eq!(
            Arc::strong_count(&serving.disk),
            2,
            "the test's own, and the server handle's"
        );
    });
}

#[test]
fn a_flush_is_asked_of_the_device_after_writes_answered_on_other_connections() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let (mut one, mut two) = (
            serving.client(Style::Simple),
            serving.client(Style::Extended),
        );
        assert_ne!(one.flags & two.flags & 1 << 8, 0, "CAN_MULTI_CONN");
        assert_eq!(one.ask_write(0, 0, &[5; 512]).errno, 0);
        assert_eq!(two.ask(0, READ, 0, 512).data, [5; 512]);
        assert_eq!(two.ask(0, FLUSH, 0, 0).errno, 0);
        assert_eq!(
            serving.disk.take_log(),
            ["write 0 512 false", "read 0 512", "flush"]
        );
    });
}

#[test]
fn connections_are_counted_and_a_seat_is_free_again_when_one_leaves() {
    for_each_engine(|engine| {
        let options = Options {
            max_connections: 2,
            ..Options::default()
        };
        let serving = Serving::new(engine, Disk::new(), options);
        let first = serving.client(Style::Simple);
        let mut second = serving.client(Style::Structured);
        let mut third = serving.connect();
        third.hello(3);
        assert_eq!(third.go(""), Err(ERR_POLICY));
        let mut old = serving.connect();
        old.hello(3);
        old.put(&option(1, b""));
        old.expect_end();
        drop(first);
        wait_until("a seat", || serving.server.connections() == 1);
        third.go("").expect("the seat that became free");
        third.check_in_step();
        second.check_in_step();
    });
}

#[test]
fn a_server_may_end_with_its_last_client() {
    for_each_engine(|engine| {
        let options = Options {
            end_with_last_client: true,
            ..Options::default()
        };
        let mut serving = Serving::new(engine, Disk::new(), options);
        drop(serving.connect());
        let (first, second) = (serving.client(Style::Simple), serving.client(Style::Simple));
        drop(first);
        wait_until("one to leave", || serving.server.connections() == 1);
        assert!(!serving.thread.as_ref().unwrap().is_finished());
        drop(second);
        serving.join().unwrap();
    });
}

/// Serves one connection on a thread of its own, as a server on standard input does.
fn serve_one(engine: Engine, input: OwnedFd, output: OwnedFd) -> JoinHandle<ploop::Result<()>> {
    std::thread::spawn(move || {
        let server = Server::new(Arc::new(Disk::new()), Options::default(), engine).unwrap();
        let (input, output) = (Arc::new(input), Arc::new(output));
        exec::run(engine, async move {
            server.serve_connection(input, output).await
        })
        .unwrap()
    })
}

#[test]
fn one_client_is_served_over_a_socket_pair_until_it_leaves() {
    for_each_engine(|engine| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let copy = theirs.try_clone().unwrap();
        let served = serve_one(engine, theirs.into(), copy.into());
        let mut client = Client::over(ours);
        client.hello(3);
        client.agree(Style::Extended);
        client.go("").unwrap();
        client.check_in_step();
        client.send(0, DISC, 1, 0, 0, b"");
        client.expect_end();
        served.join().unwrap().unwrap();
    });
}

#[test]
fn one_client_is_served_over_a_pair_of_pipes() {
    for_each_engine(|engine| {
        let (from_client, mut to_server) = std::io::pipe().unwrap();
        let (mut from_server, to_client) = std::io::pipe().unwrap();
        let served = serve_one(engine, from_client.into(), to_client.into());
        let mut all = 3u32.to_be_bytes().to_vec();
        all.extend(option(7, &info_data("", &[])));
        all.extend(request(Style::Simple, 0, WRITE, 1, 0, 100_000));
        all.extend(vec![8; 100_000]);
        all.extend(request(Style::Simple, 0, READ, 2, 99_999, 2));
        to_server.write_all(&all).unwrap();
        drop(to_server);
        let mut answer = Vec::new();
        from_server.read_to_end(&mut answer).unwrap();
        assert_eq!(answer[answer.len() - 2..], [8, 0]);
        served.join().unwrap().unwrap();
    });
}

#[test]
fn a_server_without_a_socket_or_with_an_impossible_name_is_an_error() {
    let server = Server::new(Arc::new(Disk::new()), Options::default(), Engine::Poll).unwrap();
    let result = exec::run(Engine::Poll, async { server.serve(vec![]).await }).unwrap();
    assert_eq!(result.unwrap_err().kind(), Kind::Invalid);
    let export = Export {
        name: "a\0b".into(),
        ..Export::default()
    };
    let options = Options {
        export,
        ..Options::default()
    };
    assert!(Server::new(Arc::new(Disk::new()), options, Engine::Poll).is_err());
}
