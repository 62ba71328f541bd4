//! Raw: the identity layer. Guest offset is file offset; only ever the lowest layer.
//!
//! A file may end within a sector. As a disk it then ends before that sector; as a backing file, after
//! it, and what the file lacks reads as zeros.

use crate::layer::{Below, Extent, Geometry, Layer, Never};
use crate::ledger::Ledger;
use crate::store::Store;
use crate::units::{ClusterSize, SECTOR, VirtCluster, floor_to};
use crate::{Error, Kind, Result, limits};
use bytes::BytesMut;
use std::cmp::Ordering;

/// A raw image. Its cluster size comes from outside and only says how requests are cut.
#[derive(Debug)]
pub struct Raw<S> {
    store: S,
    geometry: Geometry,
    /// What is behind it in a backing file, less than a sector, is not in the file.
    end: Option<u64>,
    /// Nothing is ever pending here; it remembers a failed flush. None: read-only.
    ledger: Option<Ledger>,
}

impl<S: Store> Raw<S> {
    /// A raw image for reading: the whole store but for a partial last sector.
    pub fn open_read(store: S, cluster: ClusterSize) -> Result<Self> {
        Self::open(store, cluster, None)
    }

    /// A raw image below others of any size, for reading: the whole store, and zeros up to the end of
    /// its last sector. It may be empty.
    pub fn open_backing(store: S, cluster: ClusterSize) -> Self {
        let len = store.info().len.min(limits::SIZE_MAX);
        // SIZE_MAX is one below a multiple of the sector.
        let size = len.next_multiple_of(SECTOR);
        Self {
            store,
            geometry: Geometry { size, cluster },
            end: Some(len),
            ledger: None,
        }
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
            end: None,
            ledger,
        })
    }

    /// Whether a failed flush forbids further success.
    pub fn is_poisoned(&self) -> bool {
        self.ledger.as_ref().is_some_and(Ledger::is_poisoned)
    }

    /// `size` rounded up to a cluster; `Invalid` when the image is larger, or no file can be so large.
    pub fn grown(&self, size: u64) -> Result<u64> {
        let Geometry { size: old, cluster } = self.geometry;
        let new = cluster.count(size).saturating_mul(cluster.bytes());
        if new < old {
            return Err(Error::invalid(format!(
                "{size} bytes are less than the {old} that it has"
            )));
        }
        if new > limits::SIZE_MAX {
            return Err(Error::invalid(format!(
                "{size} bytes are more than a file can have"
            )));
        }
        Ok(new)
    }

    /// Grows the image to [`Raw::grown`] bytes; nothing is in flight on it. What is new reads as
    /// zeros, and takes its space as it is written to. A cut leaves the old length or the new one.
    /// After an error but that of [`Raw::grown`] it is opened anew.
    pub async fn grow(&mut self, size: u64) -> Result<()> {
        let new = self.grown(size)?;
        if new == self.geometry.size {
            return Ok(());
        }
        self.store.lengthen(new).await?;
        self.flush().await?;
        self.geometry.size = new;
        Ok(())
    }

    /// `size` rounded up to a cluster; what it has when it ends in that cluster already. `Invalid` when
    /// the image is smaller, and for nothing.
    pub fn shrunk(&self, size: u64) -> Result<u64> {
        let Geometry { size: old, cluster } = self.geometry;
        let (wanted, has) = (cluster.count(size), cluster.count(old));
        match wanted.cmp(&has) {
            _ if size == 0 => Err(Error::invalid("a disk of 0 bytes")),
            Ordering::Less => Ok(wanted.saturating_mul(cluster.bytes())),
            Ordering::Equal => Ok(old),
            Ordering::Greater => Err(Error::invalid(format!(
                "{size} bytes are more than the {old} that it has"
            ))),
        }
    }

    /// Shrinks the image to [`Raw::shrunk`] bytes; nothing is in flight on it. A cut leaves the old
    /// length or the new one. After an error but that of [`Raw::shrunk`] it is opened anew.
    pub async fn shrink(&mut self, size: u64) -> Result<()> {
        let new = self.shrunk(size)?;
        if new == self.geometry.size {
            return Ok(());
        }
        self.store.set_len(new).await?;
        self.flush().await?;
        self.geometry.size = new;
        Ok(())
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
        let there = self.end.map(|end| end.saturating_sub(guest));
        Ok(match there {
            Some(0) => Extent::Zero { len },
            there => Extent::Data {
                at: guest,
                len: len.min(there.unwrap_or(len)),
            },
        })
    }

    async fn unpack(&self, guest: u64, _buf: BytesMut) -> Result<BytesMut> {
        Err(Error::invalid(format!(
            "guest offset {guest:#x}: a raw image compresses nothing"
        )))
    }

    fn is_durable(&self, _cluster: VirtCluster) -> bool {
        true
    }

    async fn reserve(&self, _cluster: VirtCluster) -> Result<Never> {
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
