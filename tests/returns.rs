//! Returns: a disk with a device that nobody has mounted goes back to a frozen point.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::attach::{Attached, can_mount, changer_of, kill};
use common::files::Random;
use common::have;
use common::process::{ok, run_within};
use common::programs::ploopctl;
use common::serve::Disk;
use common::tree::{amid, descriptor, freeze};
use ploop_formats::guid::Guid;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
const BYTES: usize = 4 << 20;

/// Through the page cache of the device, and left there.
fn write(device: &Path, byte: u8) {
    let mut file = File::options().write(true).open(device).unwrap();
    file.write_all(&vec![byte; BYTES]).unwrap();
}

/// The byte that all of it is.
fn read(device: &Path) -> u8 {
    use std::io::Read;
    let mut bytes = vec![0; BYTES];
    File::open(device).unwrap().read_exact(&mut bytes).unwrap();
    let first = bytes[0];
    assert!(bytes.iter().all(|byte| *byte == first), "a mixture");
    first
}

fn sync(device: &Path) {
    File::open(device).unwrap().sync_all().unwrap();
}

fn switch(disk: &Disk, point: Guid) -> Command {
    let mut switch = ploopctl();
    switch.args(["snapshot", "switch"]);
    switch.arg(disk.path()).arg(point.bare());
    switch
}

#[test]
fn a_device_that_nobody_uses_shows_the_point_at_once_and_takes_writes() {
    let test = "a_device_that_nobody_uses_shows_the_point_at_once_and_takes_writes";
    if !can_mount(test) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let attached = Attached::device_of(&disk);
    let device = &attached.device;
    for round in 0..5 {
        write(device, 1);
        sync(device);
        let (point, _) = freeze(&disk, round).unwrap();
        write(device, 2);
        // Neither what is cached nor what was never written back may be seen afterwards.
        assert_eq!(read(device), 2);
        ok(&mut switch(&disk, point.uuid));
        assert_eq!(read(device), 1, "round {round}");
        write(device, 3);
        sync(device);
        assert_eq!(read(device), 3);
    }
    attached.detach();
    ok(ploopctl().arg("check").arg(disk.path()));
}

#[test]
fn a_mounted_disk_and_a_served_one_do_not_go_back() {
    let test = "a_mounted_disk_and_a_served_one_do_not_go_back";
    if !can_mount(test) || !have(test, &["mkfs.ext4"]) {
        return;
    }
    let disk = Disk::with_fs("64M", "ext4", &[]);
    let attached = Attached::mounted(&disk, &[]);
    let (point, _) = freeze(&disk, 0).unwrap();
    fs::write(attached.folder().join("file"), b"kept").unwrap();
    let refused = run_within(&mut switch(&disk, point.uuid), PATIENCE);
    assert_eq!(refused.status.code(), Some(4), "{refused:?}");
    assert_eq!(fs::read(attached.folder().join("file")).unwrap(), b"kept");
    attached.detach();
    let server = disk.serve(&[]);
    let refused = run_within(&mut switch(&disk, point.uuid), PATIENCE);
    assert_eq!(refused.status.code(), Some(7), "{refused:?}");
    server.stop();
}

#[test]
fn a_return_that_is_cut_is_done_or_not_begun() {
    let test = "a_return_that_is_cut_is_done_or_not_begun";
    if !can_mount(test) {
        return;
    }
    let disk = Disk::new("64M", &[]);
    let attached = Attached::device_of(&disk);
    let device = &attached.device;
    write(device, 1);
    sync(device);
    let (point, _) = freeze(&disk, 0).unwrap();
    let mut random = Random::new(29);
    let mut refused = 0;
    for round in 0..20 {
        write(device, 2);
        sync(device);
        let top = descriptor(&disk).images().last().unwrap().file.clone();
        let kill_one = || match round % 2 {
            0 => attached.kill_worker(),
            _ => changer_of(attached.keeper).into_iter().for_each(kill),
        };
        let wait = Duration::from_micros(random.below(40_000));
        let done = amid(wait, kill_one, || {
            switch(&disk, point.uuid).output().unwrap()
        });
        refused += u32::from(!done.status.success());
        let now = descriptor(&disk);
        let gone = !now.images().iter().any(|image| image.file == top);
        assert!(gone || !done.status.success(), "{done:?}");
        assert_eq!(
            read(device),
            if gone { 1 } else { 2 },
            "round {round}: {done:?}"
        );
    }
    println!("COUNT: {test}: 20 returns, {refused} of them cut");
    assert!(refused > 0, "no return was cut");
    attached.detach();
    ok(ploopctl().arg("check").arg(disk.path()));
}
