//! `migrate send`: the side that has the disk.

use super::super::confine;
use super::super::convert::refuse_in_use;
use super::super::snapshot::mount;
use super::stream::{self, Address, Ends};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::{rate, size};
use ploop::image::detached::{self, Detached};
use ploop::image::snapshot::copy::Work;
use ploop::image::witness;
use ploop::migrate::link::Link;
use ploop::migrate::send::Sender;
use ploop::sandbox::Files;
use ploop::{Error, Result};
use serde_json::json;
use std::num::NonZeroU64;
use std::path::PathBuf;

/// Give a disk that is not attached to another host
///
/// What each delta holds is sent once, base first. When the other side has all, checked, the disk is
/// sealed here: no command opens it until `migrate resolve` says otherwise. An error before leaves it as
/// it was.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, or its DiskDescriptor.xml
    disk: PathBuf,
    /// Socket that `migrate receive` listens on, as unix:PATH; without it, and without a command, the
    /// link is standard input and output
    #[arg(long, value_name = "ADDRESS", conflicts_with = "command")]
    to: Option<Address>,
    /// Bytes a second to send at most
    #[arg(long, value_name = "BYTES", value_parser = rate::parse)]
    rate: Option<NonZeroU64>,
    /// Command whose standard input and output are the link
    #[arg(last = true)]
    command: Vec<String>,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let target = detached::resolve(&args.disk)?;
    mount::refuse_view(&target)?;
    refuse_in_use(&target, false)?;
    let place = |e: Error| e.at(target.path().display());
    let dir = target.open_dir()?;
    let looked_at = dir.try_clone()?;
    // Whoever locks the disk to write takes it away.
    let begun = witness::stored(&dir)?;
    let mut meter = Meter::new(global.progress, &cancel);
    let Ends {
        input,
        out,
        is_stdout,
    } = match (&args.to, args.command.is_empty()) {
        (Some(address), _) => stream::to(address)?,
        (None, false) => stream::of_command(&args.command)?,
        (None, true) => stream::own()?,
    };
    confine(&dir, Files::Change)?;
    let disk = Detached::take(dir).map_err(place)?;
    let goes_on = || cancel.check();
    let mut link = Link::new(input, out, &goes_on)?;
    let pace = rate::limit(args.rate, &cancel);
    let mut work = Work::new(&mut meter, &pace);
    let sent = disk.run(async {
        let seen = |disk: &_| witness::of(&looked_at, disk);
        let sender = Sender::prepare(disk.folder(), begun.as_deref(), seen).await?;
        sender.send(&mut link, &mut work).await
    });
    let sent = sent.map_err(place)?;
    link.end();
    let path = target.path().display();
    let text = format!(
        "{path}: gone, {} deltas, {} sent; it is sealed here, and `ploopctl migrate resolve {path} --delete` \
         removes it",
        sent.deltas,
        size::show(sent.bytes)
    );
    let json = json!({
        "path": path.to_string(),
        "deltas": sent.deltas,
        "bytes": sent.bytes,
    });
    Ok(super::said(Answer::new(text, json), is_stdout, global))
}
