//! Every bound on what a client may ask for or hold, each with its reason.

use ploop_formats::limits::TRANSFER_MAX;
use std::time::Duration;

/// Bytes in one payload. The protocol asks for at least 32 MiB and so do devices; a client that
/// sends more is disconnected, one that asks to read more is refused.
pub const PAYLOAD_MAX: u64 = TRANSFER_MAX;
/// Bytes in an export name or a query: the longest string of the protocol.
pub const NAME_MAX: usize = 4096;
/// Bytes of data with one option: a name of 4096 bytes and a dozen long queries.
pub const OPTION_DATA_MAX: u32 = 64 << 10;
/// Options in one negotiation. Real clients send fewer than ten.
pub const OPTIONS_MAX: u32 = 32;
/// Bytes of an error text: the longest string of the protocol.
pub const TEXT_MAX: usize = 4096;
/// Connections in negotiation at once. They are anonymous and cost little; the oldest makes room.
pub const HANDSHAKES_MAX: usize = 64;
/// Time for a whole negotiation. Real clients need milliseconds.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Negotiated connections at once unless the caller says otherwise: clients open four to eight.
pub const CONNECTIONS_DEFAULT: usize = 16;
/// Requests admitted and not yet answered, per connection. Linux sends at most 128.
pub const REQUESTS_IN_FLIGHT: usize = 128;
/// Bytes of payload, either way, admitted and not yet answered, per connection: nbdcopy's queue of
/// 64 by 256 KiB. A larger request goes alone.
pub const BYTES_IN_FLIGHT: usize = 16 << 20;
/// Extents in one block status reply: a chunk of 1 MiB, as QEMU sends at most.
pub const EXTENTS_MAX: usize = 131_072;
/// Contexts that a connection can have.
pub const CONTEXTS_MAX: usize = 16;
/// Bytes received at once between requests: a queue of 32 writes of 4 KiB arrives in one piece.
pub const RECEIVE_BUFFER: usize = 256 << 10;
/// A write payload from this size on is bulk: it is received where it stays.
pub const BULK: usize = 32 << 10;
/// Bytes received at once after bulk, so that little of the next payload is copied.
pub const BULK_WINDOW: usize = 4096;
/// Parts in one send. The kernel takes 1024 (IOV_MAX); a reply has two.
pub const BATCH_PARTS: usize = 512;
/// Bytes after which no further reply joins a send, so that answers leave while others are made.
pub const BATCH_BYTES: usize = 256 << 10;
/// Answers after which no further request is looked at before they are sent: the client works on
/// them while others are made.
pub const BATCH_REPLIES: usize = 16;
/// Bytes of payload buffers that a connection keeps for reuse: a queue of 8 by 1 MiB, twice.
pub const POOL_BYTES: usize = 16 << 20;
/// An idle connection gives its kept buffers back after this time.
pub const POOL_IDLE: Duration = Duration::from_secs(1);
/// Time to take another of the last replies, once a connection ends.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// Time to take all of them. The image is closed only then, and whoever stops the server waits.
pub const DRAIN_MAX: Duration = Duration::from_secs(30);
/// Pause after a failed accept (descriptors or memory are short), so that it does not spin.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Silence after which a TCP client is asked whether it is still there.
pub const TCP_IDLE: Duration = Duration::from_secs(60);
/// Time between two such questions.
pub const TCP_PROBE_EVERY: Duration = Duration::from_secs(10);
/// Questions without an answer after which it is gone.
pub const TCP_PROBES: u32 = 6;
/// Bytes of ciphertext received at once: four records of the largest.
pub const TLS_BUFFER: usize = 64 << 10;
/// The same before a client has shown who it is: its part of the handshake is a few kilobytes.
pub const TLS_HANDSHAKE_BUFFER: usize = 4 << 10;
/// Time for a client whose handshake failed to read why.
pub const TLS_LINGER: Duration = Duration::from_secs(1);
/// Bytes encrypted and not sent: while they leave, the client decrypts what left before.
pub const TLS_UNSENT: usize = 64 << 10;
