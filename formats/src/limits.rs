//! Every bound that an image must respect, each with its reason.

/// Smallest cluster: 64 sectors (ploop's own lower limit).
pub const CLUSTER_MIN: u64 = 32 << 10;
/// Largest cluster: 131072 sectors (ploop's own upper limit).
pub const CLUSTER_MAX: u64 = 64 << 20;
/// Images in one stack: ploop refuses the next snapshot above this (wiki: 126 snapshots).
pub const DEPTH_MAX: usize = 127;
/// Bytes of a descriptor that are read at all: 127 images and shots need less than 100 KiB.
pub const DESCRIPTOR_MAX: u64 = 4 << 20;
/// Largest virtual size in clusters: one below ploop's in-memory "none" mark 0xFFFFFFFF.
pub const BAT_ENTRIES_MAX: u64 = 0xFFFF_FFFE;
/// Largest v1 size in sectors: the header field is 32 bits wide.
pub const V1_SECTORS_MAX: u64 = 0xFFFF_FFFF;
/// Largest virtual size in bytes: what an offset of Linux (loff_t) can say.
pub const SIZE_MAX: u64 = i64::MAX as u64;
/// Bytes at the start of a format extension that may hold features. The rest of its cluster is only
/// summed up: a cluster may be 64 times as large.
pub const EXTENSION_MAX: u64 = 1 << 20;
/// Table bytes read or written in one step, and the unit of the table cache.
pub const PAGE: u64 = 4096;
/// Clean table pages kept in memory per image: 256 pages answer for 16 GiB at 64 KiB clusters.
pub const PAGES_CACHED: usize = 256;
/// Largest transfer a guest may ask for at once (the NBD promise, and FUSE's maximum is below it).
pub const TRANSFER_MAX: u64 = 32 << 20;
/// Elements nested in a descriptor: ploop's own reach five levels.
pub const DESCRIPTOR_NESTING_MAX: usize = 32;
/// Nodes (elements, texts, comments) of a descriptor, which bounds the memory of its tree: an
/// image and its shot take 24 with indentation, so 127 of them need about 3000.
pub const DESCRIPTOR_NODES_MAX: usize = 65_536;
/// Smallest and largest qcow2 cluster, as powers of two: 512 bytes to 2 MiB (QEMU's bounds).
pub const QCOW2_BITS_MIN: u8 = 9;
/// See [`QCOW2_BITS_MIN`].
pub const QCOW2_BITS_MAX: u8 = 21;
/// Bytes of a qcow2 file name inside an image (QEMU's bound for backing files).
pub const QCOW2_NAME_MAX: usize = 1023;
/// Bytes of the name of a backing file's format (QEMU's bound).
pub const QCOW2_FORMAT_NAME_MAX: usize = 15;
/// Bytes of a qcow2 first-level table: four million entries (QEMU's bound).
pub const QCOW2_L1_MAX: u64 = 32 << 20;
/// Bytes of a qcow2 refcount table (QEMU's bound).
pub const QCOW2_REFTABLE_MAX: u64 = 8 << 20;
/// Snapshots in a qcow2 image (QEMU's bound).
pub const QCOW2_SNAPSHOTS_MAX: u32 = 65_536;
/// Bitmaps in a qcow2 image (the specification's bound).
pub const QCOW2_BITMAPS_MAX: u32 = 65_535;
/// Bytes of a snapshot table or bitmap directory (QEMU's bounds). They are read entry by entry, so that
/// no more of them is in memory than the names.
pub const QCOW2_DIRECTORY_MAX: u64 = 64 << 20;
/// Bytes of unknown data that one snapshot carries (QEMU's bound).
pub const QCOW2_EXTRA_MAX: u32 = 1024;
/// Bytes of history that unpacking a zstd cluster may ask for: what every decoder must offer
/// (RFC 8878, 3.1.1.1.2), four times the largest cluster.
pub const QCOW2_WINDOW_MAX: u64 = 8 << 20;
/// Bytes that the blocks of a compressed qcow2 cluster make on average, at least: no compressor makes
/// blocks that are nearly as small, and each may cost some microseconds.
pub const QCOW2_BLOCK_MEAN: usize = 512;
/// Blocks of a compressed qcow2 cluster that may be there in addition.
pub const QCOW2_BLOCKS_SPARE: usize = 64;
