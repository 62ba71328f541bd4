//! What sets of blocks say.

use super::*;
use crate::io::memfd::SharedWords;
use std::ops::Range;

fn blocks(size: u64, log2: u32) -> Blocks<SharedWords> {
    let words = SharedWords::create(words_for(size, log2).unwrap()).unwrap();
    Blocks::new(words, log2).unwrap()
}

/// Runs, by their first byte and the one behind them.
fn runs(set: &Blocks<SharedWords>, within: Range<u64>) -> Vec<(u64, u64)> {
    set.runs(within).map(|run| (run.start, run.end)).collect()
}

#[test]
fn what_is_added_is_found_to_the_block_and_no_further() {
    for log2 in LOG2 {
        let block = 1u64 << log2;
        let (size, mut model) = (300 * block, [false; 300]);
        let set = blocks(size, log2);
        for (at, len) in [
            (0, 1),
            (block - 1, 2),
            (62 * block + 5, 3 * block),
            (127 * block, 66 * block),
            (299 * block + 1, 1),
        ] {
            set.add(at, len);
            let touched = (at / block) as usize..=((at + len - 1) / block) as usize;
            model[touched].fill(true);
        }
        for (n, wanted) in (0u64..).zip(model) {
            assert_eq!(set.holds(n * block + block / 2), wanted, "{log2}: {n}");
        }
        let found: Vec<_> = runs(&set, 0..size);
        let joined = found.windows(2).all(|two| two[0].1 < two[1].0);
        assert!(joined, "{found:?}");
        let bytes = model.iter().filter(|is| **is).count() as u64 * block;
        assert_eq!((set.bytes(size), set.bytes(block)), (bytes, block));
        assert_eq!(
            runs(&set, block / 2..block / 2 + 7),
            [(block / 2, block / 2 + 7)]
        );
        assert_eq!(runs(&set, 5 * block..9 * block), []);
    }
}

#[test]
fn a_disk_that_outgrows_its_set_has_all_of_what_is_behind_once_that_is_touched() {
    let set = blocks(1 << 20, 16);
    let bits = ((set.words().len() as u64 - 1) * 64) << 16;
    let far = bits + (1 << 30);
    assert_eq!(runs(&set, 0..far), []);
    set.add(bits + 5, 1);
    assert_eq!(runs(&set, 0..far), [(bits, far)]);
    set.add(bits - 1, 2);
    assert_eq!(runs(&set, 0..far), [(bits - (1 << 16), far)]);
    assert_eq!(set.bytes(far), far - bits + (1 << 16));
    set.add_all();
    assert_eq!((runs(&set, 0..far), set.bytes(far)), (vec![(0, far)], far));
    assert!(set.is_all());
}

#[test]
fn one_set_takes_all_that_another_has_whatever_their_sizes() {
    for (mine, other) in [
        (1u64 << 30, 1u64 << 30),
        (1 << 30, 1 << 20),
        (1 << 20, 1 << 30),
    ] {
        let (into, from) = (blocks(mine, 16), blocks(other, 16));
        into.add(0, 1);
        for at in [5 << 16, (1 << 20) + 7, (1 << 30) - 1, 2 << 30] {
            from.add(at, 1);
        }
        into.add_those_of(&from);
        for at in [0, 5 << 16, (1 << 20) + 7, (1 << 30) - 1, 2 << 30] {
            assert!(into.holds(at), "{mine} from {other}: {at}");
        }
        assert!(!into.holds(1 << 16));
    }
}

#[test]
fn a_set_that_would_take_too_much_memory_is_refused() {
    let no = words_for(16 << 40, 12).unwrap_err().to_string();
    assert!(no.contains("larger ones"), "{no}");
    assert!(words_for(16 << 40, 16).is_ok() && words_for(u64::MAX, 20).is_err());
    assert!(words_for(1 << 30, 11).is_err() && words_for(1 << 30, 21).is_err());
    assert_eq!(words_for(0, 16).unwrap(), 2);
}
