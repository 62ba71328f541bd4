//! `migrate receive`: the side that makes the disk anew.

use super::stream::{self, Address, Ends};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use ploop::formats::progress::Watch;
use ploop::io::exec::{self, Engine};
use ploop::io::folder::DirFolder;
use ploop::migrate::frame::Frame;
use ploop::migrate::incoming::Incoming;
use ploop::migrate::link::Link;
use ploop::migrate::receive::Receiver;
use ploop::migrate::talk::{self, ToSource, ToTarget};
use ploop::sandbox;
use ploop::{Error, Kind, Result};
use serde_json::json;
use std::path::PathBuf;

/// Take a disk from another host
///
/// It can be used when this says so, and not before: until then its descriptor has another name. What came
/// before the link was cut stays, and the same command goes on with it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory of the disk; must not exist, be empty, or hold what was received of the same disk
    #[arg(value_name = "DIR")]
    to: PathBuf,
    /// Wait for `migrate send` on this socket, unix:PATH; without it the link is standard input and output
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<Address>,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let incoming = Incoming::new(&args.to)?;
    let mut meter = Meter::new(global.progress, &cancel);
    let Ends {
        input,
        out,
        is_stdout,
    } = match &args.listen {
        Some(address) => stream::listen(address, &cancel)?,
        None => stream::own()?,
    };
    match sandbox::enter_all(&incoming.places()) {
        Err(e) if e.kind() != Kind::Unsupported => return Err(e),
        _ => {}
    }
    let goes_on = || cancel.check();
    let mut link = Link::new(input, out, &goes_on)?;
    let received = exec::run(Engine::detect().0, async {
        let received = receive(incoming.folder(), &mut link, &mut meter).await;
        if let Err(e) = &received {
            let message = e.to_string();
            let _ = link.write(&talk::frame(&ToSource::Failed { message })?);
        }
        received
    })?;
    let deltas = received.map_err(|e| e.at(incoming.path().display()))?;
    let path = incoming.path().display();
    let text = format!("{path}: received, {deltas} deltas; it can be used here");
    let json = json!({ "path": path.to_string(), "deltas": deltas });
    Ok(super::said(Answer::new(text, json), is_stdout, global))
}

/// Receives a disk; how many deltas it has.
async fn receive(folder: &DirFolder, link: &mut Link<'_>, watch: &mut dyn Watch) -> Result<usize> {
    let gone = || Error::new(Kind::Io, "the other side is gone");
    let hello = match link.next()?.ok_or_else(gone)? {
        Frame::Message(text) => talk::parse(&text)?,
        Frame::Data { .. } | Frame::Zero { .. } => {
            return Err(Error::new(Kind::Io, "the other side did not greet"));
        }
    };
    let ToTarget::Hello(hello) = hello else {
        return Err(Error::new(Kind::Io, "the other side did not greet"));
    };
    let (mut receiver, welcome) = Receiver::begin(folder, hello).await?;
    link.write(&talk::frame(&welcome)?)?;
    while !receiver.is_done() {
        let taken = match link.next() {
            Ok(Some(frame)) => receiver.take(frame, watch).await,
            Ok(None) => Err(gone()),
            Err(e) => Err(e),
        };
        match taken {
            Ok(Some(answer)) => link.write(&talk::frame(&answer)?)?,
            Ok(None) => {}
            Err(e) => return Err(receiver.explain(e)),
        }
    }
    Ok(receiver.disk().shots().len())
}
