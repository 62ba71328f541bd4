//! Writes the first inputs of every target into the folders that cargo-fuzz looks into.

use ploop::testkit::fuzz::TARGETS;
use std::path::Path;

fn main() -> std::io::Result<()> {
    let corpus = std::env::args().nth(1).expect("usage: seeds FOLDER");
    for target in TARGETS {
        let folder = Path::new(&corpus).join(target.name);
        std::fs::create_dir_all(&folder)?;
        for (name, bytes) in (target.seeds)() {
            std::fs::write(folder.join(name), bytes)?;
        }
    }
    Ok(())
}
