//! What OpenVZ's ploop has and this one has not: why not, what to do, and the exit code.

use super::code::{Code, Fault};

/// A command that is not offered.
#[derive(Debug)]
pub struct Absent {
    names: &'static [&'static str],
    why: &'static str,
    code: Code,
}

const ABSENT: &[Absent] = &[
    Absent {
        names: &["clear"],
        why: "no kernel driver keeps a state that could be cleared",
        code: Code::Param,
    },
    Absent {
        names: &["copy"],
        why: "no copy is sent while a disk is in use; use tsnapshot and copy what it mounts",
        code: Code::Param,
    },
    Absent {
        names: &["degrade", "tg-init", "tg-deinit", "tg-status"],
        why: "this belongs to the device mapper, which is not used",
        code: Code::Param,
    },
    Absent {
        names: &["delete", "rm"],
        why: "no delta is dropped without a look at what is in it; use snapshot-delete",
        code: Code::Param,
    },
    Absent {
        names: &["encrypt"],
        why: "there is no encryption; use dm-crypt on the device",
        code: Code::Crypt,
    },
    Absent {
        names: &["cbt"],
        why: "`ploopctl track` says what is written from now on, and `snapshot diff` compares two snapshots",
        code: Code::NoCbt,
    },
];

/// The entry of a command.
pub fn find(name: &str) -> Option<&'static Absent> {
    ABSENT.iter().find(|absent| absent.names.contains(&name))
}

impl Absent {
    /// What who asks for it is told.
    pub fn fault(&self) -> Fault {
        Fault::new(self.code, format_args!("ploop: not offered: {}", self.why))
    }
}

/// An option that is not offered.
pub fn option(option: &str, why: &str) -> Fault {
    Fault::new(Code::Param, format!("ploop: not offered: {option}: {why}"))
}
