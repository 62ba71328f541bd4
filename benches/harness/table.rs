//! A table: works by contenders, interleaved, repeated, judged against what is wanted.

use super::Options;
use super::fio::{self, FOREIGN_MAX, Run, Work};
use super::peers::Contender;

/// What we want to reach beside a peer.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    /// Our requests a second, at least so many times the peer's.
    pub iops: f64,
    /// Our processor time per request, at most so many times the peer's.
    pub cpu: f64,
}

impl Bar {
    /// A bar for speed alone.
    pub const fn iops(iops: f64) -> Self {
        Self {
            iops,
            cpu: f64::INFINITY,
        }
    }
}

/// A peer and, where it is more than there to look at, the bar.
pub type Peer = (Contender, Option<Bar>);

/// What is measured.
pub struct Table<'a> {
    /// Its headline: what work, where, in which mode.
    pub title: String,
    /// Its rows.
    pub works: &'a [Work],
    /// Bytes from the start of the device that are used.
    pub span: u64,
    /// Ours.
    pub ours: &'a Contender,
    /// The others.
    pub peers: &'a [Peer],
}

/// Runs of one row: ours first, then the peers', each in the order of repetitions.
type Row = Vec<Vec<Run>>;

impl Table<'_> {
    /// Measures and prints; our requests a second of each work.
    pub fn run(&self, options: &Options) -> Vec<f64> {
        if self.peers.is_empty() {
            println!("\nSKIP: {}: no peer to compare with", self.title);
            return Vec::new();
        }
        let rows = self.measure(options);
        self.print(options, &rows);
        let ours = rows.iter().map(|row| middle(&row[0]));
        ours.collect()
    }

    fn contender(&self, n: usize) -> &Contender {
        match n.checked_sub(1) {
            None => self.ours,
            Some(peer) => &self.peers[peer].0,
        }
    }

    fn measure(&self, options: &Options) -> Vec<Row> {
        let contenders = self.peers.len() + 1;
        let mut rows = vec![vec![Vec::new(); contenders]; self.works.len()];
        for repetition in 0..options.repetitions {
            for (work, row) in self.works.iter().zip(&mut rows) {
                for turn in 0..contenders {
                    let n = (turn + repetition) % contenders;
                    let contender = self.contender(n);
                    let run = fio::undisturbed(options, work, self.span, || contender.target());
                    eprintln!("{repetition} {} {} {run:?}", work.name(), contender.name);
                    row[n].push(run);
                }
            }
        }
        rows
    }

    fn print(&self, options: &Options, rows: &[Row]) {
        println!("\n{}", self.title);
        println!(
            "Median of {} runs of {} s; ranges are those of the ratio in one repetition. CPU: \
             microseconds of the server a request.\n",
            options.repetitions, options.seconds
        );
        println!(
            "| work | beside | IOPS, ours | theirs | ratio | CPU, ours | theirs | ratio | wanted | |"
        );
        println!("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |");
        for (work, row) in self.works.iter().zip(rows) {
            for (n, (peer, bar)) in self.peers.iter().enumerate() {
                let (ours, theirs) = (&row[0], &row[n + 1]);
                println!("{}", line(&work.name(), &peer.name, ours, theirs, *bar));
            }
        }
        let all = rows.iter().flatten().flatten();
        let disturbed = all.filter(|run| run.foreign > FOREIGN_MAX).count();
        if disturbed > 0 {
            println!(
                "\nRuns that others disturbed (above {FOREIGN_MAX} cores) and that count all the same: \
                 {disturbed}."
            );
        }
    }
}

fn line(work: &str, peer: &str, ours: &[Run], theirs: &[Run], bar: Option<Bar>) -> String {
    let cpu = |runs: &[Run]| Spread::of(runs.iter().map(|r| r.cpu)).middle;
    let pairs = || ours.iter().zip(theirs);
    let more = Spread::of(pairs().map(|(a, b)| a.iops / b.iops));
    let less = Spread::of(pairs().map(|(a, b)| a.cpu / b.cpu));
    let (wanted, verdict) = bar.map_or((String::new(), ""), |bar| judge(bar, more, less));
    format!(
        "| {work} | {peer} | {:.0} | {:.0} | {} | {:.1} | {:.1} | {} | {wanted} | {verdict} |",
        middle(ours),
        middle(theirs),
        more.text(),
        cpu(ours),
        cpu(theirs),
        less.text(),
    )
}

/// The median of requests a second.
fn middle(runs: &[Run]) -> f64 {
    Spread::of(runs.iter().map(|run| run.iops)).middle
}

fn judge(bar: Bar, more: Spread, less: Spread) -> (String, &'static str) {
    let mut wanted = format!("{} x", bar.iops);
    let mut met = more.middle >= bar.iops;
    if bar.cpu.is_finite() {
        wanted += &format!(", CPU {} x", bar.cpu);
        // Not a number, when neither took a tick: no failure.
        met &= less.middle.is_nan() || less.middle <= bar.cpu;
    }
    (wanted, if met { "met" } else { "missed" })
}

/// A median and the range around it.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    /// The median.
    pub middle: f64,
    low: f64,
    high: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (half, last) = (values.len() / 2, values.len() - 1);
        let middle = if values.len() % 2 == 1 {
            values[half]
        } else {
            (values[half - 1] + values[half]) / 2.0
        };
        Self {
            middle,
            low: values[0],
            high: values[last],
        }
    }

    /// Median and range.
    pub fn text(&self) -> String {
        if !self.middle.is_finite() {
            return "-".into();
        }
        format!("{:.2} ({:.2}..{:.2})", self.middle, self.low, self.high)
    }
}
