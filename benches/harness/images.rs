//! Images of ours: filled ones, fresh ones, stacks of many layers.

use super::Cache;
use crate::common::process::ok;
use crate::common::programs::{ploopctl, tool};
use crate::common::serve::Disk;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// Clusters of every image that has clusters, unless its name says otherwise.
pub const CLUSTER: &str = "64k";
/// The same in sectors, as the descriptor has it.
const CLUSTER_SECTORS: u64 = 128;

/// A fresh disk in a folder of its own under `folder`.
pub fn fresh(folder: &Path, size: u64) -> Disk {
    let own = TempDir::new_in(folder).expect("a folder");
    Disk::in_folder(own, &size.to_string(), "none", &["--cluster", CLUSTER])
}

/// A disk that holds what `raw` holds.
pub fn filled(folder: &Path, raw: &Path) -> Disk {
    let size = raw.metadata().expect("a raw image").len();
    let disk = fresh(folder, size);
    let server = disk.serve(&["--cache", Cache::Writeback.name()]);
    ok(tool("nbdcopy").arg("--flush").arg(raw).arg(server.uri()));
    server.stop();
    disk
}

/// The lowest layer of a stack.
pub enum Base<'a> {
    /// A flat file, linked into the stack's folder.
    Raw(&'a Path),
    /// A delta, linked likewise.
    Delta(&'a Path),
}

/// A disk of `layers` layers in a folder of its own under `folder`: `base`, and empty deltas above.
pub fn stack(folder: &Path, base: &Base<'_>, size: u64, layers: usize) -> Disk {
    let own = TempDir::new_in(folder).expect("a folder");
    let disk = own.path().join("disk");
    fs::create_dir(&disk).expect("a folder for the disk");
    let (file, kind) = match base {
        Base::Raw(file) => (file, "Plain"),
        Base::Delta(file) => (file, "Compressed"),
    };
    fs::hard_link(file, disk.join("0")).expect("one file system for all layers");
    for n in 1..layers {
        let made = own.path().join("made");
        ok(ploopctl()
            .args(["init", "-s", &size.to_string(), "--fs", "none"])
            .args(["--cluster", CLUSTER])
            .arg(&made));
        fs::rename(made.join("root.hds"), disk.join(n.to_string())).expect("a delta");
        fs::remove_dir_all(&made).expect("a folder of ours");
    }
    let text = descriptor(size / 512, kind, layers);
    fs::write(disk.join("DiskDescriptor.xml"), text).expect("a descriptor");
    Disk::around(own)
}

fn guid(n: usize) -> String {
    format!("{{{n:08x}-0000-4000-8000-000000000000}}")
}

fn descriptor(sectors: u64, base: &str, layers: usize) -> String {
    let (mut images, mut shots) = (String::new(), String::new());
    for n in 0..layers {
        let kind = if n == 0 { base } else { "Compressed" };
        // Numbers from 1: a GUID of zeros is nobody's.
        let parent = if n == 0 {
            "{00000000-0000-0000-0000-000000000000}".into()
        } else {
            guid(n)
        };
        let own = guid(n + 1);
        let _ = write!(
            images,
            "<Image><GUID>{own}</GUID><Type>{kind}</Type><File>{n}</File></Image>"
        );
        let _ = write!(
            shots,
            "<Shot><GUID>{own}</GUID><ParentGUID>{parent}</ParentGUID></Shot>"
        );
    }
    format!(
        "<?xml version=\"1.0\"?><Parallels_disk_image><Disk_Parameters><Disk_size>{sectors}\
         </Disk_size><Cylinders>{}</Cylinders><Heads>16</Heads><Sectors>63</Sectors>\
         <Padding>0</Padding></Disk_Parameters><StorageData><Storage><Start>0</Start>\
         <End>{sectors}</End><Blocksize>{CLUSTER_SECTORS}</Blocksize>{images}</Storage>\
         </StorageData><Snapshots><TopGUID>{}</TopGUID>{shots}</Snapshots>\
         </Parallels_disk_image>",
        sectors / (16 * 63),
        guid(layers)
    )
}
