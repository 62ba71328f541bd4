//! QEMU's tools, in a folder of their own.
#![allow(dead_code, reason = "each test uses its part")]

use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

/// Whether QEMU's tools are installed; otherwise the test is skipped, visibly.
pub fn installed(test: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = |tool: &str| std::env::split_paths(&path).any(|p| p.join(tool).is_file());
    let both = has("qemu-img") && has("qemu-io");
    if !both {
        println!("SKIP: {test}: needs qemu-img and qemu-io");
    }
    both
}

/// A folder that QEMU works in; it goes away with its images.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// Runs `qemu-img` with the words of `line`.
    pub fn img(&self, line: &str) {
        let mut command = Command::new("qemu-img");
        command.args(line.split_whitespace());
        ok(command.current_dir(self.0.path()), line);
    }

    /// What `qemu-img info` says of an image, as JSON.
    pub fn info(&self, name: &str) -> String {
        let mut command = Command::new("qemu-img");
        command.args(["info", "--output", "json", "-f", "qcow2", name]);
        let done = command.current_dir(self.0.path()).output().unwrap();
        assert!(done.status.success(), "{name}: {done:?}");
        String::from_utf8_lossy(&done.stdout).to_string()
    }

    /// Writes what QEMU reads from an image to a raw file; false when QEMU finds it damaged.
    pub fn convert(&self, source: &str, to: &str) -> bool {
        let mut command = Command::new("qemu-img");
        let line = format!("convert -f qcow2 -O raw {source} {to}");
        command.args(line.split_whitespace());
        let done = command.current_dir(self.0.path()).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        let damaged = said.contains("error while reading");
        assert!(done.status.success() || damaged, "{line}: {said}");
        done.status.success()
    }

    /// What QEMU's own check finds, corruptions and leaks; none when it gives up.
    pub fn check(&self, name: &str) -> Option<(u64, u64)> {
        let mut command = Command::new("qemu-img");
        command.args(["check", "--output", "json", "-f", "qcow2", name]);
        let done = command.current_dir(self.0.path()).output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).to_string();
        let number = |field: &str| {
            let rest = said.split(&format!("\"{field}\": ")).nth(1);
            let digits = rest.map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next().unwrap());
            digits.map_or(0, |digits| digits.parse().unwrap())
        };
        let complete = said.contains("check-errors") && number("check-errors") == 0;
        complete.then(|| (number("corruptions"), number("leaks")))
    }

    /// Runs commands of `qemu-io` on a qcow2 image.
    pub fn io(&self, name: &str, commands: &[String]) {
        ok(&mut self.io_command(name, commands), &commands.join("; "));
    }

    /// The same of commands that may be refused, as a compressed write to what has a place is.
    pub fn try_io(&self, name: &str, commands: &[String]) {
        let done = self.io_command(name, commands).output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).to_string();
        let did = said.matches("ops;").count();
        assert!(did > commands.len() / 2, "{said}");
    }

    /// Runs commands of `qemu-io`, and has it die before it closes the image.
    pub fn io_and_die(&self, name: &str, commands: &[String]) {
        let mut command = self.io_command(name, commands);
        let done = command.args(["-c", "abort"]).output().unwrap();
        assert!(!done.status.success());
    }

    fn io_command(&self, name: &str, commands: &[String]) -> Command {
        let mut command = Command::new("qemu-io");
        command.current_dir(self.0.path());
        command.args(["-t", "unsafe", "-d", "unmap", "-f", "qcow2"]);
        for each in commands {
            command.args(["-c", each]);
        }
        command.arg(name);
        command
    }
}

fn ok(command: &mut Command, what: &str) {
    let done = command.output().unwrap();
    let said = [done.stdout, done.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    // qemu-io succeeds although its commands failed.
    let failed = said.contains("failed") || said.contains("rror:");
    assert!(done.status.success() && !failed, "{what}: {said}");
}
