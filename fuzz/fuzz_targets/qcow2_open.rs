//! Any bytes as a qcow2 image: read, repaired and written, or refused.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ploop::testkit::fuzz::run("qcow2_open", input));
