//! The migrations campaign: the link is cut, a side dies or loses its power, at any moment of a
//! disk's way from one folder to another.
//!
//! In each state that may be left at most one side can be used, and what it holds is what the disk
//! held; where none can, the target has all of it, and the words of either side lead out, to one
//! side only.

use super::report::{Report, Tally};
use super::trees::{self, Formats, Tree};
use crate::image::change;
use crate::image::members::{INCOMING, SEALED, WITNESS};
use crate::image::snapshot::copy::{Window, Work};
use crate::image::snapshot::layers;
use crate::image::target::DESCRIPTOR;
use crate::migrate::frame::Frame;
use crate::migrate::receive::Receiver;
use crate::migrate::record::{Record, Secret};
use crate::migrate::resolve::{self, Side};
use crate::migrate::send::{Peer, Sender};
use crate::migrate::talk::{self, ToSource, ToTarget};
use ploop_formats::descriptor::Descriptor;
use ploop_formats::folder;
use ploop_formats::store::Store;
use ploop_formats::store::fault::Faults;
use ploop_formats::store::mutate::Mutator;
use ploop_formats::store::sim::{SimFolder, Wreck};
use ploop_formats::testkit::exec::{Exec, now};
use ploop_formats::testkit::rng::Rng;
use ploop_formats::{Error, Kind, Result};
use std::collections::VecDeque;

/// The target's folder.
const TARGET: usize = 1;
/// States tried after one operation.
const PER_POINT: usize = 2;
/// Points of a disk.
const POINTS: u64 = 4;
/// Frames after which a link is cut at most.
const FRAMES: u64 = 40;

/// What is lost at a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Source,
    Target,
    Both,
    /// The processes alone: what they had begun lands.
    Neither,
}

type Checked<T = ()> = std::result::Result<T, String>;

/// Tries `states` states or more.
pub fn campaign(formats: Formats, seed: u64, states: u64) -> Report {
    Report::campaign("migrations", seed, states, |seed, tally| {
        run(seed, tally, formats, &Mutator::new())
    })
}

/// One disk's way; the barriers of both sides break as `mutator` says.
pub fn run(seed: u64, tally: &mut Tally, formats: Formats, mutator: &Mutator) -> Checked {
    let mut rng = Rng::new(seed);
    let (folder, tree) = trees::make(&mut rng, formats, POINTS);
    if !may_go(&folder, &tree.disk) {
        return Ok(());
    }
    folder.sibling(TARGET);
    let mut case = Case {
        folder,
        tree,
        formats,
        window: trees::window(&mut rng),
        rng,
        states: 0,
    };
    let outcome = case.live(mutator);
    tally.states += case.states;
    tally.requests += 1;
    outcome.map_err(|e| format!("{:?}: {e}", trees::shape(&case.tree.disk)))
}

/// Whether nothing of a disk would stay behind: it has no marked point, and no image with snapshots in
/// itself.
pub fn may_go(folder: &SimFolder, disk: &Descriptor) -> bool {
    folder.sim().instant(true);
    let inner = |guid| {
        let image = layers::image(disk, guid)?;
        now(layers::open_read(folder, disk, &image)).map(|l| layers::inner_snapshots(&l))
    };
    let may_go = disk
        .shots()
        .iter()
        .all(|shot| shot.mark.is_none() && inner(shot.guid).is_ok_and(|n| n == 0));
    folder.sim().instant(false);
    may_go
}

/// The other side, in the same process: it takes each frame when that is sent.
struct Wire<'f> {
    folder: &'f SimFolder,
    receiver: Option<Receiver<'f, SimFolder>>,
    answers: VecDeque<ToSource>,
    /// Frames until the link is cut.
    left: Option<u64>,
}

impl Wire<'_> {
    async fn take(&mut self, frame: Frame) -> Result<Option<ToSource>> {
        if let Some(receiver) = &mut self.receiver {
            return receiver.take(frame, &mut ()).await;
        }
        let Frame::Message(text) = frame else {
            return Err(Error::damaged("no greeting"));
        };
        let ToTarget::Hello(hello) = talk::parse(&text)? else {
            return Err(Error::damaged("no greeting"));
        };
        let (receiver, welcome) = Receiver::begin(self.folder, hello).await?;
        self.receiver = Some(receiver);
        Ok(Some(welcome))
    }
}

impl Peer for Wire<'_> {
    async fn send(&mut self, frame: Frame) -> Result<()> {
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(1).ok_or_else(cut)?;
        }
        let answer = self.take(frame).await?;
        self.answers.extend(answer);
        Ok(())
    }

    async fn hear(&mut self) -> Result<ToSource> {
        // What was sent last arrived, and what was answered did not.
        match self.left {
            Some(0) => Err(cut()),
            _ => self.answers.pop_front().ok_or_else(cut),
        }
    }
}

fn cut() -> Error {
    Error::new(Kind::Io, "the link was cut")
}

/// A disk is sent to one target, all of it, and, before it is given away, to another. The first never
/// takes a word of the source.
pub fn changed_its_mind(seed: u64) -> Checked {
    let mut rng = Rng::new(seed);
    let (source, tree) = trees::make(&mut rng, Formats::Ploop, POINTS);
    if !may_go(&source, &tree.disk) {
        return Ok(());
    }
    for own in [TARGET, TARGET + 1] {
        source.sibling(own);
    }
    let is = |folder: &SimFolder, side| {
        now(resolve::standing(folder)).is_ok_and(|standing| standing.side == side)
    };
    // Each time from the beginning, so that no attempt goes on with what another has sent.
    let parted = (1..1000).find_map(|left| {
        let source = source.fork(left);
        source.sim().instant(true);
        let first = source.sibling(TARGET);
        let attempt = migrate(source.clone(), first.clone(), Window::default(), Some(left));
        let is_cut = now(attempt).is_err();
        let parted = is_cut && is(&first, Side::Ready) && is(&source, Side::Usable);
        parted.then_some((source, first))
    });
    let (source, first) = parted.ok_or("no target was ready before the disk was given away")?;
    let second = source.sibling(TARGET + 1);
    now(migrate(
        source.clone(),
        second.clone(),
        Window::default(),
        None,
    ))
    .map_err(|e| e.to_string())?;
    for record in [now(Record::read(&source)), now(Record::read(&second))] {
        let words = match record.map_err(|e| e.to_string())? {
            Some(Record::Source(source)) => vec![source.word],
            Some(Record::Target(target)) => vec![target.words.taken, target.words.discarded],
            None => Vec::new(),
        };
        if words
            .iter()
            .any(|word| now(resolve::go(&first, word)).is_ok())
        {
            return Err("the first target took the word of the second".into());
        }
    }
    match is(&second, Side::Usable) && !is(&first, Side::Usable) {
        true => Ok(()),
        false => Err("the disk is not where it was sent".into()),
    }
}

/// One migration, from the beginning or from where the last one ended.
async fn migrate(
    source: SimFolder,
    target: SimFolder,
    window: Window,
    left: Option<u64>,
) -> Result<()> {
    let (watch, pace) = (&mut (), &());
    let mut work = Work::new(watch, pace).within(window);
    let mut wire = Wire {
        folder: &target,
        receiver: None,
        answers: VecDeque::new(),
        left,
    };
    let begun = folder::load(&source, WITNESS, 1 << 10).await.ok();
    let begun = begun.and_then(|text| String::from_utf8(text.to_vec()).ok());
    let sender = Sender::prepare(&source, begun.as_deref(), |_| Ok("as it was".into())).await?;
    sender.send(&mut wire, &mut work).await.map(drop)
}

struct Case {
    folder: SimFolder,
    tree: Tree,
    formats: Formats,
    window: Window,
    rng: Rng,
    states: u64,
}

impl Case {
    fn live(&mut self, mutator: &Mutator) -> Checked {
        if self.rng.one_in(2) {
            let left = Some(self.rng.below(FRAMES));
            self.attempt(left, mutator)?;
        }
        self.attempt(None, mutator)
    }

    /// A migration whose link is cut after so many frames.
    fn attempt(&mut self, left: Option<u64>, mutator: &Mutator) -> Checked {
        if self.side(&self.folder)? != Some(Side::Usable) {
            return Ok(());
        }
        let source = self.folder.through(mutator.clone(), Faults::new());
        let target = source.sibling(TARGET);
        let mut exec = Exec::new(source.sim().clone(), self.rng.next());
        let done = exec.start(migrate(source.clone(), target, self.window, left));
        exec.watch(&done, |_| self.cut(&source))?;
        match done.take() {
            Some(Err(e)) if left.is_none() => Err(format!("sending it: {e}")),
            _ => Ok(()),
        }
    }

    fn side(&self, folder: &SimFolder) -> Checked<Option<Side>> {
        folder.sim().instant(true);
        let found = now(resolve::standing(folder));
        folder.sim().instant(false);
        match found {
            Ok(standing) => Ok(Some(standing.side)),
            Err(e) if e.kind() == Kind::NotFound => Ok(None),
            Err(e) => Err(e.to_string()),
        }
    }

    fn cut(&mut self, folder: &SimFolder) -> Checked {
        for _ in 0..PER_POINT {
            let loss = *self
                .rng
                .pick(&[Loss::Source, Loss::Target, Loss::Both, Loss::Neither]);
            let left = self.left_by(folder, loss);
            self.judge(&left).map_err(|e| format!("{loss:?}: {e}"))?;
        }
        Ok(())
    }

    /// What is there after a cut.
    fn left_by(&mut self, folder: &SimFolder, loss: Loss) -> SimFolder {
        let rules = self.formats.rules();
        let lives = folder.fork(self.rng.next());
        lives.sim().instant(true);
        for store in lives.sim().stores() {
            now(store.settle());
        }
        let (mut files, mut names): Wreck = folder.crash(&mut self.rng);
        let keep: &[usize] = match loss {
            Loss::Source => &[TARGET],
            Loss::Target => &[0],
            Loss::Both => &[],
            Loss::Neither => &[0, TARGET],
        };
        for own in keep {
            let now = lives.sibling(*own).names();
            for place in now.values() {
                let store = &lives.sim().stores()[*place];
                files[*place] = (store.pages(), store.rules());
            }
            names[*own] = now;
        }
        SimFolder::of((files, names), self.rng.next(), Mutator::new(), rules)
    }

    fn judge(&mut self, source: &SimFolder) -> Checked {
        self.states += 1;
        let target = source.sibling(TARGET);
        let sides = (self.side(source)?, self.side(&target)?);
        source.sim().instant(true);
        match sides {
            (Some(Side::Usable), Some(Side::Usable)) => Err("both sides can be used".into()),
            (Some(Side::Usable), _) => self.begin_again(source, &target),
            (Some(Side::Sealed | Side::Moved), Some(Side::Usable)) => {
                self.holds(&target)?;
                self.finish(source, &target)
            }
            (Some(Side::Sealed), Some(Side::Ready)) => self.lead_out(source, &target),
            sides => Err(format!("nobody has the disk: {sides:?}")),
        }
    }

    /// The source can be used: the same again, or the target throws away what it has.
    fn begin_again(&mut self, source: &SimFolder, target: &SimFolder) -> Checked {
        self.holds(source)?;
        source.sim().instant(true);
        if self.rng.one_in(4) {
            // There may be nothing.
            let _ = now(resolve::discard(target));
            return self.holds(source);
        }
        let again = || now(migrate(source.clone(), target.clone(), self.window, None));
        let mut done = again();
        // A source that was cut while it began does not know any more what was begun.
        if done.as_ref().is_err_and(|e| e.kind() == Kind::Exists) {
            now(resolve::discard(target)).map_err(|e| format!("discard: {e}"))?;
            match self.side(target)? {
                Some(Side::Discarded) => return self.holds(source),
                None => source.sim().instant(true),
                side => return Err(format!("thrown away, and the target is {side:?}")),
            }
            done = again();
        }
        done.map_err(|e| format!("asked again: {e}"))?;
        self.holds(target)?;
        match self.side(source)? {
            Some(Side::Moved) => Ok(()),
            side => Err(format!("asked again, and the source is {side:?}")),
        }
    }

    /// The target has the disk: it can prove that, and nothing else.
    fn finish(&mut self, source: &SimFolder, target: &SimFolder) -> Checked {
        source.sim().instant(true);
        if now(resolve::discard(target)).is_ok() {
            return Err("the target has thrown away what it has".into());
        }
        let standing = now(resolve::standing(source)).map_err(|e| e.to_string())?;
        if standing.side == Side::Moved {
            return Ok(());
        }
        let word = self.word(target)?;
        if now(resolve::back(source, &word)).is_ok() {
            return Err("the source took the wrong word".into());
        }
        now(resolve::gone(source, &word)).map_err(|e| format!("gone: {e}"))
    }

    /// Neither can be used: to one side or to the other.
    fn lead_out(&mut self, source: &SimFolder, target: &SimFolder) -> Checked {
        let go = self.word(source)?;
        source.sim().instant(true);
        if self.rng.one_in(2) {
            now(resolve::go(target, &go)).map_err(|e| format!("go: {e}"))?;
            self.holds(target)?;
            return self.finish(source, target);
        }
        now(resolve::discard(target)).map_err(|e| format!("discard: {e}"))?;
        if now(resolve::go(target, &go)).is_ok() {
            return Err("the target took the word after it had thrown its copy away".into());
        }
        let back = self.word(target)?;
        target.sim().instant(true);
        now(resolve::back(source, &back)).map_err(|e| format!("back: {e}"))?;
        self.holds(source)
    }

    fn word(&self, folder: &SimFolder) -> Checked<Secret> {
        folder.sim().instant(true);
        let standing = now(resolve::standing(folder)).map_err(|e| e.to_string())?;
        standing.word.ok_or_else(|| "no word".into())
    }

    /// Every point of a disk reads as it must, and no other descriptor is there.
    fn holds(&self, folder: &SimFolder) -> Checked {
        folder.sim().instant(true);
        let disk = now(change::settle(folder)).map_err(|e| format!("settling: {e}"))?;
        if trees::shape(&disk) != trees::shape(&self.tree.disk) {
            return Err(format!("another disk: {:?}", trees::shape(&disk)));
        }
        for name in [SEALED, INCOMING] {
            if folder.names().contains_key(name) {
                return Err(format!("{name} beside {DESCRIPTOR}"));
            }
        }
        for (point, wanted) in &self.tree.contents {
            let read = now(trees::content(folder, &disk, *point));
            let read = read.map_err(|e| format!("reading {point}: {e}"))?;
            if !trees::agree(&read, wanted) {
                return Err(format!("{point} reads otherwise"));
            }
        }
        Ok(())
    }
}
