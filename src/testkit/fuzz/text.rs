//! Any bytes as a descriptor: no panic, and what was understood is understood again when written.

use ploop_formats::descriptor::{Chs, Descriptor, ImageType, NewDisk};
use ploop_formats::guid::Guid;
use ploop_formats::limits;
use ploop_formats::units::ClusterSize;

/// One text.
pub fn run(input: &[u8]) {
    let Ok(descriptor) = Descriptor::parse(input) else {
        return;
    };
    let chain = descriptor.chain(descriptor.top());
    let chain = chain.expect("the top of a descriptor that was accepted has a chain");
    assert!((1..=limits::DEPTH_MAX).contains(&chain.len()));
    for image in &chain {
        let leaves = image.file.split('/').any(|part| part == "..");
        assert!(!leaves && !image.file.starts_with('/'), "{:?}", image.file);
    }
    let again = Descriptor::parse(&descriptor.encode()).expect("what we wrote reads back");
    assert_eq!(again.images(), descriptor.images());
    assert_eq!(again.shots(), descriptor.shots());
    if let Ok(edited) = descriptor.edit(|_| Ok(())) {
        Descriptor::parse(&edited.encode()).expect("what an edit gave reads back");
    }
}

/// A new disk, and a chain with a branch, comments and elements that mean nothing here.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let new = Descriptor::new_disk(&NewDisk {
        sectors: 2048,
        cluster: ClusterSize::new(1 << 20).expect("a legal cluster"),
        kind: ImageType::Compressed,
        file: "root.hds",
        preallocated: true,
        chs: Chs {
            cylinders: 1,
            heads: 16,
            sectors: 63,
        },
    });
    let new = new.expect("a legal disk").encode();
    vec![("new".into(), new), ("rich".into(), rich().into_bytes())]
}

fn rich() -> String {
    let name = |n: usize| match n {
        3 => Guid::TOP.to_string(),
        n => format!("{{{n:08x}-0000-4000-8000-00000000000a}}"),
    };
    // The fourth image is a branch.
    let parents = [Guid::NONE.to_string(), name(0), name(0), name(1)];
    let image = |n: usize| {
        let kind = if n == 0 { "Plain" } else { "Compressed" };
        let guid = name(n);
        format!(
            "<Image a='1'><GUID>{guid}</GUID><Type>{kind}</Type><File>f &amp; {n}</File></Image>"
        )
    };
    let shot = |n: usize| {
        let (guid, parent) = (name(n), &parents[n]);
        let mark = if n == 2 { "<Temporary/>" } else { "" };
        format!("<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID>{mark}</Shot>")
    };
    let (images, shots): (String, String) =
        ((0..4).map(image).collect(), (0..4).map(shot).collect());
    format!(
        "<?xml version=\"1.0\"?><!-- kept --><Parallels_disk_image Version=\"1.0\">\
         <Disk_Parameters><Disk_size>131072</Disk_size><Max_delta_size>5</Max_delta_size>\
         <Other><![CDATA[<x>]]></Other></Disk_Parameters><StorageData><Storage><Start>0</Start>\
         <End>131072</End><Blocksize>2048</Blocksize>{images}</Storage></StorageData>\
         <Snapshots><TopGUID>{}</TopGUID>{shots}</Snapshots></Parallels_disk_image>",
        Guid::TOP
    )
}
