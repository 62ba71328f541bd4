//! Both ends of a TLS connection on one machine: ours on an executor, the client's on a thread.

#[path = "../../../../tests/tls/authority.rs"]
#[allow(dead_code, reason = "the black-box suite uses the rest")]
mod authority;

use super::super::credentials::{Credentials, provider};
use super::super::link::Link;
use super::*;
use crate::io::exec::Engine;
use authority::Authority;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    CipherSuiteCommon, ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    SupportedCipherSuite, Tls13CipherSuite,
};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tempfile::TempDir;

type Peer = StreamOwned<ClientConnection, UnixStream>;

/// A folder that holds everything of both sides.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    let authority = Authority::new("ours");
    authority.equip_server(folder.path());
    authority.equip_client(folder.path(), 1);
    folder
}

fn client_config(folder: &TempDir, provider: CryptoProvider) -> ClientConfig {
    let file = |name: &str| folder.path().join(name);
    let provider = Arc::new(provider);
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(file("ca-cert.pem")).unwrap())
        .unwrap();
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_webpki_verifier(verifier.build().unwrap())
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_file(file("client-cert.pem")).unwrap()],
            PrivateKeyDer::from_pem_file(file("client-key.pem")).unwrap(),
        )
        .unwrap()
}

/// Runs a client beside a server that both have these ciphers.
fn between<T: Send + 'static>(
    engine: Engine,
    ciphers: CryptoProvider,
    client: impl FnOnce(Peer) -> T + Send + 'static,
    server: impl AsyncFnOnce(io::Result<Link>),
) -> T {
    let folder = folder();
    let (ours, theirs) = UnixStream::pair().unwrap();
    for stream in [&ours, &theirs] {
        let patience = Some(Duration::from_secs(20));
        stream.set_read_timeout(patience).unwrap();
        stream.set_write_timeout(patience).unwrap();
    }
    let config = Arc::new(client_config(&folder, ciphers.clone()));
    let client: JoinHandle<T> = thread::spawn(move || {
        let name = ServerName::try_from("localhost").unwrap();
        let connection = ClientConnection::new(config, name).unwrap();
        client(StreamOwned::new(connection, theirs))
    });
    let credentials = Credentials::read(folder.path()).unwrap();
    let identity = credentials.identity_with(ciphers).unwrap();
    exec::run(engine, async {
        let fd: Arc<OwnedFd> = Arc::new(ours.into());
        let mut link = Link::new(Arc::clone(&fd), fd);
        let shaken = link.secure(&identity).await;
        server(shaken.map(|()| link)).await;
    })
    .unwrap();
    client.join().unwrap()
}

const ENGINES: [Engine; 2] = [Engine::Ring, Engine::Poll];

/// Receives exactly so much.
async fn receive(link: &Link, mut len: usize, room: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while len > 0 {
        let (buf, got) = link.recv(BytesMut::zeroed(room.min(len))).await;
        let got = got.unwrap();
        assert_ne!(got, 0, "the end comes {len} bytes too early");
        all.extend_from_slice(&buf[..got]);
        len -= got;
    }
    all
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn bytes_arrive_whole_and_in_order_whatever_the_pieces() {
    for engine in ENGINES {
        for (len, piece, room) in [(1, 1, 1), (70_000, 1000, 77), (3 << 20, 1 << 20, 256 << 10)] {
            let sent = pattern(len);
            let client = {
                let sent = sent.clone();
                move |mut peer: Peer| {
                    for part in sent.chunks(piece) {
                        peer.write_all(part).unwrap();
                    }
                    let mut back = vec![0; sent.len()];
                    peer.read_exact(&mut back).unwrap();
                    assert!(back == sent);
                    // A goodbye is not waited with: there must be room for it.
                    peer.write_all(b"!").unwrap();
                    // The server's word that nothing more comes, or this is an error.
                    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
                }
            };
            between(engine, provider(), client, async |link| {
                let link = link.unwrap();
                let got = receive(&link, len, room).await;
                assert!(got == sent);
                let mut parts: Vec<Bytes> = got.chunks(piece).map(Bytes::copy_from_slice).collect();
                parts.insert(0, Bytes::new());
                link.send_all(parts).await.unwrap();
                assert_eq!(receive(&link, 1, 1).await, b"!");
                link.say_goodbye();
            });
        }
    }
}

#[test]
fn a_peer_that_sends_before_it_receives_is_heard_meanwhile() {
    const LEN: usize = 4 << 20;
    let client = |mut peer: Peer| {
        // More than both directions hold, twice.
        peer.write_all(&pattern(LEN)).unwrap();
        let mut back = vec![0; LEN];
        peer.read_exact(&mut back).unwrap();
        assert!(back == pattern(LEN));
    };
    for engine in ENGINES {
        between(engine, provider(), client, async |link| {
            let link = link.unwrap();
            let data = Bytes::from(pattern(LEN));
            let send = link.send_all(vec![data.clone()]);
            let (sent, got) = futures_util::future::join(send, receive(&link, LEN, 65536)).await;
            sent.unwrap();
            assert!(got == data);
        });
    }
}

/// TLS 1.3 with keys that wear out after so many records.
fn short_lived(records: u64) -> CryptoProvider {
    let mut provider = provider();
    let suite = provider
        .cipher_suites
        .iter()
        .find_map(SupportedCipherSuite::tls13)
        .unwrap();
    provider.cipher_suites = vec![SupportedCipherSuite::Tls13(Box::leak(Box::new(
        Tls13CipherSuite {
            common: CipherSuiteCommon {
                confidentiality_limit: records,
                ..suite.common
            },
            ..*suite
        },
    )))];
    provider
}

#[test]
fn keys_are_renewed_under_way_as_often_as_they_wear_out() {
    const ROUNDS: usize = 2000;
    let client = |mut peer: Peer| {
        for round in 0..ROUNDS {
            let block = [round as u8; 600];
            peer.write_all(&block).unwrap();
            let mut back = [0; 600];
            peer.read_exact(&mut back).unwrap();
            assert_eq!(back, block);
        }
    };
    for engine in ENGINES {
        between(engine, short_lived(20), client, async |link| {
            let link = link.unwrap();
            for _ in 0..ROUNDS {
                let block = receive(&link, 600, 600).await;
                link.send_all(vec![block.into()]).await.unwrap();
            }
        });
    }
}

#[test]
fn no_cipher_is_offered_whose_keys_wear_out_and_stay() {
    for suite in provider().cipher_suites {
        if let SupportedCipherSuite::Tls12(suite) = suite {
            assert_eq!(suite.common.confidentiality_limit, u64::MAX, "{suite:?}");
        }
    }
}

#[test]
fn the_end_of_the_stream_is_the_end_with_a_word_or_without() {
    for engine in ENGINES {
        for polite in [false, true] {
            let client = move |mut peer: Peer| {
                peer.write_all(b"last").unwrap();
                if polite {
                    peer.conn.send_close_notify();
                    peer.flush().unwrap();
                    // Not looked at any more.
                    let _ = peer.sock.write_all(b"noise");
                }
            };
            between(engine, provider(), client, async |link| {
                let link = link.unwrap();
                assert_eq!(receive(&link, 4, 100).await, b"last");
                for _ in 0..2 {
                    assert_eq!(link.recv(BytesMut::zeroed(9)).await.1.unwrap(), 0);
                }
            });
        }
    }
}

#[test]
fn noise_breaks_the_connection_and_the_peer_is_told() {
    for engine in ENGINES {
        let client = |mut peer: Peer| {
            peer.write_all(b"good").unwrap();
            peer.read_exact(&mut [0; 4]).unwrap();
            peer.sock.write_all(&[0x55; 100]).unwrap();
            peer.read(&mut [0; 1]).unwrap_err().to_string()
        };
        let told = between(engine, provider(), client, async |link| {
            let link = link.unwrap();
            let good = receive(&link, 4, 100).await;
            link.send_all(vec![good.into()]).await.unwrap();
            let (_, seen) = link.recv(BytesMut::zeroed(100)).await;
            assert!(seen.unwrap_err().to_string().contains("TLS"));
            assert!(link.send_all(vec![Bytes::from_static(b"x")]).await.is_err());
        });
        assert!(told.contains("alert"), "{told}");
    }
}

#[test]
fn a_handshake_that_ends_early_is_an_error() {
    for engine in ENGINES {
        let client = |peer: Peer| drop(peer);
        between(engine, provider(), client, async |link| {
            let error = link.expect_err("nobody is there");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        });
    }
}

#[test]
fn pipes_carry_tls_like_sockets() {
    for engine in ENGINES {
        let folder = folder();
        let ((from_client, mut to_server), (mut from_server, to_client)) =
            (std::io::pipe().unwrap(), std::io::pipe().unwrap());
        let config = Arc::new(client_config(&folder, provider()));
        let client = thread::spawn(move || {
            let name = ServerName::try_from("localhost").unwrap();
            let mut tls = ClientConnection::new(config, name).unwrap();
            tls.writer().write_all(&pattern(50_000)).unwrap();
            let mut back = Vec::new();
            while back.len() < 50_000 {
                while tls.wants_write() {
                    tls.write_tls(&mut to_server).unwrap();
                }
                tls.read_tls(&mut from_server).unwrap();
                tls.process_new_packets().unwrap();
                let mut part = vec![0; 50_000];
                if let Ok(got) = tls.reader().read(&mut part) {
                    back.extend_from_slice(&part[..got]);
                }
            }
            assert!(back == pattern(50_000));
        });
        let identity = Credentials::read(folder.path())
            .unwrap()
            .identity()
            .unwrap();
        exec::run(engine, async {
            let (input, output) = (Arc::new(from_client.into()), Arc::new(to_client.into()));
            let mut link = Link::new(input, output);
            link.secure(&identity).await.unwrap();
            let got = receive(&link, 50_000, 4096).await;
            link.send_all(vec![got.into()]).await.unwrap();
        })
        .unwrap();
        client.join().unwrap();
    }
}
