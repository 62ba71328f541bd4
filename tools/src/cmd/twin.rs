//! Twin: a file system beside its original or its clone, which have the same UUID.
//!
//! ext4 does not mind. XFS refuses the second unless it is told not to look at UUIDs; our locks keep
//! one disk from being attached twice. btrfs takes two devices of one UUID for one file system: since
//! Linux 6.7 it gives the second a UUID for the time being, before that it must not see it.

use ploop::{Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Where XFS says that it is XFS (first superblock: sb_magicnum), and how.
const XFS: (u64, &[u8]) = (0, b"XFSB");
/// The same of btrfs (superblock at 64 KiB: magic), and where its UUID is (fsid).
const BTRFS: (u64, &[u8]) = (0x1_0040, b"_BHRfS_M");
const BTRFS_UUID: u64 = 0x1_0020;
/// What the kernel says of btrfs.
const SYSFS: &str = "/sys/fs/btrfs";

/// What mount(8) must be told of the file system on `device`, so that it mounts beside its twin.
/// `Unsupported` where it cannot.
pub fn option(device: &Path) -> Result<Option<&'static str>> {
    let file = File::open(device).map_err(|e| Error::from(e).at(device.display()))?;
    if says(&file, XFS) {
        return Ok(Some("nouuid"));
    }
    if says(&file, BTRFS) {
        refuse_twin(&file, Path::new(SYSFS))?;
    }
    Ok(None)
}

/// Whether a file system says what it is. What cannot be read is none.
fn says(file: &File, (at, magic): (u64, &[u8])) -> bool {
    let mut found = [0; 8];
    let Some(found) = found.get_mut(..magic.len()) else {
        return false;
    };
    file.read_exact_at(found, at).is_ok() && found == magic
}

/// Refuses a btrfs whose twin is mounted, where the kernel cannot tell the two apart.
fn refuse_twin(file: &File, sysfs: &Path) -> Result<()> {
    let mut uuid = [0; 16];
    file.read_exact_at(&mut uuid, BTRFS_UUID)?;
    let uuid = uuid::Uuid::from_bytes(uuid);
    let told_apart = sysfs.join("features/temp_fsid").exists();
    if told_apart || !sysfs.join(uuid.to_string()).exists() {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "a btrfs of the same UUID ({uuid}) is mounted, and this kernel takes two of them for one: \
         unmount that one first, or use Linux 6.7 or later"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop::Kind;
    use std::fs;

    /// A device that begins as a file system does.
    fn device(dir: &Path, magic: (u64, &[u8])) -> std::path::PathBuf {
        let path = dir.join("device");
        let file = File::create(&path).expect("a file");
        file.set_len(1 << 20).expect("a length");
        file.write_all_at(magic.1, magic.0).expect("a magic");
        path
    }

    #[test]
    fn xfs_is_told_not_to_look_at_uuids_and_others_are_told_nothing() {
        let dir = tempfile::tempdir().expect("temp dir");
        let told = |magic| option(&device(dir.path(), magic)).expect("an answer");
        assert_eq!(told(XFS), Some("nouuid"));
        assert_eq!(told((0x438, b"\x53\xef")), None);
        assert_eq!(told((512, b"XFSB")), None);
        fs::write(dir.path().join("short"), "X").expect("write");
        assert_eq!(option(&dir.path().join("short")).expect("an answer"), None);
    }

    #[test]
    fn a_btrfs_whose_twin_is_mounted_needs_a_kernel_that_tells_them_apart() {
        let dir = tempfile::tempdir().expect("temp dir");
        let file = File::open(device(dir.path(), BTRFS)).expect("open");
        let sysfs = dir.path().join("btrfs");
        fs::create_dir_all(sysfs.join("features")).expect("mkdir");
        refuse_twin(&file, &sysfs).expect("it is alone");
        fs::create_dir(sysfs.join(uuid::Uuid::nil().to_string())).expect("mkdir");
        let refused = refuse_twin(&file, &sysfs).expect_err("its twin is mounted");
        assert!(refused.kind() == Kind::Unsupported && refused.to_string().contains("6.7"));
        fs::write(sysfs.join("features/temp_fsid"), "0").expect("write");
        refuse_twin(&file, &sysfs).expect("the kernel tells them apart");
    }
}
