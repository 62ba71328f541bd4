//! Any bytes of a client behind its negotiation, to a whole server.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ploop::testkit::fuzz::run("nbd_transmission", input));
