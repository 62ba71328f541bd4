//! Descriptors with something wrong in them, and folders laid out as traps around them.

use super::abuse::{Case, Node, OUT};
use super::canary::SECRET;
use bytes::Bytes;
use ploop_formats::ploop::Version;
use ploop_formats::testkit::image::Delta;
use ploop_formats::testkit::rng::Rng;
use std::ffi::OsString;
use std::sync::OnceLock;

const CLUSTER: u64 = 32 << 10;
const SECTORS: usize = 64;
/// Guest clusters of each layer.
const GUEST: usize = 3;
const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
const NONE: &str = "{00000000-0000-0000-0000-000000000000}";
const BACKUP: &str = "{704718e1-2314-44c8-9087-d78ed36b0f4e}";

/// Every hostile descriptor.
pub fn cases() -> impl Iterator<Item = Case> + Send {
    let families = [
        healthy, names, traps, numbers, trees, structure, syntax, sizes, noise,
    ];
    families.into_iter().flat_map(|family| {
        let mut cases = Vec::new();
        family(&mut cases);
        cases
    })
}

fn healthy(cases: &mut Vec<Case>) {
    cases.push(case("nothing wrong", Disk::healthy().text()));
}

/// A descriptor in parts.
#[derive(Clone)]
struct Disk {
    /// GUID, type and file, base first.
    images: Vec<[String; 3]>,
    /// GUID and parent.
    shots: Vec<[String; 2]>,
    top: String,
}

fn guid(n: usize) -> String {
    format!("{{{n:08x}-0000-4000-8000-000000000000}}")
}

fn layer_file(n: usize) -> String {
    format!("layer-{n}")
}

impl Disk {
    /// Three layers, whose files are there.
    fn healthy() -> Self {
        Self::chain(3)
    }

    fn chain(layers: usize) -> Self {
        let name = |n: usize| {
            if n + 1 == layers {
                TOP.into()
            } else {
                guid(n + 1)
            }
        };
        let parent = |n: usize| if n == 0 { NONE.into() } else { name(n - 1) };
        Self {
            images: (0..layers)
                .map(|n| [name(n), "Compressed".into(), layer_file(n)])
                .collect(),
            shots: (0..layers).map(|n| [name(n), parent(n)]).collect(),
            top: format!("<TopGUID>{TOP}</TopGUID>"),
        }
    }

    fn text(&self) -> String {
        let images = self.images.iter().map(|[guid, kind, file]| {
            format!("<Image><GUID>{guid}</GUID><Type>{kind}</Type><File>{file}</File></Image>\n")
        });
        let shots = self.shots.iter().map(|[guid, parent]| {
            format!("<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>\n")
        });
        let (images, shots): (String, String) = (images.collect(), shots.collect());
        let (sectors, top) = (GUEST * SECTORS, &self.top);
        format!(
            r#"<?xml version="1.0"?>
<Parallels_disk_image>
<Disk_Parameters><Disk_size>{sectors}</Disk_size><Max_delta_size>1</Max_delta_size>
<Cylinders>1</Cylinders><Heads>1</Heads><Sectors>1</Sectors><Padding>0</Padding></Disk_Parameters>
<StorageData><Storage><Start>0</Start><End>{sectors}</End><Blocksize>{SECTORS}</Blocksize>
<Preallocated>0</Preallocated>
{images}</Storage></StorageData>
<Snapshots>{top}
{shots}</Snapshots></Parallels_disk_image>
"#
        )
    }
}

fn layer(n: usize) -> Bytes {
    static LAYERS: [OnceLock<Bytes>; 3] = [const { OnceLock::new() }; 3];
    LAYERS[n].get_or_init(|| make_layer(n)).clone()
}

fn make_layer(n: usize) -> Bytes {
    let values = |c: usize| (0..SECTORS).map(move |s| ((n * 100 + c) * SECTORS + s + 1) as u64);
    let clusters = (0..GUEST).map(|c| (c != n).then(|| values(c).collect()));
    let delta = Delta {
        version: Version::V2,
        cluster: CLUSTER,
        clusters: clusters.collect(),
        leaks: 0,
        in_use: false,
    };
    delta.make(&mut Rng::new(n as u64)).to_vec().into()
}

fn case(name: &str, text: impl Into<Vec<u8>>) -> Case {
    let descriptor = Node::File(text.into().into(), 0);
    let mut files: Vec<(OsString, Node)> = vec![("DiskDescriptor.xml".into(), descriptor)];
    files.extend((0..3).map(|n| (layer_file(n).into(), Node::File(layer(n), 0))));
    let link = |to: &str| Node::Link(to.into());
    let traps = [
        ("link", link(&format!("{OUT}/{SECRET}"))),
        ("up", link("..")),
        ("away", link(OUT)),
        ("magic", link("/proc/self/root")),
        ("loop", link("loop")),
        ("own-link", link("layer-0")),
        ("hard", Node::Hard("layer-0".into())),
        ("pipe", Node::Pipe),
        ("folder", Node::Folder),
    ];
    files.extend(traps.map(|(name, node)| (name.into(), node)));
    Case {
        name: name.into(),
        bare: None,
        files,
    }
}

/// Names of files, as they stand in the text.
fn names(cases: &mut Vec<Case>) {
    let long = |n: usize| "n".repeat(n);
    let mut names: Vec<String> = [
        "",
        " ",
        ".",
        "..",
        "/",
        "//",
        "./",
        "../",
        "...",
        "/etc/passwd",
        "/dev/null",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/exe",
        "/proc/self/fd/0",
        "/proc/self/mem",
        "link",
        "own-link",
        "loop",
        "hard",
        "pipe",
        "folder",
        "folder/",
        "folder/..",
        "up",
        "away",
        "magic",
        "absent",
        "DiskDescriptor.xml",
        "./layer-0",
        "layer-0/",
        "layer-0/.",
        "folder/../layer-0",
        ".//layer-0",
        "LAYER-0",
        " layer-0",
        "layer-0 ",
        "layer-0\n",
        "layer&#48;-0",
        "layer&#0;",
        "layer\u{202E}0",
        "..\\outside",
        "C:\\layer-0",
        "%2e%2e/outside",
        "file:layer-0",
        "json:{\"driver\":\"file\"}",
        "nbd:localhost:10809",
        "fd:0",
        "-",
        "--help",
        "layer-0?a=b",
        "<b>layer-0</b>",
        "layer-<!-- -->0",
        "layer-<![CDATA[0]]>",
        "&amp;",
        "&lt;",
        "&quot;",
        "&unknown;",
        "&#xD800;",
        "&#x110000;",
        "\u{0}",
        "layer-0\u{0}x",
        "\u{7F}",
        "*",
        "~root",
    ]
    .map(String::from)
    .into();
    let outside = [
        "../outside/secret",
        "away/secret",
        "up/outside/secret",
        "./../outside/secret",
    ];
    names.extend(outside.map(String::from));
    names.extend([
        format!("{OUT}/{SECRET}"),
        format!("magic{OUT}/{SECRET}"),
        format!("file://{OUT}/{SECRET}"),
        long(255),
        long(256),
        long(4096),
        long(1 << 20),
        format!("{}layer-0", "./".repeat(2000)),
        format!("{}outside/secret", "../".repeat(100)),
    ]);
    for name in &names {
        for (n, kind) in [
            (0, "Compressed"),
            (0, "Plain"),
            (1, "Compressed"),
            (2, "Compressed"),
        ] {
            let mut disk = Disk::healthy();
            disk.images[n][1] = kind.into();
            disk.images[n][2] = name.clone();
            let shown: String = name.chars().take(40).collect();
            cases.push(case(
                &format!("layer {n}, {kind}, is {shown:?}"),
                disk.text(),
            ));
        }
    }
}

/// The files around the descriptor, and itself, are not what they should be.
fn traps(cases: &mut Vec<Case>) {
    let nodes = [
        ("a link away", Node::Link(format!("{OUT}/{SECRET}"))),
        ("a link up", Node::Link("../outside/secret".into())),
        ("a link beside", Node::Link("layer-1".into())),
        ("a link to a pipe", Node::Link("pipe".into())),
        ("a link to a device", Node::Link("/dev/zero".into())),
        ("a link to nothing", Node::Link("absent".into())),
        ("a pipe", Node::Pipe),
        ("a folder", Node::Folder),
        ("empty", Node::File(Bytes::new(), 0)),
        ("a hole", Node::File(Bytes::new(), 1 << 40)),
        ("noise", Node::File(vec![0xEE; 100_000].into(), 0)),
    ];
    for file in 0..4 {
        for (what, node) in &nodes {
            let mut case = case("", Disk::healthy().text());
            case.name = format!("{} is {what}", case.files[file].0.display());
            case.files[file].1 = node.clone();
            case.files.retain(|(name, _)| name != "hard");
            cases.push(case);
        }
    }
    for missing in 0..4 {
        let mut case = case("", Disk::healthy().text());
        case.name = format!("{} is missing", case.files[missing].0.display());
        case.files.remove(missing);
        case.files.retain(|(name, _)| name != "hard");
        cases.push(case);
    }
}

fn numbers(cases: &mut Vec<Case>) {
    let healthy = Disk::healthy().text();
    let digits = "9".repeat(100_000);
    let values = [
        "",
        " ",
        "-1",
        "0",
        "1",
        "2",
        "63",
        "65",
        "2147483648",
        "4294967295",
        "4294967296",
        "9223372036854775807",
        "18014398509481983",
        "18014398509481984",
        "18446744073709551615",
        "18446744073709551616",
        "0x10",
        "1e3",
        "5 5",
        "+7",
        "\u{663}",
        "NaN",
        "1.5",
        &digits,
        "<a/>",
        "<!-- 1 -->",
        "<![CDATA[64]]>",
        "&#49;",
        "192 ",
    ];
    let fields = [
        "Disk_size",
        "Max_delta_size",
        "Cylinders",
        "Heads",
        "Sectors",
        "Padding",
        "Start",
        "End",
        "Blocksize",
        "Preallocated",
    ];
    for field in fields {
        let (open, close) = (format!("<{field}>"), format!("</{field}>"));
        let from = healthy.find(&open).unwrap() + open.len();
        let to = healthy.find(&close).unwrap();
        for value in values {
            let text = format!("{}{value}{}", &healthy[..from], &healthy[to..]);
            let shown: String = value.chars().take(30).collect();
            cases.push(case(&format!("{field} is {shown:?}"), text));
        }
    }
}

fn trees(cases: &mut Vec<Case>) {
    let mut push = |name: &str, change: &dyn Fn(&mut Disk)| {
        let mut disk = Disk::healthy();
        change(&mut disk);
        cases.push(case(&format!("tree: {name}"), disk.text()));
    };
    for n in 0..3 {
        push(&format!("shot {n} is its own parent"), &|d| {
            d.shots[n][1] = d.shots[n][0].clone()
        });
        push(&format!("shot {n} is missing"), &|d| {
            drop(d.shots.remove(n))
        });
        push(&format!("image {n} is missing"), &|d| {
            drop(d.images.remove(n))
        });
        push(&format!("shot {n} twice"), &|d| {
            d.shots.push(d.shots[n].clone())
        });
        push(&format!("image {n} twice"), &|d| {
            d.images.push(d.images[n].clone())
        });
        push(&format!("the parent of {n} is unknown"), &|d| {
            d.shots[n][1] = guid(99)
        });
        push(&format!("shot {n} is a base"), &|d| {
            d.shots[n][1] = NONE.into()
        });
        push(&format!("shot {n} is nothing"), &|d| {
            d.shots[n][0] = NONE.into()
        });
        push(&format!("image {n} is a backup"), &|d| {
            d.images[n][0] = BACKUP.into();
            d.shots[n][0] = BACKUP.into();
        });
        push(&format!("image {n} is QCow2"), &|d| {
            d.images[n][1] = "QCow2".into()
        });
        push(&format!("image {n} is of no type"), &|d| {
            d.images[n][1] = "raw".into()
        });
        push(&format!("the base stands on {n}"), &|d| {
            d.shots[0][1] = d.shots[n][0].clone()
        });
        push(&format!("all stand on {n}"), &|d| {
            let parent = d.shots[n][0].clone();
            d.shots.iter_mut().for_each(|shot| shot[1] = parent.clone());
        });
        push(&format!("the files are all that of {n}"), &|d| {
            let file = d.images[n][2].clone();
            d.images
                .iter_mut()
                .for_each(|image| image[2] = file.clone());
        });
    }
    let tops = [
        "",
        "<TopGUID/>",
        "<TopGUID></TopGUID>",
        "<TopGUID>x</TopGUID>",
        &format!("<TopGUID>{NONE}</TopGUID>"),
        &format!("<TopGUID>{BACKUP}</TopGUID>"),
        &format!("<TopGUID>{}</TopGUID>", guid(1)),
        &format!("<TopGUID>{}</TopGUID>", guid(99)),
        &format!("<TopGUID>{TOP}</TopGUID><TopGUID>{}</TopGUID>", guid(1)),
    ];
    for top in tops {
        push(&format!("top {top}"), &|d| d.top = top.into());
    }
    let odd = [
        "",
        "{}",
        "x",
        "{00000001-0000-4000-8000-00000000000}",
        "00000001-0000-4000-8000-000000000000",
        "{00000001000040008000000000000000}",
        "{0000000g-0000-4000-8000-000000000000}",
        "{00000001-0000-4000-8000-000000000000",
        "{\u{663}0000001-0000-4000-8000-000000000000}",
        "urn:uuid:00000001-0000-4000-8000-000000000000",
    ];
    for text in odd {
        push(&format!("a GUID {text:?}"), &|d| {
            d.images[0][0] = text.into()
        });
        push(&format!("a parent {text:?}"), &|d| {
            d.shots[1][1] = text.into()
        });
    }
    for layers in [1, 2, 126, 127, 128, 129, 1000, 8000] {
        let mut disk = Disk::chain(layers);
        cases.push(case(&format!("tree: {layers} layers"), disk.text()));
        disk.shots[0][1] = disk.shots.last().unwrap()[0].clone();
        cases.push(case(&format!("tree: a circle of {layers}"), disk.text()));
    }
    let mut wide = Disk::healthy();
    for n in 10..5000 {
        wide.images
            .push([guid(n), "Compressed".into(), layer_file(0)]);
        wide.shots.push([guid(n), wide.shots[0][0].clone()]);
    }
    cases.push(case("tree: 5000 branches", wide.text()));
}

/// Each element left out, doubled, emptied, renamed.
fn structure(cases: &mut Vec<Case>) {
    let healthy = Disk::healthy().text();
    let mut from = 0;
    let mut seen = 0;
    while let Some(at) = healthy[from..].find('<').map(|n| n + from) {
        from = at + 1;
        let name: String = healthy[from..]
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        if name.is_empty() {
            continue;
        }
        let close = format!("</{name}>");
        let end = at + healthy[at..].find(&close).unwrap() + close.len();
        let (before, element, after) = (&healthy[..at], &healthy[at..end], &healthy[end..]);
        seen += 1;
        for (how, text) in [
            ("left out", String::new()),
            ("doubled", format!("{element}{element}")),
            ("empty", format!("<{name}/>")),
            ("renamed", element.replace(&name, "Other")),
            ("text", "text".into()),
        ] {
            let text = format!("{before}{text}{after}");
            cases.push(case(&format!("element {seen} ({name}) {how}"), text));
        }
    }
}

/// What XML can do and a descriptor has no use for.
fn syntax(cases: &mut Vec<Case>) {
    let healthy = Disk::healthy().text();
    let (head, body) = healthy.split_once("?>").unwrap();
    let laughs: String = (1..12)
        .map(|n| format!("<!ENTITY l{n} \"{}\">", format!("&l{};", n - 1).repeat(10)))
        .collect();
    let doctypes = [
        format!("<!DOCTYPE a [<!ENTITY l0 \"ha\">{laughs}]>"),
        format!("<!DOCTYPE a [<!ENTITY l11 SYSTEM \"file://{OUT}/{SECRET}\">]>"),
        format!("<!DOCTYPE a [<!ENTITY % p SYSTEM \"file://{OUT}/{SECRET}\"> %p;]>"),
        format!("<!DOCTYPE a SYSTEM \"file://{OUT}/{SECRET}\">"),
        "<!DOCTYPE a PUBLIC \"x\" \"http://127.0.0.1:1/x\">".into(),
        "<!DOCTYPE a [<!ENTITY l11 \"&l11;\">]>".into(),
        "<!DOCTYPE a [".repeat(10_000),
    ];
    for (n, doctype) in doctypes.iter().enumerate() {
        let used = body.replace("layer-0", "&l11;");
        cases.push(case(
            &format!("doctype {n}"),
            format!("{head}?>{doctype}{body}"),
        ));
        cases.push(case(
            &format!("doctype {n}, used"),
            format!("{head}?>{doctype}{used}"),
        ));
    }
    let inside = [
        format!("<xi:include href=\"file://{OUT}/{SECRET}\"/>"),
        format!("<?xml-stylesheet href=\"file://{OUT}/{SECRET}\"?>"),
        "<?xml version=\"1.0\"?>".into(),
        "<!--".into(),
        "<!-- -- -->".into(),
        "<![CDATA[".into(),
        "]]>".into(),
        "<".into(),
        ">".into(),
        "&".into(),
        "<a".into(),
        "<a b=\"".into(),
        "<a b='1' b='2'/>".into(),
        "</a>".into(),
        "\u{0}".into(),
        "\u{FFFE}".into(),
        "&#x41;".repeat(10_000),
        "<!-- -->".repeat(100_000),
        "<a/>".repeat(70_000),
        "<a>x</a>".repeat(30_000),
        "<a>".repeat(27),
        "<a>".repeat(1_000_000),
        format!("{}{}", "<a>".repeat(28), "</a>".repeat(28)),
        format!("{}{}", "<a>".repeat(29), "</a>".repeat(29)),
        format!("{}{}", "<a>".repeat(5000), "</a>".repeat(5000)),
        format!("<a b=\"{}\"/>", "x".repeat(3 << 20)),
        format!("<a {}/>", "b=\"1\" ".repeat(300_000)),
        format!("<{}/>", "a".repeat(3 << 20)),
        format!("<{0}></{0}>", "a".repeat(1 << 20)),
        format!("<?{}?>", "a".repeat(3 << 20)),
    ];
    for (n, more) in inside.iter().enumerate() {
        let text = body.replacen("<Storage>", &format!("<Storage>{more}"), 1);
        cases.push(case(&format!("inside {n}"), format!("{head}?>{text}")));
        let text = body.replacen("layer-0", &format!("layer-0{more}"), 1);
        cases.push(case(&format!("in a name {n}"), format!("{head}?>{text}")));
    }
    let utf16 = |first: [u8; 2], bytes: fn(u16) -> [u8; 2]| {
        let text = healthy.encode_utf16().flat_map(bytes);
        first.into_iter().chain(text).collect::<Vec<u8>>()
    };
    cases.push(case(
        "UTF-16, low first",
        utf16([0xFF, 0xFE], u16::to_le_bytes),
    ));
    cases.push(case(
        "UTF-16, high first",
        utf16([0xFE, 0xFF], u16::to_be_bytes),
    ));
    for coding in ["UTF-16", "ISO-8859-1", "UTF-7", "x"] {
        let text = format!("<?xml version=\"1.0\" encoding=\"{coding}\"?>{body}");
        cases.push(case(&format!("it says {coding}"), text));
    }
    for (at, bad) in [(0, 0xFF), (100, 0x80), (500, 0xC0), (900, 0xF8)] {
        let mut bytes = healthy.clone().into_bytes();
        bytes[at] = bad;
        cases.push(case(&format!("byte {at} is {bad:#x}"), bytes));
    }
}

fn sizes(cases: &mut Vec<Case>) {
    let healthy = Disk::healthy().text();
    let most = 4 << 20;
    for len in [most - 1, most, most + 1, 64 << 20] {
        let spaces = format!("{healthy}{}", " ".repeat(len - healthy.len()));
        cases.push(case(&format!("{len} bytes, spaces"), spaces));
        let text = healthy.replacen("layer-0", &"n".repeat(len - healthy.len() + 7), 1);
        cases.push(case(&format!("{len} bytes, a name"), text));
        cases.push(case(&format!("{len} bytes of tags"), "<a>".repeat(len / 3)));
        let mut hole = case(&format!("{len} bytes, a hole"), healthy.clone());
        hole.files[0].1 = Node::File(healthy.clone().into(), len as u64);
        cases.push(hole);
    }
    let mut vast = case("1 TiB, a hole", healthy.clone());
    vast.files[0].1 = Node::File(healthy.clone().into(), 1 << 40);
    cases.push(vast);
    for n in 0..40 {
        let len = healthy.len() * n / 40;
        cases.push(case(&format!("cut to {len} bytes"), &healthy[..len]));
    }
}

fn noise(cases: &mut Vec<Case>) {
    let healthy = Disk::healthy().text();
    let mut rng = Rng::new(17);
    for round in 0..120 {
        let mut bytes = healthy.clone().into_bytes();
        for _ in 0..rng.range(1, 8) {
            let at = rng.below(bytes.len() as u64) as usize;
            match rng.below(4) {
                0 => bytes[at] = rng.next() as u8,
                1 => bytes[at] = *rng.pick(b"<>&/\"'={}0"),
                2 => drop(bytes.drain(at..(at + 30).min(bytes.len()))),
                _ => {
                    let piece = bytes[at..(at + 60).min(bytes.len())].to_vec();
                    bytes.splice(at..at, piece);
                }
            }
        }
        cases.push(case(&format!("noise, {round}"), bytes));
    }
}
