//! Migrate: a disk goes to another host over any stream of bytes, with all its frozen points.
//!
//! The one side has the disk, the *source*; the other makes it anew, the *target*. What is sent
//! ([`frame`], [`talk`]) is what each delta has of its own, base first, so that the new files are
//! compact, and of the source's types. [`send`] and [`receive`] are the two sides, [`record`] is
//! what each writes down, and [`resolve`] what to do when they were parted.
//!
//! Ordering. At any cut at most one side can be used, and at least one has all of the disk:
//!
//! 1. The target keeps the descriptor under a name that no ploop opens ([`INCOMING`](crate::image::members::INCOMING)). What
//!    it says that it has is durable before it says so.
//! 2. The target has all, has closed and checked it, and has written down that it is *ready*; then
//!    it says so. It can be used once it is shown the word that the source keeps.
//! 3. The source writes down that it is *sealed*, and its descriptor gets a name that no ploop opens
//!    ([`SEALED`](crate::image::members::SEALED)), durably so. Only then the word is sent.
//! 4. The target's descriptor gets its name, durably so; then it says that it is done.
//!
//! Who is cut off before the third step has the disk as it was, and the same command goes on where
//! this one ended, unless somebody has opened the disk for writing meanwhile: the witness of what it was
//! is taken away, durably so, before that. Each attempt has a word of its own, so that a target which
//! was given up never takes the word that another one was sent. Between the third and the fourth nobody can use it until a human carries a word
//! from one side to the other: the source's to the target, or, that the target has thrown its copy
//! away, the target's to the source.

pub mod frame;
pub mod incoming;
pub mod link;
pub mod receive;
pub mod record;
pub mod resolve;
pub mod send;
pub mod talk;
