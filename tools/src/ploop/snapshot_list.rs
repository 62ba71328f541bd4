//! `snapshot-list`: the tree of a disk, in ploop's columns. Its failures all have exit code 1.

use super::code::{Code, Fault};
use super::disk;
use clap::ValueEnum;
use ploop::formats::descriptor::{Descriptor, Shot};
use ploop::formats::guid::Guid;
use std::path::{Path, PathBuf};

/// List the snapshots of a disk
#[derive(Debug, clap::Args)]
pub struct Args {
    /// No heads of columns
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Columns: uuid, parent_uuid, current, fname
    #[arg(short, long, value_name = "COLUMN,...", value_parser = columns,
          default_value = "parent_uuid,current,uuid,fname")]
    output: Columns,
    /// Only this one
    #[arg(short, long, alias = "id")]
    uuid: Option<Guid>,
    /// Without what the disk is now: the mark is at what that stands on
    #[arg(short, long)]
    snapshot: bool,
    /// DiskDescriptor.xml
    #[arg(value_name = "XML")]
    file: PathBuf,
}

/// Columns in the order that is wanted.
type Columns = std::sync::Arc<[Column]>;

fn columns(text: &str) -> Result<Columns, String> {
    let names = text.split(',');
    names.map(|name| Column::from_str(name, false)).collect()
}

/// A column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Column {
    #[value(name = "parent_uuid")]
    Parent,
    Current,
    Uuid,
    Fname,
}

impl Column {
    fn head(self) -> &'static str {
        match self {
            Self::Parent => "PARENT_UUID",
            Self::Current => "C",
            Self::Uuid => "UUID",
            Self::Fname => "FNAME",
        }
    }

    fn width(self) -> usize {
        match self {
            Self::Parent | Self::Uuid => 38,
            Self::Current => 1,
            Self::Fname => 32,
        }
    }
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Fault> {
    let read = disk::with_descriptor(&args.file);
    let (disk, descriptor) = read.map_err(|fault| Fault::new(Code::Creat, fault.text))?;
    let mut text = String::new();
    if !args.no_header {
        text += &line(&args.output, |column| column.head().to_string());
    }
    text += &rows(args, disk.path(), &descriptor);
    print!("{text}");
    Ok(())
}

fn rows(args: &Args, dir: &Path, descriptor: &Descriptor) -> String {
    let top = descriptor.top();
    let below = descriptor.shot(top).map(|shot| shot.parent);
    let current = if args.snapshot { below } else { Some(top) };
    let wanted = |shot: &&Shot| {
        (!args.snapshot || shot.guid != top) && args.uuid.is_none_or(|uuid| uuid == shot.guid)
    };
    let cell = |shot: &Shot, column: Column| match column {
        Column::Parent => shot.parent.to_string(),
        Column::Current if current == Some(shot.guid) => "*".into(),
        Column::Current => String::new(),
        Column::Uuid => shot.guid.to_string(),
        Column::Fname => {
            let image = descriptor.image(shot.guid);
            image.map_or(String::new(), |i| dir.join(&i.file).display().to_string())
        }
    };
    let shots = descriptor.shots().iter().filter(wanted);
    shots
        .map(|shot| line(&args.output, |column| cell(shot, column)))
        .collect()
}

fn line(columns: &[Column], cell: impl Fn(Column) -> String) -> String {
    let cells = columns
        .iter()
        .map(|c| format!("{:<1$}", cell(*c), c.width()));
    let cells: Vec<String> = cells.collect();
    cells.join(" ") + "\n"
}
