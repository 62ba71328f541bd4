//! `top`: what attached disks are asked, as it changes.
//!
//! Reads the counters in memory that the keepers share, and run directories for which disks there
//! are. A keeper is asked once, when its disk is first seen; watching wakes nobody after that.

use crate::answer::Answer;
use crate::attach::{self, Attached};
use crate::cancel::Cancel;
use crate::report::Output;
use crate::screen::Screen;
use crate::size;
use crate::table::{self, Align};
use ploop::client;
use ploop::counters::{OpStat, Stat, Watched};
use ploop::io::look::Look;
use ploop::io::room::HostSpace;
use ploop::serve::supervise::control::{Ask, Figures};
use ploop::{Kind, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long keepers may take to hand over their counters, all together.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long a keeper that did not answer is left alone: it makes every round late.
const SILENCE: Duration = Duration::from_secs(10);

/// Watch what attached disks are asked: requests, bytes and their times, the busiest first
///
/// The first round shows the time from the start to it. MEAN and P99 are times from request to
/// answer; P99 is the next power of two. INFL counts unanswered requests, HUNG those of them that
/// have waited for 10 seconds or more. FREE is left on the file system that holds the disk's files.
/// On a terminal each round replaces the last; Ctrl-C ends it. With -o json, one object a line for
/// each round.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds between rounds
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    delay: Duration,
    /// End after so many rounds; otherwise it goes on until Ctrl-C
    #[arg(short = 'n', long, value_name = "ROUNDS", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    match (0.1..=3600.0).contains(&seconds) {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err("0.1 to 3600 seconds".into()),
    }
}

/// Shows rounds until it is told to end.
pub fn run(args: &Args, output: Output) -> Result<Answer> {
    let cancel = Cancel::on_signals()?;
    let mut screen = Screen::new(output);
    let mut watch = Watch::default();
    watch.round()?;
    let mut left = args.count.unwrap_or(u64::MAX);
    while left > 0 && cancel.sleep(args.delay) {
        left -= 1;
        let round = watch.round()?;
        let text = match output {
            Output::Json => json!({
                "schema": 1,
                "seconds": round.time.as_secs_f64(),
                "disks": round.rows.iter().map(Row::json).collect::<Vec<_>>(),
            })
            .to_string(),
            Output::Text => round.text(),
        };
        // Nobody reads any more: that is a way to end it, too.
        if screen.show(&text).is_err() {
            break;
        }
    }
    Ok(Answer::new(String::new(), Value::Null))
}

/// Everything watched. A disk that was detached and attached again has another keeper.
#[derive(Debug, Default)]
struct Watch {
    disks: BTreeMap<(PathBuf, u32), Seen>,
    hosts: BTreeMap<String, Look<HostSpace>>,
    last: Option<Instant>,
}

/// One disk between two rounds.
#[derive(Debug)]
struct Seen {
    source: Source,
    stat: Option<Stat>,
}

/// Where its counters come from.
#[derive(Debug)]
enum Source {
    /// Memory that its keeper shares.
    Shared(Watched),
    /// Its keeper, which is of a release that shares nothing, and is asked in every round.
    Asked,
    /// Nowhere: its keeper did not answer, and is not asked before then.
    Silent(Instant),
}

impl Source {
    fn new(watched: Result<Watched>) -> Self {
        match watched {
            Ok(watched) => Self::Shared(watched),
            Err(e) if matches!(e.kind(), Kind::TimedOut | Kind::NotFound) => Self::silent(),
            Err(_) => Self::Asked,
        }
    }

    fn silent() -> Self {
        Self::Silent(Instant::now() + SILENCE)
    }
}

/// What there is to show.
#[derive(Debug)]
struct Round {
    time: Duration,
    rows: Vec<Row>,
}

/// A disk in a round.
#[derive(Debug)]
struct Row {
    disk: Attached,
    time: Duration,
    /// Now; none when the keeper does not say.
    stat: Option<Stat>,
    /// In this round, by kind.
    ops: BTreeMap<String, OpStat>,
    host: Option<HostSpace>,
}

impl Watch {
    fn round(&mut self) -> Result<Round> {
        let disks = attach::registered()?;
        self.meet(&disks);
        let asked = self.ask();
        let now = Instant::now();
        let time = self.last.map_or(Duration::ZERO, |t| now - t);
        self.last = Some(now);
        let rows = disks.into_iter().map(|disk| self.row(disk, &asked, time));
        let mut rows: Vec<Row> = rows.collect();
        rows.sort_by_key(|row| std::cmp::Reverse((row.all().requests, row.hung())));
        Ok(Round { time, rows })
    }

    /// Forgets who went, and asks newcomers for their counters.
    fn meet(&mut self, disks: &[Attached]) {
        self.disks
            .retain(|key, _| disks.iter().any(|d| id(d) == *key));
        let now = Instant::now();
        let is_due = |seen: &Seen| matches!(seen.source, Source::Silent(due) if due <= now);
        let new = disks
            .iter()
            .filter(|d| self.disks.get(&id(d)).is_none_or(is_due));
        let new: Vec<&Attached> = new.collect();
        let runs: Vec<&PathBuf> = new.iter().map(|d| &d.run).collect();
        let watched = client::watch_all(&runs, PATIENCE);
        for (disk, watched) in new.into_iter().zip(watched) {
            let (source, stat) = (Source::new(watched), None);
            self.disks.insert(id(disk), Seen { source, stat });
        }
    }

    /// What those answer who share nothing.
    fn ask(&mut self) -> BTreeMap<PathBuf, Stat> {
        let asked = self.disks.iter_mut();
        let (runs, seen): (Vec<PathBuf>, Vec<&mut Seen>) = asked
            .filter(|(_, seen)| matches!(seen.source, Source::Asked))
            .map(|((run, _), seen)| (run.clone(), seen))
            .unzip();
        let answers = client::ask_all(&runs, &[Ask::Stat], PATIENCE);
        let mut stats = BTreeMap::new();
        for ((run, seen), answer) in runs.into_iter().zip(seen).zip(answers) {
            match answer {
                Ok(answer) => stats.extend(stat(answer).map(|stat| (run, stat))),
                Err(_) => seen.source = Source::silent(),
            }
        }
        stats
    }

    fn row(&mut self, disk: Attached, asked: &BTreeMap<PathBuf, Stat>, time: Duration) -> Row {
        let host = self.host(&disk);
        let seen = self.disks.get_mut(&id(&disk));
        let stat = match seen.as_ref().map(|s| &s.source) {
            Some(Source::Shared(watched)) => Some(watched.stat()),
            _ => asked.get(&disk.run).cloned(),
        };
        let before = seen.and_then(|s| std::mem::replace(&mut s.stat, stat.clone()));
        let before = before.unwrap_or_else(|| stat.clone().unwrap_or_default());
        let none = OpStat::default();
        let since = |(name, op): (&String, &OpStat)| {
            let before = before.ops.get(name).unwrap_or(&none);
            (name.clone(), op.since(before))
        };
        let ops = stat.iter().flat_map(|s| s.ops.iter().map(since)).collect();
        Row {
            disk,
            time,
            stat,
            ops,
            host,
        }
    }

    /// What is left on the file system of a disk, which is the same for all disks on it. A run
    /// directory's name begins with its number.
    fn host(&mut self, disk: &Attached) -> Option<HostSpace> {
        let name = disk.run.file_name()?.to_str()?;
        let (dev, _) = name.split_once('-')?;
        let path = PathBuf::from(&disk.state.path);
        let look = self
            .hosts
            .entry(dev.to_string())
            .or_insert_with(|| Look::new(move || HostSpace::of(File::open(&path).ok()?).ok()));
        let space = look.now();
        if space.is_none() && !look.is_late() {
            // That disk is gone: the next one on the same file system shows the way.
            self.hosts.remove(dev);
        }
        space
    }
}

/// Counters in a keeper's answer.
fn stat(mut answer: Vec<Value>) -> Option<Stat> {
    let figures: Result<Figures> = client::parse(answer.pop()?, "figures");
    figures.ok().map(|f| f.counters)
}

fn id(disk: &Attached) -> (PathBuf, u32) {
    (disk.run.clone(), disk.state.keeper_pid)
}

/// So many a second.
fn rate(n: u64, time: Duration) -> u64 {
    match time.as_micros() {
        0 => 0,
        us => u64::try_from(u128::from(n) * 1_000_000 / us).unwrap_or(u64::MAX),
    }
}

impl Row {
    /// All kinds of requests in this round.
    fn all(&self) -> OpStat {
        let ops = self.ops.values();
        ops.fold(OpStat::default(), |sum, op| sum.and(op))
    }

    fn hung(&self) -> u64 {
        self.stat.as_ref().map_or(0, |s| s.hung)
    }

    fn rates(&self, op: &OpStat) -> Value {
        json!({
            "iops": rate(op.requests, self.time),
            "bytes_per_s": rate(op.bytes, self.time),
            "errors": op.errors,
            "mean_us": op.mean_us(),
            "p99_us": op.quantile_us(0.99),
        })
    }

    fn json(&self) -> Value {
        let ops = self.ops.iter();
        let ops = ops.map(|(name, op)| (name.clone(), self.rates(op)));
        let mut object = self.rates(&self.all());
        let state = &self.disk.state;
        object["path"] = json!(state.path);
        object["uuid"] = json!(state.uuid);
        object["device"] = json!(state.device);
        object["state"] = json!(state.state);
        object["host_low"] = json!(state.host_low);
        object["answers"] = self.stat.is_some().into();
        object["in_flight"] = self.stat.as_ref().map(|s| s.in_flight).into();
        object["hung"] = self.stat.as_ref().map(|s| s.hung).into();
        object["oldest_s"] = self.stat.as_ref().map(|s| s.oldest_s).into();
        object["host_free"] = self.host.map(|h| h.free).into();
        object["ops"] = Value::Object(ops.collect());
        object
    }

    fn cells(&self) -> [String; 10] {
        let (all, state) = (self.all(), &self.disk.state);
        let dash = || "-".to_string();
        let time = |us: u64| if all.requests == 0 { dash() } else { span(us) };
        let count = |n: fn(&Stat) -> u64| {
            let n = self.stat.as_ref().map(n);
            n.map_or_else(dash, |n| n.to_string())
        };
        [
            rate(all.requests, self.time).to_string(),
            size::show(rate(all.bytes, self.time)),
            time(all.mean_us()),
            time(all.quantile_us(0.99)),
            count(|s| s.in_flight),
            count(|s| s.hung),
            self.host.map_or_else(dash, |h| size::show(h.free)),
            match (&self.stat, state.host_low) {
                (None, _) => "silent".into(),
                (_, true) => "low".into(),
                _ => format!("{:?}", state.state).to_lowercase(),
            },
            state.device.clone().unwrap_or_else(dash),
            state.path.clone(),
        ]
    }
}

/// A time for people.
fn span(us: u64) -> String {
    match us {
        0..10_000 => format!("{us}us"),
        10_000..10_000_000 => format!("{}ms", us / 1000),
        _ => format!("{}s", us / 1_000_000),
    }
}

impl Round {
    fn text(&self) -> String {
        let heads = [
            ("IOPS", Align::Right),
            ("BYTES/S", Align::Right),
            ("MEAN", Align::Right),
            ("P99", Align::Right),
            ("INFL", Align::Right),
            ("HUNG", Align::Right),
            ("FREE", Align::Right),
            ("STATE", Align::Left),
            ("DEVICE", Align::Left),
            ("PATH", Align::Left),
        ];
        let rows: Vec<_> = self.rows.iter().map(Row::cells).collect();
        let sum = |of: fn(&OpStat) -> u64| self.rows.iter().map(|r| of(&r.all())).sum::<u64>();
        let (requests, bytes) = (sum(|o| o.requests), sum(|o| o.bytes));
        let hung: u64 = self.rows.iter().map(Row::hung).sum();
        let head = format!(
            "{} disks, {} IOPS, {}/s, {hung} hang\n",
            self.rows.len(),
            rate(requests, self.time),
            size::show(rate(bytes, self.time)),
        );
        head + &table::render(heads, &rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_shown_by_a_disk_that_is_there_when_the_first_one_on_its_file_system_is_gone() {
        let gone = Attached::sample("/run/ploop/5-1", "/nonexistent/disk");
        let there = Attached::sample("/run/ploop/5-2", "/");
        let mut watch = Watch::default();
        // A busy host may be late with a look.
        let mut looks = (0..100).map(|_| (watch.host(&gone), watch.host(&there)));
        assert!(looks.any(|(_, there)| there.is_some()));
    }

    #[test]
    fn rates_are_by_the_second_whatever_the_delay() {
        assert_eq!(rate(50, Duration::from_millis(500)), 100);
        assert_eq!(rate(50, Duration::ZERO), 0);
        assert_eq!(
            (span(900), span(15_000), span(61_000_000)),
            ("900us".into(), "15ms".into(), "61s".into())
        );
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["0", "x", "-1", "nan", "1e9"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
