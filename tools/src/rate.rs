//! Rate: `--rate`, how many bytes a second long work may copy.

use crate::cancel::Cancel;
use ploop::image::snapshot::rate::Rate;
use std::num::NonZeroU64;

/// A limit that a signal ends, or none.
pub fn limit(limit: Option<NonZeroU64>, cancel: &Cancel) -> Rate<impl Fn() -> bool> {
    Rate::new(limit, || cancel.check().is_ok())
}

/// `--rate`: a size, not 0.
pub fn parse(text: &str) -> Result<NonZeroU64, String> {
    let rate = NonZeroU64::new(crate::size::parse(text)?);
    rate.ok_or_else(|| "nothing would ever be copied at 0".into())
}
