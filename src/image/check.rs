//! Check: every layer of an unattached disk, each by its own format: of the disk as it is now, and of
//! every other point that one can go back to.
//!
//! A repair opens a layer behind the same fence as a writer does. A layer that other disks share
//! (more than one link) is never written, whatever is wrong with it.

use super::chain::{Chain, LayerFile};
use super::open::{PATIENCE, Top};
use super::target::Format;
use crate::io::beneath::{self, Access};
use crate::io::file::{Cache, FileStore};
use ploop_formats::ploop::check::{Repair, check_watched, repair_watched};
use ploop_formats::progress::Watch;
use ploop_formats::store::Store;
use ploop_formats::{Error, Kind, Result};
use ploop_formats::{ploop, qcow2};
use std::os::fd::AsFd;
use std::path::Path;

/// What the check of a layer found, as its format has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// Of a ploop image; of a raw one, in which nothing can be wrong.
    Ploop(ploop::check::Report),
    /// Of a qcow2 image, its other files left out.
    Qcow2(qcow2::check::Report),
}

impl Report {
    /// Whether nothing is broken and nothing is lost; notices do not count.
    pub const fn is_clean(&self) -> bool {
        match self {
            Self::Ploop(report) => report.is_clean(),
            Self::Qcow2(report) => report.is_clean(),
        }
    }

    /// Whether a repair may have something to do.
    const fn wants_repair(&self) -> bool {
        match self {
            Self::Ploop(report) => !report.is_clean(),
            Self::Qcow2(report) => !report.is_clean() || report.notices > 0,
        }
    }

    /// An exit code: 0 clean, 3 leaks only, 6 damaged.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Ploop(report) => report.exit_code(),
            Self::Qcow2(report) => report.exit_code(),
        }
    }
}

/// Checks each layer, in the order of [`Chain::tree`]; a raw one has nothing that could be wrong.
pub async fn layers(dir: impl AsFd, chain: &Chain, watch: &mut dyn Watch) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    for layer in &chain.tree()? {
        watch.enter(&layer.display().to_string());
        // What the page cache has of a top may never have reached the disk. Lower ones are sealed.
        let anew = layer == chain.top();
        reports.push(
            one(&dir, layer, anew, watch)
                .await
                .map_err(|e| e.at(layer.display()))?,
        );
    }
    Ok(reports)
}

async fn one(
    dir: impl AsFd,
    layer: &LayerFile,
    anew: bool,
    watch: &mut dyn Watch,
) -> Result<Report> {
    let path = Path::new(&layer.name);
    let fd = beneath::open_file(dir, path, Access::Read)?;
    if layer.format == Format::Raw {
        return Ok(Report::Ploop(ploop::check::Report::default()));
    }
    let store = FileStore::new(fd, path, Cache::Writeback)?;
    if anew {
        store.forget_cache()?;
    }
    match layer.format {
        Format::Qcow2 => {
            let found = qcow2::check::check_watched(&store, watch).await;
            found.map(Report::Qcow2)
        }
        Format::Ploop | Format::Raw => check_watched(&store, watch).await.map(Report::Ploop),
    }
}

/// Checks each layer and mends what is `allowed`, in the same order. The caller holds the locks for
/// writing.
///
/// Whoever watches may end it: what is mended stays so, and the next repair goes on from there.
pub async fn mend(
    dir: impl AsFd,
    chain: &Chain,
    allowed: &Repair,
    watch: &mut dyn Watch,
) -> Result<Vec<Report>> {
    let mut reports = layers(&dir, chain, watch).await?;
    for (layer, report) in chain.tree()?.iter().zip(&mut reports) {
        if !report.wants_repair() {
            continue;
        }
        watch.enter(&layer.display().to_string());
        let mended = mend_one(&dir, layer, allowed, watch).await;
        *report = mended.map_err(|e| e.at(layer.display()))?;
    }
    Ok(reports)
}

async fn mend_one(
    dir: impl AsFd,
    layer: &LayerFile,
    allowed: &Repair,
    watch: &mut dyn Watch,
) -> Result<Report> {
    let file = Top::fenced(dir, layer, PATIENCE)?;
    let links = file.links()?;
    if links > 1 {
        return Err(Error::new(
            Kind::Unsupported,
            format!("{links} links: other disks share this layer, and it is not written"),
        ));
    }
    let store = file.store(layer, Cache::Writeback)?;
    let report = match layer.format {
        Format::Qcow2 => {
            // Guest data is not touched, whatever is wrong.
            let allowed = qcow2::check::Repair {
                growth_max: allowed.growth_max,
                errors: true,
            };
            let mended = qcow2::check::repair_watched(&store, &allowed, watch).await;
            mended.map(Report::Qcow2)
        }
        Format::Ploop | Format::Raw => {
            let mended = repair_watched(&store, allowed, watch).await;
            mended.map(Report::Ploop)
        }
    };
    // Also when it was ended: what was asked of the file lands before its lock goes.
    store.settle().await;
    report
}
