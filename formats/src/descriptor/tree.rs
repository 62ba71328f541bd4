//! Tree: an XML document as a light tree that writes back what it read.
//!
//! Owns XML syntax and the bounds on it; knows nothing of disks. Whatever no accessor touches
//! (unknown elements, attributes, comments, white space) is kept as source text and written back
//! byte for byte. Document types and entities are refused: they are how a small file grows large
//! or reaches out.

use crate::{Error, Result, limits};
use quick_xml::escape::{escape, unescape};
use quick_xml::events::Event;
use quick_xml::reader::Reader;

/// A document: its root, and the source text around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Document {
    before: String,
    pub(super) root: Element,
    after: String,
}

/// An element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    name: String,
    /// The source between `<` and `>` of the start tag: the name and all attributes.
    tag: String,
    /// Written `<a/>`: that holds until something is put inside, as it would when read back.
    collapsed: bool,
    nodes: Vec<Node>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Element(Element),
    /// Character data and references, as in the source.
    Text(String),
    /// Character data, without its CDATA marks.
    CData(String),
    /// A comment or processing instruction, as in the source.
    Other(String),
}

/// What one event of the reader means for the tree.
enum Token {
    Open(Element),
    Close,
    Leaf(Node),
    End,
}

/// Builds the tree from events, innermost open element last.
struct Builder {
    document: Option<Document>,
    before: String,
    open: Vec<Element>,
    nodes: usize,
}

impl Document {
    /// Parses a document within the bounds of [`limits`].
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() as u64 > limits::DESCRIPTOR_MAX {
            return Err(Error::damaged(format!(
                "a descriptor of {} bytes is not read: the limit is {} bytes",
                bytes.len(),
                limits::DESCRIPTOR_MAX
            )));
        }
        let text = std::str::from_utf8(bytes)
            .map_err(|e| Error::damaged(format!("byte {}: not UTF-8 text", e.valid_up_to())))?;
        let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
        let mut reader = Reader::from_str(text);
        let mut builder = Builder {
            document: None,
            before: String::new(),
            open: Vec::new(),
            nodes: 0,
        };
        loop {
            let start = reader.buffer_position();
            let event = reader
                .read_event()
                .map_err(|e| bad(text, reader.error_position(), &e.to_string()))?;
            let source = slice(text, start, reader.buffer_position());
            let step = token(event, source).and_then(|token| match token {
                Token::End => builder.finish().map(Some),
                token => builder.take(token, source).map(|()| None),
            });
            if let Some(document) = step.map_err(|rule| bad(text, start, rule))? {
                return Ok(document);
            }
        }
    }

    /// The document as text.
    pub(super) fn write(&self) -> String {
        let mut out = self.before.clone();
        self.root.write(&mut out);
        out.push_str(&self.after);
        out
    }
}

fn slice(text: &str, from: u64, to: u64) -> &str {
    let range = usize::try_from(from).unwrap_or(usize::MAX)..usize::try_from(to).unwrap_or(0);
    text.get(range).unwrap_or("")
}

/// An error that names the line of byte `at`.
fn bad(text: &str, at: u64, rule: &str) -> Error {
    let line = slice(text, 0, at).matches('\n').count().saturating_add(1);
    Error::damaged(format!("line {line}: {rule}"))
}

/// The token of an event, or the rule that it breaks.
fn token(event: Event<'_>, source: &str) -> std::result::Result<Token, &'static str> {
    let leaf = |node| Ok(Token::Leaf(node));
    match event {
        Event::Start(tag) => Ok(Token::Open(Element::from_tag(
            tag.name().as_ref(),
            source,
            false,
        ))),
        Event::Empty(tag) => leaf(Node::Element(Element::from_tag(
            tag.name().as_ref(),
            source,
            true,
        ))),
        Event::End(_) => Ok(Token::Close),
        Event::Text(_) => leaf(Node::Text(source.into())),
        Event::CData(data) => leaf(Node::CData(data.into_inner().into_owned())),
        Event::GeneralRef(name) if name.is_char_ref() || is_predefined(source) => {
            leaf(Node::Text(source.into()))
        }
        Event::GeneralRef(_) => Err("entities are refused, the five of XML itself excepted"),
        Event::DocType(_) => Err("a document type is refused: a descriptor has none"),
        Event::Comment(_) | Event::PI(_) | Event::Decl(_) => leaf(Node::Other(source.into())),
        Event::Eof => Ok(Token::End),
    }
}

fn is_predefined(source: &str) -> bool {
    matches!(source, "&lt;" | "&gt;" | "&amp;" | "&apos;" | "&quot;")
}

impl Builder {
    fn take(&mut self, token: Token, source: &str) -> std::result::Result<(), &'static str> {
        self.nodes = self
            .nodes
            .saturating_add(usize::from(!matches!(token, Token::Close)));
        if self.nodes > limits::DESCRIPTOR_NODES_MAX {
            return Err("more than 65536 elements and texts");
        }
        match token {
            Token::Open(element) => {
                if self.open.len() >= limits::DESCRIPTOR_NESTING_MAX {
                    return Err("elements nested more than 32 deep");
                }
                self.open.push(element);
                Ok(())
            }
            Token::Close => {
                let element = self.open.pop().ok_or("an end tag without its start")?;
                self.place(Node::Element(element), source)
            }
            Token::Leaf(node) => self.place(node, source),
            Token::End => Ok(()),
        }
    }

    /// Puts a finished node into the innermost open element, or around the root.
    fn place(&mut self, node: Node, source: &str) -> std::result::Result<(), &'static str> {
        if let Some(parent) = self.open.last_mut() {
            parent.adopt(node);
            return Ok(());
        }
        match (node, &mut self.document) {
            (Node::Element(root), slot @ None) => {
                let before = std::mem::take(&mut self.before);
                *slot = Some(Document {
                    before,
                    root,
                    after: String::new(),
                });
            }
            (Node::Element(_), Some(_)) => return Err("a second root element"),
            (Node::CData(_), _) => return Err("text outside the root element"),
            (Node::Text(text), _) if !text.trim().is_empty() => {
                return Err("text outside the root element");
            }
            (_, Some(document)) => document.after.push_str(source),
            (_, None) => self.before.push_str(source),
        }
        Ok(())
    }

    fn finish(&mut self) -> std::result::Result<Document, &'static str> {
        if !self.open.is_empty() {
            return Err("the text ends inside an element");
        }
        self.document.take().ok_or("no root element")
    }
}

impl Element {
    /// An element made by us: a name and nothing else.
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            tag: name.into(),
            collapsed: true,
            nodes: Vec::new(),
        }
    }

    /// An element made by us that holds text.
    pub(super) fn with_text(name: &str, text: &str) -> Self {
        let mut element = Self::new(name);
        element.set_text(text);
        element
    }

    fn from_tag(name: &str, source: &str, collapsed: bool) -> Self {
        let tag = source
            .strip_prefix('<')
            .and_then(|s| s.strip_suffix('>'))
            .unwrap_or(name);
        let tag = if collapsed {
            tag.strip_suffix('/').unwrap_or(tag)
        } else {
            tag
        };
        Self {
            name: name.into(),
            tag: tag.into(),
            collapsed,
            nodes: Vec::new(),
        }
    }

    /// Adds a node, joining neighbouring pieces of text.
    fn adopt(&mut self, node: Node) {
        match (node, self.nodes.last_mut()) {
            (Node::Text(more), Some(Node::Text(text))) => text.push_str(&more),
            (node, _) => self.nodes.push(node),
        }
    }

    fn write(&self, out: &mut String) {
        out.push('<');
        out.push_str(&self.tag);
        if self.collapsed {
            out.push_str("/>");
            return;
        }
        out.push('>');
        for node in &self.nodes {
            match node {
                Node::Element(element) => element.write(out),
                Node::Text(source) | Node::Other(source) => out.push_str(source),
                Node::CData(data) => {
                    out.push_str("<![CDATA[");
                    out.push_str(data);
                    out.push_str("]]>");
                }
            }
        }
        out.push_str("</");
        out.push_str(&self.name);
        out.push('>');
    }

    /// The name, prefix included.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The child elements.
    pub(super) fn elements(&self) -> impl Iterator<Item = &Element> {
        self.nodes.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// The child elements, to change.
    pub(super) fn elements_mut(&mut self) -> impl Iterator<Item = &mut Element> {
        self.nodes.iter_mut().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// The only child of this name, if there is one. Two are an error: readers would disagree
    /// about which one counts.
    pub(super) fn child(&self, name: &str) -> Result<Option<&Element>> {
        let mut found = self.elements().filter(|e| e.name == name);
        let first = found.next();
        match found.next() {
            None => Ok(first),
            Some(_) => Err(Error::damaged(format!(
                "element {} has more than one {name}",
                self.name
            ))),
        }
    }

    /// The only child of this name, which must be there.
    pub(super) fn required(&self, name: &str) -> Result<&Element> {
        self.child(name)?
            .ok_or_else(|| Error::damaged(format!("element {} has no {name}", self.name)))
    }

    /// The first child of this name, to change.
    pub(super) fn child_mut(&mut self, name: &str) -> Result<&mut Element> {
        let parent = self.name.clone();
        self.elements_mut()
            .find(|e| e.name == name)
            .ok_or_else(|| Error::damaged(format!("element {parent} has no {name}")))
    }

    /// The text, references resolved. An element inside is an error.
    pub(super) fn text(&self) -> Result<String> {
        let mut out = String::new();
        for node in &self.nodes {
            match node {
                Node::Text(source) => {
                    let text = unescape(source)
                        .map_err(|e| Error::damaged(format!("element {}: {e}", self.name)))?;
                    out.push_str(&text);
                }
                Node::CData(data) => out.push_str(data),
                Node::Other(_) => {}
                Node::Element(inner) => {
                    return Err(Error::damaged(format!(
                        "element {} holds {}, where text is expected",
                        self.name, inner.name
                    )));
                }
            }
        }
        Ok(out)
    }

    /// Replaces everything inside by text.
    pub(super) fn set_text(&mut self, text: &str) {
        self.nodes = vec![Node::Text(escape(text).into_owned())];
        self.collapsed = false;
    }

    /// Sets the text of a child, which is made where `order` wants it when it is not there.
    pub(super) fn put_text(&mut self, depth: usize, name: &str, text: &str, order: &[&str]) {
        match self.child_mut(name) {
            Ok(child) => child.set_text(text),
            Err(_) => self.insert(depth, Element::with_text(name, text), order),
        }
    }

    /// Inserts a child behind the last one that `order` puts before it or beside it, indented
    /// for `depth` levels of nesting (1 for children of the root).
    pub(super) fn insert(&mut self, depth: usize, child: Element, order: &[&str]) {
        let rank = |name: &str| order.iter().position(|n| *n == name);
        let own = rank(&child.name);
        let before = |node: &Node| match node {
            Node::Element(e) => rank(&e.name).is_some_and(|r| own.is_none_or(|own| r <= own)),
            _ => false,
        };
        let at = self
            .nodes
            .iter()
            .rposition(before)
            .map_or(0, |i| i.saturating_add(1));
        if self.nodes.is_empty() {
            self.nodes.push(indentation(depth.saturating_sub(1)));
        }
        self.nodes
            .splice(at..at, [indentation(depth), Node::Element(child)]);
        self.collapsed = false;
    }

    /// Removes the children that `unwanted` picks, and their indentation.
    pub(super) fn remove(&mut self, mut unwanted: impl FnMut(&Element) -> bool) {
        for node in std::mem::take(&mut self.nodes) {
            if !matches!(&node, Node::Element(e) if unwanted(e)) {
                self.adopt(node);
            } else if matches!(self.nodes.last(), Some(Node::Text(t)) if t.trim().is_empty()) {
                self.nodes.pop();
            }
        }
    }
}

/// A line break and two spaces for each level, as ploop writes.
fn indentation(depth: usize) -> Node {
    Node::Text(format!("\n{}", "  ".repeat(depth)))
}
