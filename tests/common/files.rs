//! Files with known contents: pseudo-random bytes, sparse disks, and trees of a real system.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

/// A small, fast generator (splitmix64): the same bytes for the same seed, everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator that always says the same for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Something below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// So many bytes, a multiple of 8.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len / 8)
            .flat_map(|_| self.next().to_le_bytes())
            .collect()
    }
}

/// A file of `size` bytes that looks like a disk: runs of data, of explicit zeros and of holes.
pub fn sparse_disk(path: &Path, size: u64, seed: u64) {
    let mut random = Random::new(seed);
    let mut file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut at = 0;
    while at < size {
        let len = (4096 * (1 + random.below(128))).min(size - at);
        match random.below(3) {
            0 => {}
            1 => write_at(&mut file, at, &vec![0; len as usize]),
            _ => write_at(&mut file, at, &random.bytes(len as usize)),
        }
        at += len;
    }
}

fn write_at(file: &mut File, at: u64, data: &[u8]) {
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(data).unwrap();
}

/// The first offset where two files differ, lengths included.
pub fn difference(a: &Path, b: &Path) -> Option<u64> {
    let (mut a, mut b) = (File::open(a).unwrap(), File::open(b).unwrap());
    let mut at = 0;
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let (n, m) = (fill(&mut a, &mut x).unwrap(), fill(&mut b, &mut y).unwrap());
        if let Some(i) = (0..n.max(m)).find(|&i| i >= n || i >= m || x[i] != y[i]) {
            return Some(at + i as u64);
        }
        if n == 0 {
            return None;
        }
        at += n as u64;
    }
}

/// Demands that two files are equal.
pub fn assert_same(a: &Path, b: &Path) {
    let differ = difference(a, b);
    assert_eq!(
        differ,
        None,
        "{} and {} differ at that offset",
        a.display(),
        b.display()
    );
}

fn fill(file: &mut File, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read(&mut buf[done..])? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// Bytes of disk space that a file takes.
pub fn space_of(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// What a tree holds: each name with a digest of what is there.
pub type Digests = BTreeMap<PathBuf, String>;

/// Copies part of the running system, in the order of its names, until about `bytes` are copied:
/// files of every size, links and folders as a real container has them. Returns the digests of
/// the source as it was read, so that a later comparison does not trust the copy.
pub fn copy_system_tree(to: &Path, bytes: u64) -> Digests {
    let mut tree = Tree {
        to,
        left: bytes,
        digests: Digests::new(),
    };
    for root in ["/usr/share", "/usr/lib"] {
        tree.copy(Path::new(root));
    }
    let short = "this system has too little under /usr/share and /usr/lib";
    assert_eq!(tree.left, 0, "{short}: {} bytes are missing", tree.left);
    tree.digests
}

/// Files above this are passed over: one huge library would make the tree a single file.
const FILE_MAX: u64 = 32 << 20;

struct Tree<'a> {
    to: &'a Path,
    left: u64,
    digests: Digests,
}

impl Tree<'_> {
    fn copy(&mut self, from: &Path) {
        let Ok(meta) = fs::symlink_metadata(from) else {
            return;
        };
        if self.left == 0 {
            return;
        }
        let name = from.strip_prefix("/").unwrap();
        let to = self.to.join(name);
        if meta.is_dir() {
            fs::create_dir_all(&to).unwrap();
            for child in sorted(from) {
                self.copy(&child);
            }
        } else if meta.is_symlink() {
            let target = fs::read_link(from).unwrap();
            symlink(&target, &to).unwrap();
            self.digests
                .insert(name.into(), format!("link to {}", target.display()));
        } else if meta.is_file() && meta.len() <= FILE_MAX {
            let Ok(data) = fs::read(from) else { return };
            fs::write(&to, &data).unwrap_or_else(|e| panic!("writing {}: {e}", to.display()));
            self.digests.insert(name.into(), digest(&data));
            self.left = self.left.saturating_sub(data.len() as u64);
        }
    }
}

/// Digests of everything under `root`, by names relative to it.
pub fn digests(root: &Path) -> Digests {
    let mut found = Digests::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for path in sorted(&folder) {
            let name = path.strip_prefix(root).unwrap().to_path_buf();
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                folders.push(path);
            } else if meta.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                found.insert(name, format!("link to {}", target.display()));
            } else {
                let data = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                found.insert(name, digest(&data));
            }
        }
    }
    found
}

/// Demands that a tree holds exactly what `wanted` says.
pub fn assert_tree(root: &Path, wanted: &Digests) {
    let found = digests(root);
    for (name, digest) in wanted {
        assert_eq!(
            found.get(name),
            Some(digest),
            "{} under {}",
            name.display(),
            root.display()
        );
    }
    // A file system may keep a folder of its own for lost files.
    let extra = found.keys().find(|name| !wanted.contains_key(*name));
    assert_eq!(extra, None, "a file that nobody made");
}

fn sorted(folder: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> = fs::read_dir(folder)
        .map(|all| all.map(|e| e.unwrap().path()).collect())
        .unwrap_or_default();
    names.sort();
    names
}

/// Length and MD5 of some bytes: nobody attacks a test, and the engine already brings MD5.
fn digest(data: &[u8]) -> String {
    use md5::{Digest, Md5};
    format!(
        "{} bytes, {:032x}",
        data.len(),
        u128::from_be_bytes(Md5::digest(data).into())
    )
}
