//! A disk with snapshots and what each of its points should hold, judged by QEMU.
#![allow(dead_code, reason = "each test file uses a part")]

use super::{PLOOPCTL, Scratch, has, json, ok, text};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

pub const SIZE: usize = 8 << 20;
pub const CLUSTER: usize = 64 << 10;

/// Numbers that are the same in every run.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).expect("64 bits") % n
    }
}

pub fn tool(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    output
}

/// The tools that judge are there.
pub fn can_judge() -> bool {
    has("qemu-img") && has("qemu-io")
}

/// A server in the foreground, ended in order when it goes.
pub struct Server {
    pub child: Child,
    pub uri: String,
}

impl Server {
    pub fn start(disk: &Path) -> Self {
        let socket = format!("unix:{}.sock", text(disk));
        let mut child = Command::new(PLOOPCTL)
            .args(["serve", text(disk), "--nbd", &socket])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("serve");
        let mut uri = String::new();
        let out = child.stdout.as_mut().expect("piped");
        BufReader::new(out).read_line(&mut uri).expect("a line");
        let uri = uri.trim_end().to_string();
        Self { child, uri }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}

/// A disk and what its points should hold.
pub struct Disk {
    pub path: PathBuf,
    pub top: Vec<u8>,
    pub points: BTreeMap<String, Vec<u8>>,
}

impl Disk {
    pub fn new(scratch: &Scratch, name: &str) -> Self {
        let path = scratch.disk(name, &["-s", "8M", "--fs", "none"]);
        Self::of(path, vec![0; SIZE])
    }

    /// A disk without snapshots that reads as this.
    pub const fn of(path: PathBuf, top: Vec<u8>) -> Self {
        Self {
            path,
            top,
            points: BTreeMap::new(),
        }
    }

    pub fn name(&self) -> &str {
        text(&self.path)
    }

    /// Writes through the served disk, as its guest would: each offset, length and byte.
    pub fn write(&mut self, writes: &[(usize, usize, u8)]) {
        let server = Server::start(&self.path);
        let mut args = vec!["-f".to_string(), "raw".into()];
        for (at, len, byte) in writes {
            let command = match byte {
                0 => format!("write -z {at} {len}"),
                byte => format!("write -P {byte} {at} {len}"),
            };
            args.extend(["-c".into(), command]);
            self.top[*at..*at + *len].fill(*byte);
        }
        args.push(server.uri.clone());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        tool("qemu-io", &args);
    }

    pub fn scribble(&mut self, dice: &mut Dice, writes: usize) {
        let one = |dice: &mut Dice| {
            let at = dice.below(SIZE / 512) * 512;
            let len = (1 + dice.below(600)) * 512;
            (
                at,
                len.min(SIZE - at),
                u8::try_from(dice.below(256)).expect("a byte"),
            )
        };
        let writes: Vec<_> = (0..writes).map(|_| one(dice)).collect();
        self.write(&writes);
    }

    pub fn snapshot(&mut self) -> String {
        let uuid = ok(&["snapshot", "create", self.name()])
            .trim_end()
            .to_string();
        self.points.insert(uuid.clone(), self.top.clone());
        uuid
    }

    pub fn list(&self) -> Vec<Value> {
        let list = json(&["snapshot", "list", self.name()]);
        list["snapshots"].as_array().expect("snapshots").clone()
    }

    pub fn entry(&self, uuid: &str) -> Value {
        let list = self.list();
        let found = list.iter().find(|s| s["uuid"] == uuid);
        found.unwrap_or_else(|| panic!("{uuid}: {list:?}")).clone()
    }

    pub fn switch(&mut self, uuid: &str) {
        ok(&["snapshot", "switch", self.name(), uuid]);
        self.top = self.points[uuid].clone();
    }

    /// Deletes a snapshot; those that are merged away with it, too, are no points any more.
    pub fn delete(&mut self, uuid: &str) {
        ok(&["snapshot", "delete", self.name(), uuid]);
        self.points.remove(uuid);
    }

    pub fn top_file(&self) -> PathBuf {
        let info = json(&["info", self.name()]);
        let layers = info["layers"].as_array().expect("layers").clone();
        let top = layers.last().expect("a top")["file"]
            .as_str()
            .expect("a file")
            .to_string();
        self.path.join(top)
    }

    /// Files of a point, the upper ones first; those of the top without one.
    pub fn chain(&self, point: Option<&str>) -> Vec<PathBuf> {
        let list = self.list();
        let find = |uuid: &Value| list.iter().find(|s| s["uuid"] == *uuid);
        let mut chain = Vec::new();
        let mut next = match point {
            Some(uuid) => find(&json!(uuid)),
            None => {
                chain.push(self.top_file());
                list.iter().find(|s| s["current"] == true)
            }
        };
        while let Some(snapshot) = next {
            chain.push(self.path.join(snapshot["file"].as_str().expect("a file")));
            next = find(&snapshot["parent"]);
        }
        chain
    }

    pub fn read(&self, point: Option<&str>) -> Vec<u8> {
        read_chain(&self.chain(point))
    }

    /// Every point, the top and every file are what they should be, and there is nothing else.
    pub fn judge(&self, when: &str) {
        for (uuid, content) in &self.points {
            assert!(self.read(Some(uuid)) == *content, "{when}: {uuid}");
        }
        assert!(self.read(None) == self.top, "{when}: the top");
        let mut files = vec![self.top_file()];
        for snapshot in self.list() {
            assert!(
                snapshot["temporary"] == true
                    || self
                        .points
                        .contains_key(snapshot["uuid"].as_str().expect("a UUID")),
                "{when}: {snapshot}"
            );
            files.push(self.path.join(snapshot["file"].as_str().expect("a file")));
        }
        for file in &files {
            match driver(file) {
                "raw" => {}
                driver => drop(tool("qemu-img", &["check", "-q", "-f", driver, text(file)])),
            }
        }
        let images = fs::read_dir(&self.path).expect("list").filter(|e| {
            let name = e.as_ref().expect("an entry").file_name();
            text(Path::new(&name)).starts_with("root.hds")
        });
        assert_eq!(images.count(), files.len(), "{when}");
        let orphans = json(&["list", "--orphans", self.name()]);
        assert_eq!(orphans["files"], json!([]), "{when}");
    }
}

/// QEMU's name for what a file of a disk is.
fn driver(file: &Path) -> &'static str {
    let mut magic = [0; 4];
    let mut file = fs::File::open(file).expect("open");
    match file.read_exact(&mut magic).map(|()| magic) {
        Ok([b'Q', b'F', b'I', 0xFB]) => "qcow2",
        Ok([b'W', b'i', b't', b'h']) => "parallels",
        _ => "raw",
    }
}

/// What QEMU reads of a chain of files, the upper ones first.
pub fn read_chain(chain: &[PathBuf]) -> Vec<u8> {
    let mut below = Value::Null;
    for file in chain.iter().rev() {
        let mut node = json!({
            "driver": driver(file),
            "file": { "driver": "file", "filename": text(file) },
        });
        if !below.is_null() {
            node["backing"] = below;
        }
        below = node;
    }
    let out = tempfile::NamedTempFile::new().expect("a file");
    let place = format!("json:{below}");
    tool(
        "qemu-img",
        &["convert", "-O", "raw", &place, text(out.path())],
    );
    fs::read(out.path()).expect("read")
}

/// A UUID that no snapshot has but on request.
pub const NOBODY: &str = "00000000-1111-4222-8333-444444444444";
