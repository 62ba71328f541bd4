//! Where the programs under test and the foreign tools are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Whether a foreign tool is on the PATH, or where administrators' tools are.
pub fn installed(tool: &str) -> bool {
    search_path()
        .iter()
        .any(|folder| folder.join(tool).is_file())
}

/// The PATH for children: the caller's, and the folders of administrators' tools.
pub fn search_path() -> Vec<PathBuf> {
    let own = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&own).collect();
    folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    folders
}

/// A foreign tool, ready for arguments.
pub fn tool(name: &str) -> Command {
    let path = std::env::join_paths(search_path()).expect("the PATH was one before");
    let mut command = Command::new(name);
    command.env("PATH", path).env("LC_ALL", "C");
    command
}

/// The built `ploopctl`, which finds `ploopd` beside itself.
pub fn ploopctl_path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let folder = std::env::var_os("PLOOP_BIN_DIR").map_or_else(build, PathBuf::from);
        let path = folder.join("ploopctl");
        assert!(
            path.is_file(),
            "no ploopctl in {} (cargo build -p ploopctl)",
            folder.display()
        );
        path
    })
}

/// `ploopctl`, ready for arguments.
pub fn ploopctl() -> Command {
    let mut command = tool(
        ploopctl_path()
            .to_str()
            .expect("the build folder's name is UTF-8"),
    );
    command.env_remove("LISTEN_FDS").env_remove("LISTEN_PID");
    let settings = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/ploop.toml");
    command.env("PLOOP_CONFIG", settings);
    command
}

/// Builds the programs in the profile that this test was built in, so that a test never judges an
/// old build. Cargo builds a package's own programs for its tests, but ours are of another package.
fn build() -> PathBuf {
    let test = std::env::current_exe().expect("a running program has a path");
    let folder = test
        .parent()
        .and_then(Path::parent)
        .expect("tests live in PROFILE/deps");
    let profile = match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(name) => name,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--package",
            "ploopctl",
            "--profile",
            profile,
        ])
        .arg("--manifest-path")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "ploopctl does not build");
    folder.to_path_buf()
}
