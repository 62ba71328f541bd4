//! What ploopctl, keeper and worker say to each other: one JSON value each, over argv, a pipe and
//! a socket pair. Nothing here is kept on disk, except [`Failure`] in a run directory.

use crate::image::target::{Format, Source};
use crate::io::file;
use crate::io::room::KeepFree;
use crate::stack::NewSize;
use crate::tracker::Name;
use ploop_formats::{Error, Kind};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// Whether guest writes go through the page cache of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// The top is opened with O_DIRECT.
    None,
    /// The top goes through the page cache.
    Writeback,
}

impl Cache {
    /// Its name in options and output.
    pub const fn name(self) -> &'static str {
        match self {
            Cache::None => "none",
            Cache::Writeback => "writeback",
        }
    }
}

impl From<Cache> for file::Cache {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::None => Self::None,
            Cache::Writeback => Self::Writeback,
        }
    }
}

impl From<file::Cache> for Cache {
    fn from(cache: file::Cache) -> Self {
        match cache {
            file::Cache::None => Self::None,
            file::Cache::Writeback => Self::Writeback,
        }
    }
}

/// A path in JSON: as bytes where it is not UTF-8.
mod any_path {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::ffi::OsString;
    use std::path::{Path, PathBuf};

    pub fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        OsString::deserialize(from).map(PathBuf::from)
    }
}

/// Where NBD clients come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Listen {
    /// A unix socket at this path.
    Unix(#[serde(with = "any_path")] PathBuf),
    /// An address; off loopback only where TLS is required.
    Tcp(SocketAddr),
    /// One client, on standard input and output; the server ends with it.
    Stdio,
    /// So many listening sockets inherited from descriptor 3 on; the server ends with the last
    /// client.
    Inherited(u32),
}

/// How NBD clients are protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tls {
    /// The folder of the credentials, absolute.
    #[serde(with = "any_path")]
    pub folder: PathBuf,
    /// Whether clients without TLS are refused.
    pub required: bool,
}

/// How the disk is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// As a block device: FUSE and a loop device.
    Device,
    /// Over NBD.
    Nbd {
        /// Where clients come from.
        listen: Listen,
        /// The export's name.
        export: String,
        /// TLS, if there is any.
        tls: Option<Tls>,
    },
}

/// What a keeper is started with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperConfig {
    /// DISK, absolute.
    #[serde(with = "any_path")]
    pub disk: PathBuf,
    /// Stated format, when it is a bare file.
    pub format: Option<Format>,
    /// Name or ID of the snapshot of a bare qcow2 image that is shown instead of what it is now; only
    /// where writes are refused.
    pub snapshot: Option<String>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Cache mode of the top layer.
    pub cache: Cache,
    /// Space that the disk leaves to the host.
    pub keep_free: KeepFree,
    /// How the disk is reached.
    pub mode: Mode,
    /// Whether to run in a session of its own and log into the run directory.
    pub detached: bool,
    /// Where it logs when it is detached.
    pub log: Destination,
    /// Whether the worker is confined before it looks at an image.
    pub sandbox: bool,
    /// Who is told once the disk can be used.
    pub announce: Announce,
    /// Whether output and errors of this process are JSON.
    pub json: bool,
}

/// Where a keeper logs that has no terminal. What cannot be reached is replaced by the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Destination {
    /// The first of the following that is there.
    #[default]
    Auto,
    /// The journal of systemd.
    Journal,
    /// syslog, by `/dev/log`.
    Syslog,
    /// `log` in the run directory.
    File,
}

/// Who is told once the disk can be used, or that it cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Announce {
    /// One [`Report`] on this inherited descriptor, then end of file.
    Pipe(RawFd),
    /// Where clients connect, on standard output.
    Stdout,
    /// Nobody: standard output belongs to a client, or the caller knows.
    Nobody,
}

/// A failure on its way to another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Kind, by the name that output uses.
    pub kind: String,
    /// A sentence.
    pub message: String,
}

/// Every kind with its stable name.
const KINDS: [(Kind, &str); 15] = [
    (Kind::Usage, "usage"),
    (Kind::Io, "io"),
    (Kind::NoSpace, "no-space"),
    (Kind::Pending, "pending"),
    (Kind::Damaged, "damaged"),
    (Kind::Unsupported, "unsupported"),
    (Kind::Invalid, "invalid"),
    (Kind::ReadOnly, "read-only"),
    (Kind::Busy, "busy"),
    (Kind::NotFound, "not-found"),
    (Kind::Exists, "exists"),
    (Kind::Privilege, "privilege"),
    (Kind::TimedOut, "timed-out"),
    (Kind::Cancelled, "cancelled"),
    (Kind::Poisoned, "poisoned"),
];

/// The stable name of a kind, as JSON output shows it.
pub fn kind_name(kind: Kind) -> &'static str {
    KINDS
        .iter()
        .find(|(k, _)| *k == kind)
        .map_or("io", |(_, name)| name)
}

impl From<&Error> for Failure {
    fn from(e: &Error) -> Self {
        Self {
            kind: kind_name(e.kind()).into(),
            message: e.to_string(),
        }
    }
}

impl From<Failure> for Error {
    fn from(f: Failure) -> Self {
        let kind = KINDS
            .iter()
            .find(|(_, name)| *name == f.kind)
            .map_or(Kind::Io, |(k, _)| *k);
        Error::new(kind, f.message)
    }
}

/// The keeper's first and only report to who started it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The disk can be used.
    Ready(Box<crate::rundir::State>),
    /// It cannot, and nothing is left behind.
    Failed(Failure),
}

/// TLS for a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerTls {
    /// The memfd of the credentials, inherited: the worker opens no file of theirs.
    pub credentials_fd: RawFd,
    /// Whether clients without TLS are refused.
    pub required: bool,
}

/// How a worker reaches its clients; numbers are inherited descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkerMode {
    /// Serve `/dev/fuse` descriptors of one connection.
    Fuse {
        /// The descriptors.
        fds: Vec<RawFd>,
        /// The INIT handshake's result.
        session: crate::serve::fuse::Session,
    },
    /// The same, and answer every request with EIO: better than not at all. Opens no image.
    Broken {
        /// The descriptors.
        fds: Vec<RawFd>,
        /// The INIT handshake's result.
        session: crate::serve::fuse::Session,
        /// Virtual size in bytes.
        size: u64,
    },
    /// Serve NBD.
    Nbd {
        /// Listening sockets.
        listeners: Vec<RawFd>,
        /// One established connection: requests come from the first, replies go to the second.
        connection: Option<(RawFd, RawFd)>,
        /// The export's name.
        export: String,
        /// TLS, if there is any.
        tls: Option<WorkerTls>,
        /// End with the last client.
        until_idle: bool,
    },
}

/// The first message to a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerConfig {
    /// The directory that everything is opened beneath, inherited.
    pub dir_fd: RawFd,
    /// What to open in it.
    pub source: Source,
    /// At which snapshot, where there is no ledger.
    pub snapshot: Option<String>,
    /// The ledger's memfd, inherited. A read-only disk has none.
    pub ledger_fd: Option<RawFd>,
    /// The top on the keeper's own description, which remembers what the kernel lost; inherited.
    /// There is one with the ledger.
    pub witness_fd: Option<RawFd>,
    /// The memfd of the counters, inherited.
    pub counters_fd: RawFd,
    /// Whether another worker may have written before: fence, overlay, resend.
    pub takeover: bool,
    /// Whether a failed disk is to be used again: what it lost is lost.
    pub heal: bool,
    /// Whether to be confined before looking at an image.
    pub sandbox: bool,
    /// How long the fence may take, in milliseconds.
    pub fence_ms: u64,
    /// Cache mode of the top layer.
    pub cache: Cache,
    /// Space that the disk leaves to the host.
    pub keep_free: KeepFree,
    /// The trackers that mark what is written.
    pub trackers: Vec<WorkerTracker>,
    /// How clients are reached.
    pub mode: WorkerMode,
}

/// Later messages to a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Answer what was asked, close the image, go.
    Stop,
    /// Close the top and let nobody in until told to go on. Brings three descriptors: the new top to
    /// be written, the memfd of its ledger, and the old top to be read.
    Freeze {
        /// Name of the new top, for messages.
        top: String,
        /// Name of the old one.
        below: String,
    },
    /// Close the top, let nobody in until told to go on, and copy it into the layer below, which is
    /// to be the top. Brings that layer's file to be written, the memfd of its ledger, and the file
    /// again to be read, should it stay what it is.
    Fold {
        /// Name of the layer below, for messages.
        into: String,
    },
    /// Two of the lower layers have become one, or one has another file. Brings that one's file, to be
    /// read.
    Reload {
        /// Names of the lower layers, base first.
        lower: Vec<String>,
        /// The one that is new under its name.
        merged: String,
    },
    /// Let nobody in, give the top another size, and go on with that.
    Resize {
        /// What the disk is to have.
        to: NewSize,
    },
    /// Move clusters of the top to where they leave no holes, beside the guest, and cut its file. Is
    /// answered with `Compacting`, some a second, and in the end with `Compacted` or `NotCompacted`.
    Compact {
        /// Bytes a second to copy at most.
        rate: Option<u64>,
    },
    /// Give up compacting, if that is under way.
    EndCompact,
    /// From now on the top takes no more of the host than this, and each that follows it.
    Limit {
        /// In bytes; none for as much as there is.
        bytes: Option<u64>,
    },
    /// Something about trackers, which is done beside everything else.
    Track(Track),
    /// Let nothing in that changes the disk, and flush what was let in, beside everything else. Is
    /// answered with `Halted` or `NotHalted`.
    Halt {
        /// Number of the answer.
        number: u64,
        /// For so many milliseconds at most.
        most_ms: u64,
    },
    /// Let all in that waits after `Halt`.
    Resume,
    /// Go on after `Frozen`.
    Go {
        /// With the new top, or with the old one.
        new: bool,
    },
}

/// What a worker is told about trackers. What has a number to answer with is answered by that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Track {
    /// Record for this tracker. Brings the set to record in, and its first generation, which has every block
    /// and may be told of once `Tracked` is answered.
    Start {
        /// Number of the answer.
        ask: u64,
        /// The tracker.
        name: Name,
        /// Bytes of a block, as a power of two.
        log2: u32,
    },
    /// Record in another set, which comes along. `Tracked` says that the old one is complete.
    Seal {
        /// Number of the answer.
        ask: u64,
        /// The tracker.
        name: Name,
        /// What the old set is from then on.
        generation: u64,
        /// Bytes of a block, as a power of two.
        log2: u32,
    },
    /// A generation is not wanted any more.
    Forget {
        /// The tracker.
        name: Name,
        /// Which.
        generation: u64,
    },
    /// A tracker is not wanted any more.
    Stop {
        /// Which.
        name: Name,
    },
    /// Say what a generation has, and how that is stored now.
    Extents {
        /// Number of the answer.
        ask: u64,
        /// The tracker.
        name: Name,
        /// Which.
        generation: u64,
        /// From this byte of the disk on.
        from: u64,
        /// At most so many.
        max: u32,
    },
}

/// What to do about a range to have another disk hold the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExtentKind {
    /// Copy it.
    Data,
    /// It reads as zeros, and has its space.
    Zero,
    /// It reads as zeros, and has none.
    Discard,
}

/// A range of the disk, in bytes, that a generation has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackedExtent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// How it is stored.
    pub kind: ExtentKind,
}

/// A tracker's set, for a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerSet {
    /// Its memfd, inherited.
    pub fd: RawFd,
    /// Bytes of a block, as a power of two.
    pub log2: u32,
}

/// A tracker, for a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerTracker {
    /// Its name.
    pub name: Name,
    /// What it records in.
    pub recording: WorkerSet,
    /// Its generations.
    pub sealed: Vec<(u64, WorkerSet)>,
}

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The disk is open and being served.
    Ready {
        /// Virtual size in bytes.
        size: u64,
        /// `io_uring` or `poll`.
        engine: String,
        /// The cache mode in effect.
        cache: Cache,
        /// Whether it has failed: what it can read is read, and nothing is written.
        poisoned: bool,
        /// Format version of a delta that would stand on the top.
        version: u8,
        /// What the top may take of the host, in bytes.
        limit: Option<u64>,
    },
    /// The top is closed, and the guest waits.
    Frozen,
    /// It could not be closed, and the disk goes on.
    NotFrozen(Failure),
    /// The guest goes on.
    Went {
        /// How long it waited, in microseconds.
        stall_us: u64,
    },
    /// The disk has another size, and the guest goes on.
    Resized {
        /// Bytes that it has.
        size: u64,
        /// How long the guest waited, in microseconds.
        stall_us: u64,
    },
    /// It could not be given another size.
    NotResized(Failure),
    /// How far compacting is.
    Compacting {
        /// Bytes moved.
        done: u64,
        /// Bytes to move.
        total: u64,
    },
    /// The top's file has no holes, and the guest goes on.
    Compacted {
        /// Clusters that moved.
        moved: u64,
        /// Bytes of the file when it was cut.
        length: u64,
        /// How long the guest waited in the end, in microseconds.
        stall_us: u64,
    },
    /// It was not compacted, or not all of it.
    NotCompacted(Failure),
    /// A tracker's set is complete.
    Tracked {
        /// Number of the order.
        ask: u64,
    },
    /// An order about a tracker came to nothing.
    NotTracked {
        /// Number of the order.
        ask: u64,
        /// Why.
        why: Failure,
    },
    /// What a generation has.
    Extents {
        /// Number of the order.
        ask: u64,
        /// In order.
        extents: Vec<TrackedExtent>,
        /// Where the next one begins; none when that is all.
        next: Option<u64>,
    },
    /// Nothing changes the disk any more, and what did is durable.
    Halted {
        /// Number of the order.
        number: u64,
    },
    /// The disk goes on, because it could not be flushed.
    NotHalted {
        /// Number of the order.
        number: u64,
        /// Why.
        why: Failure,
    },
    /// Space was wanted of a host that is low on it. Said again as long as that is so, but not
    /// more than four times a second.
    Low,
    /// No flush can succeed any more.
    Poisoned,
    /// The image is closed and clean.
    Closed,
    /// It could not open, serve or close the image.
    Failed(Failure),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_keeps_its_kind_across_processes() {
        for (kind, _) in KINDS {
            let there = Failure::from(&Error::new(kind, "x"));
            assert_eq!(Error::from(there).kind(), kind);
        }
    }
}
