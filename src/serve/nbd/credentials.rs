//! Credentials: the certificates and the key that a server shows, and whose clients it believes.
//!
//! Files are named and encoded as QEMU, libvirt and nbdkit have them. They are read once, by
//! whoever may read them; the process that serves gets their contents and opens nothing.

use ploop_formats::{Error, Kind, Result};
use rustls::RootCertStore;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ServerConfig, WebPkiClientVerifier};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The server's certificate and those that lead to its authority, PEM.
const CERTIFICATE: &str = "server-cert.pem";
/// Its private key, PEM.
const KEY: &str = "server-key.pem";
/// Who signs clients' certificates, PEM. Without it clients are not asked for any.
const AUTHORITY: &str = "ca-cert.pem";
/// Certificates that count no more, PEM; optional.
const REVOKED: &str = "ca-crl.pem";
/// Bytes in one file: the bundle of all authorities of a system is a quarter of it.
const FILE_MAX: u64 = 1 << 20;

/// The contents of a folder of credentials.
#[derive(Clone, Serialize, Deserialize)]
pub struct Credentials {
    folder: String,
    certificate: Vec<u8>,
    key: Vec<u8>,
    authority: Option<Vec<u8>>,
    revoked: Option<Vec<u8>>,
}

/// Without the key.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Credentials").field(&self.folder).finish()
    }
}

/// What a server is to its clients: its key, and what it asks of them.
#[derive(Clone)]
pub struct Identity(Arc<ServerConfig>);

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity")
    }
}

impl Credentials {
    /// Reads the files. `NotFound` names what is missing; a key that others may read, or
    /// certificates that make no sense together, are `Invalid`.
    pub fn read(folder: &Path) -> Result<Self> {
        let credentials = Self {
            folder: folder.display().to_string(),
            certificate: needed(folder, CERTIFICATE)?,
            key: needed(folder, KEY)?,
            authority: read(&folder.join(AUTHORITY))?,
            revoked: read(&folder.join(REVOKED))?,
        };
        // Found out now rather than by the first client.
        credentials.identity()?;
        Ok(credentials)
    }

    /// Whether clients must show a certificate of our authority.
    pub fn asks_clients(&self) -> bool {
        self.authority.is_some()
    }

    /// What a server needs of them.
    pub fn identity(&self) -> Result<Identity> {
        self.identity_with(provider())
    }

    /// The same with other ciphers.
    pub(super) fn identity_with(&self, provider: CryptoProvider) -> Result<Identity> {
        let provider = Arc::new(provider);
        let chain = self.certificates(CERTIFICATE, &self.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|e| {
            let what = format!("holds no private key without a password in PEM form: {e}");
            self.invalid(KEY, what)
        })?;
        let versions = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .expect("the provider has suites of both versions");
        let asking = match &self.authority {
            None => versions.with_no_client_auth(),
            Some(pem) => versions.with_client_cert_verifier(self.verifier(pem, provider)?),
        };
        let mut config = asking
            .with_single_cert(chain, key)
            .map_err(|e| self.invalid(CERTIFICATE, format!("does not go with {KEY}: {e}")))?;
        // A connection lives long, and a resumed one would not show its certificate again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Identity(Arc::new(config)))
    }

    fn verifier(
        &self,
        pem: &[u8],
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>> {
        let mut roots = RootCertStore::empty();
        for authority in self.certificates(AUTHORITY, pem)? {
            let added = roots.add(authority);
            added.map_err(|e| self.invalid(AUTHORITY, e.to_string()))?;
        }
        let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        if let Some(pem) = &self.revoked {
            let lists: std::result::Result<Vec<_>, _> =
                CertificateRevocationListDer::pem_slice_iter(pem).collect();
            let lists = lists.map_err(|e| self.invalid(REVOKED, e.to_string()))?;
            if lists.is_empty() {
                return Err(self.invalid(REVOKED, "holds no revocation list in PEM form"));
            }
            // An authority without a list has revoked nothing.
            verifier = verifier.with_crls(lists).allow_unknown_revocation_status();
        }
        let file = self.revoked.as_ref().map_or(AUTHORITY, |_| REVOKED);
        verifier
            .build()
            .map_err(|e| self.invalid(file, e.to_string()))
    }

    fn certificates(&self, file: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
        let all: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let all = all.map_err(|e| self.invalid(file, e.to_string()))?;
        match all.is_empty() {
            true => Err(self.invalid(file, "holds no certificate in PEM form")),
            false => Ok(all),
        }
    }

    fn invalid(&self, file: &str, what: impl Into<String>) -> Error {
        Error::invalid(what.into()).at(PathBuf::from(&self.folder).join(file).display())
    }
}

impl Identity {
    /// For a new connection.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0)
    }
}

/// TLS 1.3 with all its ciphers, TLS 1.2 with ChaCha20 only: keys of AES-GCM wear out after 2^24
/// records, which 1.3 renews under way and 1.2 answers by hanging up, on a disk in use.
pub(super) fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites.retain(|suite| {
        let lasting =
            |suite: &rustls::Tls12CipherSuite| suite.common.confidentiality_limit == u64::MAX;
        match suite {
            rustls::SupportedCipherSuite::Tls12(suite) => lasting(suite),
            rustls::SupportedCipherSuite::Tls13(_) => true,
        }
    });
    provider
}

fn needed(folder: &Path, file: &str) -> Result<Vec<u8>> {
    let path = folder.join(file);
    read(&path)?.ok_or_else(|| {
        let what = format!(
            "does not exist; TLS needs {CERTIFICATE} and {KEY}, and {AUTHORITY} to ask clients \
             for certificates"
        );
        Error::new(Kind::NotFound, what).at(path.display())
    })
}

/// The contents of a file, if there is one.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let at = |e: io::Error| Error::from(e).at(path.display());
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(at)?,
    };
    if path.ends_with(KEY) {
        check_private(&file).map_err(|e| e.at(path.display()))?;
    }
    let mut contents = Vec::new();
    let mut start = file.take(FILE_MAX + 1);
    start.read_to_end(&mut contents).map_err(at)?;
    if contents.len() as u64 > FILE_MAX {
        let what = format!("is longer than {} MiB", FILE_MAX >> 20);
        return Err(Error::invalid(what).at(path.display()));
    }
    Ok(Some(contents))
}

/// Nobody but its owner reads a key; root's may be lent to a group.
fn check_private(file: &File) -> Result<()> {
    let meta = file.metadata()?;
    let mode = meta.mode() & 0o777;
    let lent = if meta.uid() == 0 { 0o040 } else { 0 };
    match mode & 0o077 & !lent {
        0 => Ok(()),
        _ => Err(Error::invalid(format!(
            "others may read this key (mode {mode:04o}), so it protects nothing: chmod 0600, and \
             replace it if somebody may have"
        ))),
    }
}
