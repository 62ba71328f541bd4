//! The tool `ploop` under its names, and disks for it.
#![allow(dead_code, reason = "each test file uses a part")]

use super::{PLOOPCTL, Scratch, text};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
pub const NONE: &str = "{00000000-0000-0000-0000-000000000000}";
pub const A: &str = "{aaaaaaaa-0000-4000-8000-000000000001}";
pub const B: &str = "{bbbbbbbb-0000-4000-8000-000000000002}";
pub const UNKNOWN: &str = "{cccccccc-0000-4000-8000-000000000003}";

/// The mark of an image that is in use, and that of software that kept the format's extension.
pub const IN_USE: u32 = 0x746F_6E59;
pub const CLOSED_V21: u32 = 0x312E_3276;
pub const AT_IN_USE: u64 = 0x2c;

/// A place with the tool under its names.
pub struct Place {
    pub scratch: Scratch,
    pub bin: PathBuf,
}

impl Place {
    pub fn new() -> Self {
        let scratch = Scratch::new();
        let bin = scratch.path("bin");
        fs::create_dir(&bin).expect("bin");
        for name in ["ploop", "ploop-volume", "mount.ploop", "umount.ploop"] {
            symlink(PLOOPCTL, bin.join(name)).expect("a link");
        }
        Self { scratch, bin }
    }

    pub fn tool(&self, name: &str, args: &[&str]) -> Output {
        Command::new(self.bin.join(name))
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("it runs")
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.tool("ploop", args)
    }

    /// Runs it, expects success, gives standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "ploop {args:?}: {}: {said}",
            output.status
        );
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Runs it, expects an exit code, gives standard error.
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "ploop {args:?}: {said}");
        said
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    /// A directory with an empty disk of 64 MiB; its descriptor.
    pub fn disk(&self, name: &str) -> String {
        self.disk_of(name, &["-s", "64m", "-t", "none"])
    }

    pub fn disk_of(&self, name: &str, options: &[&str]) -> String {
        let dir = self.path(name);
        fs::create_dir(&dir).expect("a directory");
        let image = dir.join("root.hds");
        self.ok(&[&["init"], options, &[text(&image)]].concat());
        text(&dir.join("DiskDescriptor.xml")).to_string()
    }

    pub fn point(&self, name: &str) -> String {
        let point = self.path(name);
        fs::create_dir_all(&point).expect("mount point");
        text(&point).to_string()
    }

    /// The rows of `snapshot-list`, as columns.
    pub fn list(&self, xml: &str, options: &[&str]) -> Vec<Vec<String>> {
        let columns = "-oparent_uuid,uuid,fname,current";
        let said = self.ok(&[&["snapshot-list", "-H", columns], options, &[xml]].concat());
        let rows = said.lines().map(|line| line.split_ascii_whitespace());
        rows.map(|row| row.map(String::from).collect()).collect()
    }
}

pub fn image(xml: &str) -> PathBuf {
    Path::new(xml).with_file_name("root.hds")
}

pub fn put(file: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(file).expect("open");
    file.write_all_at(bytes, at).expect("write");
}

pub fn number(file: &Path, at: u64) -> u32 {
    let mut bytes = [0; 4];
    let file = File::open(file).expect("open");
    file.read_exact_at(&mut bytes, at).expect("read");
    u32::from_le_bytes(bytes)
}
