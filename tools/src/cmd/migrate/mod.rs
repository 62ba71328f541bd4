//! `migrate`: a disk goes to another host, and what to do when that was cut off.

mod receive;
mod resolve;
mod send;
mod stream;

use crate::answer::Answer;
use crate::global::Global;
use ploop::Result;

pub const EXAMPLES: &str = "\
Example: ploopctl migrate send /var/lib/ct/100 -- ssh host ploopctl migrate receive /var/lib/ct/100

Over a socket:
  ploopctl migrate receive /srv/100 --listen unix:/run/100.sock
  ploopctl migrate send /var/lib/ct/100 --to unix:/run/100.sock

When it was cut off:
  ploopctl migrate resolve /var/lib/ct/100";

/// Move a disk to another host, with its snapshots, over any stream of bytes
///
/// The disk can be used on one side at most at any moment, and one side has all of it. When the link
/// is cut, the same two commands go on where it ended.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

/// What to do.
#[derive(Debug, clap::Subcommand)]
enum Verb {
    #[command(
        after_help = "Example: ploopctl migrate send /var/lib/ct/100 -- ssh host ploopctl migrate receive \
                      /var/lib/ct/100"
    )]
    Send(send::Args),
    #[command(
        after_help = "Example: ploopctl migrate receive /srv/100 --listen unix:/run/100.sock"
    )]
    Receive(receive::Args),
    #[command(after_help = "Example: ploopctl migrate resolve /var/lib/ct/100")]
    Resolve(resolve::Args),
}

/// An answer, on standard error where standard output is the link.
fn said(answer: Answer, is_stdout: bool, global: &Global) -> Answer {
    match is_stdout {
        true => answer.aside(global.output),
        false => answer,
    }
}

/// Does it.
pub fn run(args: Args, global: &Global) -> Result<Answer> {
    match args.verb {
        Verb::Send(args) => send::run(&args, global),
        Verb::Receive(args) => receive::run(&args, global),
        Verb::Resolve(args) => resolve::run(&args),
    }
}
