//! The mounted device: FUSE and a loop device on top, beside the same from QEMU, and beside a loop
//! device on a raw file, which is as fast as a loop device can be.

use crate::common::attach::{Attached, can_mount};
use crate::harness::fio::Work;
use crate::harness::images::{self, CLUSTER};
use crate::harness::peers::{self, Contender, FuseExport, Loop};
use crate::harness::table::{Bar, Peer, Table};
use crate::harness::{Options, fill};

/// fio asks the block device itself.
pub fn run(options: &Options) {
    if !can_mount("mount") || !peers::have("mount", &["nbdcopy", "losetup"]) {
        return;
    }
    let folder = options.in_memory();
    let raw = folder.path().join("raw");
    fill(&raw, options.size);
    let disk = images::filled(folder.path(), &raw);
    let attached = Attached::device_of(&disk);
    let (path, keeper) = (attached.device.clone(), attached.keeper);
    let ours = peers::device(path, Some(keeper), (attached, disk));
    let ours = Contender::lasting("ploop mount", ours);
    let mut others: Vec<Peer> = Vec::new();
    let tools = ["qemu-storage-daemon", "qemu-img"];
    if peers::have("qemu-storage-daemon", &tools) {
        let image = folder.path().join("qcow2");
        peers::convert("qcow2", &raw, &image);
        let export = FuseExport::start(&image);
        let (device, pid) = (Loop::attach(&export.file), export.pid());
        let target = peers::device(device.path.clone(), Some(pid), (device, export));
        let name = "qemu-storage-daemon qcow2, FUSE + loop";
        others.push((Contender::lasting(name, target), Some(Bar::iops(1.5))));
    }
    let device = Loop::attach(&raw);
    let limit = peers::device(device.path.clone(), None, device);
    others.push((Contender::lasting("loop on a raw file", limit), None));
    let random = [(false, 1), (false, 32), (true, 1), (true, 32)];
    let mut works: Vec<Work> = random
        .into_iter()
        .map(|(write, depth)| Work::random(write, depth))
        .collect();
    works.extend([false, true].map(|write| Work::bulk(write, 128 << 10)));
    Table {
        title: format!(
            "Block device, loop with direct I/O over FUSE; {} MiB image on tmpfs, clusters of \
             {CLUSTER}, fully allocated, O_DIRECT below",
            options.size >> 20
        ),
        works: &works,
        span: options.size,
        ours: &ours,
        peers: &others,
    }
    .run(options);
}
