//! `init`: a new image, its descriptor beside it, and a file system in a partition.

use super::code::{Code, During, Fault, Step};
use super::convert::FormArg;
use super::{Context, absent, size};
use crate::cancel::Cancel;
use crate::cmd::init::{Fs, make_fs, on_device};
use crate::cmd::mount::need_privilege;
use crate::gpt::{self, Partition};
use crate::meter::Meter;
use crate::volume::Volume;
use ploop::Error;
use ploop::formats::ploop::header::{Header, Version};
use ploop::formats::units::ClusterSize;
use ploop::image::init::{self, Form, New};
use ploop::image::target::{DESCRIPTOR, Format, Target};
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Cluster of a new image, in sectors.
const CLUSTER: u64 = 2048;
/// Bytes from which on a file system has the journal that ploop gives it, and that in MiB.
const JOURNAL_FROM: u64 = 1 << 30;
const JOURNAL: u32 = 128;

/// Make an image with a DiskDescriptor.xml beside it, and a file system in it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Size of the disk
    #[arg(short, value_parser = size::parse)]
    size: u64,
    /// What the image is
    #[arg(short, value_name = "FORMAT", default_value = "expanded")]
    format: FormArg,
    /// Version of the format
    #[arg(short, value_name = "1|2", default_value = "2", value_parser = ["1", "2"])]
    version: String,
    /// File system: none, ext4, xfs
    #[arg(short = 't', value_name = "FS", default_value = "ext4")]
    fs: FsArg,
    /// Cluster, in sectors
    #[arg(short = 'b', value_name = "SECTORS", value_parser = number)]
    cluster: Option<u64>,
    /// Block of the file system, in bytes
    #[arg(short = 'B', value_name = "BYTES", value_parser = number)]
    fs_block: Option<u64>,
    /// Let nothing for later: a new disk reads as zeros, so there is nothing
    #[arg(short = 'n', long)]
    nolazy: bool,
    /// Take no space for a raw image yet
    #[arg(short = 'S', long)]
    sparse: bool,
    /// Label of the file system
    #[arg(short = 'L', value_name = "LABEL")]
    label: Option<String>,
    /// Key (not offered)
    #[arg(short, value_name = "KEY")]
    key: Option<String>,
    /// No partition table
    #[arg(short = 'P')]
    no_partition: bool,
    /// Type of the image
    #[arg(short = 'T', value_name = "TYPE", default_value = "ploop")]
    kind: String,
    /// Image to make
    #[arg(value_name = "DELTA")]
    pub delta: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum FsArg {
    None,
    Ext4,
    Xfs,
}

fn number(text: &str) -> Result<u64, String> {
    size::number(text).ok_or_else(|| format!("'{text}' is not a number"))
}

impl Args {
    fn refuse(&self) -> Result<(), Fault> {
        if self.key.is_some() {
            return Err(absent::find("encrypt").expect("it is listed").fault());
        }
        if self.kind != "ploop" {
            return Err(absent::option("-T", "images of other types are not made"));
        }
        let is_device = |m: std::fs::Metadata| m.file_type().is_block_device();
        if std::fs::metadata(&self.delta).is_ok_and(is_device) {
            return Err(absent::option("DEVICE", "a device has its image already"));
        }
        Ok(())
    }

    fn cluster(&self) -> Result<ClusterSize, Fault> {
        let sectors = self.cluster.filter(|b| *b != 0).unwrap_or(CLUSTER);
        let bytes = sectors.saturating_mul(size::SECTOR);
        ClusterSize::new(bytes).map_err(|e| Fault::new(Code::Param, e))
    }

    fn form(&self) -> Form {
        match self.format {
            FormArg::Expanded => Form::Expanded,
            FormArg::Preallocated => Form::Preallocated,
            FormArg::Raw => Form::Raw {
                sparse: self.sparse,
            },
        }
    }

    fn version(&self) -> Version {
        match self.version.as_str() {
            "1" => Version::V1,
            _ => Version::V2,
        }
    }

    /// What mkfs is told besides.
    fn mkfs_options(&self, bytes: u64) -> Vec<String> {
        let mut options = Vec::new();
        if self.fs == FsArg::Ext4 && bytes >= JOURNAL_FROM {
            options.extend(["-J".into(), format!("size={JOURNAL}")]);
        }
        if let Some(block) = self.fs_block {
            let value = match self.fs {
                FsArg::Xfs => format!("size={block}"),
                FsArg::Ext4 | FsArg::None => block.to_string(),
            };
            options.extend(["-b".into(), value]);
        }
        if let Some(label) = &self.label {
            options.extend(["-L".into(), label.clone()]);
        }
        options
    }
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    args.refuse()?;
    let (cluster, version) = (args.cluster()?, args.version());
    let header = Header::new(version, args.size, cluster);
    let header = header.map_err(|e| Fault::new(Code::Param, e))?;
    if args.fs != FsArg::None {
        need_privilege("init with a file system").during(Step::Attach)?;
    }
    let (dir, name) = place(&args.delta)?;
    if dir.join(DESCRIPTOR).exists() {
        let what = format!("{}: there is a {DESCRIPTOR} already", dir.display());
        return Err(Fault::new(Code::Param, what));
    }
    let new = New {
        dir,
        beside: Some(name),
        size: args.size,
        cluster,
        version,
        form: args.form(),
    };
    context.say(format_args!(
        "Creating delta {} bs={} size={} sectors v{}",
        args.delta.display(),
        cluster.sectors(),
        header.sectors,
        args.version
    ));
    let cancel = Cancel::on_signals().during(Step::Create)?;
    let mut meter = Meter::new(context.global.progress, &cancel);
    let draft = init::begin(&new, &mut meter).during(Step::Create)?;
    if args.fs != FsArg::None {
        fill(args, &draft.image(), context, &cancel, &mut meter)?;
    }
    cancel.check().during(Step::Create)?;
    let made = draft.finish().during(Step::Create)?;
    context.say(format_args!(
        "Storing {}",
        made.dir.join(DESCRIPTOR).display()
    ));
    Ok(())
}

/// The directory of an image, and its name there.
fn place(delta: &Path) -> Result<(&Path, &str), Fault> {
    let name = delta.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| {
        let what = format!("{}: no name for an image", delta.display());
        Fault::new(Code::Param, what)
    })?;
    let dir = delta.parent().filter(|dir| !dir.as_os_str().is_empty());
    let dir = dir.unwrap_or(Path::new("."));
    match dir.is_dir() {
        true => Ok((dir, name)),
        false => Err(Fault::new(
            Code::Creat,
            format!("{}: no such directory", dir.display()),
        )),
    }
}

/// Makes the partition table and the file system.
fn fill(
    args: &Args,
    image: &Path,
    context: &Context,
    cancel: &Cancel,
    meter: &mut Meter<'_>,
) -> Result<(), Fault> {
    let format = match args.format {
        FormArg::Raw => Format::Raw,
        FormArg::Expanded | FormArg::Preallocated => Format::Ploop,
    };
    let image = Target::resolve(image, Some(format)).during(Step::Create)?;
    let settings = context.global.settings().during(Step::Find)?;
    let cluster = args.cluster()?.sectors();
    // Which step a failure is one of.
    let mut step = Step::Attach;
    let done = on_device(&image, &settings, cancel, meter, |device, meter| {
        if !args.no_partition {
            step = Step::Table;
            partition(device, cluster)?;
        }
        step = Step::Mkfs;
        let volume = Volume::of(device)?;
        let fs = match args.fs {
            FsArg::Xfs => Fs::Xfs,
            FsArg::Ext4 | FsArg::None => Fs::Ext4,
        };
        let options = args.mkfs_options(args.size);
        make_fs(fs, &volume.path(), &options, cancel, meter)
    });
    done.during(step)
}

fn partition(device: &Path, cluster: u64) -> ploop::Result<()> {
    let disk = File::options().read(true).write(true).open(device);
    let disk = disk.map_err(|e| Error::from(e).at(device.display()))?;
    let number = ploop::serve::loopdev::number(device);
    let number = number.ok_or_else(|| Error::invalid("not a loop device"))?;
    let sectors = ploop::serve::loopdev::status(number)?.size / gpt::SECTOR;
    gpt::write(&disk, sectors, Partition::whole(sectors, cluster)?)
}
