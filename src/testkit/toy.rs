//! A toy disk that proves the campaigns: so small that it is plainly right, with bugs on demand.
//!
//! A flat base and one file above it: a sector-sized table of places, then clusters of 4 KiB in the
//! order of their first write. One request at a time. It obeys the planted bugs `IndexBeforeData`,
//! `LedgerAfterAnswer` and `FuaIgnoresIndex`.

use super::subject::{BenchStore, Chain, Setup, Subject, Wish};
use crate::device::{Device, GuestExtent, Zero};
use bytes::{Bytes, BytesMut};
use ploop_formats::ledger::Ledger;
use ploop_formats::planted::{self, Bug};
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::Rules;
use ploop_formats::store::{Reach, Store};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp;
use ploop_formats::units::{SECTOR, VirtCluster};
use ploop_formats::{Error, Kind, Result};
use std::cell::RefCell;
use std::collections::HashSet;

const CLUSTER: u64 = 4096;
const TABLE: u64 = 4096;

/// A toy disk.
#[derive(Debug)]
pub struct Toy {
    base: BenchStore,
    top: BenchStore,
    /// File cluster of every guest cluster; 0 is none.
    places: RefCell<Vec<u32>>,
    ledger: Ledger,
    one: tokio::sync::Mutex<()>,
}

/// The toy as a subject.
#[derive(Debug)]
pub struct ToySubject;

fn table(bytes: &[u8], clusters: usize) -> Vec<u32> {
    let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("4 bytes"));
    bytes.chunks_exact(4).take(clusters).map(word).collect()
}

impl Toy {
    fn place(&self, cluster: u64) -> u64 {
        u64::from(self.places.borrow()[cluster as usize]) * CLUSTER
    }

    async fn write_table(&self) -> Result<()> {
        let mut page = BytesMut::zeroed(TABLE as usize);
        for (to, place) in page.chunks_exact_mut(4).zip(&*self.places.borrow()) {
            to.copy_from_slice(&place.to_le_bytes());
        }
        self.top.write_at(0, page.freeze(), Reach::Cache).await
    }

    async fn read_cluster(&self, cluster: u64) -> Result<BytesMut> {
        let buf = BytesMut::zeroed(CLUSTER as usize);
        match self.place(cluster) {
            0 => self.base.read_at(cluster * CLUSTER, buf).await,
            at => self.top.read_at(at, buf).await,
        }
    }

    async fn write_cluster(&self, cluster: u64, within: u64, data: Bytes) -> Result<()> {
        if self.place(cluster) != 0 {
            return self
                .top
                .write_at(self.place(cluster) + within, data, Reach::Cache)
                .await;
        }
        let end = self.top.info().len;
        self.top.set_len(end + CLUSTER).await?;
        self.top.flush().await?;
        let mut whole = self.read_cluster(cluster).await?;
        whole[within as usize..][..data.len()].copy_from_slice(&data);
        let place = (end / CLUSTER) as u32;
        if planted::is(Bug::IndexBeforeData) {
            self.places.borrow_mut()[cluster as usize] = place;
            self.write_table().await?;
        }
        self.top.write_at(end, whole.freeze(), Reach::Cache).await?;
        self.places.borrow_mut()[cluster as usize] = place;
        if !planted::is(Bug::LedgerAfterAnswer) {
            self.ledger
                .put(cluster as usize, VirtCluster(cluster as u32), place);
        }
        Ok(())
    }

    async fn sync(&self) -> Result<()> {
        if self.ledger.is_poisoned() {
            return Err(Error::poisoned());
        }
        self.top.flush().await?;
        self.write_table().await.inspect_err(|e| {
            if e.kind() != Kind::NoSpace {
                self.ledger.poison();
            }
        })?;
        self.top.flush().await?;
        (0..self.ledger.slots()).for_each(|slot| self.ledger.clear(slot));
        Ok(())
    }
}

impl Device for Toy {
    fn size(&self) -> u64 {
        self.places.borrow().len() as u64 * CLUSTER
    }

    fn read_only(&self) -> bool {
        false
    }

    fn preferred_block(&self) -> u64 {
        CLUSTER
    }

    async fn read(&self, at: u64, buf: BytesMut) -> Result<BytesMut> {
        let _one = self.one.lock().await;
        let end = at + buf.len() as u64;
        let mut all = BytesMut::new();
        for cluster in at / CLUSTER..end.div_ceil(CLUSTER) {
            all.extend_from_slice(&self.read_cluster(cluster).await?);
        }
        let mut wanted = all.split_off((at % CLUSTER) as usize);
        wanted.truncate((end - at) as usize);
        Ok(wanted)
    }

    async fn write(&self, at: u64, mut data: Bytes, fua: bool) -> Result<()> {
        let _one = self.one.lock().await;
        let mut at = at;
        while !data.is_empty() {
            let part = data.split_to(data.len().min((CLUSTER - at % CLUSTER) as usize));
            let len = part.len() as u64;
            self.write_cluster(at / CLUSTER, at % CLUSTER, part).await?;
            at += len;
        }
        match fua {
            true if planted::is(Bug::FuaIgnoresIndex) => self.top.flush().await,
            true => self.sync().await,
            false => Ok(()),
        }
    }

    async fn zero(&self, at: u64, len: u64, how: Zero, fua: bool) -> Result<()> {
        if how == Zero::Fast {
            return Err(Error::unsupported("the toy writes its zeros"));
        }
        self.write(at, Bytes::from(vec![0; len as usize]), fua)
            .await
    }

    async fn discard(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        let _one = self.one.lock().await;
        self.sync().await
    }

    async fn extents(&self, _at: u64, len: u64, _max: usize) -> Result<Vec<GuestExtent>> {
        Ok(vec![GuestExtent {
            len,
            zero: false,
            hole: false,
            depth: 1,
        }])
    }
}

impl Subject for ToySubject {
    type Device = Toy;

    fn setup(rng: &mut Rng, wish: &Wish) -> Setup {
        let sectors = rng.range(2, wish.max_clusters) * (CLUSTER / SECTOR);
        let values: Vec<u64> = (1..=sectors).collect();
        let mut base = Pages::new(sectors * SECTOR);
        for n in 0..sectors {
            base.write(n * SECTOR, &stamp::run(n, 1, n + 1));
        }
        let sealed = Rules {
            sealed: true,
            ..Rules::default()
        };
        let top = Rules {
            metadata_end: TABLE,
            ..Rules::default()
        };
        let cluster = (CLUSTER / SECTOR) as usize;
        let files = vec![(base, sealed), (Pages::new(TABLE), top)];
        Setup {
            files,
            raw_base: true,
            values,
            cluster,
            slots: sectors as usize,
        }
    }

    async fn open(mut chain: Chain) -> Result<Toy> {
        let top = chain.stores.pop().expect("two files");
        let base = chain.stores.pop().expect("two files");
        let page = top.read_at(0, BytesMut::zeroed(TABLE as usize)).await?;
        let mut places = table(&page, (base.info().len / CLUSTER) as usize);
        for (_, cluster, place) in chain.ledger.entries() {
            places[cluster.0 as usize] = place;
        }
        let end = places.iter().max().map_or(1, |p| u64::from(*p) + 1) * CLUSTER;
        if top.info().len < end {
            return Err(Error::damaged(
                "the table names a cluster past the end of the file",
            ));
        }
        top.set_len(end.max(TABLE)).await?;
        top.flush().await?;
        let ledger = chain.ledger;
        Ok(Toy {
            base,
            top,
            places: RefCell::new(places),
            ledger,
            one: tokio::sync::Mutex::default(),
        })
    }

    async fn close(device: &Toy) -> Result<()> {
        device.flush().await
    }

    fn audit(top: &Pages) -> std::result::Result<(), String> {
        let mut page = vec![0; TABLE as usize];
        top.read(0, &mut page);
        let mut seen = HashSet::new();
        let named = table(&page, TABLE as usize / 4)
            .into_iter()
            .filter(|p| *p != 0);
        for place in named {
            if u64::from(place) * CLUSTER >= top.len() || !seen.insert(place) {
                return Err(format!("cluster {place} is past the end or named twice"));
            }
        }
        Ok(())
    }

    fn audit_open(_: &Pages) -> std::result::Result<(), String> {
        Ok(())
    }

    fn audit_closed(top: &Pages) -> std::result::Result<(), String> {
        Self::audit(top)
    }
}
