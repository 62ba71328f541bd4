//! The ploop delta: a header, a block allocation table (BAT), and clusters in any order.
pub mod check;
pub mod create;
pub mod extension;
pub mod header;
