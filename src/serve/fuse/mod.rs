//! A device as one regular file, over FUSE, for a loop device to stand on.
//!
//! The mount root *is* the file: a mount covers an empty regular file and has no directory. The
//! server is hand-written because a worker must be able to start in the middle of a session: what
//! INIT agreed on is a value ([`Session`]), made once by whoever keeps the `/dev/fuse` descriptor.
//!
//! The life of a mount, and who does what:
//!
//! 1. keeper: [`mount()`], then [`Session::handshake`];
//! 2. worker: [`resend`] if it is not the first, then [`serve`];
//! 3. keeper: attaches a loop device ([`crate::serve::loopdev`]), never before a worker serves,
//!    because attaching asks for attributes and statistics;
//! 4. keeper: detaches, [`unmount`]s; the worker's [`serve`] returns [`End::Unmounted`].
//!
//! Every descriptor of a session is opened by the keeper and outlives the worker: the kernel
//! aborts a session when its last descriptor is closed, and that is also how a keeper gives up.
mod abi;
mod mount;
mod pool;
mod request;
mod server;
mod session;

pub use mount::{Mount, abort, mount, unmount};
pub use server::{End, serve};
pub use session::{Session, resend};
