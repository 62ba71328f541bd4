//! Names that scripts give to attached disks: devices called `/dev/ploopN`, and components.
//!
//! Both are symbolic links, and worth nothing once what they lead to is gone: the first to our
//! device, the second, in a directory of its own, to the path of the attached disk or view.

use super::code::{Code, Fault};
use ploop::Error;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

/// Where components are.
const COMPONENTS: &str = "/run/ploop.components";
/// Where devices are, and what their names begin with.
const DEVICES: &str = "/dev";
const DEVICE: &str = "ploop";

/// A name for a device that may be given: `/dev/ploop` and more, of nothing that is there.
pub fn refuse_device(name: &Path) -> Result<(), Fault> {
    let ours = name.parent() == Some(Path::new(DEVICES))
        && name
            .file_name()
            .and_then(|n| n.to_str())
            .is_some_and(|n| n.starts_with(DEVICE));
    if !ours {
        let what = format!("{}: -d takes names like /dev/ploop12345", name.display());
        return Err(Fault::new(Code::Param, what));
    }
    match name.exists() || fs::symlink_metadata(name).is_ok_and(|m| !m.is_symlink()) {
        true => Err(Fault::new(
            Code::Ebusy,
            format!("{}: there is such a device already", name.display()),
        )),
        false => Ok(()),
    }
}

/// Names a device.
pub fn name_device(name: &Path, device: &Path) -> ploop::Result<()> {
    // One that leads nowhere is a leftover.
    let _ = fs::remove_file(name);
    symlink(device, name).map_err(|e| Error::from(e).at(name.display()))
}

/// The name that a device was given, else its own.
pub fn of_device(device: &Path) -> PathBuf {
    let mut named = links(Path::new(DEVICES), device);
    named.next().unwrap_or_else(|| device.to_path_buf())
}

/// Names a disk, or a view, by a component; `Usage` for what cannot be a name.
pub fn name_component(name: &str, path: &Path) -> ploop::Result<()> {
    let made = DirBuilder::new().mode(0o700).create(COMPONENTS);
    let made = made.or_else(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => Ok(()),
        _ => Err(e),
    });
    let link = Path::new(COMPONENTS).join(name);
    let named = made.and_then(|()| {
        let _ = fs::remove_file(&link);
        symlink(path, &link)
    });
    named.map_err(|e| Error::from(e).at(link.display()))
}

/// Whether a component can be called that.
pub fn refuse_component(name: &str) -> Result<(), Fault> {
    match name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
        true => Err(Fault::new(
            Code::Param,
            format!("'{name}' is no name for a component"),
        )),
        false => Ok(()),
    }
}

/// What a component leads to.
pub fn component(name: &str) -> Option<PathBuf> {
    refuse_component(name).ok()?;
    let mine = |m: fs::Metadata| m.uid() == rustix::process::geteuid().as_raw();
    let trusted = fs::symlink_metadata(COMPONENTS).is_ok_and(mine);
    let read = || fs::read_link(Path::new(COMPONENTS).join(name)).ok();
    trusted.then(read).flatten()
}

/// The component that a disk, or a view, was given.
pub fn component_of(path: &Path) -> Option<String> {
    let mut named = links(Path::new(COMPONENTS), path);
    named.find_map(|link| Some(link.file_name()?.to_str()?.to_string()))
}

/// Takes away all names of a device and of what it was attached for.
pub fn forget(device: Option<&Path>, path: &Path) {
    let devices = device
        .into_iter()
        .flat_map(|d| links(Path::new(DEVICES), d));
    for link in devices.chain(links(Path::new(COMPONENTS), path)) {
        let _ = fs::remove_file(link);
    }
}

/// The links of ours in a folder that lead there.
fn links(folder: &Path, to: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let devices = folder == Path::new(DEVICES);
    let ours = move |name: &str| !devices || name.starts_with(DEVICE);
    let ours = entries.filter(move |e| e.file_name().to_str().is_some_and(&ours));
    let to = to.to_path_buf();
    ours.map(|e| e.path())
        .filter(move |link| fs::read_link(link).is_ok_and(|there| there == to))
}
