//! Survey: what a disk's files say about themselves, without opening it as a disk.
//!
//! Reads headers and lengths only, takes no lock and changes nothing, so that it also works on an
//! attached disk and on one that does not open. No file is opened that an image names.

pub mod qcow2;

use super::chain::{Chain, LayerFile};
use super::target::Format;
use crate::io::beneath::{self, Access};
use ploop_formats::ploop::header::{CLOSED_V21, Header, IN_USE, Version};
use ploop_formats::{Error, Result};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// How an image was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// Cleanly.
    Clean,
    /// It is in use, or a crash ended its use.
    InUse,
}

/// One layer's file.
#[derive(Debug, Clone)]
pub struct LayerInfo {
    /// Which file.
    pub layer: LayerFile,
    /// File length in bytes.
    pub len: u64,
    /// Bytes that the file occupies on the host.
    pub allocated: u64,
    /// Virtual size in bytes.
    pub size: u64,
    /// Cluster in bytes, and format version; a raw image has neither.
    pub cluster: Option<u64>,
    /// 1 or 2, of qcow2 2 or 3.
    pub version: Option<u32>,
    /// How it was left; a raw image does not know, and a qcow2 one only that it was not closed.
    pub closed: Option<Closed>,
    /// Links to the file: above one means that several disks share it.
    pub links: u64,
}

/// Surveys every layer, base first.
pub fn layers(dir: impl AsFd, chain: &Chain) -> Result<Vec<LayerInfo>> {
    chain
        .layers
        .iter()
        .map(|l| layer(&dir, l).map_err(|e| e.at(l.display())))
        .collect()
}

fn layer(dir: impl AsFd, layer: &LayerFile) -> Result<LayerInfo> {
    let file = File::from(beneath::open_file(
        dir,
        Path::new(&layer.name),
        Access::Read,
    )?);
    let meta = file.metadata()?;
    let mut info = LayerInfo {
        layer: layer.clone(),
        len: meta.len(),
        allocated: meta.blocks().saturating_mul(512),
        size: meta.len(),
        cluster: None,
        version: None,
        closed: None,
        links: meta.nlink(),
    };
    match layer.format {
        Format::Ploop => look_at_ploop(&file, &mut info)?,
        Format::Qcow2 => qcow2::look(&file, &mut info)?,
        Format::Raw => {}
    }
    Ok(info)
}

fn look_at_ploop(file: &File, info: &mut LayerInfo) -> Result<()> {
    let mut head = [0u8; 64];
    let read = file.read_at(&mut head, 0).map_err(Error::from)?;
    let header = Header::parse(head.get(..read).unwrap_or_default())?;
    info.size = header.geometry().size;
    info.cluster = Some(header.cluster.bytes());
    info.version = Some(if header.version == Version::V1 { 1 } else { 2 });
    info.closed = Some(match header.in_use {
        0 | CLOSED_V21 => Closed::Clean,
        IN_USE => Closed::InUse,
        // No ploop writes anything else; no reader may trust it as clean.
        _ => Closed::InUse,
    });
    Ok(())
}
