//! Layer: one delta image of a stack. It says where guest bytes live and moves none of them.
//!
//! The life of an allocation: [`Layer::reserve`] hands out a guard for a file cluster that reads
//! as zeros; the caller writes its data; [`Layer::publish`] makes the mapping visible, in memory.
//! [`Layer::sync`] makes what was published durable, data first. A dropped guard gives the
//! cluster back, or quarantines it when a write to it was already submitted.

use crate::Result;
use crate::store::Store;
use crate::units::{ClusterSize, VirtCluster};
use bytes::BytesMut;

/// The shape of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// Unit of allocation.
    pub cluster: ClusterSize,
}

/// Where a guest range lives in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// In this layer's file.
    Data {
        /// File offset in bytes.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// In this layer, compressed: [`Layer::unpack`] gives the bytes. The range is within one
    /// cluster.
    Packed {
        /// Length in bytes, of the guest.
        len: u64,
    },
    /// Reads as zeros here, whatever lies below.
    Zero {
        /// Length in bytes.
        len: u64,
    },
    /// This layer says nothing: look below.
    Absent {
        /// Length in bytes.
        len: u64,
    },
}

impl Extent {
    /// Length in bytes.
    pub const fn len(self) -> u64 {
        match self {
            Extent::Data { len, .. }
            | Extent::Packed { len }
            | Extent::Zero { len }
            | Extent::Absent { len } => len,
        }
    }

    /// Whether it covers nothing, which no answer of [`Layer::map`] does.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Where a guest range is written in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In this layer's file, and nobody else has it: it is overwritten where it is.
    Here {
        /// File offset in bytes.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Nowhere yet, or in a cluster that is shared, compressed or there in part: its clusters get
    /// others, each as a whole.
    New {
        /// Length in bytes.
        len: u64,
    },
}

/// What the guest would read in a cluster's place, were the new cluster's data lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Below {
    /// Zeros (no data before, here or below), or the new cluster holds only zeros: a fresh cluster
    /// whose data is lost in a crash reads as what it replaced, so its index needs no barrier.
    Zeros,
    /// Something else: data must be durable before the index that names it.
    Data,
}

/// A cluster taken from a layer's free ones, not yet visible to anyone.
pub trait Reservation {
    /// File offset of the cluster's first byte. The whole cluster reads as zeros until written.
    fn host(&self) -> u64;

    /// Must be called before the first write to the cluster is submitted: from then on a dropped
    /// reservation is not reused before that write can no longer land.
    fn submitted(&mut self);

    /// Bytes of the pieces that the cluster may be filled in; none when it is filled as a whole. What is
    /// not filled is not published.
    fn piece(&self) -> Option<u64> {
        None
    }

    /// Whether it is a cluster of its own. If not, it is the one that the guest cluster has: pieces that
    /// are mapped are there, and hold what they must; what others hold is arbitrary.
    fn is_new(&self) -> bool {
        true
    }

    /// Says that pieces, from one offset in the cluster to another, hold what they must. Only of one that
    /// is filled in pieces.
    fn filled(&mut self, _from: u64, _to: u64) {}
}

/// A reservation of a layer that never hands one out.
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

/// One delta image.
#[allow(
    async_fn_in_trait,
    reason = "futures of a ring are not Send; the engine is generic"
)]
pub trait Layer {
    /// Where this layer's bytes are.
    type Store: Store;
    /// A reserved cluster; dropping it gives the cluster back.
    type Reservation: Reservation;

    /// Virtual size and cluster.
    fn geometry(&self) -> Geometry;

    /// The store that [`Extent::Data`] offsets refer to.
    fn store(&self) -> &Self::Store;

    /// The first extent of the guest range `guest .. guest + len`, at most `len` long and never
    /// empty. May read table pages. `len` is not 0 and the range is inside the virtual size.
    async fn map(&self, guest: u64, len: u64) -> Result<Extent>;

    /// Fills `buf` from guest offset `guest`: a range that [`Layer::map`] answered as
    /// [`Extent::Packed`], or a part of it. Any alignment. What is data by now, as others have merged
    /// something into this layer, is read as that. `Damaged` when it does not unpack, `Invalid` when it
    /// is neither.
    async fn unpack(&self, guest: u64, buf: BytesMut) -> Result<BytesMut>;

    /// Where the first part of the guest range `guest .. guest + len` is written: at most `len` bytes
    /// and never none. As [`Layer::map`] otherwise.
    async fn place(&self, guest: u64, len: u64) -> Result<Place> {
        Ok(match self.map(guest, len).await? {
            Extent::Data { at, len } => Place::Here { at, len },
            Extent::Packed { len } | Extent::Zero { len } | Extent::Absent { len } => {
                Place::New { len }
            }
        })
    }

    /// Whether the mapping of `cluster` would survive power loss as it is now.
    fn is_durable(&self, cluster: VirtCluster) -> bool;

    /// Takes a free file cluster that reads as zeros, for guest cluster `cluster`, which the caller
    /// has to himself; or the one that it has, to fill in more pieces. Fails with `NoSpace` when the
    /// storage is full and with `Pending` when a sync must come first.
    async fn reserve(&self, cluster: VirtCluster) -> Result<Self::Reservation>;

    /// Makes `cluster`, which it was reserved for, point at the reserved cluster, whose data was
    /// written successfully.
    /// Returns once a later [`Layer::map`] sees it and a successor process would too.
    fn publish(&self, cluster: VirtCluster, reserved: Self::Reservation, below: Below);

    /// Forgets the mapping of `cluster`, which then reads from below. Its space is reused only
    /// after a sync. Fails with `Pending` when a sync must come first. The caller knows that
    /// nothing is in flight on the cluster.
    async fn release(&self, cluster: VirtCluster) -> Result<()>;

    /// Says of the whole of `cluster` that it reads as zeros, whatever lies below, and gives its space
    /// back after a sync; false, and nothing is done, where the format cannot. Otherwise as
    /// [`Layer::release`].
    async fn zero(&self, _cluster: VirtCluster) -> Result<bool> {
        Ok(false)
    }

    /// Makes everything answered before the call durable: data, barrier, index, barrier. Only
    /// one sync runs at a time; the caller sees to that. `NoSpace` may be retried; any other
    /// error is final.
    async fn sync(&self) -> Result<()>;

    /// Syncs, gives unused space back and marks the image clean. Nothing is called afterwards.
    async fn close(&self) -> Result<()>;
}
