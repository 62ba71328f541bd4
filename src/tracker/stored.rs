//! Stored: the trackers of a disk as bytes, for the time between two attachments.
//!
//! Only what the bytes are: who writes them when, and when they are believed, is in
//! [`crate::image::kept`]. Any bytes may be decoded: what is wrong is refused as `Damaged`, and no
//! more memory is taken than trackers of an attached disk may have. All numbers are little endian.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `ploopTRK` |
//! | 4 | version, 1 |
//! | 4 | 0: the disk is in use, names follow and no sets; 1: it is at rest |
//! | 8, 4 | at rest: bytes of the disk, CRC32 of its descriptor |
//! | 4, 40 each | at rest: count of files, their stamps |
//! | 4 | count of trackers |
//! | 1, n, 1, 8 | each: length of its name, that, log2 of a block, next generation |
//! | a set, 4 | at rest: what it has recorded, count of generations |
//! | 8, 8, 8, a set | each: number, bytes that it has, second since 1970 of its seal, what it has |
//! | 4 | CRC32 of everything before |
//!
//! A stamp is inode, length, and twice seconds (8) and nanoseconds (4): modified, changed. A set is
//! the number of its words (4), the first of them (8), and a byte: 0, every block is in it; 1, runs
//! follow, their count (4), and the first block (4) and the length (4) of each; 2, all other words
//! follow.

use super::blocks::{Blocks, LOG2, SET_WORDS_MAX, Words};
use super::registry::Name;
use crc32fast::Hasher;
use ploop_formats::{Error, Kind, Result, limits};
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Read, Write};
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Trackers of a disk.
pub const TRACKERS_MAX: usize = 8;
/// Generations of a tracker that nobody has acknowledged.
pub const GENERATIONS_MAX: usize = 16;
/// Words of all sets of a disk: 512 MiB, should all of it be touched.
pub const WORDS_MAX: usize = 64 << 20;
/// Files that a disk is told by: its descriptor and the layers of its chain.
const FILES_MAX: usize = limits::DEPTH_MAX + 1;
/// Numbers of generations stay below, so that there is always a next one.
const NUMBER_MAX: u64 = 1 << 62;

const MAGIC: [u8; 8] = *b"ploopTRK";
const VERSION: u32 = 1;
const IN_USE: u32 = 0;
const AT_REST: u32 = 1;
const EVERY_BLOCK: u8 = 0;
const RUNS: u8 = 1;
const ALL_WORDS: u8 = 2;

/// What is known of a tracker without its sets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// Its name.
    pub name: Name,
    /// Bytes of a block, as a power of two.
    pub log2: u32,
    /// The number of its next generation.
    pub next: u64,
}

/// A moment, in seconds since 1970 and nanoseconds.
pub type Time = (i64, u32);

/// What a file shows to whoever did not write to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Its inode.
    pub inode: u64,
    /// Its length.
    pub len: u64,
    /// When its content changed last.
    pub modified: Time,
    /// When anything of it did.
    pub changed: Time,
}

/// What tells that nobody wrote to a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// CRC32 of its descriptor.
    pub descriptor: u32,
    /// The descriptor's stamp, and those of the layers, base first.
    pub files: Vec<Stamp>,
}

/// A generation of a tracker.
#[derive(Debug, Clone)]
pub struct Generation<W> {
    /// Its number.
    pub number: u64,
    /// Bytes that it had when it was sealed.
    pub bytes: u64,
    /// When that was, in seconds since 1970.
    pub since: u64,
    /// What it has.
    pub set: Arc<Blocks<W>>,
}

/// A tracker that nobody marks in.
#[derive(Debug, Clone)]
pub struct Resting<W> {
    /// What it is.
    pub noted: Noted,
    /// What it has recorded since its last seal.
    pub recording: Arc<Blocks<W>>,
    /// Its generations, in order.
    pub sealed: Vec<Generation<W>>,
}

/// The trackers of a disk.
#[derive(Debug)]
pub enum Stored<W> {
    /// Nobody knows what was written since.
    InUse(Vec<Noted>),
    /// They are complete, if nobody else wrote.
    AtRest {
        /// Bytes of the disk.
        size: u64,
        /// What tells whether somebody did.
        proof: Proof,
        /// The trackers.
        trackers: Vec<Resting<W>>,
    },
}

/// Writes them.
pub fn encode<W: Words>(stored: &Stored<W>, to: impl Write) -> Result<()> {
    let mut out = Output {
        to,
        crc: Hasher::new(),
    };
    out.put(&MAGIC)?;
    out.u32(VERSION)?;
    match stored {
        Stored::InUse(trackers) => {
            out.u32(IN_USE)?;
            out.count(trackers.len())?;
            trackers.iter().try_for_each(|noted| out.noted(noted))?;
        }
        Stored::AtRest {
            size,
            proof,
            trackers,
        } => {
            out.u32(AT_REST)?;
            out.u64(*size)?;
            out.proof(proof)?;
            out.count(trackers.len())?;
            trackers.iter().try_for_each(|one| out.resting(one))?;
        }
    }
    let crc = out.crc.clone().finalize();
    out.u32(crc)
}

/// Reads them; `make` gives so many words, all 0. Believe nothing of what an error came with.
pub fn decode<W: Words>(
    from: impl Read,
    make: impl FnMut(usize) -> Result<W>,
) -> Result<Stored<W>> {
    let mut input = Input {
        from,
        crc: Hasher::new(),
        make,
        words: 0,
    };
    if input.bytes::<8>()? != MAGIC {
        return Err(Error::damaged("it does not begin as trackers do"));
    }
    let version = input.u32()?;
    if version != VERSION {
        let what = format!("trackers of version {version}, which a newer ploop wrote");
        return Err(Error::unsupported(what));
    }
    let stored = match input.u32()? {
        IN_USE => Stored::InUse(input.trackers(Input::noted, |noted| noted)?),
        AT_REST => Stored::AtRest {
            size: input.u64()?,
            proof: input.proof()?,
            trackers: input.trackers(Input::resting, |resting| &resting.noted)?,
        },
        _ => return Err(Error::damaged("neither in use nor at rest")),
    };
    let crc = input.crc.clone().finalize();
    if input.u32()? != crc {
        return Err(Error::damaged("its checksum is wrong"));
    }
    match input.from.read(&mut [0]) {
        Ok(0) => Ok(stored),
        Ok(_) => Err(Error::damaged("there is something behind its end")),
        Err(e) => Err(e.into()),
    }
}

/// Where bytes go, and what they sum up to.
struct Output<T> {
    to: T,
    crc: Hasher,
}

impl<T: Write> Output<T> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.crc.update(bytes);
        Ok(self.to.write_all(bytes)?)
    }

    fn u32(&mut self, value: u32) -> Result<()> {
        self.put(&value.to_le_bytes())
    }

    fn u64(&mut self, value: u64) -> Result<()> {
        self.put(&value.to_le_bytes())
    }

    fn count(&mut self, count: usize) -> Result<()> {
        self.u32(u32::try_from(count).map_err(|_| Error::invalid("too many to be stored"))?)
    }

    fn time(&mut self, (seconds, nanoseconds): Time) -> Result<()> {
        self.put(&seconds.to_le_bytes())?;
        self.u32(nanoseconds)
    }

    fn proof(&mut self, proof: &Proof) -> Result<()> {
        self.u32(proof.descriptor)?;
        self.count(proof.files.len())?;
        for stamp in &proof.files {
            self.u64(stamp.inode)?;
            self.u64(stamp.len)?;
            self.time(stamp.modified)?;
            self.time(stamp.changed)?;
        }
        Ok(())
    }

    fn noted(&mut self, noted: &Noted) -> Result<()> {
        let name = noted.name.as_ref().as_bytes();
        self.put(&[name.len() as u8])?;
        self.put(name)?;
        self.put(&[noted.log2 as u8])?;
        self.u64(noted.next)
    }

    fn resting<W: Words>(&mut self, tracker: &Resting<W>) -> Result<()> {
        self.noted(&tracker.noted)?;
        self.set(&tracker.recording)?;
        self.count(tracker.sealed.len())?;
        for generation in &tracker.sealed {
            self.u64(generation.number)?;
            self.u64(generation.bytes)?;
            self.u64(generation.since)?;
            self.set(&generation.set)?;
        }
        Ok(())
    }

    /// In whichever form is shorter: a run takes as much as a word.
    fn set<W: Words>(&mut self, set: &Blocks<W>) -> Result<()> {
        let words = set.words().count();
        self.count(words)?;
        self.u64(set.words().load(0))?;
        if set.is_all() {
            return self.put(&[EVERY_BLOCK]);
        }
        let runs = || set.runs(0..((words as u64 - 1) * 64) << set.log2());
        let count = runs().count();
        if count >= words - 1 {
            self.put(&[ALL_WORDS])?;
            return (1..words).try_for_each(|i| self.u64(set.words().load(i)));
        }
        self.put(&[RUNS])?;
        self.count(count)?;
        for run in runs() {
            // A set has at most 2^29 blocks.
            self.u32((run.start >> set.log2()) as u32)?;
            self.u32(((run.end - run.start) >> set.log2()) as u32)?;
        }
        Ok(())
    }
}

/// Where bytes come from, what they sum up to, and what they have taken.
struct Input<T, M> {
    from: T,
    crc: Hasher,
    make: M,
    /// Of all sets so far.
    words: usize,
}

impl<T: Read, M> Input<T, M> {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.from.read_exact(bytes).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => Error::damaged("it ends too early"),
            _ => e.into(),
        })?;
        self.crc.update(bytes);
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.bytes()?))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn count(&mut self, allowed: RangeInclusive<usize>, what: &str) -> Result<usize> {
        let count = self.u32()? as usize;
        match allowed.contains(&count) {
            true => Ok(count),
            false => Err(Error::damaged(format!(
                "{count} {what}, not {} to {}",
                allowed.start(),
                allowed.end()
            ))),
        }
    }

    fn time(&mut self) -> Result<Time> {
        Ok((i64::from_le_bytes(self.bytes()?), self.u32()?))
    }

    fn proof(&mut self) -> Result<Proof> {
        let descriptor = self.u32()?;
        let count = self.count(0..=FILES_MAX, "files")?;
        let mut stamp = || {
            Ok(Stamp {
                inode: self.u64()?,
                len: self.u64()?,
                modified: self.time()?,
                changed: self.time()?,
            })
        };
        let files = (0..count).map(|_| stamp()).collect::<Result<_>>()?;
        Ok(Proof { descriptor, files })
    }

    /// Trackers, in the order of their names.
    fn trackers<K>(
        &mut self,
        one: impl Fn(&mut Self) -> Result<K>,
        noted: impl Fn(&K) -> &Noted,
    ) -> Result<Vec<K>> {
        let count = self.count(0..=TRACKERS_MAX, "trackers")?;
        let all = (0..count).map(|_| one(self)).collect::<Result<Vec<_>>>()?;
        match all.is_sorted_by(|a, b| noted(a).name < noted(b).name) {
            true => Ok(all),
            false => Err(Error::damaged("its trackers are not in order")),
        }
    }

    fn noted(&mut self) -> Result<Noted> {
        let mut name = vec![0; self.u8()?.into()];
        self.fill(&mut name)?;
        let name = String::from_utf8(name).map_err(|_| Error::damaged("a name that is no text"))?;
        let (log2, next) = (self.u8()?.into(), self.u64()?);
        if !LOG2.contains(&log2) || next > NUMBER_MAX {
            return Err(Error::damaged("a tracker as none can be"));
        }
        Ok(Noted {
            name: Name::try_from(name).map_err(|e| Error::damaged(e.to_string()))?,
            log2,
            next,
        })
    }

    fn resting<W: Words>(&mut self) -> Result<Resting<W>>
    where
        M: FnMut(usize) -> Result<W>,
    {
        let noted = self.noted()?;
        let recording = self.set(noted.log2)?;
        let count = self.count(0..=GENERATIONS_MAX, "generations")?;
        let mut generation = || {
            Ok(Generation {
                number: self.u64()?,
                bytes: self.u64()?,
                since: self.u64()?,
                set: self.set(noted.log2)?,
            })
        };
        let sealed = (0..count).map(|_| generation());
        let sealed: Vec<Generation<W>> = sealed.collect::<Result<_>>()?;
        let in_order = sealed.is_sorted_by(|a, b| a.number < b.number);
        if !in_order || sealed.last().is_some_and(|last| last.number >= noted.next) {
            return Err(Error::damaged("its generations are not in order"));
        }
        Ok(Resting {
            noted,
            recording,
            sealed,
        })
    }

    fn set<W: Words>(&mut self, log2: u32) -> Result<Arc<Blocks<W>>>
    where
        M: FnMut(usize) -> Result<W>,
    {
        let words = self.count(2..=SET_WORDS_MAX as usize, "words of a set")?;
        self.words += words;
        if self.words > WORDS_MAX {
            return Err(Error::new(
                Kind::Damaged,
                format!("its sets have more than {WORDS_MAX} words"),
            ));
        }
        let (first, form) = (self.u64()?, self.u8()?);
        let set = Blocks::new((self.make)(words)?, log2)?;
        set.words().add(0, first);
        match form {
            EVERY_BLOCK if set.is_all() => {}
            RUNS if !set.is_all() => self.runs(&set)?,
            ALL_WORDS if !set.is_all() => {
                for i in 1..words {
                    set.words().add(i, self.u64()?);
                }
            }
            _ => return Err(Error::damaged("a set of no known form")),
        }
        Ok(Arc::new(set))
    }

    fn runs<W: Words>(&mut self, set: &Blocks<W>) -> Result<()> {
        let words = set.words().count() - 1;
        let (bits, mut free) = (words as u64 * 64, 0);
        for _ in 0..self.count(0..=words, "runs")? {
            let (first, len) = (u64::from(self.u32()?), u64::from(self.u32()?));
            if first < free || len == 0 || first + len > bits {
                return Err(Error::damaged(
                    "runs that are not in order, or not in their set",
                ));
            }
            set.add(first << set.log2(), len << set.log2());
            free = first + len;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::memfd::SharedWords;

    fn set(words: usize, log2: u32, ranges: &[(u64, u64)]) -> Arc<Blocks<SharedWords>> {
        let set = Blocks::new(SharedWords::create(words).unwrap(), log2).unwrap();
        for (first, len) in ranges {
            set.add(first << log2, len << log2);
        }
        Arc::new(set)
    }

    fn noted(name: &str, log2: u32, next: u64) -> Noted {
        let name = name.parse().unwrap();
        Noted { name, log2, next }
    }

    /// Sets of every form, on a disk that has outgrown one of them.
    fn at_rest() -> Stored<SharedWords> {
        let stamp = |n: u64| Stamp {
            inode: n,
            len: n << 20,
            modified: (-1, 999_999_999),
            changed: (n as i64, 7),
        };
        let every_other: Vec<(u64, u64)> = (0..320).map(|n| (n * 2, 1)).collect();
        let all = set(100, 12, &[]);
        all.add_all();
        let generation = |number, set| Generation {
            number,
            bytes: number << 12,
            since: 1_700_000_000 + number,
            set,
        };
        let sealed = vec![
            generation(0, all),
            generation(4, set(11, 12, &every_other)),
            generation(5, set(11, 12, &[(0, 640), (700, 1)])),
        ];
        Stored::AtRest {
            size: 5 << 30,
            proof: Proof {
                descriptor: 0xabcd_0123,
                files: (1..=4).map(stamp).collect(),
            },
            trackers: vec![
                Resting {
                    noted: noted("a", 12, 6),
                    recording: set(11, 12, &[(3, 5), (9, 1), (63, 2), (639, 1)]),
                    sealed,
                },
                Resting {
                    noted: noted("b-_9", 20, 1),
                    recording: set(2, 20, &[]),
                    sealed: Vec::new(),
                },
            ],
        }
    }

    fn bytes(stored: &Stored<SharedWords>) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(stored, &mut bytes).unwrap();
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Stored<SharedWords>> {
        decode(bytes, SharedWords::create)
    }

    /// With a checksum that is right.
    fn sign(bytes: &mut [u8]) {
        let (text, sum) = bytes.split_at_mut(bytes.len() - 4);
        sum.copy_from_slice(&crc32fast::hash(text).to_le_bytes());
    }

    #[test]
    fn what_was_stored_is_read_back() {
        let names = vec![noted("x", 16, 0), noted("y", 12, NUMBER_MAX)];
        let Stored::InUse(found) = read(&bytes(&Stored::InUse(names.clone()))).unwrap() else {
            panic!("in use");
        };
        assert_eq!(found, names);
        let (stored, written) = (at_rest(), bytes(&at_rest()));
        let (
            Stored::AtRest {
                size,
                proof,
                trackers,
            },
            Stored::AtRest {
                size: wanted_size,
                proof: wanted_proof,
                trackers: wanted,
            },
        ) = (read(&written).unwrap(), stored)
        else {
            panic!("at rest");
        };
        assert_eq!((size, proof), (wanted_size, wanted_proof));
        assert_eq!(trackers.len(), wanted.len());
        for (found, wanted) in trackers.iter().zip(&wanted) {
            assert_eq!(found.noted, wanted.noted);
            let sets = |tracker: &Resting<SharedWords>| {
                let sealed = tracker.sealed.iter();
                let sealed = sealed.map(|g| (g.number, g.bytes, g.since, Arc::clone(&g.set)));
                let recording = (9, 9, 9, Arc::clone(&tracker.recording));
                sealed.chain([recording]).collect::<Vec<_>>()
            };
            for (found, wanted) in sets(found).iter().zip(sets(wanted)) {
                assert_eq!((found.0, found.1, found.2), (wanted.0, wanted.1, wanted.2));
                let (found, wanted) = (&found.3, &wanted.3);
                assert_eq!(found.words().count(), wanted.words().count());
                assert_eq!(found.is_all(), wanted.is_all());
                let runs = |set: &Blocks<SharedWords>| set.runs(0..10 << 30).collect::<Vec<_>>();
                assert_eq!(runs(found), runs(wanted));
            }
        }
    }

    #[test]
    fn a_set_takes_no_more_than_its_words_and_little_where_little_was_written() {
        let len = |ranges: &[(u64, u64)]| {
            let recording = set(1001, 12, ranges);
            let noted = noted("a", 12, 1);
            bytes(&Stored::AtRest {
                size: 0,
                proof: Proof {
                    descriptor: 0,
                    files: Vec::new(),
                },
                trackers: vec![Resting {
                    noted,
                    recording,
                    sealed: Vec::new(),
                }],
            })
            .len()
        };
        let every_other: Vec<(u64, u64)> = (0..32_000).map(|n| (n * 2, 1)).collect();
        let none = len(&[]);
        assert_eq!(len(&[(0, 64_000)]), none + 8);
        assert_eq!(len(&every_other[..999]), none + 999 * 8);
        assert_eq!(
            len(&every_other),
            none + 1000 * 8 - 4,
            "words have no count"
        );
    }

    #[test]
    fn every_flipped_bit_and_every_lost_end_is_refused() {
        for whole in [
            bytes(&at_rest()),
            bytes(&Stored::InUse(vec![noted("x", 16, 9)])),
        ] {
            for len in 0..whole.len() {
                let kind = read(&whole[..len]).map(|_| ()).unwrap_err().kind();
                assert_eq!(kind, Kind::Damaged, "the first {len} bytes");
            }
            for bit in 0..whole.len() * 8 {
                let mut flipped = whole.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(read(&flipped).is_err(), "bit {bit}");
            }
            let longer = [whole, vec![0]].concat();
            assert_eq!(read(&longer).unwrap_err().kind(), Kind::Damaged);
        }
    }

    #[test]
    fn what_no_disk_can_have_is_refused_though_its_checksum_is_right() {
        let words = |recording| Stored::AtRest {
            size: 0,
            proof: Proof {
                descriptor: 0,
                files: Vec::new(),
            },
            trackers: vec![Resting {
                noted: noted("a", 12, 1),
                recording,
                sealed: Vec::new(),
            }],
        };
        // 8 magic, 4 version, 4 state, 8 size, 4 descriptor, 4 files, 4 trackers, 1 length, 1 name, 1, 8.
        let recording = 47;
        for (what, at, value) in [
            ("no words", recording, 0u32),
            ("one word", recording, 1),
            ("too many words", recording, (8 << 20) + 1),
            ("runs behind the end", recording + 17, 640),
            ("an empty run", recording + 21, 0),
            ("runs out of order", recording + 25, 4),
            ("more runs than words", recording + 13, 11),
            ("a block of 8 MiB", 38, 23),
        ] {
            let mut bytes = bytes(&words(set(11, 12, &[(3, 5), (9, 1)])));
            read(&bytes).unwrap();
            match what {
                "a block of 8 MiB" => bytes[at] = value as u8,
                _ => bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()),
            }
            sign(&mut bytes);
            let kind = read(&bytes).map(|_| ()).unwrap_err().kind();
            assert_eq!(kind, Kind::Damaged, "{what}");
        }
        let twice = vec![noted("x", 16, 9), noted("x", 16, 9)];
        assert!(read(&bytes(&Stored::InUse(twice))).is_err());
        let nine = (0..9).map(|n| noted(&n.to_string(), 16, 9)).collect();
        assert!(read(&bytes(&Stored::InUse(nine))).is_err());
    }

    #[test]
    fn no_more_memory_is_taken_than_trackers_may_have() {
        let one = |n: u64| Resting {
            noted: noted(&n.to_string(), 12, 9),
            recording: set(2, 12, &[]),
            sealed: (0..2)
                .map(|number| Generation {
                    number,
                    bytes: 0,
                    since: 0,
                    set: set(2, 12, &[]),
                })
                .collect(),
        };
        let mut large = bytes(&Stored::AtRest {
            size: 0,
            proof: Proof {
                descriptor: 0,
                files: Vec::new(),
            },
            trackers: (0..8).map(one).collect(),
        });
        // Each says that it has as many words as one may have.
        let (small, most) = ([2, 0, 0, 0, 0, 0, 0, 0], (8u32 << 20).to_le_bytes());
        for at in 0..large.len() - 8 {
            if large[at..at + 8] == small && large[at + 12] == 1 {
                large[at..at + 4].copy_from_slice(&most);
            }
        }
        sign(&mut large);
        let mut taken = 0;
        let counted = |words| {
            taken += words;
            SharedWords::create(words)
        };
        let no = decode(&large[..], counted).unwrap_err();
        assert_eq!(no.kind(), Kind::Damaged);
        assert_eq!(taken, WORDS_MAX);
    }
}
