//! `resize`: a disk, its partition and the file system in it get another size.

use super::code::{Code, During, Fault, Step};
use super::{Context, disk, grow, size, verb};
use std::path::PathBuf;

/// Change the size of a disk, and of the file system on it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Size of the disk
    #[arg(short, value_parser = size::parse)]
    size: u64,
    /// Only if it is mounted
    #[arg(short = 'o')]
    online: bool,
    /// Take all that can be taken: not offered
    #[arg(short = 'b')]
    most: bool,
    /// Mount namespace: not offered
    #[arg(short, value_name = "PID")]
    pid: Option<u32>,
    /// DiskDescriptor.xml, or a device
    #[arg(value_name = "XML|DEVICE")]
    file: PathBuf,
}

/// Does it.
pub fn run(args: &Args, context: &Context) -> Result<(), Fault> {
    if args.most {
        return Err(super::absent::option("-b", "say how much with -s"));
    }
    if args.pid.is_some() {
        let why = "run it in that namespace: nsenter --mount --target PID";
        return Err(super::absent::option("-p", why));
    }
    let disk = match args.file.starts_with("/dev") {
        true => grow::of_device(&args.file, None)?,
        false => disk::resolve(&args.file, None)?,
    };
    if args.online && disk::of(&disk)?.is_none() {
        let what = format!("{} is not mounted", disk.path().display());
        return Err(Fault::new(Code::NotMounted, what));
    }
    let said = verb(&grow::words("resize", &disk, args.size)).during(Step::Resize)?;
    context.say(format_args!(
        "{} has {} sectors, had {}",
        disk.path().display(),
        grow::sectors(&said["size"]),
        grow::sectors(&said["old_size"])
    ));
    Ok(())
}
