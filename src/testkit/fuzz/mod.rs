//! Fuzz targets: what a stranger's bytes are fed to, and the bytes to start from.
//!
//! A fuzzer calls [`Target::run`] with whatever it makes up; a plain test calls it with the seeds
//! and with mutations of them. A target panics when a promise is broken, and only then.

mod control;
mod image;
mod migration;
mod nbd;
mod ops;
mod qcow2;
mod text;
mod trackers;

use ploop_formats::testkit::rng::Rng;

/// One fuzz target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: that of its file, its corpus and its artifacts.
    pub name: &'static str,
    /// Feeds it an input.
    pub run: fn(&[u8]),
    /// First inputs, each with a name.
    pub seeds: fn() -> Vec<(String, Vec<u8>)>,
}

/// All of them.
pub const TARGETS: [Target; 10] = [
    Target {
        name: "ploop_open",
        run: image::run,
        seeds: image::seeds,
    },
    Target {
        name: "layer_ops",
        run: ops::run,
        seeds: ops::seeds,
    },
    Target {
        name: "descriptor",
        run: text::run,
        seeds: text::seeds,
    },
    Target {
        name: "nbd_handshake",
        run: nbd::handshake,
        seeds: nbd::handshake_seeds,
    },
    Target {
        name: "nbd_transmission",
        run: nbd::transmission,
        seeds: nbd::transmission_seeds,
    },
    Target {
        name: "control_socket",
        run: control::run,
        seeds: control::seeds,
    },
    Target {
        name: "qcow2_open",
        run: qcow2::open,
        seeds: qcow2::images,
    },
    Target {
        name: "migration",
        run: migration::run,
        seeds: migration::seeds,
    },
    Target {
        name: "qcow2_ops",
        run: qcow2::requests,
        seeds: qcow2::seeds,
    },
    Target {
        name: "stored_trackers",
        run: trackers::run,
        seeds: trackers::seeds,
    },
];

/// Feeds the target of this name.
///
/// # Panics
/// When there is none, or when the input breaks a promise.
pub fn run(name: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("a target of that name").run)(input);
}

/// Values that have been somebody's mistake before.
const EXTREMES: [u64; 8] = [
    0,
    1,
    64,
    1 << 15,
    1 << 29,
    1 << 31,
    u32::MAX as u64,
    u64::MAX,
];

/// `bytes` with a few things changed, as a fuzzer would.
pub fn mutate(bytes: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..rng.range(1, 6) {
        if out.is_empty() {
            out.push(rng.next() as u8);
        }
        // What decides is mostly at the start.
        let reach = if rng.one_in(2) {
            out.len().min(256)
        } else {
            out.len()
        };
        let at = rng.below(reach as u64) as usize;
        let end = (at + rng.range(1, 32) as usize).min(out.len());
        match rng.below(6) {
            0 => out[at] ^= 1 << rng.below(8),
            1 => out[at] = rng.next() as u8,
            2 => drop(out.drain(at..end)),
            3 => {
                let piece = out[at..end].to_vec();
                out.splice(at..at, piece);
            }
            4 => out.truncate(at),
            _ => {
                let value = *rng.pick(&EXTREMES);
                let ordered = if rng.one_in(2) {
                    value.to_be_bytes()
                } else {
                    value.to_le_bytes()
                };
                let width = (end - at).min(8);
                let from = if ordered[0] == 0 { 8 - width } else { 0 };
                out[at..at + width].copy_from_slice(&ordered[from..from + width]);
            }
        }
    }
    out
}
