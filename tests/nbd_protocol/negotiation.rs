//! Agreeing, and failing to.

use super::client::*;
use super::disk::{Disk, SIZE};
use super::serving::{Serving, for_each_engine};
use bytes::{Buf, Bytes};
use ploop::serve::nbd::{Export, Options};
use std::time::Instant;

#[test]
fn unknown_client_flags_end_the_connection() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        for flags in [4, 0x1_0000, u32::MAX] {
            let mut client = serving.connect();
            client.hello(flags);
            client.expect_end();
        }
        serving.check();
    });
}

#[test]
fn options_that_fail_leave_the_negotiation_in_step() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.connect();
        client.hello(3);
        let longer = "n".repeat(4097);
        let wrong: Vec<(u32, Vec<u8>, u32)> = vec![
            (3, vec![1], 3),
            (4, vec![], 1),
            (5, vec![], 1),
            (6, info_data("nobody", &[]), 6),
            (6, vec![0xff; 8], 3),
            (7, info_data(&longer, &[]), 9),
            (7, info_data("nobody", &[3]), 6),
            (8, vec![0], 3),
            (9, query_data("", &[]), 3),
            (10, query_data("", &["base:allocation"]), 3),
            (11, vec![0], 3),
            (12, vec![0; 65536], 1),
            (u32::MAX, vec![], 1),
        ];
        for (number, data, error) in wrong {
            let replies = client.option(number, &data);
            assert_eq!(
                replies.last().unwrap().0,
                0x8000_0000 | error,
                "option {number}"
            );
            let list = client.option(3, b"");
            assert_eq!(list[0], (2, Bytes::from_static(&[0; 4])));
        }
        assert_eq!(client.option(2, b"").len(), 1);
        client.expect_end();
        serving.check();
    });
}

#[test]
fn too_much_negotiation_ends_the_connection() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.connect();
        client.hello(3);
        for _ in 0..32 {
            client.option(3, b"");
        }
        client.put(&option(3, b""));
        client.expect_end();
        let mut client = serving.connect();
        client.hello(3);
        client.put(&[b"IHAVEOPT", &[0, 0, 0, 3, 0, 1, 0, 1][..]].concat());
        client.expect_end();
        serving.check();
    });
}

#[test]
fn an_export_is_listed_described_and_reached_by_both_its_names() {
    for_each_engine(|engine| {
        let export = Export {
            name: "root".into(),
            description: "a disk".into(),
        };
        let serving = Serving::new(
            engine,
            Disk::new(),
            Options {
                export,
                ..Options::default()
            },
        );
        let mut client = serving.connect();
        client.hello(3);
        assert_eq!(
            client.option(3, b"")[0],
            (2, Bytes::from_static(b"\0\0\0\x04root"))
        );
        let pieces = client.option(6, &info_data("root", &[1, 2, 3]));
        let texts: Vec<_> = pieces.iter().map(|(_, data)| data.clone()).collect();
        assert!(texts.contains(&Bytes::from_static(b"\0\x01root")));
        assert!(texts.contains(&Bytes::from_static(b"\0\x02a disk")));
        assert!(texts.contains(&Bytes::from_static(b"\0\x03\0\0\0\x01\0\x01\0\0\x02\0\0\0")));
        client.go("root").unwrap();
        assert_eq!((client.size, client.flags), (SIZE, 0x0d6d));
        client.check_in_step();
        let mut client = serving.connect();
        client.hello(3);
        client.go("").unwrap();
        client.check_in_step();
    });
}

#[test]
fn old_clients_start_with_export_name() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        for (flags, padding) in [(0, 124), (1, 124), (3, 0)] {
            let mut client = serving.connect();
            client.hello(flags);
            client.put(&option(1, b""));
            let mut export = client.get(10 + padding);
            assert_eq!(export.get_u64(), SIZE);
            client.check_in_step();
        }
        for name in [&b"nobody"[..], &[b'n'; 4097]] {
            let mut client = serving.connect();
            client.hello(3);
            client.put(&option(1, name));
            client.expect_end();
        }
        let mut client = serving.connect();
        client.hello(3);
        client.option(11, b"");
        client.put(&option(1, b""));
        client.expect_end();
        serving.check();
    });
}

#[test]
fn requests_sent_together_with_go_are_served() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.connect();
        client.hello(3);
        let mut all = option(7, &info_data("", &[]));
        all.extend(request(Style::Simple, 0, WRITE, 5, 4096, 3000));
        all.extend([7; 3000]);
        all.extend(request(Style::Simple, 0, FLUSH, 6, 0, 0));
        client.put(&all);
        assert_eq!(client.option_replies(7).last().unwrap().0, ACK);
        let cookies = [client.reply(0), client.reply(0)].map(|reply| (reply.cookie, reply.errno));
        assert_eq!(cookies, [(5, 0), (6, 0)]);
        assert_eq!(client.ask(0, READ, 4096, 3000).data, [7; 3000]);
    });
}

#[test]
fn contexts_are_negotiated_for_one_export_and_replace_each_other() {
    for_each_engine(|engine| {
        let export = Export {
            name: "root".into(),
            ..Export::default()
        };
        let serving = Serving::new(
            engine,
            Disk::new(),
            Options {
                export,
                ..Options::default()
            },
        );
        for (first, second, go, works) in [
            ("root", None, "root", true),
            ("", None, "root", false),
            ("root", Some(query_data("root", &[])), "root", false),
            ("root", Some(vec![0xff]), "root", false),
            (
                "root",
                Some(query_data("root", &["qemu:allocation-depth"])),
                "root",
                true,
            ),
        ] {
            let mut client = serving.connect();
            client.hello(3);
            client.option(8, b"");
            client.style = Style::Structured;
            let selected = client.option(10, &query_data(first, &["base:allocation", "base:"]));
            assert_eq!(
                selected[0].1.slice(4..),
                Bytes::from_static(b"base:allocation")
            );
            assert_eq!(selected.len(), 2);
            if let Some(data) = second {
                client.option(10, &data);
            }
            client.go(go).unwrap();
            let reply = client.ask(0, STATUS, 0, 512);
            assert_eq!(reply.errno, if works { 0 } else { EINVAL });
            assert_eq!(reply.status.len(), usize::from(works));
            client.check_in_step();
        }
    });
}

#[test]
fn silent_connections_make_room_for_new_ones_oldest_first() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut good = serving.client(Style::Simple);
        let mut silent: Vec<_> = (0..64).map(|_| serving.connect()).collect();
        silent.iter_mut().for_each(|client| client.hello(3));
        let mut late = serving.connect();
        late.hello(3);
        silent[0].expect_end();
        silent[1].option(3, b"");
        late.go("").unwrap();
        late.check_in_step();
        good.check_in_step();
    });
}

#[test]
fn a_negotiation_has_ten_seconds() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut good = serving.client(Style::Simple);
        let mut slow = serving.connect();
        slow.hello(3);
        let begin = Instant::now();
        slow.expect_end();
        let waited = begin.elapsed();
        assert!((9..15).contains(&waited.as_secs()), "{waited:?}");
        good.check_in_step();
    });
}
