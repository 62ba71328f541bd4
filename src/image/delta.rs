//! Delta: one image of a disk's directory, opened as what its descriptor says that it is.
//!
//! What a delta stands on, the descriptor says and nobody else: a qcow2 image that names files itself
//! is refused, and nothing that it names is looked for. What an image says of its cluster must be what
//! the descriptor says.

use super::target::Format;
use crate::stack::AnyLayer;
use ploop_formats::layer::Layer;
use ploop_formats::ledger::Ledger;
use ploop_formats::ploop::Ploop;
use ploop_formats::ploop::header::IN_USE;
use ploop_formats::qcow2::extension::printable;
use ploop_formats::qcow2::{Qcow2, read_header};
use ploop_formats::raw::Raw;
use ploop_formats::store::Store;
use ploop_formats::units::ClusterSize;
use ploop_formats::{Error, Result};

/// Opens one for reading.
pub async fn read<S: Store>(store: S, format: Format, cluster: ClusterSize) -> Result<AnyLayer<S>> {
    Ok(match format {
        Format::Ploop => AnyLayer::Ploop(Ploop::open_read(store).await?),
        Format::Raw => AnyLayer::Raw(Raw::open_read(store, cluster)?),
        Format::Qcow2 => {
            refuse_others(&store, cluster).await?;
            AnyLayer::Qcow2(Box::new(Qcow2::open_read(store, None).await?))
        }
    })
}

/// Opens one to be the top, after whatever end. The caller holds its locks, and the fence when
/// `ledger` comes from a dead predecessor.
pub async fn write<S: Store>(
    store: S,
    format: Format,
    cluster: ClusterSize,
    ledger: Ledger,
) -> Result<AnyLayer<S>> {
    Ok(match format {
        Format::Ploop => AnyLayer::Ploop(Ploop::open_write(store, ledger).await?),
        Format::Raw => AnyLayer::Raw(Raw::open_write(store, cluster, ledger)?),
        Format::Qcow2 => {
            refuse_others(&store, cluster).await?;
            AnyLayer::Qcow2(Box::new(Qcow2::open_write(store, None, ledger).await?))
        }
    })
}

/// Opens one that is below others, to be merged into. It does not say that it is in use, so a merge
/// that is cut leaves it as good as it was.
pub async fn target<S: Store>(
    store: S,
    format: Format,
    cluster: ClusterSize,
    ledger: Ledger,
) -> Result<AnyLayer<S>> {
    match format {
        Format::Ploop => Ploop::open_target(store, ledger).await.map(AnyLayer::Ploop),
        // Neither of these ever says so.
        Format::Raw | Format::Qcow2 => write(store, format, cluster, ledger).await,
    }
}

/// What an open delta is.
pub const fn format<S>(layer: &AnyLayer<S>) -> Format {
    match layer {
        AnyLayer::Ploop(_) => Format::Ploop,
        AnyLayer::Raw(_) => Format::Raw,
        AnyLayer::Qcow2(_) => Format::Qcow2,
    }
}

/// Opens a delta's file anew for reading, as what it was.
pub async fn read_again<S: Store>(store: S, was: &AnyLayer<S>) -> Result<AnyLayer<S>> {
    read(store, format(was), was.geometry().cluster).await
}

/// Whether an image says that its user did not come to an end: it may lack what was written. Only
/// ploop images say it.
pub const fn is_unclosed<S: Store>(layer: &AnyLayer<S>) -> bool {
    match layer {
        AnyLayer::Ploop(ploop) => ploop.header().in_use == IN_USE,
        AnyLayer::Raw(_) | AnyLayer::Qcow2(_) => false,
    }
}

/// Refuses a qcow2 image that does not stand alone, or has other clusters than its disk.
async fn refuse_others<S: Store>(store: &S, cluster: ClusterSize) -> Result<()> {
    let header = read_header(store).await?;
    if let Some(name) = &header.backing {
        return Err(Error::unsupported(format!(
            "it names a backing file itself (\"{}\"), but what stands on what, the descriptor of a disk \
             says alone: where the layer below is that file, `qemu-img rebase -u -b '' IMAGE` takes the \
             name away; else `qemu-img convert -O qcow2` makes one image of both",
            printable(name)
        )));
    }
    if header.has_data_file() {
        return Err(Error::unsupported(
            "its data is in another file, which no disk with a descriptor has; `qemu-img convert -O \
             qcow2` makes one image of both",
        ));
    }
    match header.cluster == cluster {
        true => Ok(()),
        false => Err(Error::damaged(format!(
            "clusters of {} bytes, where the descriptor says {}",
            header.cluster.bytes(),
            cluster.bytes()
        ))),
    }
}
