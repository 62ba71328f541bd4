//! Any bytes as stored trackers: refused, or read back as they were written.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ploop::testkit::fuzz::run("stored_trackers", input));
