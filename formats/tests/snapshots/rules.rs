//! The rules of ploop for a descriptor, loaded by other code than the crate's: its own reading of
//! XML and its own tree. Owns no operation; whatever breaks a rule is refused with its name.

use std::collections::BTreeMap;

pub const NONE: &str = "{00000000-0000-0000-0000-000000000000}";
pub const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
pub const BACKUP: &str = "{704718e1-2314-44c8-9087-d78ed36b0f4e}";

/// A disk as ploop would load it. GUIDs are in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub shots: BTreeMap<String, Row>,
    pub top: String,
    pub volume: bool,
    /// The top's shot is not in the text.
    pub implied: bool,
    /// What is neither an image nor a shot nor the top, as in the source and in its order.
    pub rest: Vec<String>,
}

/// An image and its shot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub parent: String,
    pub file: String,
    pub kind: String,
    pub mark: Option<String>,
    /// What nobody knows in the image and in the shot, as in the source.
    pub extras: Vec<String>,
}

impl Disk {
    pub fn children(&self, guid: &str) -> Vec<&str> {
        let shots = self.shots.iter();
        let of = shots.filter(|(_, row)| row.parent == guid);
        of.map(|(guid, _)| guid.as_str()).collect()
    }

    /// The shots that a shot stands on, itself first.
    pub fn chain(&self, guid: &str) -> Vec<&str> {
        let mut chain = Vec::new();
        let mut next = guid;
        while let Some((guid, row)) = self.shots.get_key_value(next) {
            chain.push(guid.as_str());
            next = &row.parent;
        }
        chain
    }
}

/// A piece of XML.
enum Piece {
    Element(Element),
    Text(String),
    /// Comments, processing instructions and declarations.
    Other(String),
}

struct Element {
    name: String,
    attributes: String,
    source: String,
    inside: Vec<Piece>,
}

type Loaded<T> = Result<T, String>;

/// Loads a descriptor or names the rule that it breaks.
pub fn load(text: &str) -> Loaded<Disk> {
    let mut input = text;
    let pieces = pieces(&mut input)?;
    ensure(input.is_empty(), "an end tag without its start")?;
    let roots: Vec<&Element> = elements(&pieces).collect();
    ensure(roots.len() == 1, "one root")?;
    let root = roots[0];
    let (parameters, data) = (one(root, "Disk_Parameters")?, one(root, "StorageData")?);
    let storage = one(data, "Storage")?;
    ensure(
        word(storage, "Start")? == "0" && word(storage, "End")? == word(parameters, "Disk_size")?,
        "one storage that covers the disk",
    )?;
    let snapshots = one(root, "Snapshots")?;
    let mut disk = Disk {
        shots: BTreeMap::new(),
        top: guid(snapshots, "TopGUID")?,
        volume: elements(&data.inside).any(|e| e.name == "Volume"),
        implied: false,
        rest: Vec::new(),
    };
    let images = images(storage)?;
    let mut shots = shots(snapshots)?;
    if shots.len() + 1 == images.len() {
        let parent = std::mem::replace(&mut disk.top, TOP.into());
        shots.push((TOP.into(), parent, None, Vec::new()));
        disk.implied = true;
    }
    ensure(shots.len() == images.len(), "as many images as shots")?;
    for (guid, parent, mark, more) in shots {
        let (kind, file, mut extras) = images.get(&guid).cloned().ok_or("a shot has an image")?;
        extras.extend(more);
        let row = Row {
            parent,
            file,
            kind,
            mark,
            extras,
        };
        ensure(disk.shots.insert(guid, row).is_none(), "one shot of a GUID")?;
    }
    check_tree(&disk)?;
    for known in [
        (root, &["Disk_Parameters", "StorageData", "Snapshots"][..]),
        (
            parameters,
            &[
                "Disk_size",
                "Max_delta_size",
                "Cylinders",
                "Heads",
                "Sectors",
                "Padding",
            ],
        ),
        (data, &["Volume", "Storage"]),
        (
            storage,
            &["Start", "End", "Blocksize", "Preallocated", "Image"],
        ),
        (snapshots, &["TopGUID", "Shot"]),
    ] {
        check_order(known.0, known.1)?;
        disk.rest
            .push(format!("{}{}", known.0.name, known.0.attributes));
        disk.rest.extend(unknown(known.0, known.1));
    }
    let around = pieces.iter().filter_map(|piece| match piece {
        Piece::Other(source) => Some(source.clone()),
        _ => None,
    });
    disk.rest.extend(around);
    Ok(disk)
}

fn check_tree(disk: &Disk) -> Loaded<()> {
    let shots = &disk.shots;
    let top = shots.get(&disk.top).ok_or("the top is there")?;
    ensure(top.mark.is_none(), "the top is not temporary")?;
    ensure(disk.top != BACKUP, "the top is not the backup")?;
    ensure(!shots.contains_key(NONE), "no shot is called like none")?;
    ensure(disk.children(NONE).len() == 1, "one base")?;
    for (guid, row) in shots {
        ensure(
            row.parent == NONE || shots.contains_key(&row.parent),
            "a parent is there",
        )?;
        let (mut depth, mut next) = (0, guid);
        while let Some(row) = shots.get(next) {
            next = &row.parent;
            depth += 1;
            ensure(depth <= 127, "no circle and no chain above the limit")?;
        }
    }
    let mut files: Vec<&str> = shots.values().map(|row| row.file.as_str()).collect();
    files.sort_unstable();
    files.dedup();
    ensure(files.len() == shots.len(), "one image in a file")
}

type ImageText = (String, String, Vec<String>);

fn images(storage: &Element) -> Loaded<BTreeMap<String, ImageText>> {
    let mut images = BTreeMap::new();
    for image in elements(&storage.inside).filter(|e| e.name == "Image") {
        let known = ["GUID", "Type", "File"];
        check_order(image, &known)?;
        let (kind, file) = (word(image, "Type")?, word(image, "File")?);
        ensure(
            ["Compressed", "Plain"].contains(&kind.as_str()),
            "a known type",
        )?;
        ensure(!file.is_empty(), "an image has a file")?;
        let old = images.insert(guid(image, "GUID")?, (kind, file, unknown(image, &known)));
        ensure(old.is_none(), "one image of a GUID")?;
    }
    ensure(!images.is_empty(), "an image")?;
    Ok(images)
}

type ShotText = (String, String, Option<String>, Vec<String>);

fn shots(snapshots: &Element) -> Loaded<Vec<ShotText>> {
    let marks = ["Temporary", "TemporaryZero", "TemporaryZeroSwap"];
    let known = [&["GUID", "ParentGUID"], &marks[..]].concat();
    let shots = elements(&snapshots.inside).filter(|e| e.name == "Shot");
    shots
        .map(|shot| {
            check_order(shot, &known)?;
            let mut found = elements(&shot.inside).filter(|e| marks.contains(&e.name.as_str()));
            let mark = found.next();
            ensure(found.next().is_none(), "one mark")?;
            ensure(
                mark.is_none_or(|mark| mark.inside.is_empty()),
                "a mark is empty",
            )?;
            let mark = mark.map(|mark| mark.name.clone());
            let (guid, parent) = (guid(shot, "GUID")?, guid(shot, "ParentGUID")?);
            Ok((guid, parent, mark, unknown(shot, &known)))
        })
        .collect()
}

fn ensure(holds: bool, rule: &str) -> Loaded<()> {
    if holds { Ok(()) } else { Err(rule.into()) }
}

fn elements(pieces: &[Piece]) -> impl Iterator<Item = &Element> {
    pieces.iter().filter_map(|piece| match piece {
        Piece::Element(element) => Some(element),
        _ => None,
    })
}

fn one<'e>(parent: &'e Element, name: &str) -> Loaded<&'e Element> {
    let mut found = elements(&parent.inside).filter(|e| e.name == name);
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        _ => Err(format!("one {name} in {}", parent.name)),
    }
}

fn word(parent: &Element, name: &str) -> Loaded<String> {
    match one(parent, name)?.inside.as_slice() {
        [Piece::Text(text)] => Ok(text
            .replace("&lt;", "<")
            .replace("&gt;", ">")
            .replace("&quot;", "\"")
            .replace("&apos;", "'")
            .replace("&amp;", "&")),
        _ => Err(format!("{name} is a word")),
    }
}

fn guid(parent: &Element, name: &str) -> Loaded<String> {
    let text = word(parent, name)?;
    let fits = |(at, c): (usize, char)| match at {
        0 => c == '{',
        37 => c == '}',
        9 | 14 | 19 | 24 => c == '-',
        _ => c.is_ascii_hexdigit(),
    };
    ensure(
        text.len() == 38 && text.chars().enumerate().all(fits),
        "a GUID has its form",
    )?;
    Ok(text.to_ascii_lowercase())
}

fn check_order(parent: &Element, known: &[&str]) -> Loaded<()> {
    let rank = |e: &Element| known.iter().position(|name| *name == e.name);
    let ranks: Vec<usize> = elements(&parent.inside).filter_map(rank).collect();
    ensure(ranks.is_sorted(), &format!("the order in {}", parent.name))
}

/// What is inside and not known, as in the source.
fn unknown(parent: &Element, known: &[&str]) -> Vec<String> {
    let inside = parent.inside.iter();
    let unknown = inside.filter_map(|piece| match piece {
        Piece::Element(e) if known.contains(&e.name.as_str()) && e.name != "Volume" => None,
        Piece::Element(e) => Some(e.source.clone()),
        Piece::Other(source) => Some(source.clone()),
        Piece::Text(text) => (!text.trim().is_empty()).then(|| text.trim().into()),
    });
    unknown.collect()
}

/// Cuts `input` behind `end`.
fn until<'t>(input: &mut &'t str, end: &str) -> Loaded<&'t str> {
    let at = input.find(end).ok_or(format!("no {end:?}"))? + end.len();
    let (part, rest) = input.split_at(at);
    *input = rest;
    Ok(part)
}

/// All pieces up to an end tag or the end.
fn pieces(input: &mut &str) -> Loaded<Vec<Piece>> {
    let mut pieces = Vec::new();
    while !input.is_empty() && !input.starts_with("</") {
        if input.starts_with("<!--") {
            pieces.push(Piece::Other(until(input, "-->")?.into()));
        } else if input.starts_with("<?") {
            pieces.push(Piece::Other(until(input, "?>")?.into()));
        } else if input.starts_with('<') {
            pieces.push(Piece::Element(element(input)?));
        } else {
            let (text, rest) = input.split_at(input.find('<').unwrap_or(input.len()));
            pieces.push(Piece::Text(text.into()));
            *input = rest;
        }
    }
    Ok(pieces)
}

fn element(input: &mut &str) -> Loaded<Element> {
    let start = *input;
    let tag = until(input, ">")?
        .trim_start_matches('<')
        .trim_end_matches('>');
    let (tag, empty) = tag
        .strip_suffix('/')
        .map_or((tag, false), |tag| (tag, true));
    let at = tag.find(char::is_whitespace).unwrap_or(tag.len());
    let (name, attributes) = tag.split_at(at);
    let mut inside = Vec::new();
    if !empty {
        inside = pieces(input)?;
        ensure(until(input, ">")? == format!("</{name}>"), "tags match")?;
    }
    Ok(Element {
        name: name.into(),
        attributes: attributes.into(),
        source: start[..start.len() - input.len()].into(),
        inside,
    })
}
