//! Any bytes as stored trackers: refused, or read back as they were written, in bounded memory.

use crate::io::memfd::SharedWords;
use crate::tracker::Blocks;
use crate::tracker::stored::{
    Generation, Noted, Proof, Resting, Stamp, Stored, WORDS_MAX, decode, encode,
};
use ploop_formats::{Error, Kind, Result};
use std::sync::Arc;

/// Words of one set here: what is larger is for a test of its own.
const WORDS: usize = 1 << 12;

/// One file: as it is, and with a checksum that is right.
pub fn run(input: &[u8]) {
    read_back(input);
    let Some(end) = input.len().checked_sub(4) else {
        return;
    };
    let mut signed = input.to_vec();
    let (text, sum) = signed.split_at_mut(end);
    sum.copy_from_slice(&crc32fast::hash(text).to_le_bytes());
    read_back(&signed);
}

fn read(bytes: &[u8]) -> Result<Stored<SharedWords>> {
    let mut taken = 0;
    decode(bytes, |words| {
        taken += words;
        assert!(taken <= WORDS_MAX, "{taken} words");
        match words > WORDS {
            true => Err(Error::new(Kind::Busy, "too large here")),
            false => SharedWords::create(words),
        }
    })
}

fn bytes(stored: &Stored<SharedWords>) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(stored, &mut bytes).expect("what was read can be written");
    bytes
}

fn read_back(input: &[u8]) {
    let Ok(stored) = read(input) else {
        return;
    };
    let once = bytes(&stored);
    assert!(once.len() <= input.len(), "the shorter form is written");
    let again = read(&once).expect("what we wrote reads back");
    assert_eq!(bytes(&again), once);
}

/// Names alone, and sets of every form.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let noted = |name: &str| Noted {
        name: name.parse().expect("a name"),
        log2: 12,
        next: 9,
    };
    let set = |step: usize| {
        let words = SharedWords::create(9).expect("memory");
        let set = Blocks::new(words, 12).expect("a set");
        for block in (0..512).step_by(step) {
            set.add(block << 12, 5000);
        }
        Arc::new(set)
    };
    let all = set(1);
    all.add_all();
    let generations = [(0, all), (3, set(4)), (8, set(100))].into_iter();
    let sealed = generations.map(|(number, set)| Generation {
        number,
        bytes: 512 << 12,
        since: 1_700_000_000,
        set,
    });
    let stamp = Stamp {
        inode: 12,
        len: 1 << 20,
        modified: (1_700_000_000, 5),
        changed: (1_700_000_000, 5),
    };
    let at_rest = Stored::AtRest {
        size: 2 << 20,
        proof: Proof {
            descriptor: 7,
            files: vec![stamp; 3],
        },
        trackers: vec![Resting {
            noted: noted("b0"),
            recording: set(200),
            sealed: sealed.collect(),
        }],
    };
    let in_use = Stored::InUse(vec![noted("a"), noted("b")]);
    vec![
        ("in-use".into(), bytes(&in_use)),
        ("at-rest".into(), bytes(&at_rest)),
    ]
}
