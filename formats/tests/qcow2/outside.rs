//! Other sizes of closed images whose data is in another file: by us and by QEMU in turns, and with the
//! power gone anywhere, for both files.

use crate::qemu::{Folder, installed};
use crate::repair::rules;
use crate::snapshots::Turns;
use bytes::BytesMut;
use ploop_formats::Kind;
use ploop_formats::layer::{Extent, Layer};
use ploop_formats::qcow2::check::check;
use ploop_formats::qcow2::resize::resize;
use ploop_formats::qcow2::{Qcow2, read_header};
use ploop_formats::store::Store;
use ploop_formats::store::mem::MemStore;
use ploop_formats::store::mutate::{Break, MutateStore, Mutation, Mutator};
use ploop_formats::store::pages::Pages;
use ploop_formats::store::sim::{Fate, Rules, Sim};
use ploop_formats::testkit::exec::{Exec, now};
use ploop_formats::testkit::rng::Rng;

const KINDS: [&str; 5] = [
    "data_file=data",
    "data_file=data,data_file_raw=on",
    "data_file=data,data_file_raw=on,cluster_size=4k",
    "data_file=data,cluster_size=512",
    "data_file=data,extended_l2=on,cluster_size=16k",
];

/// We give the image of a folder another size.
fn ours(folder: &Folder, to: u64) -> u64 {
    let [disk, data] = ["disk", "data"].map(|name| MemStore::from_bytes(&folder.read(name)));
    let size = now(resize(&disk, Some(&data), to, &mut ())).unwrap();
    for (name, store) in [("disk", disk), ("data", data)] {
        std::fs::write(folder.path(name), store.to_vec()).unwrap();
    }
    size
}

#[test]
fn sizes_of_data_files_by_us_and_by_qemu_show_what_was_there() {
    if !installed("sizes_of_data_files_by_us_and_by_qemu_show_what_was_there") {
        return;
    }
    let mut done = [0; 4];
    for (n, kind) in KINDS.iter().enumerate() {
        let mut turns = Turns::new(kind, 300 + n as u64);
        turns.write();
        for round in 0..12 {
            turns.place = format!("{kind}, round {round}");
            let by_us = turns.rng.one_in(2);
            let is = turns.now.len() as u64;
            let to = 512 * turns.rng.range(400, 30_000);
            let to = match by_us {
                true => ours(&turns.folder, to),
                false => {
                    let shrink = if to < is { "--shrink" } else { "" };
                    let line = format!("resize -q -f qcow2 {shrink} disk {to}");
                    turns.folder.img(&line);
                    to
                }
            };
            done[usize::from(by_us) + 2 * usize::from(to < is)] += 1;
            turns.now.resize(to as usize, 0);
            turns.judge_now();
            let data = turns.folder.read("data");
            // QEMU leaves the end of a cluster now and then.
            assert!(!by_us || data.len() as u64 == to, "{}", turns.place);
            assert!(
                !kind.contains("raw") || data.starts_with(&turns.now),
                "{}: the data file alone",
                turns.place
            );
            turns.write();
            turns.judge_now();
        }
    }
    assert!(done.iter().all(|n| *n > 5), "{done:?}");
}

/// An image, its data file, and the size that they get.
struct Case {
    files: [Vec<u8>; 2],
    raw: bool,
    to: u64,
}

/// What a guest reads.
fn shown(files: &[MemStore; 2]) -> Result<Vec<u8>, String> {
    let [disk, data] = files.clone();
    let image = now(Qcow2::open_read(disk, Some(data))).map_err(|e| e.to_string())?;
    let size = image.geometry().size;
    let mut out = Vec::new();
    while (out.len() as u64) < size {
        let at = out.len() as u64;
        let extent = now(image.map(at, size - at)).map_err(|e| e.to_string())?;
        let buf = BytesMut::zeroed(extent.len() as usize);
        match extent {
            Extent::Data { at, .. } => {
                let read = now(image.store().read_at(at, buf));
                out.extend(read.map_err(|e| e.to_string())?);
            }
            _ => out.extend(buf),
        }
    }
    Ok(out)
}

fn stores(files: Vec<(Pages, Rules)>) -> [MemStore; 2] {
    let all: Vec<MemStore> = files
        .into_iter()
        .map(|(pages, _)| MemStore::from_pages(pages))
        .collect();
    all.try_into().unwrap()
}

impl Case {
    /// An image of QEMU's with data up to its end.
    fn new(kind: &str, from: u64, to: u64) -> Self {
        let folder = Folder::new();
        let line = format!("create -q -f qcow2 -o {kind},cluster_size=512 disk {from}");
        folder.img(&line);
        let fill = format!("write -P 7 1k {}", from - 1024);
        folder.io("disk", &[fill, "write -z 4k 8k".into()]);
        Self {
            files: ["disk", "data"].map(|name| folder.read(name)),
            raw: kind.contains("raw"),
            to,
        }
    }

    /// The same of which a shrinking to so many bytes was cut behind its first step.
    fn cut_to(mut self, size: u64) -> Self {
        self.files[0][24..32].copy_from_slice(&size.to_be_bytes());
        self
    }

    fn before(&self) -> [MemStore; 2] {
        [0, 1].map(|n| MemStore::from_bytes(&self.files[n]))
    }

    /// What is wrong with a state that a cut left, or the end.
    fn wrong(&self, files: &[MemStore; 2], old: &[u8], done: bool) -> Result<(), String> {
        let report = now(check(&files[0])).map_err(|e| e.to_string())?;
        if report.errors > 0 {
            return Err(format!("{report:#?}"));
        }
        let mut new = old.to_vec();
        new.resize(self.to as usize, 0);
        let is = shown(files)?;
        if is != new && (done || is != old) {
            return Err("not what it was, nor what it should be".into());
        }
        let data = files[1].to_vec();
        match data.get(..is.len()) {
            None => Err("the data file is too short".into()),
            Some(head) if self.raw && head != is => {
                Err("the data file alone is another disk".into())
            }
            Some(_) if done && data.len() != is.len() => Err("the data file is too long".into()),
            Some(_) => Ok(()),
        }
    }

    /// Every state that a cut can leave while the work runs, with a barrier that does nothing or with
    /// all of them.
    fn cuts(
        &self,
        broken: [Option<u64>; 2],
        mut judge: impl FnMut([MemStore; 2], bool) -> Result<(), String>,
    ) -> Result<(), String> {
        let pages = |n: usize| (self.before()[n].pages(), rules());
        let sim = Sim::of(vec![pages(0), pages(1)], 1);
        let mut files: Vec<_> = sim
            .stores()
            .into_iter()
            .zip(broken)
            .map(|(store, broken)| {
                let mutator = Mutator::new();
                mutator.set(broken.map(|barrier| Mutation {
                    covers: None,
                    how: Break::Drop,
                    only: Some(barrier),
                }));
                MutateStore::new(store, mutator, u64::MAX)
            })
            .collect();
        let (data, disk) = (files.pop().unwrap(), files.pop().unwrap());
        let to = self.to;
        let mut exec = Exec::new(sim.clone(), 1);
        let work = exec.start(async move { resize(&disk, Some(&data), to, &mut ()).await });
        let mut dice = Rng::new(1);
        // Of the large ones each state takes long; what a barrier of the image keeps apart is short.
        let each = match broken {
            [Some(_), _] => 1,
            _ if self.files[1].len() > 1 << 20 => 90,
            _ => 3,
        };
        let mut count = 0;
        exec.watch(&work, |done| {
            count += 1;
            if count % each > 0 {
                return Ok(());
            }
            let fates = [Fate::None, Fate::All, Fate::Random(dice.next())];
            for one in fates {
                for other in fates {
                    judge(stores(sim.crash_each(&[one, other])), done)?;
                }
            }
            Ok(())
        })?;
        let size = work.take().unwrap().map_err(|e| e.to_string())?;
        assert_eq!(size, to);
        judge(stores(sim.crash_each(&[Fate::None, Fate::None])), true)
    }

    fn is_noticed(&self, broken: [Option<u64>; 2]) -> bool {
        let old = shown(&self.before()).unwrap();
        self.cuts(broken, |files, done| self.wrong(&files, &old, done))
            .is_err()
    }
}

/// In clusters of 512 bytes: a table covers 64 of them, and 64 tables fill a cluster of the first one.
fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for kind in ["data_file=data", "data_file=data,data_file_raw=on"] {
        for (from, to) in [(40, 60), (60, 300), (4090, 4200), (300, 70), (70, 64)] {
            all.push(Case::new(kind, from * 512, to * 512));
        }
        all.push(Case::new(kind, 130 * 512, 200 * 512).cut_to(70 * 512));
        all.push(Case::new(kind, 130 * 512, 70 * 512).cut_to(70 * 512));
    }
    all
}

#[test]
fn a_new_size_of_two_files_may_be_cut_anywhere_and_the_same_call_goes_on() {
    if !installed("a_new_size_of_two_files_may_be_cut_anywhere_and_the_same_call_goes_on") {
        return;
    }
    let mut states = 0;
    for (n, case) in cases().iter().enumerate() {
        let old = shown(&case.before()).unwrap();
        let outcome = case.cuts([None, None], |files, done| {
            states += 1;
            case.wrong(&files, &old, done)?;
            now(resize(&files[0], Some(&files[1]), case.to, &mut ())).map_err(|e| e.to_string())?;
            case.wrong(&files, &old, true)
                .map_err(|e| format!("again: {e}"))?;
            // What was behind an end does not come back.
            let more = case.to.max(old.len() as u64) + 64 * 512;
            now(resize(&files[0], Some(&files[1]), more, &mut ())).map_err(|e| e.to_string())?;
            let mut wanted = old.clone();
            wanted.resize(case.to as usize, 0);
            wanted.resize(more as usize, 0);
            match shown(&files)? == wanted && files[1].to_vec().len() as u64 == more {
                true => Ok(()),
                false => Err("larger: something came back".into()),
            }
        });
        outcome.unwrap_or_else(|e| panic!("case {n}: {e}"));
    }
    println!("COUNT: {states} states");
    assert!(states > 600, "{states}");
}

#[test]
fn every_barrier_of_a_data_file_is_missed_when_it_is_gone() {
    if !installed("every_barrier_of_a_data_file_is_missed_when_it_is_gone") {
        return;
    }
    for (n, case) in cases().iter().enumerate() {
        assert!(case.is_noticed([None, Some(0)]), "case {n}");
    }
    // Smaller: the header first.
    let case = &cases()[3];
    assert!(case.is_noticed([Some(0), None]));
}

#[test]
fn a_data_file_is_given_exactly_when_there_is_one() {
    if !installed("a_data_file_is_given_exactly_when_there_is_one") {
        return;
    }
    let case = Case::new("data_file=data", 40 * 512, 60 * 512);
    let [disk, data] = case.before();
    let e = now(resize(&disk, None, case.to, &mut ())).unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid, "{e}");
    assert!(disk.to_vec() == case.files[0]);
    let whole = MemStore::from_bytes(&crate::check::whole());
    let e = now(resize(&whole, Some(&data), case.to, &mut ())).unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid, "{e}");
    // One that lists snapshots is damaged: its bytes have one state only.
    let mut bytes = case.files[0].clone();
    let header = now(read_header(&MemStore::from_bytes(&bytes))).unwrap();
    bytes[60..64].copy_from_slice(&1u32.to_be_bytes());
    bytes[64..72].copy_from_slice(&header.l1.at.to_be_bytes());
    let store = MemStore::from_bytes(&bytes);
    let e = now(resize(&store, Some(&data), case.to, &mut ())).unwrap_err();
    assert_eq!(e.kind(), Kind::Damaged, "{e}");
    assert!(store.to_vec() == bytes && data.to_vec() == case.files[1]);
}
