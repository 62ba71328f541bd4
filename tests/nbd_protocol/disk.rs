//! The device behind the server under test.

use bytes::{Bytes, BytesMut};
use ploop::device::{Device, GuestExtent, Zero};
use ploop::{Error, Kind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Bytes of the disk.
pub const SIZE: u64 = 80 << 20;

/// A disk in memory that records what it is asked and can be told to wait or to fail.
pub struct Disk {
    pub data: Mutex<Vec<u8>>,
    pub log: Mutex<Vec<String>>,
    pub read_only: bool,
    /// Requests wait while it is closed (true).
    gate: watch::Sender<bool>,
    started: AtomicUsize,
    failure: Mutex<Option<Kind>>,
}

impl Disk {
    pub fn new() -> Self {
        Self {
            data: Mutex::new(vec![0; SIZE as usize]),
            log: Mutex::default(),
            read_only: false,
            gate: watch::Sender::new(false),
            started: AtomicUsize::new(0),
            failure: Mutex::default(),
        }
    }

    pub fn close_gate(&self) {
        self.gate.send_replace(true);
    }

    pub fn open_gate(&self) {
        self.gate.send_replace(false);
    }

    async fn enter(&self, what: String) -> ploop::Result<()> {
        self.started.fetch_add(1, Ordering::SeqCst);
        self.gate
            .subscribe()
            .wait_for(|closed| !closed)
            .await
            .expect("the gate is ours");
        self.log.lock().unwrap().push(what);
        match *self.failure.lock().unwrap() {
            Some(kind) => Err(Error::new(kind, "the disk was told to fail")),
            None => Ok(()),
        }
    }

    pub fn fail(&self, kind: Option<Kind>) {
        *self.failure.lock().unwrap() = kind;
    }

    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    pub fn started(&self) -> usize {
        self.started.load(Ordering::SeqCst)
    }

    pub fn wait_started(&self, count: usize) {
        wait_until("requests to start", || self.started() >= count);
    }
}

impl Device for Disk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn preferred_block(&self) -> u64 {
        65536
    }

    async fn read(&self, at: u64, mut buf: BytesMut) -> ploop::Result<BytesMut> {
        assert_eq!(
            buf.as_ptr() as usize % 4096,
            0,
            "direct I/O reads into aligned memory"
        );
        self.enter(format!("read {at} {}", buf.len())).await?;
        let data = self.data.lock().unwrap();
        let len = buf.len();
        buf.copy_from_slice(&data[at as usize..][..len]);
        Ok(buf)
    }

    async fn write(&self, at: u64, data: Bytes, fua: bool) -> ploop::Result<()> {
        assert_eq!(
            data.as_ptr() as usize % 4096,
            0,
            "direct I/O writes from aligned memory"
        );
        self.enter(format!("write {at} {} {fua}", data.len()))
            .await?;
        self.data.lock().unwrap()[at as usize..][..data.len()].copy_from_slice(&data);
        Ok(())
    }

    async fn zero(&self, at: u64, len: u64, how: Zero, fua: bool) -> ploop::Result<()> {
        self.enter(format!("zero {at} {len} {how:?} {fua}")).await?;
        if how == Zero::Fast {
            return Err(Error::unsupported("not faster here"));
        }
        self.data.lock().unwrap()[at as usize..][..len as usize].fill(0);
        Ok(())
    }

    async fn discard(&self, at: u64, len: u64) -> ploop::Result<()> {
        self.enter(format!("discard {at} {len}")).await
    }

    async fn flush(&self) -> ploop::Result<()> {
        self.enter("flush".into()).await
    }

    /// Blocks of 64 KiB, by number modulo 3: data in the top, data below, hole.
    async fn extents(&self, at: u64, len: u64, max: usize) -> ploop::Result<Vec<GuestExtent>> {
        self.enter(format!("extents {at} {len} {max}")).await?;
        let (mut extents, mut at, end) = (Vec::new(), at, at + len);
        while at < end && extents.len() < max {
            let (block, next) = (at / 65536, end.min((at / 65536 + 1) * 65536));
            let hole = block % 3 == 2;
            let depth = if hole { 0 } else { (block % 3) as u32 + 1 };
            extents.push(GuestExtent {
                len: next - at,
                zero: hole,
                hole,
                depth,
            });
            at = next;
        }
        Ok(extents)
    }
}

pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "waited too long for {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}
