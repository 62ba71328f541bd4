//! Any bytes as a delta: no panic, no hang, no memory beyond what the file itself can justify.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ploop::testkit::fuzz::run("ploop_open", input));
