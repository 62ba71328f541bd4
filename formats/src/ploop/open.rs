//! Opening and closing a delta: the in-use mark, recovery, and the clean end.
//!
//! Opening for writing, in order:
//!
//! 1. The table is read and judged; a table that contradicts itself or the file is refused and
//!    nothing is changed (`check --repair` mends it).
//! 2. A predecessor that died left its answered mappings in the ledger: they are overlaid and made
//!    durable by an ordinary pass, data first. The caller holds the fence: nothing of the
//!    predecessor can land any more.
//! 3. After an unclean end the file is cut to its last used cluster, durably, so that whatever is
//!    appended from now on has never been written.
//! 4. The header says in-use, durably, before anything else is written.
//!
//! Closing: pass, cut to the last used cluster and header clean, barrier. Features of the format
//! extension that ask for it are kept, durable before the header that names them; the others,
//! dirty bitmaps too, would no longer tell the truth and are dropped when writing begins.

use super::alloc::Alloc;
use super::extension::{self, Extension, Sum};
use super::header::{CLOSED_V21, FLAG_CONVERTING, FLAG_EMPTY, HEADER_LEN, Header, IN_USE};
use super::image::{Ploop, lock};
use super::index::{Index, raw_entry};
use crate::layer::Layer;
use crate::ledger::Ledger;
use crate::planted::{self, Bug};
use crate::store::Store;
use crate::units::{HostCluster, SECTOR, floor_to};
use crate::update::Update;
use crate::{Error, Kind, Result, limits};
use bytes::{Bytes, BytesMut};
use roaring::RoaringBitmap;
use std::sync::{Arc, Mutex};

/// Table bytes read in one step when the whole table is looked at.
pub(super) const SCAN_STEP: u64 = 256 << 10;

/// Reads and parses the header.
pub(super) async fn read_header<S: Store>(store: &S) -> Result<Header> {
    let info = store.info();
    if info.align > limits::PAGE {
        return Err(Error::unsupported(format!(
            "storage blocks of {} bytes",
            info.align
        )));
    }
    let len = info.len.min(limits::PAGE);
    if len < limits::PAGE {
        return Err(Error::damaged(format!(
            "{len} bytes are too few for a ploop image"
        )));
    }
    let page = store
        .read_at(0, crate::buf::aligned(limits::PAGE as usize))
        .await?;
    Header::parse(&page)
}

impl<S: Store> Ploop<S> {
    /// Opens a delta for reading. The file is never changed, whatever state it is in; entries are
    /// judged when they are used. One whose format is being converted is refused: its entries may
    /// be in either unit.
    pub async fn open_read(store: S) -> Result<Self> {
        let header = read_header(&store).await?;
        refuse_converting(&header)?;
        match read_extension(&store, &header).await {
            Ok(extension) => extension.refuse_unknown()?,
            Err(e) if e.kind() == Kind::Unsupported => return Err(e),
            Err(_) => {}
        }
        let end = header.cluster.count(store.info().len);
        let alloc = Alloc::unknown(header.data_start, clip(end));
        let ledger = Ledger::new(Arc::new(crate::ledger::LocalWords::new(1)));
        Ok(Self::assemble(store, header, alloc, ledger, false))
    }

    /// Opens a delta for writing, alone: the caller holds its locks and, when `ledger` comes from
    /// a dead predecessor, the fence. A poisoned ledger opens for reading what was answered.
    pub async fn open_write(store: S, ledger: Ledger) -> Result<Self> {
        let header = read_header(&store).await?;
        judge_header(&header, store.info().len)?;
        let extension = read_extension(&store, &header).await.map_err(refuse)?;
        extension.refuse_unknown()?;
        let inherited = ledger.entries().next().is_some();
        if inherited && header.in_use != IN_USE {
            return Err(Error::damaged(
                "answered writes are pending for an image that is closed",
            ));
        }
        let end = clip(header.cluster.count(store.info().len));
        let poisoned = ledger.is_poisoned();
        let alloc = Alloc::unknown(header.data_start, end);
        let mut image = Self::assemble(store, header, alloc, ledger, true);
        image.kept.features = extension.transit().cloned().collect();
        if poisoned {
            return Ok(image);
        }
        if planted::is(Bug::CutBeforeOverlay) {
            image.start().await?;
        }
        if inherited {
            image.pass_inherited().await?;
        }
        image.start().await?;
        Ok(image)
    }

    /// Opens a frozen delta for the one above it to be merged into. It is written without the
    /// in-use mark, because it is still below others: nothing that they show is changed in it. The
    /// caller holds its locks. One that says that it is in use was to become the top once, and did
    /// not: it is cut to its end like any that was not closed.
    pub async fn open_target(store: S, ledger: Ledger) -> Result<Self> {
        let header = read_header(&store).await?;
        judge_header(&header, store.info().len)?;
        let extension = read_extension(&store, &header).await.map_err(refuse)?;
        extension.refuse_unknown()?;
        let end = clip(header.cluster.count(store.info().len));
        let alloc = Alloc::unknown(header.data_start, end);
        let mut image = Self::assemble(store, header, alloc, ledger, true);
        image.kept.features = extension.transit().cloned().collect();
        image.find_free().await?;
        if image.header.extension != 0 || image.header.flags & FLAG_EMPTY != 0 {
            // It ends with the first cluster that takes its place, and is not empty any more.
            image.header.extension = 0;
            image.header.in_use = 0;
            image.header.flags &= !FLAG_EMPTY;
            image.write_header().await?;
        }
        Ok(image)
    }

    /// Says durably that a target is in use: it becomes the top. What was copied into it is durable
    /// (`sync` came last).
    pub async fn become_top(&mut self) -> Result<()> {
        self.header.in_use = IN_USE;
        self.header.flags &= !FLAG_EMPTY;
        self.header.extension = 0;
        self.write_header().await
    }

    fn assemble(store: S, header: Header, alloc: Alloc, ledger: Ledger, writable: bool) -> Self {
        let index = Arc::new(Mutex::new(Index::new(header, alloc, ledger.clone())));
        Self {
            store,
            header,
            index,
            ledger,
            writable,
            kept: Extension {
                features: Vec::new(),
            },
            supply: tokio::sync::Mutex::new(()),
        }
    }

    /// Makes a dead predecessor's answers durable. Freed space is not returned yet: the free
    /// clusters are not known.
    async fn pass_inherited(&self) -> Result<()> {
        self.pass(None)
            .await
            .map_err(|e| e.at("recovering what the last worker had answered"))
    }

    /// Steps 3 and 4: a known end, free clusters, and the in-use mark.
    async fn start(&mut self) -> Result<()> {
        self.find_free().await?;
        self.become_top().await
    }

    /// Step 3: the table is judged, and the file cut to a known end where it was not closed.
    async fn find_free(&mut self) -> Result<()> {
        let used = self.used_clusters().await?;
        let size = self.header.cluster;
        let len = self.store.info().len;
        let last = used
            .max()
            .map_or(self.header.data_start, |c| c.saturating_add(1));
        let clean = self.header.in_use != IN_USE && size.within(len) == 0;
        let end = if clean { clip(size.count(len)) } else { last };
        if size.start(end) != len {
            let cut = Update::new().len(size.start(end)).barrier();
            cut.apply(&self.store)
                .await
                .map_err(|e| e.at("cutting an unclean end"))?;
        }
        if self.header.in_use == IN_USE {
            // It may have been cut while it got smaller.
            self.clear_behind_end().await?;
        }
        lock(&self.index).alloc = Alloc::new(self.header.data_start, end, &used);
        Ok(())
    }

    /// Writes the header and a barrier.
    async fn write_header(&self) -> Result<()> {
        let page = self.first_page(&self.header).await?;
        Update::new()
            .write(0, page.clone())
            .barrier()
            .apply(&self.store)
            .await?;
        let mut index = lock(&self.index);
        index.header = self.header;
        let epoch = index.epoch();
        index.keep_page(0, epoch, page);
        Ok(())
    }

    /// The first table page with `header` in it.
    pub(super) async fn first_page(&self, header: &Header) -> Result<Bytes> {
        let durable = self.read_page(0).await?;
        let mut page: BytesMut = crate::buf::aligned(durable.len());
        page.copy_from_slice(&durable);
        if let Some(head) = page.get_mut(..HEADER_LEN as usize) {
            head.copy_from_slice(&header.encode());
        }
        Ok(page.freeze())
    }

    /// The extension cluster of features that outlive a writer who does not know them, if any and
    /// if the format can name the cluster that it would be: its pieces, in order.
    fn kept_cluster(&self, at: u32) -> Result<Option<Vec<Bytes>>> {
        if self.kept.features.is_empty() || at >= self.last_cluster() {
            return Ok(None);
        }
        let start = self.kept.build_start(self.header.cluster)?;
        let mut piece = crate::buf::aligned(start.len());
        piece.copy_from_slice(&start);
        let zeros = crate::buf::aligned(start.len()).freeze();
        let pieces = self.header.cluster.bytes().div_ceil(limits::EXTENSION_MAX);
        let mut all = vec![zeros; pieces as usize];
        if let Some(first) = all.first_mut() {
            *first = piece.freeze();
        }
        Ok(Some(all))
    }

    /// Every file cluster that the table names; the whole table is judged on the way.
    async fn used_clusters(&self) -> Result<RoaringBitmap> {
        let mut used = RoaringBitmap::new();
        self.each_entry(|_, to| match used.insert(to.0) {
            true => Ok(()),
            false => Err(Error::damaged(format!(
                "names cluster {}, which another entry names too",
                to.0
            ))),
        })
        .await?;
        Ok(used)
    }

    /// Shows every entry that names a file cluster, in order; one that breaks a rule of the format,
    /// or is refused, makes the image one that is not opened for writing.
    pub(super) async fn each_entry(
        &self,
        mut see: impl FnMut(u32, HostCluster) -> Result<()>,
    ) -> Result<()> {
        let header = &self.header;
        let len = self.store.info().len;
        let table_end = header.entry_at(header.entries).min(len);
        let mut at = 0u64;
        while at < table_end {
            let (data, until) = self.store.extent(at).await?;
            let hole_end = floor_to(until, limits::PAGE);
            if !data && hole_end > at {
                at = hole_end;
                continue;
            }
            let step = floor_to(SCAN_STEP.min(len.saturating_sub(at)), limits::PAGE);
            if step == 0 {
                break;
            }
            let buf = self
                .store
                .read_at(at, crate::buf::aligned(step as usize))
                .await?;
            self.judge_entries(at, &buf, &mut see)?;
            at = at.saturating_add(step);
        }
        Ok(())
    }

    /// Judges the entries in table bytes read from `at`.
    fn judge_entries(
        &self,
        at: u64,
        bytes: &[u8],
        see: &mut impl FnMut(u32, HostCluster) -> Result<()>,
    ) -> Result<()> {
        let header = &self.header;
        let end = header.cluster.count(self.store.info().len);
        let skip = if at == 0 { HEADER_LEN as usize } else { 0 };
        for (i, _) in bytes.chunks_exact(4).enumerate().skip(skip / 4) {
            let byte = i.saturating_mul(4);
            let offset = at.saturating_add(byte as u64);
            let n = offset.saturating_sub(HEADER_LEN) / 4;
            if n >= u64::from(header.entries) {
                break;
            }
            let raw = raw_entry(bytes, byte);
            if raw == 0 {
                continue;
            }
            let place = |e: Error| refuse(e.at(format!("BAT entry {n} (offset {offset:#x})")));
            let Some(to) = header.entry_to_cluster(raw).map_err(place)? else {
                continue;
            };
            if u64::from(to.0) >= end {
                return Err(place(Error::damaged(format!(
                    "names cluster {}, past the end of the file ({end} clusters)",
                    to.0
                ))));
            }
            see(n as u32, to).map_err(place)?;
        }
        Ok(())
    }

    /// The clean end. Nothing runs any more.
    pub(super) async fn shut(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        if !planted::is(Bug::CleanMarkBeforeSync) {
            self.may_write()?;
            self.pass(None).await?;
        }
        let (end, blank) = {
            let index = lock(&self.index);
            let end = index.alloc.used_end();
            (end, end == self.header.data_start)
        };
        let size = self.header.cluster;
        let mut clean = Header {
            in_use: 0,
            flags: self.header.flags & !FLAG_EMPTY | if blank { FLAG_EMPTY } else { 0 },
            ..self.header
        };
        let mut update = Update::new();
        match self.kept_cluster(end)? {
            None => update = update.len(size.start(end)),
            Some(pieces) => {
                clean.in_use = CLOSED_V21;
                clean.extension = size.start(end) / SECTOR;
                update = update.len(size.start(end.saturating_add(1)));
                let places = (size.start(end)..).step_by(limits::EXTENSION_MAX as usize);
                for (at, piece) in places.zip(pieces) {
                    update = update.write(at, piece);
                }
                update = update.barrier();
            }
        }
        let page = self.first_page(&clean).await?;
        update.write(0, page).barrier().apply(&self.store).await?;
        if planted::is(Bug::CleanMarkBeforeSync) {
            self.sync().await
        } else {
            Ok(())
        }
    }
}

/// The format extension, empty when there is none to be trusted.
pub(super) async fn read_extension<S: Store>(store: &S, header: &Header) -> Result<Extension> {
    let Some(at) = extension::offset(header, store.info().len)? else {
        return Ok(Extension {
            features: Vec::new(),
        });
    };
    load_extension(store, header, at).await?
}

/// Reads the extension at byte `at`: the features in its start, and the sum of all of it in steps.
/// The outer error is the storage's.
pub(super) async fn load_extension<S: Store>(
    store: &S,
    header: &Header,
    at: u64,
) -> Result<Result<Extension>> {
    let size = header.cluster.bytes();
    let read = async |done: u64, step: u64| {
        let len = step.min(size.saturating_sub(done));
        let buf = crate::buf::aligned(len as usize);
        store.read_at(at.saturating_add(done), buf).await
    };
    let start = read(0, limits::EXTENSION_MAX).await?;
    let mut sum = Sum::of(&start);
    let mut done = start.len() as u64;
    while done < size {
        sum.add(&read(done, SCAN_STEP).await?);
        done = done.saturating_add(SCAN_STEP);
    }
    Ok(Extension::parse_start(&start, sum))
}

/// What must hold before an image is opened for writing.
fn judge_header(header: &Header, len: u64) -> Result<()> {
    refuse_converting(header)?;
    if !header.covers_size() {
        return Err(refuse(Error::damaged(format!(
            "offset 0x20: {} BAT entries do not cover a size of {} sectors",
            header.entries, header.sectors
        ))));
    }
    if len < header.cluster.start(header.data_start) {
        return Err(refuse(Error::damaged(format!(
            "the file ends at byte {len}, inside its table, which ends at {}",
            header.cluster.start(header.data_start)
        ))));
    }
    if !matches!(header.in_use, 0 | IN_USE | CLOSED_V21) {
        return Err(refuse(Error::damaged(format!(
            "offset 0x2C: in-use mark {:#x}",
            header.in_use
        ))));
    }
    Ok(())
}

fn refuse_converting(header: &Header) -> Result<()> {
    match header.flags & FLAG_CONVERTING {
        0 => Ok(()),
        _ => Err(Error::damaged(
            "offset 0x34: a conversion between format versions was interrupted; `ploopctl convert \
             DISK` undoes it",
        )),
    }
}

/// Says what a refused image needs.
fn refuse(e: Error) -> Error {
    if e.kind() != Kind::Damaged {
        return e;
    }
    Error::damaged(format!("{e}; not opened for writing: run check --repair"))
}

/// A cluster count as the 32 bits that any entry can name.
fn clip(clusters: u64) -> u32 {
    u32::try_from(clusters).unwrap_or(u32::MAX)
}
