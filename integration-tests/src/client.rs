//! Clients of the API, with any certificate a test wants to present.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use marco_proto::names::CONTROLLER_TLS_NAME;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic_types::StatusExt as _;

/// A client's TLS credentials.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The CA that must have signed the controller's certificate, PEM.
    pub ca: String,
    /// Certificate and key, PEM; `None`: an anonymous client.
    pub identity: Option<(String, String)>,
}

impl Credentials {
    /// Reads `ca.crt`, `NAME.crt` and `NAME.key` from a folder.
    pub fn read(certs: &Path, name: &str) -> Result<Self> {
        let read = |file: String| {
            let path = certs.join(file);
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        Ok(Self {
            ca: read("ca.crt".to_owned())?,
            identity: Some((read(format!("{name}.crt"))?, read(format!("{name}.key"))?)),
        })
    }

    /// True if each PEM text has its end line: the controller may be writing the files still.
    pub fn are_whole(&self) -> bool {
        let whole = |pem: &String| pem.trim_end().ends_with("-----") && pem.contains("-----END");
        whole(&self.ca) && self.identity.iter().all(|(certificate, key)| whole(certificate) && whole(key))
    }

    /// The same CA without a client certificate.
    pub fn anonymous(&self) -> Self {
        Self { identity: None, ..self.clone() }
    }

    /// A channel that connects at first use, and reconnects after a cut.
    pub fn channel(&self, address: SocketAddr) -> Result<Channel> {
        let mut tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.ca)).domain_name(CONTROLLER_TLS_NAME);
        if let Some((certificate, key)) = &self.identity {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        let endpoint = Endpoint::from_shared(format!("https://{address}"))?
            .tls_config(tls)?
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true);
        // A channel must outlive a controller that is killed and started again.
        Ok(endpoint.connect_lazy())
    }
}

/// The reason in a status's `google.rpc.ErrorInfo`, with a note if its domain is wrong; empty if there is none.
pub fn reason(status: &tonic::Status) -> String {
    match status.get_details_error_info() {
        Some(info) if info.domain == "marco.bootstrap" => info.reason,
        Some(info) => format!("{} of the wrong domain {}", info.reason, info.domain),
        None => String::new(),
    }
}

/// The field names in a status's `google.rpc.BadRequest`.
pub fn bad_fields(status: &tonic::Status) -> Vec<String> {
    let violations = status.get_details_bad_request().map(|details| details.field_violations);
    violations.unwrap_or_default().into_iter().map(|violation| violation.field).collect()
}
