//! Ploop images with something wrong in them, each made from a healthy one.

use super::abuse::{Case, Node};
use ploop_formats::ploop::Version;
use ploop_formats::ploop::extension::{Bits, DirtyBitmap, Extension, Feature, NECESSARY, TRANSIT};
use ploop_formats::ploop::header::{CLOSED_V21, Header, IN_USE};
use ploop_formats::testkit::image::Delta;
use ploop_formats::testkit::rng::Rng;
use ploop_formats::units::ClusterSize;
use uuid::Uuid;

const CLUSTER: u64 = 32 << 10;
const SECTORS: usize = 64;
/// Guest clusters of an image.
const GUEST: usize = 12;
const TABLE: usize = 64;
const VERSIONS: [Version; 2] = [Version::V1, Version::V2];
const NAME: &str = "image.hds";

/// Header fields: a name, an offset, a width in bytes.
const FIELDS: [(&str, usize, usize); 12] = [
    ("signature", 0x00, 8),
    ("type", 0x10, 4),
    ("heads", 0x14, 4),
    ("cylinders", 0x18, 4),
    ("cluster", 0x1C, 4),
    ("entries", 0x20, 4),
    ("sectors", 0x24, 8),
    ("sectors, low", 0x24, 4),
    ("in use", 0x2C, 4),
    ("first data", 0x30, 4),
    ("flags", 0x34, 4),
    ("extension", 0x38, 8),
];

/// Every hostile image.
pub fn cases() -> impl Iterator<Item = Case> + Send {
    let families = [
        fields,
        entries,
        truncations,
        ragged,
        extensions,
        giants,
        noise,
    ];
    let all = VERSIONS
        .into_iter()
        .flat_map(move |version| families.map(|f| (version, f)));
    all.flat_map(|(version, family)| {
        let mut cases = Vec::new();
        family(version, &mut cases);
        cases
    })
}

fn case(version: Version, name: String, bytes: Vec<u8>, len: u64) -> Case {
    Case {
        name: format!("{version:?} {name}"),
        bare: Some(NAME),
        files: vec![(NAME.into(), Node::File(bytes.into(), len))],
    }
}

/// Eight of twelve guest clusters have data.
fn healthy(version: Version) -> Vec<u8> {
    let cluster = |n: usize| {
        (n % 3 != 2).then(|| (0..SECTORS).map(|s| (n * SECTORS + s + 1) as u64).collect())
    };
    let delta = Delta {
        version,
        cluster: CLUSTER,
        clusters: (0..GUEST).map(cluster).collect(),
        leaks: 0,
        in_use: false,
    };
    delta.make(&mut Rng::new(7)).to_vec()
}

fn set(bytes: &mut [u8], at: usize, width: usize, value: u64) {
    bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn fields(version: Version, cases: &mut Vec<Case>) {
    let healthy = healthy(version);
    for (name, at, width) in FIELDS {
        let was = u64::from(word(&healthy, at));
        let all = if width == 4 {
            u64::from(u32::MAX)
        } else {
            u64::MAX
        };
        let extremes = [
            0,
            1,
            2,
            3,
            63,
            64,
            65,
            127,
            512,
            4096,
            1 << 17,
            (1 << 17) + 1,
            1 << 29,
            (1 << 29) + 1,
            1 << 31,
            (1 << 31) - 1,
            all,
            all - 1,
            all / 2,
            all / 512,
            all / 512 + 1,
            was.wrapping_add(1) & all,
            was.wrapping_sub(1) & all,
            was.wrapping_mul(2) & all,
        ];
        for value in extremes {
            let mut bytes = healthy.clone();
            set(&mut bytes, at, width, value);
            cases.push(case(version, format!("{name} = {value:#x}"), bytes, 0));
        }
    }
}

/// An entry that names the start of a file cluster.
fn entry(version: Version, cluster: u32) -> u32 {
    match version {
        Version::V1 => cluster * SECTORS as u32,
        Version::V2 => cluster,
    }
}

fn entries(version: Version, cases: &mut Vec<Case>) {
    let healthy = healthy(version);
    let end = (healthy.len() as u64 / CLUSTER) as u32;
    let at = |cluster| entry(version, cluster);
    let bad = [
        ("past the end", at(end)),
        ("far past the end", at(end + 1000)),
        ("the largest", u32::MAX),
        ("nearly the largest", u32::MAX - 1),
        ("half the largest", 1 << 31),
        ("in the header", 1),
        ("misaligned", at(2) + 1),
        ("misaligned to the end", at(end) - 1),
        ("a duplicate", at(1)),
        ("a duplicate of the last", at(end - 1)),
    ];
    for slot in [0, 1, 2, 5, 11] {
        for (name, raw) in bad {
            let mut bytes = healthy.clone();
            set(&mut bytes, TABLE + 4 * slot, 4, raw.into());
            let name = format!("entry {slot} is {name}");
            cases.push(case(version, name, bytes, 0));
        }
    }
    for slot in [12, 13, 100, (CLUSTER as usize - TABLE) / 4 - 1] {
        let mut bytes = healthy.clone();
        set(&mut bytes, TABLE + 4 * slot, 4, at(1).into());
        cases.push(case(
            version,
            format!("slot {slot} behind the device"),
            bytes,
            0,
        ));
    }
    let mut rng = Rng::new(11);
    for round in 0..60 {
        let mut bytes = healthy.clone();
        for _ in 0..rng.range(2, 12) {
            let raw = rng.pick(&bad).1;
            set(
                &mut bytes,
                TABLE + 4 * rng.below(14) as usize,
                4,
                raw.into(),
            );
        }
        if rng.one_in(3) {
            set(&mut bytes, 0x2C, 4, IN_USE.into());
        }
        if rng.one_in(3) {
            bytes.truncate(bytes.len() - rng.below(3 * CLUSTER) as usize);
        }
        cases.push(case(version, format!("broken entries, {round}"), bytes, 0));
    }
}

fn truncations(version: Version, cases: &mut Vec<Case>) {
    let healthy = healthy(version);
    let edges = [
        0,
        1,
        16,
        63,
        64,
        65,
        511,
        512,
        4095,
        4096,
        4097,
        CLUSTER as usize,
    ];
    let later = (0..24).map(|n| CLUSTER as usize + n * 9973);
    for len in edges.into_iter().chain(later) {
        let mut bytes = healthy.clone();
        bytes.truncate(len);
        cases.push(case(version, format!("cut to {len} bytes"), bytes, 0));
    }
}

fn ragged(version: Version, cases: &mut Vec<Case>) {
    for more in [
        1u64,
        511,
        512,
        4095,
        4096,
        4097,
        CLUSTER - 1,
        CLUSTER + 1,
        5 * CLUSTER,
    ] {
        for in_use in [0, IN_USE, CLOSED_V21, 77] {
            let mut bytes = healthy(version);
            set(&mut bytes, 0x2C, 4, in_use.into());
            let len = bytes.len() as u64 + more;
            if more % 2 == 1 {
                bytes.resize(len as usize, 0xEE);
            }
            let name = format!("{more} bytes behind the end, mark {in_use:#x}");
            cases.push(case(version, name, bytes, len));
        }
    }
}

/// A healthy image with bitmap and extension clusters behind its data, and where the latter is.
fn extended(version: Version, features: Vec<Feature>) -> (Vec<u8>, usize) {
    let mut bytes = healthy(version);
    bytes.resize(bytes.len() + CLUSTER as usize, 0x5A);
    let at = bytes.len();
    let size = ClusterSize::new(CLUSTER).unwrap();
    bytes.extend(Extension { features }.build(size).unwrap());
    set(&mut bytes, 0x38, 8, at as u64 / 512);
    set(&mut bytes, 0x2C, 4, CLOSED_V21.into());
    (bytes, at)
}

/// The feature of a bitmap whose bits are in the cluster before the extension's.
fn bitmap(version: Version) -> Feature {
    let bits = healthy(version).len() as u64 / CLUSTER;
    let bitmap = DirtyBitmap {
        sectors: (GUEST * SECTORS) as u64,
        id: Uuid::from_u128(1),
        granularity: 8,
        l1: vec![Bits::At(bits as u32)],
    };
    bitmap.feature(ClusterSize::new(CLUSTER).unwrap()).unwrap()
}

fn feature(magic: u64, flags: u64, len: usize) -> Feature {
    Feature {
        magic,
        flags,
        data: vec![9; len],
    }
}

fn extensions(version: Version, cases: &mut Vec<Case>) {
    let mut push = |name: &str, bytes: Vec<u8>| {
        cases.push(case(version, format!("extension: {name}"), bytes, 0));
    };
    let lists = [
        ("none", vec![]),
        ("a bitmap", vec![bitmap(version)]),
        ("a bitmap twice", vec![bitmap(version), bitmap(version)]),
        ("necessary", vec![feature(77, NECESSARY, 8)]),
        ("transit", vec![feature(77, TRANSIT, 8)]),
        ("both", vec![feature(77, TRANSIT | NECESSARY, 0)]),
        ("all flags", vec![feature(77, u64::MAX, 100)]),
        (
            "as much as fits",
            vec![feature(77, TRANSIT, CLUSTER as usize - 72)],
        ),
        (
            "as many as fit",
            vec![feature(77, TRANSIT, 0); CLUSTER as usize / 24 - 2],
        ),
    ];
    for (name, features) in lists {
        push(name, extended(version, features).0);
    }
    // Fields of the bitmap's feature, with the digest made right again.
    let fields = [0usize, 8, 16, 20, 24, 32, 48, 52, 56];
    let values = [
        0,
        1,
        2,
        3,
        7,
        1 << 20,
        1 << 31,
        u64::from(u32::MAX),
        u64::MAX - 1,
        u64::MAX,
    ];
    for field in fields {
        for value in values {
            let (mut bytes, at) = extended(version, vec![bitmap(version)]);
            let width = if matches!(field, 16 | 20 | 48 | 52) {
                4
            } else {
                8
            };
            set(&mut bytes, at + 24 + field, width, value);
            digest(&mut bytes, at);
            push(&format!("field {field} = {value:#x}"), bytes);
        }
    }
    for pointer in [
        1,
        63,
        64,
        65,
        128,
        1 << 20,
        1 << 54,
        (1 << 55) - 1,
        1 << 55,
        u64::MAX,
    ] {
        let (mut bytes, _) = extended(version, vec![bitmap(version)]);
        set(&mut bytes, 0x38, 8, pointer);
        push(&format!("pointer {pointer:#x}"), bytes);
    }
    let (bytes, at) = extended(version, vec![bitmap(version), feature(77, TRANSIT, 40)]);
    for (name, byte) in [
        ("magic", 0),
        ("digest", 8),
        ("content", 2000),
        ("the end", CLUSTER - 1),
    ] {
        let mut bytes = bytes.clone();
        bytes[at + byte as usize] ^= 1;
        push(&format!("{name} spoiled"), bytes);
    }
    for (name, file_cluster) in [
        ("extension", at as u64 / CLUSTER),
        ("bitmap", at as u64 / CLUSTER - 1),
    ] {
        let mut shared = bytes.clone();
        set(
            &mut shared,
            TABLE + 8,
            4,
            entry(version, file_cluster as u32).into(),
        );
        push(&format!("an entry names the {name} cluster"), shared);
    }
    for cut in [1, 512, 20_000, CLUSTER as usize, 2 * CLUSTER as usize] {
        let mut bytes = bytes.clone();
        bytes.truncate(bytes.len() - cut);
        push(&format!("cut by {cut}"), bytes);
    }
}

/// Writes the digest that the extension cluster at `at` should have.
fn digest(bytes: &mut [u8], at: usize) {
    use md5::{Digest, Md5};
    let end = at + CLUSTER as usize;
    let sum: [u8; 16] = Md5::digest(&bytes[at + 24..end]).into();
    bytes[at + 8..at + 24].copy_from_slice(&sum);
}

/// Small files that claim much, or are long and nearly all hole.
fn giants(version: Version, cases: &mut Vec<Case>) {
    let mut push = |name: &str, header: &Header, table: &[(usize, u32)], len: u64| {
        let mut bytes = header.encode().to_vec();
        bytes.resize(4096, 0);
        for (slot, raw) in table {
            set(&mut bytes, TABLE + 4 * slot, 4, (*raw).into());
        }
        cases.push(case(version, format!("giant: {name}"), bytes, len));
    };
    const GIB: u64 = 1 << 30;
    for cluster in [32 << 10, 1 << 20, 64 << 20] {
        let size = ClusterSize::new(cluster).unwrap();
        let most = match version {
            Version::V1 => u64::from(u32::MAX) * 512,
            Version::V2 => (1 << 31) * cluster,
        };
        for size_of_disk in [GIB, 1 << 40, most] {
            let Ok(mut header) = Header::new(version, size_of_disk, size) else {
                continue;
            };
            header.flags = 0;
            let table = size.start(header.data_start);
            let used = [(0, entry_of(version, size, header.data_start))];
            for in_use in [0, IN_USE] {
                header.in_use = in_use;
                let name = format!("{size_of_disk} bytes of {cluster}, mark {in_use:#x}");
                push(&format!("{name}, table only"), &header, &[], table);
                push(&format!("{name}, no table"), &header, &[], 0);
                push(
                    &format!("{name}, one cluster"),
                    &header,
                    &used,
                    table + cluster,
                );
                push(
                    &format!("{name}, 8 TiB long"),
                    &header,
                    &used,
                    table + (8 << 40),
                );
            }
        }
    }
    for entries in [u32::MAX, u32::MAX - 1, 1 << 31, 1 << 29] {
        let size = ClusterSize::new(CLUSTER).unwrap();
        let mut header = Header::new(version, CLUSTER, size).unwrap();
        header.entries = entries;
        header.data_start = ((64 + u64::from(entries) * 4).div_ceil(CLUSTER)) as u32;
        push(
            &format!("{entries} entries"),
            &header,
            &[],
            size.start(header.data_start),
        );
        push(&format!("{entries} entries, no table"), &header, &[], 0);
    }
    let size = ClusterSize::new(64 << 20).unwrap();
    let lists = [
        (
            "many features",
            vec![feature(77, TRANSIT, 0); (1 << 20) / 24 - 2],
        ),
        (
            "one feature too many",
            vec![feature(77, TRANSIT, 0); (1 << 20) / 24 - 1],
        ),
        (
            "features to the end",
            vec![feature(77, TRANSIT, 0); (64 << 20) / 24 - 2],
        ),
        (
            "a vast feature",
            vec![feature(77, TRANSIT, (64 << 20) - 100)],
        ),
    ];
    for (name, features) in lists {
        let mut header = Header::new(version, GIB, size).unwrap();
        header.in_use = CLOSED_V21;
        header.extension = size.bytes() / 512;
        let mut bytes = header.encode().to_vec();
        bytes.resize(size.bytes() as usize, 0);
        bytes.extend(Extension { features }.build(size).unwrap());
        cases.push(case(version, format!("giant: {name}"), bytes, 0));
    }
}

fn entry_of(version: Version, size: ClusterSize, cluster: u32) -> u32 {
    match version {
        Version::V1 => cluster * size.sectors() as u32,
        Version::V2 => cluster,
    }
}

/// Bytes of header and table changed at random, several at a time.
fn noise(version: Version, cases: &mut Vec<Case>) {
    let (plain, rich) = (healthy(version), extended(version, vec![bitmap(version)]).0);
    let mut rng = Rng::new(13);
    for round in 0..100 {
        let mut bytes = if round % 2 == 0 { &plain } else { &rich }.clone();
        for _ in 0..rng.range(1, 6) {
            // The signature mostly stays, or nothing behind it would be looked at.
            let from = if rng.one_in(20) { 0 } else { 16 };
            let at = rng.range(from, TABLE as u64 + 4 * GUEST as u64) as usize;
            bytes[at] = match rng.below(3) {
                0 => bytes[at] ^ 1 << rng.below(8),
                1 => 0xFF,
                _ => rng.next() as u8,
            };
        }
        cases.push(case(version, format!("noise, {round}"), bytes, 0));
    }
}
