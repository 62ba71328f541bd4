//! Any bytes as requests to a disk in memory, judged by a flat array.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ploop::testkit::fuzz::run("layer_ops", input));
