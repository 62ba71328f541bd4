//! Any bytes as a descriptor: refused, or read back as it was written.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ploop::testkit::fuzz::run("descriptor", input));
