//! Sizes: disks grow across every boundary of their tables, to the ends of their formats. QEMU judges
//! what is left.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::files::space_of;
use common::have;
use common::nbd::Client;
use common::process::{fails, ok_within};
use common::programs::ploopctl;
use common::serve::Disk;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
/// What a piece of data has.
const PIECE: u64 = 4096;

/// Pieces of data on a disk: before its first end, and around each end that it had.
struct Pieces(Vec<u64>);

impl Pieces {
    fn byte(at: u64) -> u8 {
        (at / PIECE % 251) as u8 + 1
    }

    fn write(&mut self, guest: &mut Client, at: u64) {
        let data = vec![Self::byte(at); PIECE as usize];
        assert_eq!(guest.write(at, &data).unwrap(), 0);
        self.0.push(at);
    }

    fn judge(&self, guest: &mut Client, size: u64) {
        for at in &self.0 {
            let found = guest.read(*at, PIECE as u32).unwrap();
            assert!(found.iter().all(|b| *b == Self::byte(*at)), "{at}");
        }
        let found = guest.read(size - PIECE, PIECE as u32).unwrap();
        assert!(found.iter().all(|b| *b == 0), "the new end");
    }
}

/// Grows a disk to each size, and looks at all of it in between; by whom it is served while it grows
/// changes from step to step. `table` are the bytes that its table has in the end.
fn grows_to(version: &str, cluster: &str, table: u64, sizes: &[u64]) {
    let test = "a disk grows to the end of its format";
    if !have(test, &["qemu-img"]) {
        return;
    }
    let disk = Disk::new("200M", &["--cluster", cluster, "--format-version", version]);
    let (mut pieces, mut old) = (Pieces(Vec::new()), 200 * MIB);
    for (step, size) in sizes.iter().enumerate() {
        let server = disk.serve(&[]);
        let mut guest = Client::connect(server.socket()).unwrap();
        for n in 0..4 {
            pieces.write(&mut guest, old / 4 * n + step as u64 * PIECE);
        }
        pieces.write(&mut guest, old - PIECE);
        guest.disconnect().unwrap();
        let grow = || {
            let mut command = ploopctl();
            command.arg("grow").arg(disk.path()).arg(size.to_string());
            ok_within(&mut command, PATIENCE);
        };
        let server = match step % 2 {
            0 => {
                grow();
                server
            }
            _ => {
                server.stop();
                grow();
                disk.serve(&[])
            }
        };
        let mut guest = Client::connect(server.socket()).unwrap();
        pieces.judge(&mut guest, *size);
        guest.disconnect().unwrap();
        server.stop();
        disk.assert_qemu_finds_it_clean();
        old = *size;
    }
    let takes = space_of(&disk.image());
    println!("COUNT: {test}: version {version}, clusters of {cluster}, {old} bytes take {takes}");
    assert!(takes < table + 64 * MIB, "{takes}");
    if version == "1" {
        let mut command = ploopctl();
        let beyond = fails(command.arg("grow").arg(disk.path()).arg("17T"));
        assert!(
            beyond.err.contains("the limit of ploop format V1"),
            "{}",
            beyond.err
        );
    }
}

#[test]
fn a_disk_of_version_1_grows_to_the_end_of_its_format() {
    // The first sector of each cluster is to have a number of 32 bits.
    grows_to(
        "1",
        "64K",
        128 * MIB,
        &[201 * MIB, 1 << 30, 2 * TIB - 512 * MIB],
    );
    grows_to(
        "1",
        "1M",
        8 * MIB,
        &[201 * MIB, 1 << 30, TIB, 2 * TIB - 512 * MIB],
    );
}

#[test]
fn a_disk_of_version_2_grows_to_sixteen_tebibytes() {
    grows_to("2", "64K", 64 * MIB, &[201 * MIB, 1 << 30, TIB]);
    grows_to("2", "256K", 256 * MIB, &[1 << 30, 16 * TIB]);
    grows_to("2", "1M", 64 * MIB, &[201 * MIB, 1 << 30, TIB, 16 * TIB]);
}
