//! Policy: asked before any name found *inside* an image or a descriptor is opened.
//!
//! A descriptor is data that may come from anywhere, and so is an image; the files it names are opened
//! with our privileges. The default answer is therefore no: only a plain name passes, which cannot
//! leave the descriptor's own directory, or an image's own folder. This module opens nothing itself.

use ploop_formats::qcow2::extension::printable;
use ploop_formats::{Error, Kind, Result};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// May this name, found in a descriptor, be opened beneath the descriptor's directory?
///
/// Fails with `Unsupported` for a name that leads elsewhere, and says the way out.
pub fn allow(name: &str) -> Result<()> {
    let plain = !name.is_empty()
        && name != "."
        && name != ".."
        && name.len() <= 255
        && !name.contains(['/', '\0']);
    if plain {
        return Ok(());
    }
    Err(Error::new(
        Kind::Unsupported,
        format!(
            "the descriptor names {name:?}, which is not a plain file name in its own directory; \
             move the image beside the descriptor and name it there"
        ),
    ))
}

/// May this name, found in an image, be opened beneath the image's own folder? It may go down into
/// folders there. Whoever opens it follows no link.
///
/// Fails with `Unsupported` for every other one: names that lead elsewhere, and what other programs
/// take for more than the name of a file (`json:`, `nbd:`, whatever has a colon before a slash).
pub fn allow_beneath(name: &[u8]) -> Result<&Path> {
    let first = name.split(|b| *b == b'/').next().unwrap_or_default();
    let mut parts = name.split(|b| *b == b'/');
    let why = match () {
        () if first.contains(&b':') => "would be no file for other programs",
        () if name.starts_with(b"/") => "is absolute",
        () if parts.any(|part| part == b"..") => "leads up",
        () if name.is_empty() || name.contains(&0) => "names no file",
        () => return Ok(Path::new(OsStr::from_bytes(name))),
    };
    Err(Error::unsupported(format!(
        "the image names \"{}\", which {why}; only files in or below its own folder are opened",
        printable(name)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_an_image_stays_below_its_folder() {
        let bad = [
            "",
            "/etc/passwd",
            "..",
            "../x",
            "a/../b",
            "a/..",
            "a\0b",
            "json:{\"driver\":\"nbd\"}",
            "nbd://host/x",
            "file:x",
            "fat:rw:x",
            "a:b",
        ];
        for name in bad {
            let refused = allow_beneath(name.as_bytes()).map_err(|e| e.kind());
            assert_eq!(refused, Err(Kind::Unsupported), "{name:?}");
        }
        for name in ["base.qcow2", "./a:b", "sub/base", "..a", "a..", "...", "-"] {
            allow_beneath(name.as_bytes()).expect("a plain name passes");
        }
    }

    #[test]
    fn a_name_that_leaves_the_directory_is_refused() {
        for name in ["", ".", "..", "/etc/passwd", "../x", "a/b", "a\0b"] {
            assert_eq!(
                allow(name).map_err(|e| e.kind()),
                Err(Kind::Unsupported),
                "{name:?}"
            );
        }
        allow("root.hds.{5fbaabe3-6958-40ff-92a7-860e329aab41}").expect("ploop's own names pass");
    }
}
