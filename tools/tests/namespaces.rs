//! Disks that another mount namespace holds. A suite of its own: a new namespace takes copies of
//! everything that is mounted, also of what other tests mounted.

mod common;

use common::{Scratch, can_mount, eventually, fails, ok, text};
use std::fs;
use std::process::Command;

#[test]
fn who_has_it_mounted_in_another_namespace_is_named() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.disk("d", &["-s", "64M"]);
    let point = scratch.mountpoint();
    ok(&["mount", text(&disk), text(&point)]);
    let mut container = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sleep", "60"])
        .spawn()
        .expect("unshare runs");
    let comm = format!("/proc/{}/comm", container.id());
    let inside = || fs::read_to_string(&comm).is_ok_and(|name| name.trim() == "sleep");
    eventually("the container runs", inside);
    let said = fails(4, &["umount", text(&disk)]);
    assert!(said.contains(&container.id().to_string()), "{said}");
    assert_eq!(scratch.attached()[0]["state"], "serving");
    container.kill().expect("kill");
    container.wait().expect("wait");
    // The namespace goes shortly after its last process.
    eventually("it can be detached", || {
        common::run(&["umount", text(&disk)]).status.success()
    });
    assert!(scratch.attached().is_empty());
}
