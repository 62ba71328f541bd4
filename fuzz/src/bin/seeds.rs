//! Writes the first inputs of `ploop_open` into a folder: small healthy images of both versions,
//! and the same with one thing wrong.

use ploop_formats::ploop::header::{HEADER_LEN, IN_USE};
use ploop_formats::ploop::{Header, Version};
use ploop_formats::units::{ClusterSize, HostCluster};
use std::path::Path;

const CLUSTER: u64 = 32 << 10;

/// One thing that may be wrong with an image.
const FAULTS: [&str; 5] = ["healthy", "unclean", "shared", "past-end", "ragged"];

fn main() -> std::io::Result<()> {
    let folder = std::env::args().nth(1).expect("usage: seeds FOLDER");
    std::fs::create_dir_all(&folder)?;
    for version in [Version::V1, Version::V2] {
        for fault in FAULTS {
            let name = format!("{version:?}-{fault}").to_lowercase();
            std::fs::write(Path::new(&folder).join(name), image(version, fault))?;
        }
    }
    Ok(())
}

/// Two clusters of data behind the first and the last of eight entries.
fn image(version: Version, fault: &str) -> Vec<u8> {
    let cluster = ClusterSize::new(CLUSTER).expect("a legal cluster");
    let mut header = Header::new(version, 8 * CLUSTER, cluster).expect("a legal size");
    header.flags = 0;
    if fault == "unclean" {
        header.in_use = IN_USE;
    }
    let first = header.data_start;
    let last = match fault {
        "shared" => first,
        "past-end" => first + 9,
        _ => first + 1,
    };
    let mut bytes = header.encode().to_vec();
    bytes.resize((u64::from(first + 2) * CLUSTER) as usize, 0x6B);
    bytes[HEADER_LEN as usize..(u64::from(first) * CLUSTER) as usize].fill(0);
    for (n, at) in [(0, first), (7, last)] {
        let entry = header.cluster_to_entry(HostCluster(at)).expect("a small number");
        let place = header.entry_at(n) as usize;
        bytes[place..place + 4].copy_from_slice(&entry.to_le_bytes());
    }
    if fault == "ragged" {
        bytes.truncate(bytes.len() - 1000);
    }
    bytes
}
