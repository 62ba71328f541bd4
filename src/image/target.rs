//! Target: what DISK means on a command line.
//!
//! A directory with a `DiskDescriptor.xml`, that file itself, or a bare image file whose format is
//! stated. Formats are never guessed: a guest can write any signature into its own disk.

use super::chain::Chain;
use super::members::{ASIDE, DELETED, INCOMING, SEALED};
use crate::io::beneath;
use ploop_formats::descriptor::{ImageType, LayerFormat};
use ploop_formats::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Name of the descriptor in an image directory (ploop's own).
pub const DESCRIPTOR: &str = "DiskDescriptor.xml";

/// Stated format of a bare image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One ploop delta, version 1 or 2.
    Ploop,
    /// A flat file.
    Raw,
    /// One qcow2 image, with those that it names.
    Qcow2,
}

impl Format {
    /// What `--format` takes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ploop => "ploop",
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// What a descriptor calls the lowest image of a disk.
    pub const fn image_type(self) -> ImageType {
        match self {
            Self::Ploop => ImageType::Compressed,
            Self::Raw => ImageType::Plain,
            Self::Qcow2 => ImageType::QCow2,
        }
    }
}

impl From<LayerFormat> for Format {
    fn from(stated: LayerFormat) -> Self {
        match stated {
            LayerFormat::Ploop => Self::Ploop,
            LayerFormat::Raw => Self::Raw,
            LayerFormat::Qcow2 => Self::Qcow2,
        }
    }
}

/// One disk, as files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An image directory.
    Bundle {
        /// The directory, absolute.
        dir: PathBuf,
    },
    /// A single image file.
    Bare {
        /// The file, absolute.
        file: PathBuf,
        /// Its stated format.
        format: Format,
    },
}

/// What names a disk while it is attached: device and inode of its directory, or of the file when
/// it is bare. No format stores an identity, and a path has many spellings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.dev, self.ino)
    }
}

impl Identity {
    /// Name space of the UUIDs below; any constant does, this one is this project's.
    const SPACE: uuid::Uuid = uuid::Uuid::from_u128(0x8d6b_1f0c_2a57_4c0e_9e3d_7b41_5a90_c2f6);

    /// The disk's `uuid` in output: UUIDv5 of `<dev>-<inode>`, never stored.
    pub fn uuid(&self) -> String {
        uuid::Uuid::new_v5(&Self::SPACE, self.to_string().as_bytes()).to_string()
    }

    /// The identity of whatever `path` leads to: the directory of a descriptor, else the thing.
    pub fn of(path: &Path) -> Result<Self> {
        let path = if path.file_name() == Some(OsStr::new(DESCRIPTOR)) && path.is_file() {
            parent(path)
        } else {
            path.to_path_buf()
        };
        let meta = std::fs::metadata(&path).map_err(|e| Error::from(e).at(path.display()))?;
        Ok(Self {
            dev: meta.dev(),
            ino: meta.ino(),
        })
    }
}

/// Why a directory without a descriptor is no disk.
fn why_none(dir: &Path) -> String {
    let has = |name| dir.join(name).exists();
    match () {
        () if has(DELETED) => "its deletion was interrupted; `ploopctl delete` finishes it".into(),
        () if has(SEALED) => {
            "its disk has gone to another host; `ploopctl migrate resolve` says more".into()
        }
        () if has(INCOMING) => {
            "it comes from another host; `ploopctl migrate resolve` says more".into()
        }
        () if has(ASIDE) => "it was not made to its end; `ploopctl delete` removes it".into(),
        () => format!("no {DESCRIPTOR} here, so this is not a disk"),
    }
}

/// The folder that a file's path leads to.
pub(super) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

impl Target {
    /// Understands DISK. `format` is what `--format` said.
    ///
    /// `NotFound` when nothing is there, `Usage` when a format is missing or superfluous.
    pub fn resolve(disk: &Path, format: Option<Format>) -> Result<Self> {
        let path = disk
            .canonicalize()
            .map_err(|e| Error::from(e).at(disk.display()))?;
        let meta = std::fs::metadata(&path).map_err(|e| Error::from(e).at(path.display()))?;
        let is_descriptor = path.file_name() == Some(OsStr::new(DESCRIPTOR));
        if meta.is_dir() || is_descriptor {
            let dir = if meta.is_dir() { path } else { parent(&path) };
            return Self::bundle(dir, format);
        }
        Self::bare(path, &meta, format)
    }

    fn bundle(dir: PathBuf, format: Option<Format>) -> Result<Self> {
        if format.is_some() {
            let what = "the descriptor states every layer's format; leave --format out";
            return Err(Error::new(Kind::Usage, what).at(dir.display()));
        }
        let descriptor = dir.join(DESCRIPTOR);
        let there = match std::fs::metadata(&descriptor) {
            Ok(meta) => meta.is_file(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
            // Who may not look cannot say that nothing is there.
            Err(e) => return Err(Error::from(e).at(descriptor.display())),
        };
        if !there {
            let what = format!("{}: {}", dir.display(), why_none(&dir));
            return Err(Error::new(Kind::NotFound, what));
        }
        Ok(Self::Bundle { dir })
    }

    fn bare(file: PathBuf, meta: &std::fs::Metadata, format: Option<Format>) -> Result<Self> {
        if !meta.is_file() {
            return Err(Error::unsupported(format!(
                "{}: neither a directory nor a regular file",
                file.display()
            )));
        }
        let format = format.ok_or_else(|| {
            let what = "a bare image file needs --format ploop, raw or qcow2; formats are never \
                        guessed";
            Error::new(Kind::Usage, what).at(file.display())
        })?;
        Ok(Self::Bare { file, format })
    }

    /// What the user means by the disk: the directory, or the bare file.
    pub fn path(&self) -> &Path {
        match self {
            Target::Bundle { dir } => dir,
            Target::Bare { file, .. } => file,
        }
    }

    /// The directory that everything is opened beneath.
    pub fn dir(&self) -> PathBuf {
        match self {
            Target::Bundle { dir } => dir.clone(),
            Target::Bare { file, .. } => parent(file),
        }
    }

    /// Opens that directory.
    pub fn open_dir(&self) -> Result<OwnedFd> {
        beneath::directory(&self.dir())
    }

    /// Which files make up the disk. `dir` is [`Target::open_dir`].
    pub fn chain(&self, dir: impl AsFd) -> Result<Chain> {
        Chain::read(dir, &self.source()).map_err(|e| e.at(self.path().display()))
    }

    /// The bare file's name and format; `None` for an image directory.
    pub fn source(&self) -> Source {
        match self {
            Target::Bundle { .. } => Source::Bundle,
            Target::Bare { file, format } => Source::Bare {
                name: file
                    .file_name()
                    .map(OsStr::to_os_string)
                    .unwrap_or_default(),
                format: *format,
            },
        }
    }

    /// What names this disk while it is attached.
    pub fn identity(&self) -> Result<Identity> {
        Identity::of(self.path())
    }
}

/// A target once its directory is open: what to look for beneath it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// The descriptor names the layers.
    Bundle,
    /// One file.
    Bare {
        /// Its name in the directory.
        name: OsString,
        /// Its stated format.
        format: Format,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(r: Result<Target>) -> Option<Kind> {
        r.err().map(|e| e.kind())
    }

    #[test]
    fn a_directory_and_its_descriptor_are_the_same_disk() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join(DESCRIPTOR), "<x/>").expect("write");
        let a = Target::resolve(dir.path(), None).expect("directory");
        let b = Target::resolve(&dir.path().join(DESCRIPTOR), None).expect("descriptor");
        assert_eq!(a, b);
        assert_eq!(
            a.identity().ok(),
            Identity::of(&dir.path().join(DESCRIPTOR)).ok()
        );
    }

    #[test]
    fn a_format_is_never_guessed_and_never_contradicts_a_descriptor() {
        let dir = tempfile::tempdir().expect("temp dir");
        assert_eq!(
            kind(Target::resolve(dir.path(), None)),
            Some(Kind::NotFound)
        );
        let file = dir.path().join("x.img");
        assert_eq!(kind(Target::resolve(&file, None)), Some(Kind::NotFound));
        std::fs::write(&file, "WithoutFreeSpace").expect("write");
        assert_eq!(kind(Target::resolve(&file, None)), Some(Kind::Usage));
        assert_eq!(kind(Target::resolve(&file, Some(Format::Raw))), None);
        std::fs::write(dir.path().join(DESCRIPTOR), "<x/>").expect("write");
        assert_eq!(
            kind(Target::resolve(dir.path(), Some(Format::Raw))),
            Some(Kind::Usage)
        );
    }
}
