//! One more disk of a golden image: our clone beside an overlay of QEMU's.

use crate::barriers::barriers;
use crate::common::process::ok;
use crate::common::programs::{ploopctl, tool};
use crate::harness::Options;
use crate::harness::cost;
use crate::harness::images;
use crate::harness::peers;
use crate::harness::table::Spread;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SIZE: u64 = 10 << 30;
/// Each takes milliseconds.
const RUNS: usize = 15;
/// Of the time that QEMU takes.
const WANTED: f64 = 0.6;

/// On a disk and in memory, where nothing waits for one.
pub fn run(options: &Options) {
    if !peers::have("clone", &["qemu-img", "strace"]) {
        return;
    }
    let runs = RUNS * options.repetitions;
    println!(
        "\nClones of a golden image of {} GiB, from the command's start to its end; median of {runs} \
         runs, ranges are those of the ratio of two that follow each other. Calls: fsync and \
         fdatasync; ours wait three times, because those for the delta, its name, the descriptor and \
         the directory are made at once.\n",
        SIZE >> 30
    );
    println!(
        "| where | ours, ms | qemu-img create -b, ms | ratio | wanted | | calls, ours | theirs |"
    );
    println!("| --- | ---: | ---: | ---: | --- | --- | ---: | ---: |");
    for (name, folder) in [("disk", options.on_disk()), ("tmpfs", options.in_memory())] {
        let place = Place::new(folder.path());
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            ours.push(milliseconds(&mut place.ours()));
            place.clean();
            theirs.push(milliseconds(&mut place.theirs()));
            place.clean();
        }
        let ratio = Spread::of(ours.iter().zip(&theirs).map(|(a, b)| a / b));
        println!(
            "| {name} | {:.1} | {:.1} | {} | {WANTED} x | {} | {} | {} |",
            Spread::of(ours.into_iter()).middle,
            Spread::of(theirs.into_iter()).middle,
            ratio.text(),
            if ratio.middle <= WANTED {
                "met"
            } else {
                "missed"
            },
            place.calls(&place.ours()),
            place.calls(&place.theirs()),
        );
    }
}

fn milliseconds(command: &mut Command) -> f64 {
    cost::of(command).time.as_secs_f64() * 1e3
}

/// A folder with a golden image of each kind.
struct Place {
    folder: PathBuf,
    uuid: String,
}

impl Place {
    fn new(folder: &Path) -> Self {
        let uuid = golden(&folder.join("ours"), SIZE);
        let base = folder.join("base");
        ok(tool("qemu-img")
            .args(["create", "-f", "qcow2"])
            .arg(&base)
            .arg(SIZE.to_string()));
        let folder = folder.to_owned();
        Self { folder, uuid }
    }

    fn ours(&self) -> Command {
        clone(
            &self.folder.join("ours"),
            &self.uuid,
            &self.folder.join("clone"),
        )
    }

    fn theirs(&self) -> Command {
        let mut command = tool("qemu-img");
        let (base, overlay) = (self.folder.join("base"), self.folder.join("overlay"));
        command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]);
        command.arg(base).arg(overlay);
        command
    }

    fn clean(&self) {
        let _ = fs::remove_dir_all(self.folder.join("clone"));
        let _ = fs::remove_file(self.folder.join("overlay"));
    }

    /// Barriers of a command, counted where it makes plain system calls.
    fn calls(&self, command: &Command) -> usize {
        let log = self.folder.join("calls");
        let mut strace = tool("strace");
        strace.args(["-f", "-qq", "-o"]).arg(&log);
        strace.args(["-e", "trace=fdatasync,fsync,io_uring_setup"]);
        strace.args(["-e", "inject=io_uring_setup:error=ENOSYS"]);
        ok(strace.arg(command.get_program()).args(command.get_args()));
        self.clean();
        barriers(&log)
    }
}

/// Makes a disk and freezes it; the snapshot.
pub fn golden(disk: &Path, size: u64) -> String {
    ok(ploopctl()
        .args(["init", "--fs", "none", "--cluster", images::CLUSTER, "-s"])
        .arg(size.to_string())
        .arg(disk));
    ok(ploopctl().args(["snapshot", "create"]).arg(disk))
        .trim()
        .to_owned()
}

/// The command that clones a snapshot.
pub fn clone(disk: &Path, uuid: &str, to: &Path) -> Command {
    let mut command = ploopctl();
    command
        .arg("clone")
        .arg(format!("{}@{uuid}", disk.display()))
        .arg(to);
    command
}
