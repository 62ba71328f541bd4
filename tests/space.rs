//! Space: what a file system frees goes back to the host, on every layer, and what is overwritten
//! takes none.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, can_mount};
use common::files::{Random, space_of};
use common::nbd::Client;
use common::process::{eventually, ok_within};
use common::programs::{ploopctl, tool};
use common::serve::Disk;
use common::tree::{descriptor, freeze};
use common::{count, have};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// XFS frees in the background.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longer than frees wait for a pass that nobody asks for.
const PASS: Duration = Duration::from_secs(6);
const MIB: u64 = 1 << 20;
/// What file systems of this size write in turns.
const JOURNAL: u64 = 64 * MIB;

/// Writes so many bytes in files of a size, durably, and gives their names' beginning.
fn fill(folder: &Path, name: &str, bytes: u64, each: u64) {
    let mut random = Random::new(each);
    for n in 0..bytes / each {
        let mut file = File::create(folder.join(format!("{name}{n}"))).unwrap();
        file.write_all(&random.bytes(each as usize)).unwrap();
    }
    sync(folder);
}

/// Removes the files whose names begin so.
fn remove(folder: &Path, name: &str) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with(name) {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    sync(folder);
}

fn sync(folder: &Path) {
    rustix::fs::syncfs(File::open(folder).unwrap()).unwrap();
}

/// Bytes that the file system on a folder does not call free: its own, too.
fn used(disk: &Disk, folder: &Path) -> u64 {
    let stat = rustix::fs::statvfs(folder).unwrap();
    size(disk) - stat.f_bfree * stat.f_frsize
}

fn size(disk: &Disk) -> u64 {
    ploop::image::change::size(&descriptor(disk))
}

/// Bytes that the top takes on the host.
fn top(disk: &Disk) -> u64 {
    let disk_now = descriptor(disk);
    let top = disk_now.image(disk_now.top()).unwrap();
    space_of(&disk.path().join(&top.file))
}

/// Trims until the top takes at most so much; what it takes then.
fn trim_to(disk: &Disk, folder: &Path, most: impl Fn() -> u64) -> u64 {
    eventually("the space is returned", PATIENCE, || {
        sync(folder);
        ok_within(tool("fstrim").arg(folder), PATIENCE);
        thread::sleep(PASS);
        let takes = top(disk);
        (takes <= most()).then_some(takes)
    })
}

/// What is deleted and trimmed goes back, and the top takes what is in use within two percent; then
/// the same over a frozen layer, of what is newer than that: a journal, and what is kept.
fn space_goes_back(test: &str, fs: &str) {
    if !can_mount(test) || !have(test, &["fstrim", &format!("mkfs.{fs}")]) {
        return;
    }
    let disk = Disk::with_fs("3G", fs, &[]);
    let attached = Attached::mounted(&disk, &[]);
    let folder = attached.folder();
    for n in 0..8 {
        fill(folder, &format!("kept-{n}-"), 64 * MIB, 256 << 10);
        // No two batches alike: of free ranges of one length Linux 6.18's XFS trims but one.
        fill(
            folder,
            &format!("gone-{n}-"),
            (100 + 9 * n) * MIB,
            192 << 10,
        );
    }
    let full = top(&disk);
    remove(folder, "gone");
    let percent = |bytes: u64| bytes + bytes / 50;
    let alone = trim_to(&disk, folder, || percent(used(&disk, folder)));
    let below = used(&disk, folder);

    freeze(&disk, 0).unwrap();
    for n in 0..4 {
        fill(folder, &format!("new-{n}-"), 64 * MIB, 256 << 10);
        fill(
            folder,
            &format!("gone-{n}-"),
            (200 + 30 * n) * MIB,
            192 << 10,
        );
    }
    remove(folder, "gone");
    let newer = || used(&disk, folder) - below + JOURNAL;
    let over = trim_to(&disk, folder, || percent(newer()));
    println!(
        "COUNT: {test}: {} MiB, after a trim {} of {} MiB in use; over a parent {} of {} MiB",
        full / MIB,
        alone / MIB,
        below / MIB,
        over / MIB,
        newer() / MIB
    );
    attached.detach();
    ok_within(ploopctl().arg("check").arg(disk.path()), PATIENCE);
}

#[test]
fn what_ext4_frees_goes_back_to_the_host_alone_and_over_a_parent() {
    let test = "what_ext4_frees_goes_back_to_the_host_alone_and_over_a_parent";
    space_goes_back(test, "ext4");
}

#[test]
fn what_xfs_frees_goes_back_to_the_host_alone_and_over_a_parent() {
    let test = "what_xfs_frees_goes_back_to_the_host_alone_and_over_a_parent";
    space_goes_back(test, "xfs");
}

#[test]
fn steady_overwriting_with_flushes_takes_no_more_space() {
    const BYTES: u64 = 32 * MIB;
    let disk = Disk::new("64M", &[]);
    let server = disk.serve(&[]);
    let mut guest = Client::connect(server.socket()).unwrap();
    let mut random = Random::new(3);
    let mut sizes = Vec::new();
    for pass in 0..=count("PLOOP_OVERWRITES", 10) {
        for n in 0..BYTES / (64 << 10) {
            let at = n * (64 << 10);
            assert_eq!(guest.write(at, &random.bytes(64 << 10)).unwrap(), 0);
            if pass > 0 && n % 16 == 0 {
                assert_eq!(guest.flush().unwrap(), 0);
            }
        }
        assert_eq!(guest.flush().unwrap(), 0);
        sizes.push((top(&disk), fs::metadata(disk.image()).unwrap().len()));
    }
    assert!(sizes.iter().all(|size| *size == sizes[0]), "{sizes:?}");
    guest.disconnect().unwrap();
    server.stop();
    disk.assert_qemu_finds_it_clean();
}
