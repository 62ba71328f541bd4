//! Restore: a lost DiskDescriptor.xml is made anew from the images that it named.
//!
//! What a descriptor says and images do not is which file stands on which; the caller says that. The
//! GUIDs of snapshots are new ones. A descriptor that is there is never replaced, nor is one made
//! beside what a command of ours left: that may be the one that is missed.
//!
//! In order: the descriptor aside, its fsync, one more name for it, which nobody may have taken, the
//! directory's fsync, and the first name goes. That is one of its own: what lies beside images under
//! the name of a new disk's descriptor says that they are worth nothing.

use super::change::{LAST, NEXT};
use super::members::{ASIDE, DELETED, INCOMING, RESTORED, SEALED};
use super::snapshot::layers;
use super::target::{DESCRIPTOR, Format};
use crate::policy;
use ploop_formats::descriptor::{Chs, Descriptor, NewDisk};
use ploop_formats::folder::{self, Access, Folder};
use ploop_formats::guid::Guid;
use ploop_formats::ploop::Ploop;
use ploop_formats::ploop::check::check_watched;
use ploop_formats::ploop::header::{Header, IN_USE, chs};
use ploop_formats::progress::Watch;
use ploop_formats::store::Store;
use ploop_formats::units::{ClusterSize, SECTOR};
use ploop_formats::{Error, Kind, Result};

/// Clusters that a raw base may have, the first that fits is taken: ploop reference 1.8.
const RAW_CLUSTERS: [u64; 6] = [1 << 20, 512 << 10, 256 << 10, 128 << 10, 64 << 10, 32 << 10];

/// The descriptor of a disk of these files, base first. `new_guid` names its snapshots.
///
/// `Damaged` when a file is no ploop image or does not fit on the one before it.
pub async fn describe<F: Folder>(
    folder: &F,
    files: &[String],
    base: Format,
    mut new_guid: impl FnMut() -> Guid,
    watch: &mut dyn Watch,
) -> Result<Descriptor> {
    let (first, uppers) = files
        .split_first()
        .ok_or_else(|| Error::new(Kind::Usage, "no image is named"))?;
    for file in files {
        policy::allow(file)?;
    }
    refuse_shared(folder, files).await?;
    let mut headers = Vec::new();
    for file in uppers {
        headers.push(header(folder, file).await.map_err(|e| e.at(file))?);
    }
    let below = match base {
        Format::Ploop => Below::ploop(header(folder, first).await.map_err(|e| e.at(first))?),
        Format::Raw => raw(folder, first, headers.first())
            .await
            .map_err(|e| e.at(first))?,
        Format::Qcow2 => {
            let what = "a descriptor is made anew for ploop images, on a raw one or not; `ploopctl adopt \
                FILE --format qcow2 DIR` makes a disk of a qcow2 image";
            return Err(Error::unsupported(what).at(first));
        }
    };
    let (mut below, mut lower, whole) = (below, first, below);
    for (file, header) in uppers.iter().zip(headers) {
        below.carries(&header, lower).map_err(|e| e.at(file))?;
        (below, lower) = (Below::ploop(header), file);
    }
    let preallocated = match whole.header {
        Some(header) => is_full(folder, first, &header, watch).await?,
        None => false,
    };
    let (heads, track, cylinders) = chs(below.sectors);
    let mut disk = Descriptor::new_disk(&NewDisk {
        sectors: below.sectors,
        cluster: below.cluster,
        kind: base.image_type(),
        file: first,
        preallocated,
        chs: Chs {
            cylinders: u64::from(cylinders),
            heads: u64::from(heads),
            sectors: u64::from(track),
        },
    })?;
    for file in uppers {
        disk = disk.with_snapshot(new_guid(), file)?;
    }
    Ok(disk)
}

/// The last file is going to be written to.
async fn refuse_shared<F: Folder>(folder: &F, files: &[String]) -> Result<()> {
    let Some(top) = files.last() else {
        return Ok(());
    };
    layers::refuse_names(folder, top, |n| {
        let what = format!(
            "{top}: {n} names lead to it, as to a frozen file that disks share, and it would be \
             written to; name the file that stands on it as well, or make a copy of it"
        );
        Error::new(Kind::Busy, what)
    })
    .await
}

async fn header<F: Folder>(folder: &F, file: &str) -> Result<Header> {
    let image = Ploop::open_read(folder.open(file, Access::Read).await?).await?;
    Ok(*image.header())
}

/// What the next file stands on.
#[derive(Debug, Clone, Copy)]
struct Below {
    header: Option<Header>,
    sectors: u64,
    cluster: ClusterSize,
}

impl Below {
    const fn ploop(header: Header) -> Self {
        Self {
            header: Some(header),
            sectors: header.sectors,
            cluster: header.cluster,
        }
    }

    /// The rules for a stack: ploop reference 1.3.
    fn carries(&self, upper: &Header, lower: &str) -> Result<()> {
        let damaged = |what: String| Err(Error::damaged(what));
        if upper.cluster != self.cluster {
            return damaged(format!(
                "clusters of {} bytes, and {lower}, which is named before it, has {}",
                upper.cluster.bytes(),
                self.cluster.bytes()
            ));
        }
        if upper.sectors < self.sectors {
            return damaged(format!(
                "{} sectors, fewer than the {} of {lower}: name the files base first",
                upper.sectors, self.sectors
            ));
        }
        match self.header {
            Some(own) if own.version != upper.version => damaged(format!(
                "another format version than {lower}, which is named before it"
            )),
            Some(own) if own.in_use == IN_USE => damaged(format!(
                "{lower}, which is named before it, was not closed, so it was the top of a disk: \
                 name the files base first, or mend it with check --repair --format ploop"
            )),
            _ => Ok(()),
        }
    }
}

async fn raw<F: Folder>(folder: &F, file: &str, upper: Option<&Header>) -> Result<Below> {
    let len = folder.open(file, Access::Read).await?.info().len;
    let fits = |bytes: u64| len.is_multiple_of(bytes);
    let cluster = match upper {
        Some(upper) => Some(upper.cluster.bytes()).filter(|bytes| fits(*bytes)),
        None => RAW_CLUSTERS.into_iter().find(|bytes| fits(*bytes)),
    };
    let Some(cluster) = cluster.filter(|_| len > 0) else {
        return Err(Error::unsupported(format!(
            "{len} bytes are not a whole number of clusters; lengthen it with truncate(1)"
        )));
    };
    Ok(Below {
        header: None,
        sectors: len / SECTOR,
        cluster: ClusterSize::new(cluster)?,
    })
}

/// Whether every cluster has its place, as in an image that was preallocated.
async fn is_full<F: Folder>(
    folder: &F,
    file: &str,
    header: &Header,
    watch: &mut dyn Watch,
) -> Result<bool> {
    watch.enter(file);
    let store = folder.open(file, Access::Read).await?;
    let report = check_watched(&store, watch).await;
    let used = report.map_err(|e| e.at(file))?.used_clusters;
    Ok(used == u64::from(header.entries))
}

/// Refuses a folder that has a descriptor, or what may be one.
pub async fn refuse_described<F: Folder>(folder: &F) -> Result<()> {
    if folder::has(folder, DESCRIPTOR).await? {
        return Err(taken());
    }
    for moved in [SEALED, INCOMING] {
        if folder::has(folder, moved).await? {
            return Err(Error::new(
                Kind::Exists,
                format!(
                    "{moved}: the disk goes to another host, or comes from one; `ploopctl migrate \
                     resolve` says more"
                ),
            ));
        }
    }
    for record in [NEXT, LAST, ASIDE, DELETED] {
        if folder::has(folder, record).await? {
            return Err(Error::new(
                Kind::Exists,
                format!(
                    "{record}: left by an interrupted command, and it may be the descriptor that is \
                     missed; look into it, then give it its name or move it away"
                ),
            ));
        }
    }
    Ok(())
}

fn taken() -> Error {
    Error::new(
        Kind::Exists,
        format!("{DESCRIPTOR}: exists, and is not replaced; move it away if it is wrong"),
    )
}

/// Writes a descriptor, for good, where there is none. The caller has the folder to himself.
pub async fn write<F: Folder>(folder: &F, disk: &Descriptor) -> Result<()> {
    refuse_described(folder).await?;
    if folder::has(folder, RESTORED).await? {
        folder.remove(RESTORED).await?;
    }
    folder::save(folder, RESTORED, &disk.encode()).await?;
    let named = folder.link(RESTORED, folder, DESCRIPTOR).await;
    let synced = match named {
        Ok(()) => folder.sync().await,
        Err(e) if e.kind() == Kind::Exists => Err(taken()),
        Err(e) => Err(e),
    };
    folder.remove(RESTORED).await?;
    synced
}
