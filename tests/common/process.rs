//! Child processes that cannot outlive their test or their deadline.

use std::fmt::Write as _;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

/// What a child said and how it ended.
#[derive(Debug)]
pub struct Said {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

/// How long a child may take unless the test says otherwise. Generous: CI shares two cores.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// Runs a command to its end, however it ends.
pub fn run(command: &mut Command) -> Said {
    run_within(command, DEADLINE)
}

/// Runs a command to its end; after `deadline` it is killed and the test fails.
pub fn run_within(command: &mut Command, deadline: Duration) -> Said {
    let mut guard = Guard::spawn(command.stdin(Stdio::null()));
    let out = collect(guard.child.stdout.take().unwrap());
    let err = collect(guard.child.stderr.take().unwrap());
    let status = guard.wait_within(deadline);
    let said = |pipe: Receiver<String>| {
        let held = "a process it left behind holds its output open";
        pipe.recv_timeout(Duration::from_secs(10))
            .unwrap_or_else(|_| panic!("{command:?}: {held}"))
    };
    let (out, err) = (said(out), said(err));
    let Some(status) = status else {
        panic!("{command:?} did not end in {deadline:?}\nstdout: {out}\nstderr: {err}");
    };
    Said { status, out, err }
}

/// Runs a command that must succeed, and returns what it printed.
pub fn ok(command: &mut Command) -> String {
    ok_within(command, DEADLINE)
}

/// As [`ok`], with a deadline.
pub fn ok_within(command: &mut Command, deadline: Duration) -> String {
    let said = run_within(command, deadline);
    assert!(said.status.success(), "{}", describe(command, &said));
    said.out
}

/// Runs a command that must fail by itself (no signal) and say why; returns what it said.
pub fn fails(command: &mut Command) -> Said {
    let said = run(command);
    let failed = said.status.code().is_some_and(|code| code != 0);
    assert!(failed, "should have failed: {}", describe(command, &said));
    assert!(
        !said.err.trim().is_empty(),
        "failed in silence: {}",
        describe(command, &said)
    );
    said
}

/// A failed command, for people.
pub fn describe(command: &Command, said: &Said) -> String {
    let mut text = String::new();
    let _ = write!(
        text,
        "{command:?}: {}\nstdout: {}\nstderr: {}",
        said.status, said.out, said.err
    );
    text
}

/// Reads a pipe to its end beside the test, so that neither pipe can fill up and stop the child.
fn collect(mut pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// A child that is killed when its test ends.
#[derive(Debug)]
pub struct Guard {
    /// The child.
    pub child: Child,
}

impl Guard {
    /// Starts a command with piped output.
    pub fn spawn(command: &mut Command) -> Self {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Self {
            child: child.unwrap_or_else(|e| panic!("{command:?} does not start: {e}")),
        }
    }

    /// Waits for the end, at most so long; a child that is late is killed and `None` returned.
    pub fn wait_within(&mut self, deadline: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            if start.elapsed() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return None;
            }
            thread::sleep(Duration::from_millis(2).max(start.elapsed() / 50));
        }
    }

    /// Sends a signal to the child.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("an unreaped child can be signalled");
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `check` says something, at most so long.
pub fn eventually<T>(what: &str, deadline: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(
            start.elapsed() < deadline,
            "not within {deadline:?}: {what}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}
