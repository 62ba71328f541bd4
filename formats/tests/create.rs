//! New images: byte for byte what ploop 1.12.2 writes, and usable only once complete.
//! The golden values are those of ploop reference 1.6, measured by running ploop.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use ploop_formats::Kind;
use ploop_formats::ploop::create::{blank, blank_len, create, create_preallocated};
use ploop_formats::ploop::header::{FLAG_EMPTY, IN_USE};
use ploop_formats::ploop::{Header, Version};
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;
use ploop_formats::units::ClusterSize;
use ploop_formats::update::Step;

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const G: u64 = 1 << 30;
const T: u64 = 1 << 40;

fn header(version: Version, size: u64, cluster_sectors: u64) -> Header {
    Header::new(
        version,
        size,
        ClusterSize::new(cluster_sectors * 512).unwrap(),
    )
    .unwrap()
}

fn head(store: &MemStore) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    store.pages().read(0, &mut bytes);
    bytes
}

fn entries(store: &MemStore, count: usize) -> Vec<u32> {
    let mut bytes = vec![0; 4 * count];
    store.pages().read(64, &mut bytes);
    bytes
        .chunks(4)
        .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// heads, cylinders, m_Sectors, m_Size, low and high size, in-use, FBO, flags: from offset 0x14.
fn fields(bytes: &[u8]) -> Vec<u32> {
    bytes[0x14..0x38]
        .chunks(4)
        .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// Size, cluster; heads, cylinders, m_Size, sectors, FBO; bytes of the file.
type Golden = (u64, u64, u32, u32, u32, u64, u32, u64);

#[test]
fn new_images_equal_the_golden_headers_and_lengths() {
    let table: [Golden; 10] = [
        (64 * M, 2048, 16, 256, 64, 131_072, 2048, 1_048_576),
        (G, 2048, 16, 2080, 1024, 2_097_152, 2048, 1_048_576),
        (100_001 * K, 2048, 16, 392, 98, 200_704, 2048, 1_048_576),
        (
            10 * G,
            2048,
            16,
            40_960,
            10_240,
            20_971_520,
            2048,
            1_048_576,
        ),
        (
            100 * G,
            2048,
            16,
            409_600,
            102_400,
            209_715_200,
            2048,
            1_048_576,
        ),
        (
            300 * G,
            2048,
            16,
            1_228_800,
            307_200,
            629_145_600,
            4096,
            2_097_152,
        ),
        (
            T,
            2048,
            16,
            4_194_304,
            1_048_576,
            2_147_483_648,
            10_240,
            5_242_880,
        ),
        (
            4 * T,
            2048,
            16,
            16_777_216,
            4_194_304,
            8_589_934_592,
            34_816,
            17_825_792,
        ),
        (64 * M, 64, 16, 256, 2048, 131_072, 64, 32_768),
        (64 * M, 131_072, 16, 256, 1, 131_072, 131_072, 67_108_864),
    ];
    for version in [Version::V1, Version::V2] {
        for (size, cluster, heads, cylinders, count, sectors, first, file) in table {
            if version == Version::V1 && size > 2 * T {
                continue;
            }
            let store = MemStore::new(0);
            now(create(&store, &header(version, size, cluster))).unwrap();
            let bytes = head(&store);
            let magic: &[u8] = match version {
                Version::V1 => b"WithoutFreeSpace\x02\0\0\0",
                Version::V2 => b"WithouFreSpacExt\x02\0\0\0",
            };
            assert_eq!(&bytes[..0x14], magic);
            let (low, high) = (sectors as u32, (sectors >> 32) as u32);
            let expected = [
                heads,
                cylinders,
                cluster as u32,
                count,
                low,
                high,
                0,
                first,
                1,
            ];
            assert_eq!(fields(&bytes), expected, "{size} {version:?}");
            assert_eq!(&bytes[0x38..], [0; 8]);
            assert_eq!(store.info().len, file, "{size} {version:?}");
            assert!(store.to_vec()[64..].iter().all(|b| *b == 0));
        }
    }
}

#[test]
fn the_first_64_bytes_of_a_1_gib_image_are_the_golden_ones() {
    let golden = "57697468 6f754672 65537061 63457874 02000000 10000000 20080000 00080000 \
                  00040000 00002000 00000000 00000000 00080000 01000000 00000000 00000000";
    let encoded = header(Version::V2, G, 2048).encode();
    let hex: String = encoded
        .chunks(4)
        .map(|w| w.iter().map(|b| format!("{b:02x}")).collect::<String>() + " ")
        .collect();
    assert_eq!(hex.trim(), golden);
}

#[test]
fn a_preallocated_image_equals_the_golden_one() {
    for (version, unit) in [(Version::V1, 2048), (Version::V2, 1)] {
        let store = MemStore::new(0);
        now(create_preallocated(&store, &header(version, 64 * M, 2048))).unwrap();
        assert_eq!(store.info().len, 68_157_440);
        assert_eq!(
            fields(&head(&store)),
            [16, 256, 2048, 64, 131_072, 0, 0, 2048, 1]
        );
        let mut expected: Vec<u32> = (1..=64).map(|n| n * unit).collect();
        expected.extend([0; 64]);
        assert_eq!(entries(&store, 128), expected);
    }
}

#[test]
fn a_preallocated_table_of_many_steps_has_every_entry() {
    let header = header(Version::V2, 64 * G, 64);
    let store = MemStore::new(0).aligned_to(4096);
    now(create_preallocated(&store, &header)).unwrap();
    let all = entries(&store, header.entries as usize + 100);
    let (used, rest) = all.split_at(header.entries as usize);
    assert!(
        used.iter()
            .zip(header.data_start..)
            .all(|(entry, n)| *entry == n)
    );
    assert!(rest.iter().all(|entry| *entry == 0));
}

#[test]
fn a_16_tib_image_costs_one_page() {
    let header = header(Version::V2, 16 * T, 128);
    let steps = blank(&header);
    let written: usize = steps
        .steps()
        .iter()
        .map(|step| {
            if let Step::Write { data, .. } = step {
                data.len()
            } else {
                0
            }
        })
        .sum();
    assert_eq!(written, 4096);
    let store = MemStore::new(0).aligned_to(4096);
    now(create(&store, &header)).unwrap();
    assert_eq!(store.info().len, blank_len(&header));
    assert_eq!(blank_len(&header), G + 64 * K);
}

#[test]
fn an_image_ends_with_a_barrier_and_has_its_length_before_its_header() {
    let steps = blank(&header(Version::V2, G, 128));
    let kinds: Vec<_> = steps
        .steps()
        .iter()
        .map(|step| match step {
            Step::Len(_) => "len",
            Step::Write { .. } => "write",
            Step::Barrier => "barrier",
        })
        .collect();
    assert_eq!(kinds, ["len", "write", "barrier"]);
}

#[test]
fn sizes_are_rounded_up_to_a_cluster_and_down_where_the_format_ends() {
    for (size, sectors) in [(512, 2048), (2049 * 512, 4096), (100_001 * K, 200_704)] {
        assert_eq!(header(Version::V2, size, 2048).sectors, sectors);
    }
    let top = header(Version::V1, 2 * T - 512, 2048);
    assert_eq!(top.sectors, 0xFFFF_FFFF / 2048 * 2048);
    let cluster = ClusterSize::new(M).unwrap();
    assert!(Header::new(Version::V1, 3 * T, cluster).is_err());
    assert!(Header::new(Version::V2, 0, cluster).is_err());
    assert!(Header::new(Version::V2, u64::MAX, cluster).is_err());
    for bad in [0, 8, 16, 32, 100, 262_144] {
        assert!(ClusterSize::new(bad * 512).is_err(), "{bad}");
    }
}

#[test]
fn a_preallocated_image_whose_last_cluster_has_no_number_is_refused() {
    let store = MemStore::new(0);
    let full = header(Version::V1, 2 * T - M, 2048);
    assert_eq!(
        now(create_preallocated(&store, &full)).unwrap_err().kind(),
        Kind::Invalid
    );
    assert_eq!(store.info().len, 0);
    now(create(&store, &full)).unwrap();
}

#[test]
fn a_file_with_content_is_never_overwritten() {
    let store = MemStore::from_bytes(b"precious");
    let header = header(Version::V2, G, 128);
    assert_eq!(
        now(create(&store, &header)).unwrap_err().kind(),
        Kind::Exists
    );
    assert_eq!(
        now(create_preallocated(&store, &header))
            .unwrap_err()
            .kind(),
        Kind::Exists
    );
    assert_eq!(store.to_vec(), b"precious");
}

#[test]
fn a_new_header_is_read_back_and_keeps_the_callers_in_use_mark() {
    for version in [Version::V1, Version::V2] {
        let header = Header {
            in_use: IN_USE,
            ..header(version, 10 * G, 128)
        };
        let store = MemStore::new(0);
        now(create(&store, &header)).unwrap();
        let read = Header::parse(&head(&store)).unwrap();
        assert_eq!(read, header);
        assert_eq!(read.flags, FLAG_EMPTY);
    }
}
