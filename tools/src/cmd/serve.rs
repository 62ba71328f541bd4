//! `serve`: a disk is served over NBD, in the foreground.
//!
//! ploopctl becomes ploopd by exec: the process that a socket activator started, and named in
//! LISTEN_PID, is the one that serves.

use super::{CacheArg, FormatArg, SandboxArg};
use crate::answer::Answer;
use crate::attach;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::report::Output;
use ploop::image::target::Target;
use ploop::io::room::KeepFree;
use ploop::serve::supervise::leftover;
use ploop::serve::supervise::message::{
    Announce, Cache, Destination, KeeperConfig, Listen, Mode, Tls,
};
use ploop::{Error, Kind, Result};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Serve a disk over NBD until SIGTERM or Ctrl-C
///
/// Prints where clients connect once they can. With sockets from a socket activator
/// (LISTEN_FDS), as in `nbdcopy [ ploopctl serve DISK ] FILE`, --nbd is not needed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare image file
    disk: PathBuf,
    /// unix:PATH, tcp:ADDR:PORT (tcp: may be left out), or - for one client on standard input and output
    ///
    /// An address off loopback needs TLS, see --tls-creds.
    #[arg(long, value_name = "WHERE", value_parser = parse_listen)]
    nbd: Option<Listen>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Serve a qcow2 image as it was at this snapshot that it keeps in itself, by name or ID; with
    /// --read-only
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// Folder with server-cert.pem and server-key.pem (mode 0600), as QEMU and nbdkit name them
    ///
    /// With ca-cert.pem in it, clients must show a certificate that this authority signed, and
    /// that ca-crl.pem, if there is one, does not revoke. Without it whoever can connect can use
    /// the disk. The files are read once, at the start.
    #[arg(long, value_name = "DIR", required_if_eq_any([("tls", "allow"), ("tls", "require")]))]
    tls_creds: Option<PathBuf>,
    /// Whether clients must use TLS, may, or cannot; with --tls-creds they must
    ///
    /// Where they may, somebody in between can make them go without.
    #[arg(long, value_name = "WHEN")]
    tls: Option<TlsArg>,
    /// Name of the export
    #[arg(long, default_value = "", value_name = "NAME")]
    export: String,
    /// Cache mode of the writable layer; `writeback` when neither this nor the settings say
    #[arg(long)]
    cache: Option<CacheArg>,
    /// Leave so much of the host's file system free: a size, a percentage, or 0
    ///
    /// With less, whatever needs new space fails with ENOSPC until there is more. Without this
    /// option 1G or 1% are left, whichever is more, but at most an eighth.
    #[arg(long, value_name = "SPACE", value_parser = super::keep_free)]
    keep_free: Option<KeepFree>,
    /// What the process that serves may do, should an image or a client take it over; `on` when
    /// neither this nor the settings say
    #[arg(long)]
    sandbox: Option<SandboxArg>,
    /// Format of a bare image file
    #[arg(long)]
    format: Option<FormatArg>,
}

/// What the help ends with.
pub const EXAMPLES: &str = "\
Example: ploopctl serve /var/lib/ct/100 --nbd unix:/run/ct-100.sock

Over a network:
  ploopctl serve /var/lib/ct/100 --nbd tcp:0.0.0.0:10809 --tls-creds /etc/pki/ploop
      and on the client, whose certificate is in a folder there:
      nbdinfo 'nbds://HOST/?tls-certificates=/etc/pki/client'";

/// Whether clients use TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum TlsArg {
    /// They cannot
    Off,
    /// They may
    Allow,
    /// They must
    Require,
}

/// Becomes ploopd; returns only on failure.
pub fn run(args: Args, global: &Global) -> Result<Answer> {
    super::check_snapshot(args.snapshot.as_deref(), args.read_only, args.format)?;
    let settings = global.settings()?;
    leftover::sweep()?;
    let target = Target::resolve(&args.disk, args.format.map(Into::into))?;
    super::convert::settle(&target, &Cancel::on_signals()?)?;
    let listen = match (inherited()?, args.nbd) {
        (Some(count), _) => Listen::Inherited(count),
        (None, Some(listen)) => absolute(listen)?,
        (None, None) => {
            let what =
                "say where with --nbd unix:PATH, tcp:ADDR:PORT or -, or pass sockets by LISTEN_FDS";
            return Err(Error::new(Kind::Usage, what));
        }
    };
    let tls = tls(args.tls, args.tls_creds)?;
    let announce = match &listen {
        Listen::Unix(_) | Listen::Tcp(_) => Announce::Stdout,
        Listen::Stdio | Listen::Inherited(_) => Announce::Nobody,
    };
    let config = KeeperConfig {
        disk: target.path().to_path_buf(),
        format: args.format.map(Into::into),
        snapshot: args.snapshot,
        read_only: args.read_only,
        cache: args
            .cache
            .or(settings.serve.cache)
            .map_or(Cache::Writeback, Into::into),
        keep_free: args.keep_free.or(settings.keep_free).unwrap_or_default(),
        mode: Mode::Nbd {
            listen,
            export: args.export,
            tls,
        },
        detached: false,
        log: Destination::default(),
        sandbox: args
            .sandbox
            .or(settings.sandbox)
            .is_none_or(SandboxArg::is_on),
        announce,
        json: global.output == Output::Json,
    };
    let text = serde_json::to_string(&config).map_err(|e| Error::invalid(e.to_string()))?;
    let program = attach::ploopd();
    let failed = Command::new(&program)
        .args(["--config", &text])
        .env_remove("LISTEN_FDS")
        .env_remove("LISTEN_PID")
        .env_remove("LISTEN_FDNAMES")
        .exec();
    Err(attach::not_started(&program, failed))
}

/// TLS as asked for. That it is asked for without credentials was found out before.
fn tls(when: Option<TlsArg>, folder: Option<PathBuf>) -> Result<Option<Tls>> {
    let Some(folder) = folder.filter(|_| when != Some(TlsArg::Off)) else {
        return Ok(None);
    };
    Ok(Some(Tls {
        folder: std::path::absolute(&folder).map_err(|e| Error::from(e).at(folder.display()))?,
        required: when != Some(TlsArg::Allow),
    }))
}

/// What fits into a `sockaddr_un`, the last byte aside.
const SOCKET_PATH_MAX: usize = 107;

/// How many sockets a socket activator passed to this very process.
fn inherited() -> Result<Option<u32>> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u32>().ok());
    match (number("LISTEN_PID"), number("LISTEN_FDS")) {
        (Some(pid), Some(count)) if pid == std::process::id() => match count {
            0 => Err(Error::invalid("LISTEN_FDS=0: no socket was passed")),
            // More than anyone passes; each is a descriptor in keeper and worker.
            65.. => Err(Error::unsupported(format!(
                "LISTEN_FDS={count}: at most 64 sockets"
            ))),
            count => Ok(Some(count)),
        },
        _ => Ok(None),
    }
}

fn absolute(listen: Listen) -> Result<Listen> {
    match listen {
        Listen::Unix(path) => {
            let path = std::path::absolute(&path).map_err(|e| Error::from(e).at(path.display()))?;
            match path.as_os_str().len() {
                0..=SOCKET_PATH_MAX => Ok(Listen::Unix(path)),
                n => Err(Error::new(
                    Kind::Usage,
                    format!("--nbd: a socket's path has at most {SOCKET_PATH_MAX} bytes, not {n}"),
                )),
            }
        }
        other => Ok(other),
    }
}

fn parse_listen(text: &str) -> std::result::Result<Listen, String> {
    if text == "-" {
        return Ok(Listen::Stdio);
    }
    match text.split_once(':') {
        Some(("unix", path)) if !path.is_empty() => Ok(Listen::Unix(Path::new(path).into())),
        Some(("tcp", addr)) => {
            let addr = addr.replacen("localhost:", "127.0.0.1:", 1);
            addr.parse()
                .map(Listen::Tcp)
                .map_err(|e| format!("tcp:ADDR:PORT: {e}"))
        }
        _ => text
            .parse()
            .map(Listen::Tcp)
            .map_err(|_| "one of unix:PATH, tcp:ADDR:PORT, ADDR:PORT, -".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_path_a_port_or_standard_input() {
        assert_eq!(parse_listen("-"), Ok(Listen::Stdio));
        assert_eq!(
            parse_listen("unix:/run/a:b"),
            Ok(Listen::Unix("/run/a:b".into()))
        );
        let port = "127.0.0.1:10809".parse().map(Listen::Tcp).expect("address");
        assert_eq!(parse_listen("tcp:localhost:10809"), Ok(port.clone()));
        assert_eq!(parse_listen("tcp:127.0.0.1:10809"), Ok(port.clone()));
        assert_eq!(parse_listen("127.0.0.1:10809"), Ok(port));
        for bad in [
            "",
            "unix:",
            "tcp:10809",
            "/run/s",
            "udp:1",
            "10809",
            "host:1",
        ] {
            assert!(parse_listen(bad).is_err(), "{bad:?}");
        }
    }
}
