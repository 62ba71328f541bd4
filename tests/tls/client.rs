//! NBD clients of this suite: in the clear, under TLS, and stopping half-way.

use crate::common::nbd::{Client, greet};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion,
};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// A client's end of a TLS connection.
pub type Secure = StreamOwned<ClientConnection, UnixStream>;

/// Numbers of options and of their replies, from the protocol's text.
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const SET_META_CONTEXT: u32 = 10;

    pub const ACK: u32 = 1;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
}

/// A connection on which nothing was said, with patience for a busy machine.
pub fn raw(socket: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

/// A connection after the greeting.
pub fn greeted(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = raw(socket)?;
    greet(&mut stream)?;
    Ok(stream)
}

/// An option on the wire.
pub fn message(number: u32, data: &[u8]) -> Vec<u8> {
    let mut out = b"IHAVEOPT".to_vec();
    out.extend(number.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

/// The next reply to an option: its type and its data.
pub fn reply(stream: &mut impl Read) -> io::Result<(u32, Vec<u8>)> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    let mut data = vec![0; word(16) as usize];
    stream.read_exact(&mut data)?;
    Ok((word(12), data))
}

/// Sends an option: the type of the first reply.
pub fn ask(stream: &mut (impl Read + Write), number: u32, data: &[u8]) -> io::Result<u32> {
    stream.write_all(&message(number, data))?;
    stream.flush()?;
    Ok(reply(stream)?.0)
}

/// What a client believes and shows: a folder as libnbd has it.
pub fn config(folder: &Path, versions: &[&'static SupportedProtocolVersion]) -> ClientConfig {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(folder.join("ca-cert.pem")).unwrap())
        .unwrap();
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_webpki_verifier(verifier.build().unwrap());
    if !folder.join("client-cert.pem").exists() {
        return config.with_no_client_auth();
    }
    let chain = CertificateDer::pem_file_iter(folder.join("client-cert.pem"))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let key = PrivateKeyDer::from_pem_file(folder.join("client-key.pem")).unwrap();
    config.with_client_auth_cert(chain, key).unwrap()
}

/// The beginning of a TLS connection; nothing is sent yet.
pub fn shake(stream: UnixStream, config: ClientConfig) -> Secure {
    let name = ServerName::try_from("localhost").unwrap();
    StreamOwned::new(
        ClientConnection::new(Arc::new(config), name).unwrap(),
        stream,
    )
}

/// A connection under TLS with nothing agreed.
pub fn secure(socket: &Path, config: ClientConfig) -> io::Result<Secure> {
    let mut stream = greeted(socket)?;
    let answer = ask(&mut stream, option::STARTTLS, b"")?;
    assert_eq!(answer, option::ACK, "STARTTLS is refused");
    let mut secure = shake(stream, config);
    while secure.conn.is_handshaking() {
        secure.conn.complete_io(&mut secure.sock)?;
    }
    Ok(secure)
}

/// A whole client: TLS, then the default export.
pub fn connect(socket: &Path, folder: &Path) -> io::Result<Client<Secure>> {
    Client::go(secure(socket, config(folder, rustls::ALL_VERSIONS))?)
}
