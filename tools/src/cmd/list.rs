//! `list`: which disks are attached, and how they are.

use super::orphans;
use crate::answer::Answer;
use crate::table::{self, Align};
use crate::view::{self, View};
use crate::{attach, size};
use ploop::Result;
use ploop::image::views;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// List the attached disks and how they are
///
/// STATE is starting, serving, recovering (its server died, another takes over), stopping, frozen
/// (see `ploopctl freeze`), or what needs somebody: failed, low (the host is low on space, and new
/// space is refused or soon will be), silent (its keeper does not answer). HUNG counts requests
/// that have waited for 10 seconds or more, and says how long the oldest has. FREE is left on the
/// file system that holds the disk's files.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    orphans: orphans::Args,
}

/// Does it.
pub fn run(args: &Args) -> Result<Answer> {
    if let Some(answer) = orphans::run(&args.orphans)? {
        return Ok(answer);
    }
    let views = view::of(attach::all()?);
    let disks: Vec<Value> = views.iter().map(object).collect();
    Ok(Answer::new(text(&views), json!({ "disks": disks })))
}

/// What the keeper said of a disk, as a program reads it.
fn object(view: &View) -> Value {
    let mut object = json!(view.disk.state);
    object["health"] = view.health().into();
    object["answers"] = view.answers.into();
    view::tell(&mut object, view.figures.as_ref());
    let seen = views::of(Path::new(&view.disk.state.path));
    let disk = seen.as_ref().map(|(disk, _)| disk.display().to_string());
    object["view_of"] = disk.into();
    if let Some((_, name)) = seen {
        object["snapshot"] = name.point.bare().into();
    }
    object
}

fn text(views: &[View]) -> String {
    let heads = [
        ("DEVICE", Align::Left),
        ("SIZE", Align::Right),
        ("STATE", Align::Left),
        ("HUNG", Align::Right),
        ("FREE", Align::Right),
        ("MOUNTPOINT", Align::Left),
        ("PATH", Align::Left),
    ];
    let rows: Vec<[String; 7]> = views.iter().map(row).collect();
    table::render(heads, &rows) + &summary(views)
}

fn row(view: &View) -> [String; 7] {
    let state = &view.disk.state;
    let dash = || "-".to_string();
    let hung = view.figures.as_ref().filter(|f| f.counters.hung > 0);
    let space = view.footprint();
    [
        state
            .device
            .clone()
            .or_else(|| state.uri.clone())
            .unwrap_or_else(dash),
        size::show(state.size),
        view.health().into(),
        hung.map_or_else(dash, |f| {
            format!("{} {}s", f.counters.hung, f.counters.oldest_s)
        }),
        space.map_or_else(dash, |s| size::show(s.host_free)),
        state.mountpoint.clone().unwrap_or_else(dash),
        state.path.clone(),
    ]
}

/// Where there are many, how many of them are how.
fn summary(views: &[View]) -> String {
    if views.len() < 2 {
        return String::new();
    }
    let mut words: BTreeMap<&str, usize> = BTreeMap::new();
    for view in views {
        *words.entry(view.health()).or_default() += 1;
    }
    let words: Vec<String> = words
        .iter()
        .map(|(word, n)| format!("{n} {word}"))
        .collect();
    let hung: u64 = views.iter().map(View::hung).sum();
    let hung = match hung {
        0 => String::new(),
        n => format!("; {n} requests hang"),
    };
    format!("{} disks: {}{hung}\n", views.len(), words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::Attached;
    use ploop::serve::supervise::control::Figures;

    fn view(n: u64, figures: Option<Figures>) -> View {
        let (run, path) = (format!("/run/ploop/1-{n}"), format!("/var/lib/ct/{n}"));
        let mut disk = Attached::sample(run, &path);
        disk.state.device = Some(format!("/dev/loop{n}"));
        disk.state.mountpoint = Some(format!("/mnt/{n}"));
        disk.state.size = n << 30;
        View {
            disk,
            answers: figures.is_some(),
            figures,
        }
    }

    #[test]
    fn three_hundred_disks_are_a_table_with_its_columns_in_line_and_a_summary() {
        let mut busy = Figures::default();
        busy.counters.hung = 2;
        busy.counters.oldest_s = 17;
        let mut views: Vec<View> = (0..300)
            .map(|n| view(n, Some(Figures::default())))
            .collect();
        views.extend([view(300, Some(busy)), view(301, None)]);
        let text = text(&views);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 304);
        let column = lines[0].find("PATH").expect("a head");
        let place = |line: &&str| line.find("/var/lib/ct/") == Some(column);
        assert!(lines[1..303].iter().all(place), "{text}");
        assert!(
            lines[301].contains("2 17s") && lines[302].contains("silent"),
            "{text}"
        );
        assert_eq!(
            lines[303],
            "302 disks: 301 serving, 1 silent; 2 requests hang"
        );
    }
}
