//! Descriptors as the two generations of ploop write them, element by element.

use ploop_formats::descriptor::Descriptor;
use ploop_formats::guid::Guid;

/// The writable top of an ordinary disk.
pub const TOP: Guid = Guid::TOP;
/// The parent of a base.
pub const NONE: Guid = Guid::NONE;

/// GUID and file of an image.
pub type ImageRow = (Guid, &'static str);
/// GUID and parent of a shot, and its mark.
pub type ShotRow = (Guid, Guid, &'static str);
/// How a generation writes.
pub type Generation = fn(&[ImageRow], &[ShotRow]) -> Text;

/// A disk to be written: the form is that of a generation, the rest is told.
#[derive(Debug, Clone)]
pub struct Text {
    pub root: &'static str,
    /// What stands in front of the storage.
    pub volume: &'static str,
    pub kind: &'static str,
    pub images: Vec<ImageRow>,
    pub top: Guid,
    pub shots: Vec<ShotRow>,
}

impl Text {
    /// What the first generation writes.
    pub fn old(images: &[ImageRow], shots: &[ShotRow]) -> Self {
        Self {
            root: "Parallels_disk_image",
            volume: "",
            kind: "Compressed",
            images: images.to_vec(),
            top: TOP,
            shots: shots.to_vec(),
        }
    }

    /// What the later generation writes.
    pub fn new(images: &[ImageRow], shots: &[ShotRow]) -> Self {
        let root = "Virtuozzo_disk_image";
        Self {
            root,
            ..Self::old(images, shots)
        }
    }

    pub fn write(&self) -> String {
        let Self {
            root,
            volume,
            kind,
            top,
            ..
        } = self;
        let mut text = format!(
            "<?xml version=\"1.0\"?>\n<{root}>\n  <Disk_Parameters>\n    \
             <Disk_size>2097152</Disk_size>\n    <Cylinders>2080</Cylinders>\n    \
             <Heads>16</Heads>\n    <Sectors>63</Sectors>\n    <Padding>0</Padding>\n  \
             </Disk_Parameters>\n  <StorageData>\n{volume}    <Storage>\n      <Start>0</Start>\n      \
             <End>2097152</End>\n      <Blocksize>2048</Blocksize>\n"
        );
        for (guid, file) in &self.images {
            text += &format!(
                "      <Image>\n        <GUID>{guid}</GUID>\n        <Type>{kind}</Type>\n        \
                 <File>{file}</File>\n      </Image>\n"
            );
        }
        text += &format!(
            "    </Storage>\n  </StorageData>\n  <Snapshots>\n    <TopGUID>{top}</TopGUID>\n"
        );
        for (guid, parent, mark) in &self.shots {
            let mark = match *mark {
                "" => String::new(),
                mark => format!("      <{mark}/>\n"),
            };
            text += &format!(
                "    <Shot>\n      <GUID>{guid}</GUID>\n      <ParentGUID>{parent}</ParentGUID>\n\
                 {mark}    </Shot>\n"
            );
        }
        text + &format!("  </Snapshots>\n</{root}>\n")
    }

    pub fn parse(&self) -> Descriptor {
        Descriptor::parse(self.write().as_bytes()).unwrap()
    }
}

/// A GUID to tell from others at a glance.
pub fn guid(n: u32) -> Guid {
    Guid::parse(&format!("{{{n:08x}-abcd-4000-8000-000000000000}}")).unwrap()
}

/// Base 1 with the snapshots 2, on which the top stands, and 3, which is marked.
pub fn branched(write: Generation) -> Text {
    let (a, b, c) = (guid(1), guid(2), guid(3));
    write(
        &[(a, "root.hdd"), (b, "f2"), (c, "f3"), (TOP, "f4")],
        &[(a, NONE, ""), (b, a, ""), (c, a, "Temporary"), (TOP, b, "")],
    )
}

/// What an operation is to have written.
pub fn assert_text(disk: &Descriptor, expected: &Text) {
    assert_eq!(String::from_utf8(disk.encode()).unwrap(), expected.write());
}
