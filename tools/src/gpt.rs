//! GPT: the partition table that ploop puts on a disk, read and written.
//!
//! What a guest wrote is read by a process with privileges: every number is bounded before it is
//! used, and nothing is trusted that has no right checksum. Sectors have 512 bytes, as those of our
//! devices. The layout is that of UEFI 2.10, chapter 5.

use ploop::{Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use uuid::Uuid;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Sectors of the entries in a table that we write.
const ENTRY_SECTORS: u64 = 32;
/// Entries of a table that we write, and bytes of each.
const ENTRIES: u32 = 128;
const ENTRY_LEN: u32 = 128;
/// Largest unit that a partition ends with a multiple of, as a power of two of sectors.
const CLUSTER_MAX: u32 = 11;
/// Bytes of a header.
const HEADER_LEN: u32 = 92;
/// Bytes of entries that are read at most.
const TABLE_MAX: u64 = 1 << 20;
const SIGNATURE: &[u8] = b"EFI PART";
const REVISION: u32 = 0x0001_0000;
/// Type of a partition with a Linux file system.
const LINUX: Uuid = Uuid::from_u128(0x0FC6_3DAF_8483_4772_8E79_3D69_D847_7DE4);
/// MBR: signature at the end, first entry, type of an entry that stands for a GPT.
const MBR_SIGNATURE: [u8; 2] = [0x55, 0xAA];
const MBR_ENTRY: usize = 446;
const MBR_ENTRY_LEN: usize = 16;
const PROTECTIVE: u8 = 0xEE;

/// A partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// First sector.
    pub first: u64,
    /// Last sector.
    pub last: u64,
}

impl Partition {
    /// Its sectors.
    pub fn sectors(self) -> u64 {
        self.last.saturating_sub(self.first).saturating_add(1)
    }

    /// The one partition of a disk as ploop makes it: it begins with the second cluster, and ends
    /// with the last cluster that leaves room for the second table. `Invalid` when the disk is too
    /// small for that.
    pub fn whole(sectors: u64, cluster: u64) -> Result<Self> {
        let usable = sectors.saturating_sub(ENTRY_SECTORS + 1);
        let end = usable
            .checked_div(cluster)
            .unwrap_or(0)
            .saturating_mul(cluster);
        match end > cluster {
            true => Ok(Self {
                first: cluster,
                last: end - 1,
            }),
            false => Err(Error::invalid(format!(
                "{sectors} sectors are too few for a partition between clusters of {cluster}"
            ))),
        }
    }
}

/// The partitions of a disk of so many sectors; none when it has no GPT. `Damaged` when it says
/// that it has one, and neither copy can be believed.
pub fn read(disk: &File, sectors: u64) -> Result<Option<Vec<Partition>>> {
    let mut mbr = [0; SECTOR as usize];
    if disk.read_exact_at(&mut mbr, 0).is_err() || !is_protective(&mbr) {
        return Ok(None);
    }
    either(disk, sectors).map(|table| Some(table.partitions))
}

/// The first copy of a table, or the second where that cannot be believed.
fn either(disk: &File, sectors: u64) -> Result<Table> {
    let first = table(disk, 1, sectors);
    first.or_else(|e| table(disk, sectors.saturating_sub(1), sectors).map_err(|_| e))
}

/// A table that can be believed.
#[derive(Debug)]
struct Table {
    header: Vec<u8>,
    /// Bytes of each entry.
    size: usize,
    entries: Vec<u8>,
    partitions: Vec<Partition>,
}

/// Whether a first sector says that the rest is under a GPT.
fn is_protective(mbr: &[u8; SECTOR as usize]) -> bool {
    let (entries, signature) = mbr.split_at(mbr.len() - MBR_SIGNATURE.len());
    let mut entries = entries.iter().skip(MBR_ENTRY + 4).step_by(MBR_ENTRY_LEN);
    signature == MBR_SIGNATURE && entries.any(|kind| *kind == PROTECTIVE)
}

/// The table whose header is in sector `at`.
fn table(disk: &File, at: u64, sectors: u64) -> Result<Table> {
    let wrong = |what: &str| Error::damaged(format!("GPT header in sector {at}: {what}"));
    let mut header = [0; SECTOR as usize];
    disk.read_exact_at(&mut header, at.saturating_mul(SECTOR))?;
    let len = u32_at(&header, 12);
    if !header.starts_with(SIGNATURE) || !(HEADER_LEN..=SECTOR as u32).contains(&len) {
        return Err(wrong("no header"));
    }
    let mut summed = header.get(..len as usize).unwrap_or_default().to_vec();
    summed.splice(16..20, [0; 4]);
    if crc32fast::hash(&summed) != u32_at(&header, 16) || u64_at(&header, 24) != at {
        return Err(wrong("wrong checksum or place"));
    }
    let (count, size) = (
        u64::from(u32_at(&header, 80)),
        u64::from(u32_at(&header, 84)),
    );
    let bytes = count.saturating_mul(size);
    if size < u64::from(ENTRY_LEN) || !size.is_multiple_of(8) || bytes > TABLE_MAX {
        return Err(wrong("a table of entries that nobody makes"));
    }
    let mut entries = vec![0; usize::try_from(bytes).unwrap_or(0)];
    disk.read_exact_at(&mut entries, u64_at(&header, 72).saturating_mul(SECTOR))?;
    if crc32fast::hash(&entries) != u32_at(&header, 88) {
        return Err(wrong("the checksum of its entries is wrong"));
    }
    let used = entries.chunks_exact(size as usize);
    let used = used.filter(|entry| entry.get(..16).is_some_and(|kind| kind != [0; 16]));
    let partitions = used.map(|entry| Partition {
        first: u64_at(entry, 32),
        last: u64_at(entry, 40),
    });
    let partitions: Vec<Partition> = partitions.collect();
    let inside = |p: &Partition| p.first > 1 && p.first <= p.last && p.last < sectors;
    match partitions.iter().all(inside) {
        true => Ok(Table {
            header: header.get(..len as usize).unwrap_or_default().to_vec(),
            size: size as usize,
            entries,
            partitions,
        }),
        false => Err(wrong("a partition is not inside the disk")),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u32::from_le_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |field| u64::from_le_bytes(*field))
}

/// Writes a table with this partition on a blank disk of so many sectors, durably.
pub fn write(disk: &File, sectors: u64, partition: Partition) -> Result<()> {
    let entries = entries(partition);
    let last = sectors.saturating_sub(1);
    let guid = Uuid::new_v4();
    let header = |own, other, table| header(own, other, table, last, guid, &entries);
    let put = |bytes: &[u8], at: u64| disk.write_all_at(bytes, at.saturating_mul(SECTOR));
    let second = last.saturating_sub(ENTRY_SECTORS);
    put(&protective(sectors), 0)?;
    put(&header(1, last, 2), 1)?;
    put(&entries, 2)?;
    put(&entries, second)?;
    put(&header(last, 1, second), last)?;
    Ok(disk.sync_all()?)
}

/// Has the one partition of a disk end where a disk of `sectors` sectors has room for it, and gives it. The
/// disk has `has` sectors at the moment: as many, or, when it is to be made smaller, more. It ends with a
/// cluster as it begins with one, but on a disk that gets no smaller never before where it ended;
/// everything else that the table says of it stays.
///
/// In order, each durable: the second copy in its new place, which nobody looks at yet; the first copy.
/// A cut in the midst of that leaves the second, or, on a disk that is to be made smaller, the old second.
pub fn resize(disk: &File, has: u64, sectors: u64) -> Result<Partition> {
    let mut table = either(disk, has)?;
    let (new, second) = fit(&table, has, sectors)?;
    let used = |entry: &&mut [u8]| entry.get(..16).is_some_and(|kind| kind != [0; 16]);
    for entry in table.entries.chunks_exact_mut(table.size).filter(used) {
        put(entry, 40, &new.last.to_le_bytes());
    }
    let last = sectors.saturating_sub(1);
    for (own, other, entries) in [(last, 1, second), (1, last, 2)] {
        let header = moved(&table, own, other, entries, second.saturating_sub(1));
        disk.write_all_at(&table.entries, entries.saturating_mul(SECTOR))?;
        disk.write_all_at(&header, own.saturating_mul(SECTOR))?;
        if own == 1 {
            protect(disk, sectors)?;
        }
        disk.sync_all()?;
    }
    Ok(new)
}

/// What [`resize`] would make of it.
pub fn fitted(disk: &File, has: u64, sectors: u64) -> Result<Partition> {
    fit(&either(disk, has)?, has, sectors).map(|(new, _)| new)
}

/// The one partition of a table on a disk of so many sectors, and where the entries of its second copy
/// begin, before which all can be used.
fn fit(table: &Table, has: u64, sectors: u64) -> Result<(Partition, u64)> {
    let [old] = table.partitions[..] else {
        return Err(Error::unsupported(format!(
            "{} partitions, and which one is to be resized is not known",
            table.partitions.len()
        )));
    };
    let taken = (table.entries.len() as u64).div_ceil(SECTOR);
    let moved_away = u64_at(&table.header, 24) == 1 && u64_at(&table.header, 72) != 2;
    let first_usable = u64_at(&table.header, 40);
    if moved_away || old.first < 2u64.saturating_add(taken) || first_usable > old.first {
        return Err(Error::unsupported(
            "the table is not where it is on other disks, and what is in its place is not known",
        ));
    }
    let second = sectors.saturating_sub(1).saturating_sub(taken);
    let new = Partition {
        first: old.first,
        last: new_end(old, second, sectors >= has)?,
    };
    Ok((new, second))
}

/// The last sector of a partition on a disk whose second copy begins in sector `second`. `grows` keeps
/// it from getting smaller.
fn new_end(old: Partition, second: u64, grows: bool) -> Result<u64> {
    let cluster = 1 << old.first.trailing_zeros().min(CLUSTER_MAX);
    let end = second / cluster * cluster;
    match end.checked_sub(1) {
        Some(last) if grows && last < old.last && old.last < second => Ok(old.last),
        Some(last) if grows && last >= old.last => Ok(last),
        // One that ends before its disk does stays as it is.
        Some(last) if !grows && last > old.first => Ok(last.min(old.last)),
        _ => Err(Error::invalid(format!(
            "{} sectors are too few for a partition that begins with sector {}",
            second, old.first
        ))),
    }
}

/// Has the entry of an MBR that stands for the GPT cover the whole disk, and leaves the rest of it, in which
/// others may have put a program.
fn protect(disk: &File, sectors: u64) -> Result<()> {
    let mut mbr = [0; SECTOR as usize];
    disk.read_exact_at(&mut mbr, 0)?;
    let whole = u32::try_from(sectors.saturating_sub(1)).unwrap_or(u32::MAX);
    let entries = mbr.get_mut(MBR_ENTRY..).unwrap_or_default();
    for entry in entries.chunks_exact_mut(MBR_ENTRY_LEN) {
        if entry.get(4) == Some(&PROTECTIVE) {
            put(entry, 12, &whole.to_le_bytes());
        }
    }
    Ok(disk.write_all_at(&mbr, 0)?)
}

/// The header of a table for another place.
fn moved(table: &Table, own: u64, other: u64, entries: u64, usable: u64) -> Vec<u8> {
    let mut header = table.header.clone();
    for (at, field) in [(24, own), (32, other), (48, usable), (72, entries)] {
        put(&mut header, at, &field.to_le_bytes());
    }
    put(
        &mut header,
        88,
        &crc32fast::hash(&table.entries).to_le_bytes(),
    );
    put(&mut header, 16, &[0; 4]);
    let sum = crc32fast::hash(&header);
    put(&mut header, 16, &sum.to_le_bytes());
    header.resize(SECTOR as usize, 0);
    header
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    let place = bytes.get_mut(at..at.saturating_add(field.len()));
    place
        .expect("inside a header or an entry")
        .copy_from_slice(field);
}

/// An MBR that keeps those away who know no GPT.
fn protective(sectors: u64) -> Vec<u8> {
    let count = u32::try_from(sectors.saturating_sub(1)).unwrap_or(u32::MAX);
    let mut mbr = vec![0; MBR_ENTRY];
    mbr.extend([0, 0, 2, 0, PROTECTIVE, 0xFF, 0xFF, 0xFF]);
    mbr.extend(1u32.to_le_bytes());
    mbr.extend(count.to_le_bytes());
    mbr.resize(SECTOR as usize - MBR_SIGNATURE.len(), 0);
    mbr.extend(MBR_SIGNATURE);
    mbr
}

fn entries(partition: Partition) -> Vec<u8> {
    let mut entries = Vec::new();
    entries.extend(LINUX.to_bytes_le());
    entries.extend(Uuid::new_v4().to_bytes_le());
    entries.extend(partition.first.to_le_bytes());
    entries.extend(partition.last.to_le_bytes());
    entries.resize(ENTRIES as usize * ENTRY_LEN as usize, 0);
    entries
}

fn header(own: u64, other: u64, table: u64, last: u64, guid: Uuid, entries: &[u8]) -> Vec<u8> {
    let sum = |sum: u32| {
        let mut header = SIGNATURE.to_vec();
        for field in [REVISION, HEADER_LEN, sum, 0] {
            header.extend(field.to_le_bytes());
        }
        let usable = [ENTRY_SECTORS + 2, last.saturating_sub(ENTRY_SECTORS + 1)];
        for field in [own, other].into_iter().chain(usable) {
            header.extend(field.to_le_bytes());
        }
        header.extend(guid.to_bytes_le());
        header.extend(table.to_le_bytes());
        for field in [ENTRIES, ENTRY_LEN, crc32fast::hash(entries)] {
            header.extend(field.to_le_bytes());
        }
        header
    };
    let mut header = sum(crc32fast::hash(&sum(0)));
    header.resize(SECTOR as usize, 0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use ploop::Kind;
    use std::path::Path;
    use std::process::Command;

    const SECTORS: u64 = 64 * 2048;

    fn disk() -> (tempfile::NamedTempFile, Partition) {
        let disk = tempfile::NamedTempFile::new().expect("temp file");
        disk.as_file().set_len(SECTORS * SECTOR).expect("length");
        let partition = Partition::whole(SECTORS, 2048).expect("room");
        write(disk.as_file(), SECTORS, partition).expect("written");
        (disk, partition)
    }

    #[test]
    fn what_is_written_is_read_and_others_read_the_same() {
        let (disk, partition) = disk();
        assert_eq!((partition.first, partition.last), (2048, 63 * 2048 - 1));
        let read = read(disk.as_file(), SECTORS).expect("a table");
        assert_eq!(read, Some(vec![partition]));
        let Ok(said) = Command::new("sfdisk").arg("-d").arg(disk.path()).output() else {
            println!("SKIP: sfdisk is not installed");
            return;
        };
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(
            said.contains("label: gpt") && said.contains("last-lba: 131038"),
            "{said}"
        );
        let part = said
            .lines()
            .find(|l| l.contains("start="))
            .expect("a partition");
        let plain: String = part.split_ascii_whitespace().collect();
        assert!(
            plain.contains("start=2048,size=126976,type=0FC63DAF"),
            "{part}"
        );
    }

    #[test]
    fn a_table_whose_first_copy_is_lost_is_read_from_its_second() {
        let (disk, partition) = disk();
        disk.as_file().write_all_at(&[0; 512], 512).expect("write");
        let found = read(disk.as_file(), SECTORS).expect("a table");
        assert_eq!(found, Some(vec![partition]));
        disk.as_file()
            .write_all_at(&[1], (SECTORS - 1) * 512 + 60)
            .expect("write");
        let lost = read(disk.as_file(), SECTORS).expect_err("both are lost");
        assert_eq!(lost.kind(), Kind::Damaged);
    }

    /// Where sfdisk finds the partition and the last sector that one can use; none without sfdisk.
    fn judged(disk: &Path) -> Option<(u64, u64, u64)> {
        let said = Command::new("sfdisk").arg("-d").arg(disk).output().ok()?;
        let said = String::from_utf8_lossy(&said.stdout).replace([',', ' '], "\n");
        let field = |name: &str| {
            let mut after = said.lines().filter_map(|line| line.strip_prefix(name));
            after.find(|rest| !rest.is_empty())?.parse().ok()
        };
        let last = said.split("last-lba:").nth(1)?.split_whitespace().next()?;
        Some((field("start=")?, field("size=")?, last.parse().ok()?))
    }

    #[test]
    fn a_table_that_follows_its_disk_in_size_keeps_who_its_partition_is() {
        let (disk, old) = disk();
        let file = disk.as_file();
        let who = either(file, SECTORS).expect("a table").entries[..40].to_vec();
        for to in [SECTORS * 3 + 8, SECTORS, SECTORS / 2] {
            let has = file.metadata().expect("length").len() / SECTOR;
            file.set_len(has.max(to) * SECTOR).expect("length");
            let new = resize(file, has.max(to), to).expect("resized");
            file.set_len(to * SECTOR).expect("length");
            assert_eq!(read(file, to).expect("a table"), Some(vec![new]));
            assert_eq!(
                (new.first, new.last),
                (old.first, (to - 33) / 2048 * 2048 - 1)
            );
            assert_eq!(either(file, to).expect("a table").entries[..40], who);
            if let Some(found) = judged(disk.path()) {
                assert_eq!(found, (new.first, new.sectors(), to - 34));
            }
        }
        let refused = resize(file, SECTORS / 2, 2048).expect_err("too small");
        assert_eq!(refused.kind(), Kind::Invalid);
    }

    #[test]
    fn a_partition_gets_no_smaller_when_its_disk_gets_larger() {
        let (disk, _) = disk();
        let file = disk.as_file();
        // To the last sector that it can have, as others make it.
        let odd = Partition {
            first: 2048,
            last: SECTORS - 34,
        };
        write(file, SECTORS, odd).expect("written");
        file.write_all_at(b"a program", 0).expect("write");
        for (to, last) in [
            (SECTORS, odd.last),
            (SECTORS + 8, odd.last),
            (SECTORS + 2048, SECTORS - 1),
            (SECTORS + 4096, SECTORS + 2047),
        ] {
            file.set_len(to * SECTOR).expect("length");
            assert_eq!(resize(file, to, to).expect("resized").last, last, "{to}");
            let found = read(file, to).expect("a table").expect("a table");
            assert_eq!(found[0].last, last);
        }
        let mut program = [0; 9];
        file.read_exact_at(&mut program, 0).expect("read");
        assert_eq!(&program, b"a program");
    }

    #[test]
    fn a_table_that_would_be_written_over_data_is_left_alone() {
        let (disk, _) = disk();
        let early = Partition {
            first: 20,
            last: 8191,
        };
        write(disk.as_file(), SECTORS, early).expect("written");
        let refused = resize(disk.as_file(), SECTORS, SECTORS).expect_err("in the way");
        assert_eq!(refused.kind(), Kind::Unsupported);
    }

    #[test]
    fn a_table_that_is_cut_while_it_follows_its_disk_can_be_read() {
        for to in [SECTORS * 2, SECTORS / 2] {
            let (disk, old) = disk();
            let file = disk.as_file();
            let has = SECTORS.max(to);
            file.set_len(has * SECTOR).expect("length");
            let mut before = vec![0; (has * SECTOR) as usize];
            file.read_exact_at(&mut before, 0).expect("read");
            let new = resize(file, has, to).expect("resized");
            let mut after = vec![0; (has * SECTOR) as usize];
            file.read_exact_at(&mut after, 0).expect("read");
            let sector = |n: u64| (n * SECTOR) as usize..((n + 1) * SECTOR) as usize;
            let first = 0..34;
            let second = to - 33..to;
            let judge = |image: &[u8]| {
                file.write_all_at(image, 0).expect("write");
                let found = read(file, has).expect("a table").expect("a table");
                assert!(found == [old] || found == [new], "{found:?}");
            };
            // The second copy half-written, then the first with the second there.
            let mut image = before.clone();
            for n in second.chain(first) {
                image[sector(n)].copy_from_slice(&after[sector(n)]);
                judge(&image);
            }
            assert_eq!(image, after);
        }
    }

    #[test]
    fn a_disk_that_does_not_say_so_has_no_table() {
        let (disk, _) = disk();
        disk.as_file().write_all_at(&[0; 2], 510).expect("write");
        assert_eq!(read(disk.as_file(), SECTORS).expect("nothing"), None);
        let short = tempfile::tempfile().expect("temp file");
        assert_eq!(read(&short, 0).expect("nothing"), None);
    }

    /// A header with this put into both copies, and the checksum made right again.
    fn forged(at: usize, bytes: &[u8]) -> Kind {
        let (disk, _) = disk();
        for sector in [1, SECTORS - 1] {
            let mut header = [0; 512];
            disk.as_file()
                .read_exact_at(&mut header, sector * 512)
                .expect("read");
            header[at..at + bytes.len()].copy_from_slice(bytes);
            header[16..20].fill(0);
            let sum = crc32fast::hash(&header[..92]);
            header[16..20].copy_from_slice(&sum.to_le_bytes());
            disk.as_file()
                .write_all_at(&header, sector * 512)
                .expect("write");
        }
        read(disk.as_file(), SECTORS)
            .expect_err("a forged table")
            .kind()
    }

    #[test]
    fn a_hostile_header_is_refused_before_memory_is_taken() {
        assert_eq!(forged(80, &u32::MAX.to_le_bytes()), Kind::Damaged);
        assert_eq!(forged(84, &u32::MAX.to_le_bytes()), Kind::Damaged);
        assert_eq!(forged(84, &8u32.to_le_bytes()), Kind::Damaged);
        assert_eq!(forged(12, &u32::MAX.to_le_bytes()), Kind::Damaged);
        assert_ne!(forged(72, &u64::MAX.to_le_bytes()), Kind::Unsupported);
    }

    #[test]
    fn a_partition_that_leaves_the_disk_is_refused() {
        for (first, last) in [(2048, SECTORS), (0, 100), (200, 100), (2048, u64::MAX)] {
            let disk = tempfile::tempfile().expect("temp file");
            disk.set_len(SECTORS * SECTOR).expect("length");
            write(&disk, SECTORS, Partition { first, last }).expect("written");
            let refused = read(&disk, SECTORS).expect_err("outside");
            assert_eq!(refused.kind(), Kind::Damaged, "{first} to {last}");
        }
        assert!(Partition::whole(2048, 2048).is_err() && Partition::whole(4096, 2048).is_err());
        assert_eq!(Partition::whole(6144, 2048).expect("room").sectors(), 2048);
    }
}
