//! `check`: is a disk sound, and can it be made so.

use super::{FormatArg, confine};
use crate::answer::Answer;
use crate::cancel::Cancel;
use crate::global::Global;
use crate::meter::Meter;
use crate::{attach, size};
use ploop::formats::ploop::check::{Grade, Repair};
use ploop::formats::qcow2::check::FindingKind as Qcow2;
use ploop::formats::severity::Severity;
use ploop::formats::{ploop as own, qcow2};
use ploop::image::chain::{Chain, LayerFile};
use ploop::image::check::{self, Report};
use ploop::image::convert::version;
use ploop::image::lock::{Access, DiskLocks};
use ploop::image::target::{Format, Target};
use ploop::io::exec::{self, Engine};
use ploop::io::folder::DirFolder;
use ploop::sandbox::Files;
use ploop::{Error, Kind, Result};
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Check every layer of an unattached disk, its snapshots included
///
/// Exit code 0: sound; 3: space is lost, data is not; 6: a rule of the format is broken. Without
/// options nothing is changed. --repair mends what loses nothing: what can be read reads the same
/// afterwards. --repair --force also clears the entries whose data nobody can read any more: these
/// places then read as the layers below have them, or as zeros.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image directory, its DiskDescriptor.xml, or a bare image file
    disk: PathBuf,
    /// Mend what loses nothing; an image that takes more is not touched
    #[arg(long)]
    repair: bool,
    /// With --repair: clear also the entries whose data is gone
    #[arg(long, requires = "repair")]
    force: bool,
    /// Format of a bare image file
    #[arg(long)]
    format: Option<FormatArg>,
}

/// Does it.
pub fn run(args: &Args, global: &Global) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let target = Target::resolve(&args.disk, args.format.map(Into::into))?;
    attach::refuse(&target)?;
    // Not before: cleaning up after others is no part of a check that takes long.
    let mut meter = Meter::new(global.progress, &cancel);
    let dir = target.open_dir()?;
    confine(
        &dir,
        if args.repair {
            Files::Change
        } else {
            Files::Write
        },
    )?;
    let chain = target.chain(&dir)?;
    let access = if args.repair {
        Access::Write
    } else {
        Access::Read
    };
    let _locks = DiskLocks::take(&dir, &target.source(), access)
        .map_err(|e| e.at(target.path().display()))?;
    let allowed = Repair {
        give_up: args.force,
        ..Repair::default()
    };
    let reports = exec::run(Engine::Poll, async {
        if args.repair {
            undo_conversion(&target, &dir, &chain).await?;
        }
        match args.repair {
            true => check::mend(&dir, &chain, &allowed, &mut meter).await,
            false => check::layers(&dir, &chain, &mut meter).await,
        }
    })?;
    drop(meter);
    let place = target.path().display();
    let reports = reports.map_err(|e| ended(e, args.repair).at(place))?;
    let code = reports.iter().map(Report::exit_code).max().unwrap_or(0);
    let files = chain.tree()?;
    let found: Vec<Found> = reports.iter().map(Found::of).collect();
    let both = || files.iter().zip(&found);
    let mut text: String = both()
        .map(|(layer, found)| found.text(&layer.display().to_string()))
        .collect();
    if args.repair && !args.force && found.iter().any(Found::loses) {
        text += "not touched is what has lost data: --repair --force clears the entries of that\n";
    }
    let layers: Vec<Value> = both().map(|(layer, found)| found.json(layer)).collect();
    let json = json!({
        "path": target.path().display().to_string(),
        "clean": code == 0,
        "layers": layers,
    });
    Ok(Answer { text, json, code })
}

/// A conversion that was interrupted is undone first: nothing true can be said of it.
async fn undo_conversion(target: &Target, dir: &OwnedFd, chain: &Chain) -> Result<()> {
    let folder = DirFolder::new(dir.try_clone()?);
    match (&chain.descriptor, target) {
        (Some(disk), _) => version::settle(&folder, disk).await,
        (None, Target::Bare { file, format }) if *format == Format::Ploop => {
            let name = file.file_name().and_then(|name| name.to_str());
            match name {
                Some(name) => version::settle_bare(&folder, name).await,
                None => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

/// What a signal left.
fn ended(e: Error, repair: bool) -> Error {
    match (e.kind(), repair) {
        (Kind::Cancelled, true) => Error::new(
            Kind::Cancelled,
            "cancelled by a signal; what is mended stays so, the next --repair goes on from there",
        ),
        (Kind::Cancelled, false) => Error::new(
            Kind::Cancelled,
            "cancelled by a signal; nothing was changed",
        ),
        _ => e,
    }
}

/// What a check says of one file, whatever its format.
struct Found {
    errors: u64,
    leaks: u64,
    notices: u64,
    leaked_bytes: u64,
    used_clusters: u64,
    omitted: u64,
    findings: Vec<Finding>,
    repaired: Vec<Finding>,
}

/// One finding.
struct Finding {
    kind: &'static str,
    grade: Grade,
    severity: Severity,
    entry: Option<u64>,
    offset: u64,
    text: String,
}

impl Finding {
    fn of_ploop(found: &own::check::Finding) -> Self {
        Self {
            kind: found.kind.as_str(),
            grade: found.kind.grade(),
            severity: found.severity,
            entry: found.entry,
            offset: found.offset,
            text: found.text.clone(),
        }
    }

    fn of_qcow2(found: &qcow2::check::Finding) -> Self {
        Self {
            kind: found.kind.as_str(),
            grade: match found.kind {
                Qcow2::RefcountLow
                | Qcow2::Leak
                | Qcow2::Copied
                | Qcow2::Dirty
                | Qcow2::Corrupt => Grade::Safe,
                _ => Grade::None,
            },
            severity: found.severity,
            entry: None,
            offset: found.offset,
            text: found.text.clone(),
        }
    }

    fn json(&self) -> Value {
        json!({
            "kind": self.kind,
            "repair": self.grade.as_str(),
            "severity": format!("{:?}", self.severity).to_lowercase(),
            "entry": self.entry,
            "offset": self.offset,
            "message": self.text,
        })
    }
}

impl Found {
    fn of(report: &Report) -> Self {
        match report {
            Report::Ploop(report) => Self {
                errors: report.errors,
                leaks: report.leaks,
                notices: report.notices,
                leaked_bytes: report.leaked_bytes,
                used_clusters: report.used_clusters,
                omitted: report.omitted,
                findings: report.findings.iter().map(Finding::of_ploop).collect(),
                repaired: report.repaired.iter().map(Finding::of_ploop).collect(),
            },
            Report::Qcow2(report) => Self {
                errors: report.errors,
                leaks: report.leaks,
                notices: report.notices,
                leaked_bytes: report.leaked_bytes,
                used_clusters: report.used_clusters,
                omitted: report.omitted,
                findings: report.findings.iter().map(Finding::of_qcow2).collect(),
                repaired: report.repaired.iter().map(Finding::of_qcow2).collect(),
            },
        }
    }

    fn text(&self, file: &str) -> String {
        let line = |verb: &str, f: &Finding| format!("{file}: {verb}{}\n", f.text);
        let mut text = String::new();
        for done in &self.repaired {
            text += &line("repaired: ", done);
        }
        for found in &self.findings {
            text += &line("", found);
        }
        if self.omitted > 0 {
            text += &format!("{file}: and {} more\n", self.omitted);
        }
        let verdict = match (self.errors, self.leaks) {
            (0, 0) => "sound".to_string(),
            (0, leaks) => format!("{leaks} leaks, {} lost", size::show(self.leaked_bytes)),
            (errors, _) => format!("{errors} errors"),
        };
        text + &format!(
            "{file}: {verdict}, {} clusters in use\n",
            self.used_clusters
        )
    }

    /// Whether something is found that takes --force.
    fn loses(&self) -> bool {
        let mut findings = self.findings.iter();
        findings.any(|finding| finding.grade == Grade::Loss)
    }

    fn json(&self, layer: &LayerFile) -> Value {
        json!({
            "file": layer.display().to_string(),
            "guid": layer.guid.map(|guid| guid.to_string()),
            "errors": self.errors,
            "leaks": self.leaks,
            "notices": self.notices,
            "leaked_bytes": self.leaked_bytes,
            "used_clusters": self.used_clusters,
            "findings": self.findings.iter().map(Finding::json).collect::<Vec<_>>(),
            "repaired": self.repaired.iter().map(Finding::json).collect::<Vec<_>>(),
            "omitted": self.omitted,
        })
    }
}
