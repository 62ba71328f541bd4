//! Ploop images made and judged byte by byte, by other code than the engine's.
//!
//! Free clusters of a made image are poison, so that a reader of free space is found out.

use super::rng::Rng;
use super::stamp::{self, Value};
use crate::ploop::{Header, Version};
use crate::store::pages::Pages;
use crate::store::sim::POISON;
use crate::units::{ClusterSize, SECTOR};
use std::collections::HashSet;

/// What to make.
#[derive(Debug, Clone)]
pub struct Delta {
    /// Format version.
    pub version: Version,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// For each guest cluster the values of its sectors, or nothing.
    pub clusters: Vec<Option<Vec<Value>>>,
    /// Clusters that no entry names, full of poison.
    pub leaks: u32,
    /// Whether its last user crashed.
    pub in_use: bool,
}

impl Delta {
    /// The file, its clusters in an order that dice choose.
    pub fn make(&self, rng: &mut Rng) -> Pages {
        let cluster = ClusterSize::new(self.cluster).expect("a legal cluster size");
        let size = self.cluster * self.clusters.len() as u64;
        let mut header = Header::new(self.version, size, cluster).expect("a legal size");
        header.flags = 0;
        header.in_use = if self.in_use {
            crate::ploop::header::IN_USE
        } else {
            0
        };
        let used = self.clusters.iter().flatten().count() as u32;
        let mut places: Vec<u32> =
            (header.data_start..header.data_start + used + self.leaks).collect();
        for i in (1..places.len()).rev() {
            places.swap(i, rng.below(i as u64 + 1) as usize);
        }
        let mut pages = Pages::new(cluster.start(header.data_start + used + self.leaks));
        pages.write(0, &header.encode());
        for (guest, values) in self.clusters.iter().enumerate() {
            let Some(values) = values else { continue };
            let place = places.pop().expect("a place for every cluster");
            let unit = if self.version == Version::V1 {
                cluster.sectors() as u32
            } else {
                1
            };
            pages.write(header.entry_at(guest as u32), &(place * unit).to_le_bytes());
            let first = guest as u64 * cluster.sectors();
            let mut bytes = vec![0; self.cluster as usize];
            for (i, sector) in bytes.chunks_exact_mut(SECTOR as usize).enumerate() {
                stamp::fill(sector, first + i as u64, values[i]);
            }
            pages.write(cluster.start(place), &bytes);
        }
        for place in places {
            pages.fill(cluster.start(place), self.cluster, POISON);
        }
        pages
    }
}

/// What a healthy image says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Audit {
    /// Clusters that no entry names.
    pub leaks: u64,
    /// Whether the in-use mark is set.
    pub in_use: bool,
}

/// Judges an image: the header parses, and no entry is misaligned, past the end, in the table or
/// named twice.
pub fn audit(pages: &Pages) -> Result<Audit, String> {
    let mut head = vec![0; 64];
    pages.read(0, &mut head);
    let header = Header::parse(&head).map_err(|e| e.to_string())?;
    let cluster = header.cluster;
    let mut table = vec![0; header.entries as usize * 4];
    pages.read(64, &mut table);
    let unit = if header.version == Version::V1 {
        cluster.sectors() as u32
    } else {
        1
    };
    let end = pages.len().div_ceil(cluster.bytes());
    let mut seen = HashSet::new();
    for (n, raw) in table.chunks_exact(4).enumerate() {
        let raw = u32::from_le_bytes(raw.try_into().expect("4 bytes"));
        let place = raw / unit;
        if raw == 0 {
            continue;
        }
        if raw % unit != 0
            || place < header.data_start
            || u64::from(place) >= end
            || !seen.insert(place)
        {
            return Err(format!(
                "BAT entry {n} is {raw}: {} clusters, data from {}",
                end, header.data_start
            ));
        }
    }
    let leaks = end.saturating_sub(u64::from(header.data_start) + seen.len() as u64);
    Ok(Audit {
        leaks,
        in_use: header.in_use == crate::ploop::header::IN_USE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta() -> Delta {
        let clusters = vec![Some(vec![5; 64]), None, Some(vec![6; 64])];
        Delta {
            version: Version::V1,
            cluster: 32 << 10,
            clusters,
            leaks: 2,
            in_use: false,
        }
    }

    #[test]
    fn a_made_image_is_healthy_and_its_leaks_are_counted() {
        let pages = delta().make(&mut Rng::new(1));
        assert_eq!(
            audit(&pages),
            Ok(Audit {
                leaks: 2,
                in_use: false
            })
        );
    }

    #[test]
    fn a_cluster_that_is_named_twice_or_past_the_end_is_found() {
        let mut pages = delta().make(&mut Rng::new(1));
        let mut first = [0; 4];
        pages.read(64, &mut first);
        pages.write(68, &first);
        assert!(audit(&pages).is_err());
        pages.write(68, &(64 * 6u32).to_le_bytes());
        assert!(audit(&pages).is_err());
        pages.write(68, &[0; 4]);
        assert!(audit(&pages).is_ok());
    }
}
