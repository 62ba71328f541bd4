//! Any bytes as a delta: no panic, no hang, no memory beyond what the file itself can justify.
//!
//! An image that opens for writing must, after a write, a sync and a close, open again and show
//! what was written: recovery may not end in a state that the next open refuses.

use bytes::{Bytes, BytesMut};
use ploop_formats::layer::{Below, Extent, Layer, Reservation};
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::header::{HEADER_LEN, IN_USE};
use ploop_formats::ploop::{Header, Ploop, Version};
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::{Reach, Store};
use ploop_formats::testkit::exec::now;
use ploop_formats::units::{ClusterSize, HostCluster, VirtCluster};

/// How far a table is followed: enough to pass a page of it, few enough to stay quick.
const LOOKS: u64 = 1100;
/// Bytes asked for at once: a transport asks for a bounded range too.
const RANGE: u64 = 256 << 20;

/// One image.
pub fn run(input: &[u8]) {
    let _ = Header::parse(input);
    now(read(MemStore::from_bytes(input)));
    now(write(MemStore::from_bytes(input)));
}

async fn read(store: MemStore) {
    let Ok(image) = Ploop::open_read(store).await else {
        return;
    };
    look(&image).await;
}

/// Follows the table and reads what it points at.
async fn look(image: &Ploop<MemStore>) {
    let shape = image.geometry();
    let mut at = 0;
    for _ in 0..LOOKS {
        if at >= shape.size {
            break;
        }
        let range = RANGE.min(shape.size - at);
        let Ok(extent) = image.map(at, range).await else {
            break;
        };
        assert!(
            !extent.is_empty() && extent.len() <= range,
            "{extent:?} at {at}"
        );
        if let Extent::Data { at: place, len } = extent {
            let buf = BytesMut::zeroed(len.min(4096) as usize);
            let _ = image.store().read_at(place, buf).await;
        }
        at += extent.len();
    }
}

async fn write(store: MemStore) {
    let Ok(image) = Ploop::open_write(store.clone(), Ledger::local()).await else {
        return;
    };
    look(&image).await;
    let written = allocate(&image).await;
    if image.sync().await.is_err() || image.close().await.is_err() {
        return;
    }
    drop(image);
    let again = Ploop::open_write(store, Ledger::local()).await;
    let again = again.expect("what we closed cleanly opens again");
    if let Some(byte) = written {
        let Ok(Extent::Data { at, .. }) = again.map(0, 1).await else {
            panic!("a synced cluster is gone");
        };
        let buf = BytesMut::zeroed(512);
        let found = again
            .store()
            .read_at(at, buf)
            .await
            .expect("mapped data is inside the file");
        assert_eq!(found.first(), Some(&byte), "a synced cluster changed");
    }
}

/// Gives the first cluster data if it has none; says which byte it then starts with.
async fn allocate(image: &Ploop<MemStore>) -> Option<u8> {
    if !matches!(image.map(0, 1).await, Ok(Extent::Absent { .. })) {
        return None;
    }
    let mut reserved = image.reserve(VirtCluster(0)).await.ok()?;
    let data = Bytes::from(vec![0xA7; 512]);
    reserved.submitted();
    image
        .store()
        .write_at(reserved.host(), data, Reach::Cache)
        .await
        .ok()?;
    image.publish(VirtCluster(0), reserved, Below::Data);
    Some(0xA7)
}

const CLUSTER: u64 = 32 << 10;

/// One thing that may be wrong with an image.
const FAULTS: [&str; 5] = ["healthy", "unclean", "shared", "past-end", "ragged"];

/// Small healthy images of both versions, and the same with one thing wrong.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let all = [Version::V1, Version::V2]
        .into_iter()
        .flat_map(|version| FAULTS.map(|fault| (version, fault)));
    all.map(|(version, fault)| {
        let name = format!("{version:?}-{fault}").to_lowercase();
        (name, image(version, fault))
    })
    .collect()
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
        let entry = header
            .cluster_to_entry(HostCluster(at))
            .expect("a small number");
        let place = header.entry_at(n) as usize;
        bytes[place..place + 4].copy_from_slice(&entry.to_le_bytes());
    }
    if fault == "ragged" {
        bytes.truncate(bytes.len() - 1000);
    }
    bytes
}
