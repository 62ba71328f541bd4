//! An image with those below it, read as a guest reads it.
#![allow(dead_code, reason = "each test uses its part")]

use bytes::BytesMut;
use ploop_formats::Result;
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::qcow2::{Qcow2, read_header};
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::testkit::exec::now;

/// An image with those below it, the highest first.
pub struct Chain {
    pub top: Qcow2<MemStore>,
    below: Option<Below>,
}

enum Below {
    Qcow2(Box<Chain>),
    Raw(Vec<u8>),
}

impl Chain {
    /// Opens an image and what it names, which `file` gives by its name.
    pub fn open(name: &str, file: &impl Fn(&str) -> Vec<u8>) -> Result<Self> {
        let store = MemStore::from_bytes(&file(name));
        let header = now(read_header(&store))?;
        let text = |name: &[u8]| String::from_utf8(name.to_vec()).unwrap();
        let data = header
            .data_file()
            .map(|name| MemStore::from_bytes(&file(&text(name))));
        let below = match (&header.backing, header.backing_format()) {
            (None, _) => None,
            (Some(name), Some(b"qcow2")) => {
                Some(Below::Qcow2(Box::new(Self::open(&text(name), file)?)))
            }
            (Some(name), Some(b"raw")) => Some(Below::Raw(file(&text(name)))),
            (Some(_), other) => panic!("a backing file of format {other:?}"),
        };
        Ok(Self {
            top: now(Qcow2::open_read(store, data))?,
            below,
        })
    }

    pub fn size(&self) -> u64 {
        self.top.geometry().size
    }

    /// Fills `buf` from guest offset `at`.
    pub fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let guest = at + done as u64;
            let rest = &mut buf[done..];
            let extent = now(self.top.map(guest, rest.len() as u64))?;
            assert!(!extent.is_empty() && extent.len() <= rest.len() as u64);
            let len = extent.len() as usize;
            self.fill(guest, extent, &mut rest[..len])?;
            done += len;
        }
        Ok(())
    }

    fn fill(&self, guest: u64, extent: Extent, buf: &mut [u8]) -> Result<()> {
        let empty = BytesMut::zeroed(buf.len());
        match extent {
            Extent::Data { at, .. } => {
                buf.copy_from_slice(&now(self.top.store().read_at(at, empty))?);
            }
            Extent::Packed { .. } => buf.copy_from_slice(&now(self.top.unpack(guest, empty))?),
            Extent::Zero { .. } => buf.fill(0),
            Extent::Absent { .. } => self.fill_below(guest, buf)?,
        }
        Ok(())
    }

    /// What is behind the end of a lower image reads as zeros.
    fn fill_below(&self, guest: u64, buf: &mut [u8]) -> Result<()> {
        buf.fill(0);
        let size = match &self.below {
            None => 0,
            Some(Below::Raw(bytes)) => bytes.len() as u64,
            Some(Below::Qcow2(chain)) => chain.size(),
        };
        let len = size.saturating_sub(guest).min(buf.len() as u64) as usize;
        let part = &mut buf[..len];
        match &self.below {
            Some(Below::Qcow2(chain)) if len > 0 => chain.read(guest, part)?,
            Some(Below::Raw(bytes)) if len > 0 => {
                part.copy_from_slice(&bytes[guest as usize..guest as usize + len]);
            }
            _ => {}
        }
        Ok(())
    }

    /// All of it.
    pub fn all(&self) -> Result<Vec<u8>> {
        let mut all = vec![0xEE; self.size() as usize];
        self.read(0, &mut all)?;
        Ok(all)
    }
}
