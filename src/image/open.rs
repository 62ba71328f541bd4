//! Open: from files to a device.
//!
//! In order: every file is opened by its stated format, the fence is taken on the very description
//! of the top that will do I/O, and only then is anything read.

use super::chain::{Chain, LayerFile};
use super::target::Format;
use crate::disk::Disk;
use crate::io::beneath;
use crate::io::file::FileStore;
use crate::serve::supervise::message::Cache;
use crate::stack::AnyLayer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::Ploop;
use ploop_formats::ploop::header::IN_USE;
use ploop_formats::raw::Raw;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Error, Kind, Result};
use rustix::fs::{FlockOperation, OFlags, flock};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How to open a disk.
#[derive(Debug, Clone)]
pub struct How {
    /// Cache mode of the top.
    pub cache: Cache,
    /// How long to wait for a dead predecessor's last writes.
    pub fence: Duration,
    /// Where answers are kept until they are durable; none opens the disk read-only.
    pub ledger: Option<Ledger>,
}
