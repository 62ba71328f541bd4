//! Chains as a subject: a qcow2 top over qcow2 images or a flat file, of any clusters and sizes.

use super::subject::{BenchStore, Chain, Setup, Subject, Wish};
use crate::disk::Disk;
use crate::stack::{AnyLayer, Stack};
use ploop_formats::Result;
use ploop_formats::layer::Layer;
use ploop_formats::qcow2::Qcow2;
use ploop_formats::raw::Raw;
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::Rules;
use ploop_formats::testkit::qcow2::{Image, audit};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::testkit::stamp::{self, Value, ZERO};
use ploop_formats::units::SECTOR;
use std::sync::Arc;

/// Sectors of the largest disk.
const SECTORS: u64 = 150;

/// The engine with a qcow2 top.
#[derive(Debug)]
pub struct Chains;

/// The same over images of rarer kinds ([`Image::odd_of_dice`]).
#[derive(Debug)]
pub struct OddChains;

/// How an image is chosen.
type Dice = fn(&mut Rng, u64, &mut Value) -> Image;

/// A flat file of `sectors` sectors, and what a guest reads from it.
fn flat(rng: &mut Rng, sectors: u64, value: &mut Value) -> (Pages, Vec<Value>) {
    let mut values = Vec::new();
    for _ in 0..sectors {
        *value += 1;
        values.push(if rng.one_in(8) { ZERO } else { *value });
    }
    let mut pages = Pages::new(sectors * SECTOR);
    for (n, value) in values.iter().enumerate().filter(|(_, v)| **v != ZERO) {
        pages.write(n as u64 * SECTOR, &stamp::run(n as u64, 1, *value));
    }
    (pages, values)
}

/// Adds a lower image; what is behind its end reads as zeros from then on.
fn lower(rng: &mut Rng, dice: Dice, values: &mut Vec<Value>, value: &mut Value) -> Pages {
    let image = dice(rng, SECTORS, value);
    let sectors = (image.size() / SECTOR) as usize;
    values.resize(sectors, ZERO);
    image.overlay(values);
    image.make(rng)
}

/// Files that dice choose.
fn setup(rng: &mut Rng, wish: &Wish, dice: Dice) -> Setup {
    let layers = rng.range(wish.min_layers, wish.max_layers.min(3));
    let raw_base = layers > 1 && rng.one_in(2);
    let align = *rng.pick(&[1, 512]);
    let read = Rules {
        align,
        sealed: true,
        ..Rules::default()
    };
    let (mut value, mut values, mut files) = (0, Vec::new(), Vec::new());
    for n in 1..layers {
        let pages = if raw_base && n == 1 {
            let sectors = rng.range(1, SECTORS);
            let (pages, flat) = flat(rng, sectors, &mut value);
            values = flat;
            pages
        } else {
            lower(rng, dice, &mut values, &mut value)
        };
        files.push((pages, read));
    }
    let image = dice(rng, SECTORS, &mut value);
    let sectors = (image.size() / SECTOR) as usize;
    values.resize(sectors, ZERO);
    image.overlay(&mut values);
    let top = image.make(rng);
    let tight = top.len() + (rng.below(64) << image.log2);
    let rules = Rules {
        align,
        // Tables may be anywhere: sectors are whole or not there.
        metadata_end: u64::MAX,
        fresh_zero: !rng.one_in(4),
        max_len: if rng.one_in(3) { tight } else { u64::MAX },
        sealed: false,
    };
    files.push((top, rules));
    Setup {
        files,
        raw_base,
        values,
        cluster: ((1u64 << image.log2) / SECTOR) as usize,
        slots: *rng.pick(&[4, 16, 64]),
    }
}

impl Subject for Chains {
    type Device = Disk<BenchStore>;

    fn setup(rng: &mut Rng, wish: &Wish) -> Setup {
        setup(rng, wish, Image::of_dice)
    }

    async fn open(mut chain: Chain) -> Result<Disk<BenchStore>> {
        let top = chain.stores.pop().expect("a disk has a file");
        let top = Qcow2::open_write(top, None, chain.ledger).await?;
        let mut layers = Vec::new();
        for (n, store) in chain.stores.into_iter().enumerate() {
            layers.push(Arc::new(if chain.raw_base && n == 0 {
                AnyLayer::Raw(Raw::open_read(store, top.geometry().cluster)?)
            } else {
                AnyLayer::Qcow2(Box::new(Qcow2::open_read(store, None).await?))
            }));
        }
        layers.push(Arc::new(AnyLayer::Qcow2(Box::new(top))));
        Ok(Disk::over(Stack::of_chain(layers)?, false))
    }

    async fn close(device: &Disk<BenchStore>) -> Result<()> {
        device.close().await
    }

    fn audit(top: &Pages) -> std::result::Result<(), String> {
        audit(top).map(|_| ())
    }

    fn audit_open(top: &Pages) -> std::result::Result<(), String> {
        Self::audit(top)
    }

    fn audit_closed(top: &Pages) -> std::result::Result<(), String> {
        Self::audit(top)
    }
}

impl Subject for OddChains {
    type Device = Disk<BenchStore>;

    fn setup(rng: &mut Rng, wish: &Wish) -> Setup {
        setup(rng, wish, Image::odd_of_dice)
    }

    async fn open(chain: Chain) -> Result<Disk<BenchStore>> {
        Chains::open(chain).await
    }

    async fn close(device: &Disk<BenchStore>) -> Result<()> {
        device.close().await
    }

    fn audit(top: &Pages) -> std::result::Result<(), String> {
        Chains::audit(top)
    }

    fn audit_open(top: &Pages) -> std::result::Result<(), String> {
        Chains::audit(top)
    }

    fn audit_closed(top: &Pages) -> std::result::Result<(), String> {
        Chains::audit(top)
    }
}
