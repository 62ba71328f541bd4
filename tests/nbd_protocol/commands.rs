//! Every command and flag, legal and not, in every framing.

use super::client::*;
use super::disk::{Disk, SIZE};
use super::serving::{Serving, for_each_engine, for_each_style};
use bytes::BufMut;
use ploop::Kind;
use ploop::serve::nbd::Options;

#[test]
fn every_command_reaches_the_device_with_its_flags() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        serving.disk.take_log();
        assert_eq!(client.ask_write(0, 512, &[1; 1024]).errno, 0);
        assert_eq!(client.ask_write(FUA, 1536, &[2; 512]).errno, 0);
        let reply = client.ask(FUA, READ, 1000, 1000);
        assert_eq!(reply.data, [&[1; 536][..], &[2; 464]].concat());
        for (flags, command, at, len) in [
            (FUA, FLUSH, 0, 0),
            (0, TRIM, 4096, 8192),
            (FUA, TRIM, 1, 2),
            (FUA, CACHE, 0, SIZE),
            (0, ZEROES, 0, 512),
            (NO_HOLE | FUA, ZEROES, 512, 100),
            (0, ZEROES, 0, SIZE),
        ] {
            let reply = client.ask(flags, command, at, len);
            assert_eq!(
                (reply.cookie, reply.errno),
                (0xc00c1e, 0),
                "command {command}"
            );
        }
        let expected = [
            "write 512 1024 false",
            "write 1536 512 true",
            "read 1000 1000",
            "flush",
            "discard 4096 8192",
            "discard 1 2",
            "flush",
            "zero 0 512 MayFree false",
            "zero 512 100 Allocate true",
            &format!("zero 0 {SIZE} MayFree false"),
        ];
        assert_eq!(serving.disk.take_log(), expected);
        assert_eq!(client.ask(FAST_ZERO, ZEROES, 0, 512).errno, ENOTSUP);
        assert_eq!(
            client.ask(FAST_ZERO | NO_HOLE, ZEROES, 0, 512).errno,
            ENOTSUP
        );
        client.check_in_step();
        client.send(0, DISC, 1, 0, 0, b"");
        client.expect_end();
    });
}

#[test]
fn illegal_requests_fail_with_the_value_of_the_text_and_change_nothing() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        serving.disk.take_log();
        let mut table = vec![
            (0, READ, SIZE - 1, 2, EINVAL),
            (0, READ, u64::MAX, 1, EINVAL),
            (0, READ, 0, 33 << 20, EINVAL),
            (NO_HOLE, READ, 0, 512, EINVAL),
            (0, TRIM, SIZE, 1, EINVAL),
            (NO_HOLE, TRIM, 0, 1, EINVAL),
            (0, CACHE, SIZE, 1, EINVAL),
            (0, ZEROES, SIZE - 511, 512, ENOSPC),
            (0, ZEROES, u64::MAX - 5, 512, ENOSPC),
            (DF, ZEROES, 0, 512, EINVAL),
            (0, FLUSH, 0, 512, EINVAL),
            (0, FLUSH, 512, 0, EINVAL),
            (REQ_ONE, FLUSH, 0, 0, EINVAL),
            (0, STATUS, SIZE, 1, EINVAL),
            (0, STATUS, 0, 0, EINVAL),
            (0, 8, 4096, 0, EINVAL),
            (0, 77, 0, 0, EINVAL),
            (1 << 15, READ, 0, 512, EINVAL),
        ];
        if style == Style::Simple {
            table.extend([
                (DF, READ, 0, 512, EINVAL),
                (PAYLOAD_LEN, READ, 0, 512, EINVAL),
            ]);
        }
        for (flags, command, at, len, errno) in table {
            let reply = client.ask(flags, command, at, len);
            let asked = format!("{style:?} command {command} flags {flags} at {at} len {len}");
            assert_eq!((reply.cookie, reply.errno), (0xc00c1e, errno), "{asked}");
        }
        assert_eq!(serving.disk.take_log(), [""; 0]);
        client.check_in_step();
    });
}

#[test]
fn a_refused_write_takes_its_payload_along() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        for (flags, at, len, errno) in [
            (0, SIZE - 4, 5, ENOSPC),
            (0, u64::MAX, 1 << 20, ENOSPC),
            (NO_HOLE, 0, 3000, EINVAL),
            (DF, 0, 300_000, EINVAL),
            (0, SIZE, 32 << 20, ENOSPC),
        ] {
            let reply = client.ask_write(flags, at, &vec![0x25; len]);
            assert_eq!((reply.errno, reply.cookie), (errno, 0xc00c1e));
            client.check_in_step();
        }
    });
}

#[test]
fn an_unexpected_payload_is_swallowed() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.client(Style::Extended);
        for command in [READ, FLUSH, TRIM, CACHE, ZEROES, 8, 99] {
            client.send(PAYLOAD_LEN, command, 9, 0, 5000, &[0x21; 5000]);
            let reply = client.reply(0);
            assert_eq!(
                (reply.cookie, reply.errno),
                (9, EINVAL),
                "command {command}"
            );
            client.check_in_step();
        }
        // QEMU's client leaves the flag out on writes.
        client.send(0, WRITE, 9, 0, 600, &[3; 600]);
        assert_eq!(client.reply(0).errno, 0);
        assert_eq!(client.ask(0, READ, 0, 600).data, [3; 600]);
    });
}

#[test]
fn empty_requests_succeed() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        serving.disk.take_log();
        for at in [0, 4096, SIZE] {
            assert_eq!(client.ask_write(FUA, at, b"").errno, 0);
            for command in [READ, TRIM, CACHE, ZEROES] {
                let reply = client.ask(0, command, at, 0);
                assert_eq!((reply.errno, reply.data.len()), (0, 0), "command {command}");
            }
        }
        assert_eq!(client.ask_write(0, SIZE + 1, b"").errno, ENOSPC);
        assert_eq!(serving.disk.take_log(), [""; 0]);
        client.check_in_step();
    });
}

#[test]
fn payloads_up_to_32_mib_work_and_longer_ones_end_the_connection() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        let big: Vec<u8> = (0..32 * MIB).map(|i| (i >> 9) as u8 ^ i as u8).collect();
        assert_eq!(client.ask_write(0, 12345, &big).errno, 0);
        let reply = client.ask(0, READ, 12345, u64::from(32 * MIB));
        assert!(reply.errno == 0 && reply.data == big);
        client.check_in_step();
        let flags = if style == Style::Extended {
            PAYLOAD_LEN
        } else {
            0
        };
        client.send(flags, WRITE, 1, 0, u64::from(33 * MIB), b"");
        client.expect_end();
        serving.check();
    });
}

#[test]
fn a_read_only_export_says_so_and_refuses_changes() {
    for_each_engine(|engine| {
        let mut disk = Disk::new();
        disk.read_only = true;
        let serving = Serving::new(engine, disk, Options::default());
        for style in STYLES {
            let mut client = serving.client(style);
            // READ_ONLY, and neither TRIM nor WRITE_ZEROES nor FAST_ZERO.
            assert_eq!(client.flags & (1 << 1 | 1 << 5 | 1 << 6 | 1 << 11), 1 << 1);
            assert_eq!(client.ask_write(0, 0, &[1; 70_000]).errno, EPERM);
            assert_eq!(client.ask(0, TRIM, 0, 512).errno, EPERM);
            assert_eq!(client.ask(0, ZEROES, 0, 512).errno, EPERM);
            assert_eq!(client.ask(0, FLUSH, 0, 0).errno, 0);
            assert_eq!(client.ask(0, READ, 0, 512).data, [0; 512]);
        }
    });
}

#[test]
fn a_device_that_fails_is_reported_and_the_connection_goes_on() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        for (kind, errno) in [
            (Kind::Io, EIO),
            (Kind::NoSpace, ENOSPC),
            (Kind::ReadOnly, EPERM),
            (Kind::Poisoned, EIO),
            (Kind::Unsupported, EINVAL),
        ] {
            serving.disk.fail(Some(kind));
            assert_eq!(client.ask_write(0, 0, &[0; 512]).errno, errno, "{kind:?}");
            assert_eq!(client.ask(0, READ, 0, 512).errno, errno, "{kind:?}");
            assert_eq!(client.ask(0, FLUSH, 0, 0).errno, errno, "{kind:?}");
            assert_eq!(client.ask(FUA, TRIM, 0, 512).errno, errno, "{kind:?}");
            assert_eq!(client.ask(NO_HOLE, ZEROES, 0, 512).errno, errno, "{kind:?}");
            if style != Style::Simple {
                assert_eq!(client.ask(0, STATUS, 0, 512).errno, errno, "{kind:?}");
            }
        }
        serving.disk.fail(None);
        client.check_in_step();
    });
}

/// What `Disk` says about `len` bytes from `at`, joined where neighbours agree.
fn expected(at: u64, len: u64, word: impl Fn(u64) -> u64) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    let (mut at, end) = (at, at + len);
    while at < end {
        let next = end.min((at / 65536 + 1) * 65536);
        let status = word(at / 65536 % 3);
        match joined.last_mut() {
            Some((len, same)) if *same == status => *len += next - at,
            _ => joined.push((next - at, status)),
        }
        at = next;
    }
    joined
}

fn allocation(kind: u64) -> u64 {
    [0, 0, 3][kind as usize]
}

fn depth(kind: u64) -> u64 {
    [1, 2, 0][kind as usize]
}

#[test]
fn block_status_describes_each_selected_context() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        if style == Style::Simple {
            assert_eq!(client.ask(0, STATUS, 0, 4096).errno, EINVAL);
            return client.check_in_step();
        }
        for (at, len) in [(0, SIZE), (5, 65536 * 4), (65535, 2), (SIZE - 1, 1)] {
            let reply = client.ask(0, STATUS, at, len);
            assert_eq!((reply.errno, reply.status.len()), (0, 2));
            assert_eq!(reply.status[0], (1, expected(at, len, allocation)));
            assert_eq!(reply.status[1], (2, expected(at, len, depth)));
        }
        let one = client.ask(REQ_ONE, STATUS, 65536, SIZE - 65536).status;
        assert_eq!(one, [(1, vec![(65536, 0)]), (2, vec![(65536, 2)])]);
        client.check_in_step();
    });
}

#[test]
fn a_status_payload_restricts_the_contexts() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.client(Style::Extended);
        assert_ne!(client.flags & 1 << 12, 0);
        let payload = |len: u64, ids: &[u32]| {
            let mut payload = len.to_be_bytes().to_vec();
            ids.iter().for_each(|id| payload.put_u32(*id));
            payload
        };
        let mut ask = |payload: Vec<u8>| {
            client.send(
                PAYLOAD_LEN,
                STATUS,
                3,
                65536,
                payload.len() as u64,
                &payload,
            );
            let reply = client.reply(0);
            assert_eq!(reply.cookie, 3);
            client.check_in_step();
            reply
        };
        let long = 65536 * 5;
        assert_eq!(
            ask(payload(long, &[2])).status,
            [(2, expected(65536, long, depth))]
        );
        assert_eq!(ask(payload(long, &[2, 1])).status.len(), 2);
        for wrong in [
            payload(long, &[]),
            payload(long, &[1, 1]),
            payload(long, &[1, 2, 1]),
            payload(long, &[3]),
            payload(0, &[1]),
            payload(SIZE, &[1]),
            payload(long, &[1])[..11].to_vec(),
            vec![0; 4],
            vec![0; 100_000],
        ] {
            assert_eq!(ask(wrong).errno, EINVAL);
        }
        let mut client = serving.connect();
        client.hello(3);
        client.option(11, b"");
        client.style = Style::Extended;
        client.go("").unwrap();
        assert_eq!(client.flags & 1 << 12, 0, "no contexts, no payload");
    });
}

#[test]
fn a_status_reply_is_bounded() {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        let mut client = serving.client(Style::Extended);
        client.ask(0, STATUS, 0, SIZE);
        let asked = serving.disk.take_log();
        assert_eq!(asked.last().unwrap(), &format!("extents 0 {SIZE} 131072"));
    });
}

#[test]
fn a_stream_that_is_no_request_ends_the_connection() {
    for_each_style(|serving, style| {
        let mut client = serving.client(style);
        client.check_in_step();
        client.put(&[0x55; 64]);
        client.expect_end();
        serving.check();
    });
}
