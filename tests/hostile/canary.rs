//! Canary: files that nobody may open, and a watch that tells who did.

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The folder beside that of the disk.
pub const OUTSIDE: &str = "outside";
/// A file in it.
pub const SECRET: &str = "secret";

/// A folder with files that is watched.
pub struct Canary {
    watch: OwnedFd,
    secret: PathBuf,
}

impl Canary {
    /// Puts the folder into `place`.
    pub fn plant(place: &Path) -> Self {
        let folder = place.join(OUTSIDE);
        fs::create_dir_all(&folder).unwrap();
        let secret = folder.join(SECRET);
        fs::write(&secret, vec![0x53; 1 << 20]).unwrap();
        let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&watch, &folder, WatchFlags::ALL_EVENTS).unwrap();
        Self { watch, secret }
    }

    /// Demands that the watch works.
    pub fn sings(&self) {
        assert_eq!(self.heard(), [""; 0]);
        drop(fs::File::open(&self.secret).unwrap());
        assert!(!self.heard().is_empty(), "a watch that sees nothing");
    }

    /// What happened in the folder since the last call.
    pub fn heard(&self) -> Vec<String> {
        let mut room = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.watch, &mut room);
        let mut heard = Vec::new();
        loop {
            match events.next() {
                Ok(event) => heard.push(format!("{:?} {:?}", event.file_name(), event.events())),
                Err(Errno::WOULDBLOCK) => return heard,
                Err(e) => panic!("the watch broke: {e}"),
            }
        }
    }
}
