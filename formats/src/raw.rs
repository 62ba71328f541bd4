//! Raw: the identity layer. Guest offset is file offset; only ever the lowest layer.

use crate::layer::{Below, Extent, Geometry, Layer, Reservation};
use crate::ledger::Ledger;
use crate::store::Store;
use crate::units::{ClusterSize, SECTOR, VirtCluster, floor_to};
use crate::{Error, Kind, Result};

/// A raw image. Its cluster size comes from outside and only says how requests are cut.
#[derive(Debug)]
pub struct Raw<S> {
    store: S,
    geometry: Geometry,
    /// Nothing is ever pending here; it remembers a failed flush. None: read-only.
    ledger: Option<Ledger>,
}

/// Nothing is ever reserved in a raw image.
#[derive(Debug)]
pub enum Never {}

impl Reservation for Never {
    fn host(&self) -> u64 {
        match *self {}
    }
    fn submitted(&mut self) {
        match *self {}
    }
}

impl<S: Store> Raw<S> {
    /// A raw image for reading: the whole store but for a partial last sector.
    pub fn open_read(store: S, cluster: ClusterSize) -> Result<Self> {
        Self::open(store, cluster, None)
    }

    /// A raw image for writing. The ledger keeps a failed flush across workers.
    pub fn open_write(store: S, cluster: ClusterSize, ledger: Ledger) -> Result<Self> {
        Self::open(store, cluster, Some(ledger))
    }

    fn open(store: S, cluster: ClusterSize, ledger: Option<Ledger>) -> Result<Self> {
        let size = floor_to(store.info().len, SECTOR);
        if size == 0 {
            return Err(Error::damaged("a raw image of less than one sector"));
        }
        Ok(Self {
            store,
            geometry: Geometry { size, cluster },
            ledger,
        })
    }

    /// Whether a failed flush forbids further success.
    pub fn is_poisoned(&self) -> bool {
        self.ledger.as_ref().is_some_and(Ledger::is_poisoned)
    }

    async fn flush(&self) -> Result<()> {
        let Some(ledger) = &self.ledger else {
            return Err(Error::new(
                Kind::ReadOnly,
                "this raw image is open read-only",
            ));
        };
        if ledger.is_poisoned() {
            return Err(Error::poisoned());
        }
        self.store
            .flush()
            .await
            .map_err(Error::into_final)
            .inspect_err(|_| ledger.poison())
    }
}

impl<S: Store> Layer for Raw<S> {
    type Store = S;
    type Reservation = Never;

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn store(&self) -> &S {
        &self.store
    }

    async fn map(&self, guest: u64, len: u64) -> Result<Extent> {
        Ok(Extent::Data { at: guest, len })
    }

    fn is_durable(&self, _cluster: VirtCluster) -> bool {
        true
    }

    async fn reserve(&self) -> Result<Never> {
        Err(Error::invalid("a raw image has every cluster"))
    }

    fn publish(&self, _cluster: VirtCluster, reserved: Never, _below: Below) {
        match reserved {}
    }

    async fn release(&self, _cluster: VirtCluster) -> Result<()> {
        Err(Error::invalid("a raw image keeps every cluster"))
    }

    async fn sync(&self) -> Result<()> {
        self.flush().await
    }

    async fn close(&self) -> Result<()> {
        self.flush().await
    }
}
