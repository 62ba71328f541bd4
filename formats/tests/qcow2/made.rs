//! Images made field by field, by other code than the crate's.
#![allow(dead_code, reason = "each test uses its part")]

/// Clusters of 64 KiB.
pub const BITS: u32 = 16;
pub const CLUSTER: u64 = 1 << BITS;
/// Virtual size: eight clusters.
pub const SIZE: u64 = 8 * CLUSTER;
/// Where the parts of [`image`] are, in bytes.
pub const REFTABLE: u64 = CLUSTER;
pub const L1: u64 = 3 * CLUSTER;
pub const L2: u64 = 4 * CLUSTER;
pub const DATA: u64 = 5 * CLUSTER;

pub fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

pub fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// The first cluster of an image, with no extension.
pub fn header(version: u32) -> Vec<u8> {
    let mut bytes = vec![0; CLUSTER as usize];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    put32(&mut bytes, 4, version);
    put32(&mut bytes, 20, BITS);
    put64(&mut bytes, 24, SIZE);
    put32(&mut bytes, 36, 1);
    put64(&mut bytes, 40, L1);
    put64(&mut bytes, 48, REFTABLE);
    put32(&mut bytes, 56, 1);
    if version == 3 {
        put32(&mut bytes, 96, 4);
        put32(&mut bytes, 100, 112);
    }
    bytes
}

/// Puts an extension behind those that are there.
pub fn extend(bytes: &mut [u8], at: usize, magic: u32, data: &[u8]) -> usize {
    put32(bytes, at, magic);
    put32(bytes, at + 4, data.len() as u32);
    bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
    at + 8 + data.len().next_multiple_of(8)
}

/// A name behind everything else, as the backing file's.
pub fn backing(bytes: &mut [u8], at: usize, name: &[u8]) {
    bytes[at..at + name.len()].copy_from_slice(name);
    put64(bytes, 8, at as u64);
    put32(bytes, 16, name.len() as u32);
}

/// A whole image: guest clusters 0, 2 and 5 hold their number, 3 is a zero cluster (version 3), the
/// others are absent.
pub fn image(version: u32) -> Vec<u8> {
    let mut bytes = header(version);
    bytes.resize(8 * CLUSTER as usize, 0);
    put64(&mut bytes, REFTABLE as usize, 2 * CLUSTER);
    for n in 0..8 {
        bytes[2 * CLUSTER as usize + 2 * n + 1] = 1;
    }
    put64(&mut bytes, L1 as usize, L2 | 1 << 63);
    for (i, guest) in [0u64, 2, 5].into_iter().enumerate() {
        let at = DATA + i as u64 * CLUSTER;
        put64(&mut bytes, (L2 + 8 * guest) as usize, at | 1 << 63);
        bytes[at as usize..(at + CLUSTER) as usize].fill(guest as u8 + 1);
    }
    if version == 3 {
        put64(&mut bytes, L2 as usize + 24, 1);
    }
    bytes
}

/// Gives an image the snapshot `name`, listed at `at`, of the disk that the table at `l1` says.
pub fn list_snapshot(bytes: &mut [u8], at: u64, l1: u64) {
    put32(bytes, 60, 1);
    put64(bytes, 64, at);
    let at = at as usize;
    put64(bytes, at, l1);
    put32(bytes, at + 8, 1);
    bytes[at + 12..at + 16].copy_from_slice(&[0, 1, 0, 4]);
    put32(bytes, at + 36, 16);
    put64(bytes, at + 48, SIZE);
    bytes[at + 56..at + 61].copy_from_slice(b"1name");
}

/// Gives an image the bitmap `bits`, listed at `at`, which the table at `table` holds.
pub fn list_bitmap(bytes: &mut [u8], at: u64, table: u64) {
    let mut directory = vec![0; 24];
    put32(&mut directory, 0, 1);
    put64(&mut directory, 8, 32);
    put64(&mut directory, 16, at);
    put64(bytes, 88, 1);
    extend(bytes, 112, 0x2385_2875, &directory);
    let at = at as usize;
    put64(bytes, at, table);
    put32(bytes, at + 8, 1);
    bytes[at + 16..at + 20].copy_from_slice(&[1, 16, 0, 4]);
    bytes[at + 24..at + 28].copy_from_slice(b"bits");
}

/// `content` as deflate that compresses nothing: blocks of stored bytes.
pub fn stored(content: &[u8]) -> Vec<u8> {
    let pieces: Vec<&[u8]> = content.chunks(0xFFFF).collect();
    let mut out = Vec::new();
    for (n, piece) in pieces.iter().enumerate() {
        let len = piece.len() as u16;
        out.push(u8::from(n + 1 == pieces.len()));
        out.extend(len.to_le_bytes());
        out.extend((!len).to_le_bytes());
        out.extend(*piece);
    }
    out
}

/// An image whose first guest cluster is compressed as zstd: `packed`, in the cluster at [`DATA`].
pub fn zstd(packed: &[u8]) -> Vec<u8> {
    let mut bytes = image(3);
    put64(&mut bytes, 72, 1 << 3);
    bytes[104] = 1;
    put64(&mut bytes, L2 as usize, 1 << 62 | 1 << 54 | DATA);
    bytes[DATA as usize..(DATA + CLUSTER) as usize].fill(0);
    bytes[DATA as usize..DATA as usize + packed.len()].copy_from_slice(packed);
    bytes
}

/// A zstd block: `len` times the same byte.
pub fn repeated(byte: u8, len: u64, last: bool) -> Vec<u8> {
    let head = ((len as u32) << 3 | 0b010 | u32::from(last)).to_le_bytes();
    [&head[..3], &[byte]].concat()
}
