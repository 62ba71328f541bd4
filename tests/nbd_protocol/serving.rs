//! A server under test, and running a test under every engine and framing.

use super::client::{Client, DISC, STYLES, Style};
use super::disk::{Disk, wait_until};
use ploop::io::exec::{self, Engine};
use ploop::serve::nbd::{Options, Server};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

/// A server on its own thread and socket.
pub struct Serving {
    pub disk: Arc<Disk>,
    pub server: Server<Disk>,
    socket: PathBuf,
    pub thread: Option<JoinHandle<ploop::Result<()>>>,
    _folder: tempfile::TempDir,
}

impl Serving {
    pub fn new(engine: Engine, disk: Disk, options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd");
        let listener = UnixListener::bind(&socket).unwrap();
        let disk = Arc::new(disk);
        let server = Server::new(Arc::clone(&disk), options, engine).unwrap();
        let serving = server.clone();
        let thread = std::thread::spawn(move || {
            exec::run(
                engine,
                async move { serving.serve(vec![listener.into()]).await },
            )
            .unwrap()
        });
        Self {
            disk,
            server,
            socket,
            thread: Some(thread),
            _folder: folder,
        }
    }

    pub fn plain(engine: Engine) -> Self {
        Self::new(engine, Disk::new(), Options::default())
    }

    pub fn connect(&self) -> Client {
        Client::over(UnixStream::connect(&self.socket).unwrap())
    }

    /// A client in the transmission phase.
    pub fn client(&self, style: Style) -> Client {
        let mut client = self.connect();
        client.hello(3);
        client.agree(style);
        client.go("").expect("a place");
        client
    }

    /// A good client finds everything in order.
    pub fn check(&self) {
        let mut client = self.client(Style::Structured);
        client.check_in_step();
        client.send(0, DISC, 1, 0, 0, b"");
        client.expect_end();
    }

    pub fn join(&mut self) -> ploop::Result<()> {
        let thread = self.thread.take().expect("joined once");
        wait_until("the server to end", || thread.is_finished());
        thread.join().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.server.stop();
        if self.thread.is_some() && !std::thread::panicking() {
            self.join().unwrap();
        }
    }
}

/// Both, where this machine has both.
pub fn engines() -> Vec<Engine> {
    match Engine::detect().0 {
        Engine::Ring => vec![Engine::Ring, Engine::Poll],
        Engine::Poll => vec![Engine::Poll],
    }
}

pub fn for_each_engine(test: impl Fn(Engine)) {
    for engine in engines() {
        eprintln!("engine {engine:?}");
        test(engine);
    }
}

pub fn for_each_style(test: impl Fn(&Serving, Style)) {
    for_each_engine(|engine| {
        let serving = Serving::plain(engine);
        for style in STYLES {
            eprintln!("style {style:?}");
            test(&serving, style);
        }
        serving.check();
    });
}
