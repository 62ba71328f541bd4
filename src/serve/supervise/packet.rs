//! Packet: one JSON value, and descriptors with it, over a socket pair between two of our processes.

use super::child::MESSAGE_MAX;
use ploop_formats::{Error, Result};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Descriptors with one message at most.
const FDS_MAX: usize = 4;

/// Sends a message, or fails: never waits. The other end may be gone, or not listen.
pub fn send(to: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let text = serde_json::to_vec(message).map_err(io::Error::from)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Error::invalid("more descriptors than a message takes"));
    }
    let data = [IoSlice::new(&text)];
    sendmsg(
        to,
        &data,
        &mut control,
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )
    .map(|_| ())
    .map_err(|e| io::Error::from(e).into())
}

/// The next message, if one is there; never waits. `NotFound` when the other end is gone.
pub fn receive<T: DeserializeOwned>(from: impl AsFd) -> Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buf = vec![0u8; MESSAGE_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let data = &mut [IoSliceMut::new(&mut buf)];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = match recvmsg(from, data, &mut control, flags) {
        Ok(got) => got.bytes,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(e) => return Err(io::Error::from(e).into()),
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            fds.extend(passed);
        }
    }
    let text = buf.get(..got).unwrap_or_default();
    if text.is_empty() {
        return Err(Error::new(
            ploop_formats::Kind::NotFound,
            "the other end is gone",
        ));
    }
    let message = serde_json::from_slice(text)
        .map_err(|e| Error::invalid(format!("a message of another process: {e}")))?;
    Ok(Some((message, fds)))
}
