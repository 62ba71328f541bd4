//! Any bytes of a client of the control socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ploop::testkit::fuzz::run("control_socket", input));
