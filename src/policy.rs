//! Policy: asked before any name found *inside* an image or a descriptor is opened.
//!
//! A descriptor is data that may come from anywhere; the files it names are opened with our
//! privileges. The default answer is therefore no: only a plain name, which cannot leave the
//! descriptor's own directory, passes. This module opens nothing itself.

use ploop_formats::{Error, Kind, Result};

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

#[cfg(test)]
mod tests {
    use super::*;

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
