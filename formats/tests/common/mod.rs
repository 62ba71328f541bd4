//! Images made field by field, and what a guest would read from them, by other code than the
//! crate's.
#![allow(dead_code, reason = "each test file uses its part")]

use ploop_formats::ploop::Version;
use ploop_formats::ploop::extension::{Bits, DirtyBitmap, Extension, Feature, NECESSARY};
use ploop_formats::ploop::header::{CLOSED_V21, Header};
use ploop_formats::store::pages::Pages;
use ploop_formats::testkit::rng::{Rng, mix};
use ploop_formats::units::ClusterSize;
use uuid::Uuid;

/// Cluster of all these images.
pub const CLUSTER: u64 = 32 << 10;
/// Offset of BAT slot 0.
pub const SLOT: u64 = 64;
/// Slots in the first cluster.
const SLOTS: usize = ((CLUSTER - SLOT) / 4) as usize;

/// An image to be.
#[derive(Debug, Clone)]
pub struct Made {
    pub header: Header,
    /// All slots of the first header cluster.
    pub table: Vec<u32>,
    /// Data clusters in the file, behind the header's.
    data: u32,
    /// Bytes behind the last whole cluster.
    pub ragged: u64,
    /// File clusters that are holes.
    pub punched: Vec<u32>,
    /// Clusters with other content than a pattern.
    special: Vec<(u32, Vec<u8>)>,
    pub zero_data_offset: bool,
    /// Length of the file, where it ends inside its table.
    pub cut: Option<u64>,
}

impl Made {
    /// 16 guest clusters, of which 0 to 3 are in file clusters 1 to 4.
    pub fn healthy(version: Version) -> Self {
        let cluster = ClusterSize::new(CLUSTER).unwrap();
        let mut header = Header::new(version, 16 * CLUSTER, cluster).unwrap();
        header.flags = 0;
        let mut made = Self {
            header,
            table: vec![0; SLOTS],
            data: 4,
            ragged: 0,
            punched: Vec::new(),
            special: Vec::new(),
            zero_data_offset: false,
            cut: None,
        };
        for n in 0..4 {
            made.set_cluster(n, n as u32 + 1);
        }
        made
    }

    /// Whole clusters in the file.
    pub fn clusters(&self) -> u32 {
        self.header.data_start + self.data
    }

    /// The entry that names a file cluster.
    pub fn raw(&self, cluster: u32) -> u32 {
        match self.header.version {
            Version::V1 => cluster * (CLUSTER / 512) as u32,
            Version::V2 => cluster,
        }
    }

    pub fn set_cluster(&mut self, slot: usize, cluster: u32) {
        self.table[slot] = self.raw(cluster);
    }

    /// Appends clusters that nothing names.
    pub fn grow(&mut self, clusters: u32) {
        self.data += clusters;
    }

    pub fn shrink(&mut self, clusters: u32) {
        self.data -= clusters;
    }

    /// Moves the first data cluster, and all data with it.
    pub fn start(&mut self, cluster: u32) {
        let by = cluster - self.header.data_start;
        let by = self.raw(by);
        self.header.data_start = cluster;
        self.table
            .iter_mut()
            .filter(|raw| **raw != 0)
            .for_each(|raw| *raw += by);
    }

    /// Appends a bitmap cluster and an extension cluster.
    pub fn add_extension(&mut self) {
        let bits = self.clusters();
        let bitmap = DirtyBitmap {
            sectors: self.header.sectors,
            id: Uuid::from_u128(1),
            granularity: 128,
            l1: vec![Bits::At(bits)],
        };
        let feature = bitmap.feature(self.header.cluster).unwrap();
        self.special.push((bits, vec![0x5A; CLUSTER as usize]));
        self.push_extension(bits + 1, feature);
        self.data += 2;
    }

    pub fn add_necessary_feature(&mut self) {
        let at = self.clusters();
        self.push_extension(
            at,
            Feature {
                magic: 77,
                flags: NECESSARY,
                data: vec![0; 8],
            },
        );
        self.data += 1;
    }

    fn push_extension(&mut self, at: u32, feature: Feature) {
        let extension = Extension {
            features: vec![feature],
        };
        self.special
            .push((at, extension.build(self.header.cluster).unwrap()));
        self.header.extension = u64::from(at) * CLUSTER / 512;
        self.header.in_use = CLOSED_V21;
    }

    pub fn spoil_extension(&mut self) {
        self.special.last_mut().unwrap().1[2000] ^= 1;
    }

    /// The file.
    pub fn pages(&self) -> Pages {
        let whole = u64::from(self.clusters()) * CLUSTER;
        let mut pages = Pages::new(whole + self.ragged);
        let mut head = self.header.encode();
        if self.zero_data_offset {
            head[0x30..0x34].fill(0);
        }
        pages.write(0, &head);
        let table: Vec<u8> = self
            .table
            .iter()
            .flat_map(|raw| raw.to_le_bytes())
            .collect();
        pages.write(SLOT, &table);
        for cluster in self.header.data_start..=self.clusters() {
            let at = u64::from(cluster) * CLUSTER;
            let len = (whole + self.ragged - at).min(CLUSTER);
            pages.write(at, &pattern(at, len));
        }
        for (cluster, bytes) in &self.special {
            pages.write(u64::from(*cluster) * CLUSTER, bytes);
        }
        for cluster in &self.punched {
            pages.zero(u64::from(*cluster) * CLUSTER, CLUSTER);
        }
        if let Some(len) = self.cut {
            pages.set_len(len);
        }
        pages
    }

    /// An image with several rules broken, chosen by dice.
    pub fn damaged(rng: &mut Rng) -> Self {
        let version = *rng.pick(&[Version::V1, Version::V2]);
        let mut made = Self::healthy(version);
        made.table.fill(0);
        made.data = rng.range(0, 12) as u32;
        if rng.one_in(4) {
            made.start(2);
        }
        if rng.one_in(3) {
            made.ragged = rng.range(1, CLUSTER / 512 - 1) * 512 + rng.below(2) * 77;
        }
        let mut free: Vec<u32> = (made.header.data_start..made.clusters()).collect();
        for slot in 0..16 {
            made.table[slot] = made.some_entry(rng, &mut free);
        }
        if rng.one_in(4) {
            let slot = rng.range(16, SLOTS as u64 - 1) as usize;
            made.table[slot] = rng.range(1, 40) as u32;
        }
        if rng.one_in(4) {
            made.header.entries -= rng.range(1, 4) as u32;
        }
        if rng.one_in(4) {
            made.header.sectors -= rng.range(1, CLUSTER / 512 + 9);
        }
        made.damage_header(rng);
        made
    }

    fn damage_header(&mut self, rng: &mut Rng) {
        if self.ragged == 0 && rng.one_in(3) {
            self.add_extension();
            if rng.one_in(3) {
                self.spoil_extension();
            }
        }
        match rng.below(6) {
            0 | 1 => self.header.in_use = ploop_formats::ploop::header::IN_USE,
            2 => self.header.in_use = 0x55AA,
            3 => self.header.extension = rng.below(2000),
            _ => {}
        }
        self.header.flags = rng.below(2) as u32;
        self.cut = rng.one_in(12).then(|| 4096 + rng.below(CLUSTER - 4096));
        for cluster in self.header.data_start..self.clusters() {
            if rng.one_in(6) && self.special.is_empty() {
                self.punched.push(cluster);
            }
        }
    }

    fn some_entry(&self, rng: &mut Rng, free: &mut Vec<u32>) -> u32 {
        let any = self.header.data_start
            + rng.below(u64::from(self.clusters() - self.header.data_start) + 1) as u32;
        match rng.below(16) {
            0..=3 => 0,
            4..=9 if !free.is_empty() => {
                self.raw(free.swap_remove(rng.below(free.len() as u64) as usize))
            }
            10 => self.raw(any),
            11 => self.raw(self.clusters() + rng.below(20) as u32),
            12 => *rng.pick(&[1, u32::MAX, 0x4000_0001]),
            13 => self.raw(self.header.data_start - 1),
            14 => self.raw(any) + rng.below(5) as u32,
            _ => 0,
        }
    }
}

/// Bytes that say where in which file they are.
fn pattern(at: u64, len: u64) -> Vec<u8> {
    let words = (at / 8..)
        .map(|n| mix(n) | 1)
        .take(len.div_ceil(8) as usize);
    let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    bytes.truncate(len as usize);
    bytes
}

/// What a guest reads from each cluster: the bytes that the file has of it; nothing where no entry
/// leads to any.
pub fn view(pages: &Pages) -> Result<Vec<Option<Vec<u8>>>, String> {
    let mut head = vec![0; 64];
    pages.read(0, &mut head);
    let header = Header::parse(&head).map_err(|e| e.to_string())?;
    let count = header.sectors.div_ceil(CLUSTER / 512);
    let start = u64::from(header.data_start) * CLUSTER;
    Ok((0..count)
        .map(|slot| {
            let at = SLOT + 4 * slot;
            if slot >= u64::from(header.entries) || at + 4 > pages.len() {
                return None;
            }
            let mut raw = [0; 4];
            pages.read(at, &mut raw);
            let raw = u32::from_le_bytes(raw);
            let unit = if header.version == Version::V1 {
                512
            } else {
                CLUSTER
            };
            let from = u64::from(raw) * unit;
            if raw == 0 || raw == u32::MAX || from < start || from >= pages.len() {
                return None;
            }
            let mut bytes = vec![0; (pages.len() - from).min(CLUSTER) as usize];
            pages.read(from, &mut bytes);
            Some(bytes)
        })
        .collect())
}
