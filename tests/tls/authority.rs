//! A certificate authority for tests, and folders of credentials as QEMU and libnbd name them.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber, date_time_ymd,
};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Whoever signs.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// A new one that nobody knows yet.
    pub fn new(name: &str) -> Self {
        let mut params = named(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    /// What a server needs to be believed, and to ask clients for certificates.
    pub fn equip_server(&self, folder: &Path) {
        self.introduce(folder);
        let mut params = named("localhost");
        let purpose = ExtendedKeyUsagePurpose::ServerAuth;
        params.extended_key_usages = vec![purpose];
        params.subject_alt_names = CertificateParams::new(["localhost".into(), "127.0.0.1".into()])
            .unwrap()
            .subject_alt_names;
        self.sign(folder, "server", params);
    }

    /// What a client needs to be believed; its certificate has this number.
    pub fn equip_client(&self, folder: &Path, serial: u64) {
        self.introduce(folder);
        let mut params = named("client");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.serial_number = Some(SerialNumber::from(serial));
        self.sign(folder, "client", params);
    }

    /// What anybody needs to believe those whom this authority signed.
    pub fn introduce(&self, folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("ca-cert.pem"), self.0.pem()).unwrap();
    }

    /// Takes a certificate's word back.
    pub fn revoke(&self, folder: &Path, serial: u64) {
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2025, 1, 1),
            next_update: date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: date_time_ymd(2025, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&self.0).unwrap();
        fs::write(folder.join("ca-crl.pem"), list.pem().unwrap()).unwrap();
    }

    fn sign(&self, folder: &Path, who: &str, params: CertificateParams) {
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        fs::write(folder.join(format!("{who}-cert.pem")), cert.pem()).unwrap();
        let file = folder.join(format!("{who}-key.pem"));
        fs::write(&file, key.serialize_pem()).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    }
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = date_time_ymd(2025, 1, 1);
    params.not_after = date_time_ymd(2100, 1, 1);
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
