//! Codes: how a failure of ours becomes an exit code of ploop's. The one place where that is decided.

use ploop::{Error, Kind};
use std::fmt;

/// Exit codes as OpenVZ's ploop numbers and names them, those that can arise here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// An image could not be made.
    Creat = 1,
    /// No block device.
    Device = 2,
    /// A file could not be opened.
    Open = 4,
    /// Reading failed.
    Read = 6,
    /// Writing failed.
    Write = 7,
    /// An image is damaged.
    PloopFmt = 11,
    /// Something of this program, or of the system, failed.
    Sys = 12,
    /// An earlier flush failed.
    Fsync = 16,
    /// Somebody else uses it.
    Ebusy = 17,
    /// No space for an image.
    Fallocate = 20,
    /// It cannot be mounted.
    Mount = 21,
    /// It cannot be unmounted.
    Umount = 22,
    /// Somebody has locked the disk.
    Lock = 23,
    /// No file system could be made.
    Mkfs = 24,
    /// The file system cannot get another size.
    ResizeFs = 26,
    /// A signal ended it.
    Abort = 29,
    /// No partition table could be made.
    ChangeGpt = 33,
    /// The image was not closed, or is in use.
    PloopInUse = 37,
    /// The command line cannot be meant, or asks for what is not offered.
    Param = 38,
    /// The descriptor is damaged.
    DiskDescr = 39,
    /// It is not mounted.
    NotMounted = 40,
    /// The file system is damaged.
    Fsck = 41,
    /// There is no such snapshot.
    NoSnap = 43,
    /// Changed blocks are not tracked.
    NoCbt = 44,
    /// There is no encryption.
    Crypt = 45,
    /// It cannot be unmounted, because somebody uses it.
    UmountBusy = 46,
}

/// What was being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Finding out which disk is meant.
    Find,
    /// Reading its descriptor.
    Descriptor,
    /// Making an image.
    Create,
    /// Making a partition table.
    Table,
    /// Making a file system.
    Mkfs,
    /// Making it a device.
    Attach,
    /// Checking its file system.
    Fsck,
    /// Mounting that.
    Mount,
    /// Mounting a snapshot.
    MountSnapshot,
    /// Unmounting and detaching.
    Umount,
    /// Looking at it.
    Look,
    /// Checking its images.
    Check,
    /// Making a snapshot.
    Snapshot,
    /// Deleting one.
    Delete,
    /// Merging one.
    Merge,
    /// Going back to one.
    Switch,
    /// Changing its images, or their descriptor.
    Change,
    /// Changing its size, and that of its file system.
    Resize,
}

impl Step {
    /// The exit code of a failure of this kind in this step.
    pub const fn code(self, kind: Kind) -> Code {
        match kind {
            Kind::Cancelled => Code::Abort,
            Kind::Usage => Code::Param,
            Kind::Poisoned => Code::Fsync,
            Kind::Pending => Code::Sys,
            Kind::Io => self.broken(),
            Kind::NoSpace => match self {
                Step::Create | Step::Change | Step::Resize => Code::Fallocate,
                _ => Code::Write,
            },
            Kind::Damaged => match self {
                Step::Descriptor => Code::DiskDescr,
                Step::Fsck => Code::Fsck,
                _ => Code::PloopFmt,
            },
            Kind::Busy => self.busy(),
            Kind::NotFound => self.missing(),
            Kind::Exists => match self {
                Step::Create => Code::Creat,
                _ => Code::Param,
            },
            Kind::ReadOnly | Kind::Privilege => match self {
                Step::Create => Code::Creat,
                Step::Attach | Step::Table | Step::Mkfs => Code::Device,
                Step::Mount | Step::MountSnapshot => Code::Mount,
                Step::Umount => Code::Umount,
                Step::Resize => Code::ResizeFs,
                _ => Code::Open,
            },
            Kind::TimedOut => match self {
                Step::Umount => Code::Umount,
                _ => Code::Ebusy,
            },
            Kind::Unsupported if matches!(self, Step::Resize) => Code::ResizeFs,
            Kind::Invalid | Kind::Unsupported => match self {
                Step::Attach => Code::Device,
                Step::Descriptor => Code::DiskDescr,
                Step::Mkfs => Code::Mkfs,
                Step::Mount => Code::Mount,
                Step::Table => Code::ChangeGpt,
                _ => Code::Param,
            },
        }
    }

    const fn broken(self) -> Code {
        match self {
            Step::Attach => Code::Device,
            Step::Table => Code::ChangeGpt,
            Step::Mkfs => Code::Mkfs,
            Step::Fsck => Code::Fsck,
            Step::Mount | Step::MountSnapshot => Code::Mount,
            Step::Umount => Code::Umount,
            Step::Resize => Code::ResizeFs,
            Step::Find | Step::Descriptor | Step::Look | Step::Check => Code::Read,
            Step::Create
            | Step::Snapshot
            | Step::Delete
            | Step::Merge
            | Step::Switch
            | Step::Change => Code::Write,
        }
    }

    const fn busy(self) -> Code {
        match self {
            Step::Attach | Step::Mount => Code::Mount,
            Step::Umount => Code::UmountBusy,
            Step::Check => Code::PloopInUse,
            Step::Snapshot | Step::Change | Step::Resize => Code::Lock,
            Step::Switch => Code::Param,
            _ => Code::Ebusy,
        }
    }

    const fn missing(self) -> Code {
        match self {
            Step::Mkfs => Code::Mkfs,
            Step::Fsck => Code::Fsck,
            Step::Mount => Code::Mount,
            Step::Umount => Code::NotMounted,
            Step::Delete | Step::MountSnapshot => Code::NoSnap,
            Step::Merge | Step::Switch => Code::Param,
            _ => Code::Open,
        }
    }
}

/// A failure as a script sees it.
#[derive(Debug)]
pub struct Fault {
    /// The exit code.
    pub code: Code,
    /// What goes to standard error; empty when it is said already.
    pub text: String,
}

impl Fault {
    /// A failure that has its code already.
    pub fn new(code: Code, text: impl fmt::Display) -> Self {
        Self {
            code,
            text: text.to_string(),
        }
    }
}

/// Failures of a step.
pub trait During<T> {
    /// Says in which step it failed.
    fn during(self, step: Step) -> Result<T, Fault>;
}

impl<T> During<T> for Result<T, Error> {
    fn during(self, step: Step) -> Result<T, Fault> {
        self.map_err(|e| Fault::new(step.code(e.kind()), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_the_code_of_its_step_and_kind() {
        for (step, kind, code) in [
            (Step::Look, Kind::Io, 6),
            (Step::Create, Kind::Io, 7),
            (Step::Merge, Kind::NoSpace, 7),
            (Step::Attach, Kind::Pending, 12),
            (Step::Snapshot, Kind::Poisoned, 16),
            (Step::Create, Kind::NoSpace, 20),
            (Step::Change, Kind::Io, 7),
            (Step::Change, Kind::NoSpace, 20),
            (Step::Umount, Kind::Io, 22),
            (Step::Umount, Kind::TimedOut, 22),
            (Step::Merge, Kind::Cancelled, 29),
            (Step::Descriptor, Kind::Damaged, 39),
            (Step::Attach, Kind::Damaged, 11),
        ] {
            assert_eq!(step.code(kind) as u8, code, "{step:?} {kind:?}");
        }
    }
}
