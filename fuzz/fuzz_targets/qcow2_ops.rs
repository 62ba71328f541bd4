//! Any bytes as changes of a made qcow2 image and requests to it.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ploop::testkit::fuzz::run("qcow2_ops", input));
