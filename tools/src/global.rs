//! Global: options that every verb takes.

use crate::meter::ProgressArg;
use crate::report::Output;
use crate::settings::Settings;
use ploop::Result;
use std::path::PathBuf;

/// Options that every verb takes.
#[derive(Debug, clap::Args)]
pub struct Global {
    /// How results and errors are printed
    #[arg(short = 'o', long, global = true, value_enum, default_value = "text")]
    pub output: Output,
    /// Settings, in place of /etc/ploop/ploop.toml
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Who is told how far a verb is that takes long, on standard error
    #[arg(long, global = true, value_enum, default_value = "auto")]
    pub progress: ProgressArg,
}

impl Global {
    /// What the settings file says.
    pub fn settings(&self) -> Result<Settings> {
        Settings::read(self.config.as_deref()).map(|(settings, _)| settings)
    }
}
