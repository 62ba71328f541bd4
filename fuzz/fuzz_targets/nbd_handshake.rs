//! Any bytes of a client that negotiates.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ploop::testkit::fuzz::run("nbd_handshake", input));
