//! Metrics: what is counted of disks, as Prometheus reads it.
//!
//! Text only: it asks nobody and opens nothing.

use super::control::Figures;
use crate::counters::OpStat;
use crate::rundir::{Phase, State};

/// The counters of disks in Prometheus' text format: family by family, each with every disk.
pub fn prometheus(disks: &[(&State, &Figures)]) -> String {
    let disks: Vec<_> = disks.iter().map(|(s, f)| (label(s), *s, *f)).collect();
    let mut out = String::new();
    let totals: [Total; 3] = [
        ("requests_total", "Requests answered.", |op| op.requests),
        ("errors_total", "Requests answered with an error.", |op| {
            op.errors
        }),
        ("bytes_total", "Bytes asked for.", |op| op.bytes),
    ];
    for (name, help, of) in totals {
        out += &head(name, "counter", help);
        for (disk, _, figures) in &disks {
            for (op, stat) in &figures.counters.ops {
                out += &format!("ploop_{name}{{{disk},op=\"{op}\"}} {}\n", of(stat));
            }
        }
    }
    let help = "Time from request to answer.";
    out += &head("request_seconds", "histogram", help);
    for (disk, _, figures) in &disks {
        for (op, stat) in &figures.counters.ops {
            out += &histogram(&format!("{disk},op=\"{op}\""), stat);
        }
    }
    for (name, kind, help, of) in PLAIN {
        let mut told = false;
        for (disk, state, figures) in &disks {
            let Some(value) = of(state, figures) else {
                continue;
            };
            if !std::mem::replace(&mut told, true) {
                out += &head(name, kind, help);
            }
            out += &format!("ploop_{name}{{{disk}}} {value}\n");
        }
    }
    out
}

/// What there is one number of for each kind of request: name, help, value.
type Total = (&'static str, &'static str, fn(&OpStat) -> u64);

/// What there is one number of for each disk: name, kind, help, value where it is known.
type Plain = (
    &'static str,
    &'static str,
    &'static str,
    fn(&State, &Figures) -> Option<u64>,
);

const PLAIN: [Plain; 9] = [
    (
        "in_flight",
        "gauge",
        "Requests not answered yet.",
        |_, f| Some(f.counters.in_flight),
    ),
    (
        "oldest_request_seconds",
        "gauge",
        "Age of the oldest of them.",
        |_, f| Some(f.counters.oldest_s),
    ),
    (
        "hung_io",
        "gauge",
        "Requests that have waited for 10 seconds or more.",
        |_, f| Some(f.counters.hung),
    ),
    ("size_bytes", "gauge", "Virtual size.", |s, _| Some(s.size)),
    (
        "failed",
        "gauge",
        "Whether it failed and waits for `recover` or `umount`.",
        |s, _| Some(u64::from(s.state == Phase::Failed)),
    ),
    (
        "host_low",
        "gauge",
        "Whether the host is low on space, so that new space is refused, or soon will be.",
        |s, _| Some(u64::from(s.host_low)),
    ),
    (
        "alloc_bytes",
        "gauge",
        "What the top layer's file takes on the host.",
        |_, f| f.footprint.map(|here| here.allocated),
    ),
    (
        "host_free_bytes",
        "gauge",
        "What the host's file system has left.",
        |_, f| f.footprint.map(|here| here.host_free),
    ),
    (
        "worker_restarts_total",
        "counter",
        "Workers that were replaced.",
        |s, _| Some(u64::from(s.restarts)),
    ),
];

fn label(state: &State) -> String {
    let disk = state.path.replace('\\', "\\\\").replace('"', "\\\"");
    format!("disk=\"{}\"", disk.replace('\n', "\\n"))
}

fn head(name: &str, kind: &str, help: &str) -> String {
    format!("# HELP ploop_{name} {help}\n# TYPE ploop_{name} {kind}\n")
}

fn histogram(labels: &str, stat: &OpStat) -> String {
    let (mut out, mut below) = (String::new(), 0);
    for (n, count) in stat.latency_log2_us.iter().enumerate() {
        below += count;
        let bound = (1u64 << n) as f64 / 1e6;
        out += &format!("ploop_request_seconds_bucket{{{labels},le=\"{bound}\"}} {below}\n");
    }
    out += &format!("ploop_request_seconds_bucket{{{labels},le=\"+Inf\"}} {below}\n");
    let sum = stat.total_us as f64 / 1e6;
    out += &format!("ploop_request_seconds_sum{{{labels}}} {sum}\n");
    out + &format!("ploop_request_seconds_count{{{labels}}} {below}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_metrics_of_many_disks_are_one_text_whose_families_are_told_once() {
        let disks = [State::sample("/ct/1"), State::sample("/ct/2\"")];
        let mut figures = Figures::default();
        figures
            .counters
            .ops
            .insert("read".into(), OpStat::default());
        let text = prometheus(&[(&disks[0], &figures), (&disks[1], &figures)]);
        let mut told = Vec::new();
        let mut family = "";
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                family = rest.split(' ').next().expect("a name");
                assert!(!told.contains(&family), "{family} is told twice");
                told.push(family);
            }
            let sample = line.starts_with('#') || line.starts_with(family);
            assert!(sample, "{line} stands in the family {family}");
        }
        assert!(told.len() > 8, "{text}");
        for disk in ["/ct/1", "/ct/2\\\""] {
            let line = format!("ploop_requests_total{{disk=\"{disk}\",op=\"read\"}} 0");
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
    }
}
