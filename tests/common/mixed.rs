//! Mixed: disks whose top is a qcow2 image, on a base of any format.

use super::process::{ok, ok_within};
use super::programs::{ploopctl, tool};
use super::serve::Disk;
use super::tree::descriptor;
use ploop_formats::descriptor::{ImageType, LayerFormat};
use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(120);

/// A disk with a file system, whose top is a qcow2 image: with subclusters, and alone, or on a snapshot of
/// this format.
pub fn disk(bytes: u64, fs: &str, base: LayerFormat) -> Disk {
    let disk = match base {
        LayerFormat::Ploop => Disk::with_fs(&bytes.to_string(), fs, &[]),
        LayerFormat::Raw | LayerFormat::Qcow2 => adopted(bytes, fs, base),
    };
    if base != LayerFormat::Qcow2 {
        ok(ploopctl().args(["snapshot", "create"]).arg(disk.path()));
        graft(&disk);
    }
    disk
}

fn adopted(bytes: u64, fs: &str, base: LayerFormat) -> Disk {
    let disk = Disk::around(TempDir::new().unwrap());
    let (raw, image) = (disk.beside("raw"), disk.beside("image"));
    File::create(&raw).unwrap().set_len(bytes).unwrap();
    ok_within(tool(&format!("mkfs.{fs}")).arg("-q").arg(&raw), PATIENCE);
    let format = match base {
        LayerFormat::Raw => {
            fs::rename(&raw, &image).unwrap();
            "raw"
        }
        _ => {
            let mut convert = tool("qemu-img");
            convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
            convert.args(["-o", "extended_l2=on"]);
            ok_within(convert.arg(&raw).arg(&image), PATIENCE);
            fs::remove_file(&raw).unwrap();
            "qcow2"
        }
    };
    let mut adopt = ploopctl();
    adopt.args(["adopt", "--format", format]);
    ok(adopt.arg(&image).arg(disk.path()));
    disk
}

/// Puts an empty image of QEMU's in the place of an empty top.
fn graft(disk: &Disk) {
    let old = descriptor(disk);
    let top = old.top();
    let file = disk.path().join(&old.image(top).unwrap().file);
    fs::remove_file(&file).unwrap();
    let cluster = format!("cluster_size={}", old.cluster().bytes());
    let mut create = tool("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", &cluster]);
    let size = old.sectors() * 512;
    ok(create.arg(&file).arg(size.to_string()));
    let new = old.edit(|e| e.set_type(top, ImageType::QCow2)).unwrap();
    fs::write(disk.path().join("DiskDescriptor.xml"), new.encode()).unwrap();
}

/// What QEMU finds in the qcow2 images of a disk that was detached in order: nothing.
pub fn assert_clean(disk: &Disk) {
    for image in descriptor(disk).images() {
        if image.kind == ImageType::QCow2 {
            assert_image_clean(&disk.path().join(&image.file));
        }
    }
}

fn assert_image_clean(file: &Path) {
    let mut check = tool("qemu-img");
    ok_within(
        check.args(["check", "-q", "-f", "qcow2"]).arg(file),
        PATIENCE,
    );
}
