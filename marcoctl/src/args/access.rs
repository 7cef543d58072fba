//! `marcoctl users`, `api-tokens`, `certs` and `audit`.

use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::{Args, Subcommand, ValueEnum};
use marco_proto::v1;

use super::Paging;
use super::values::{Pair, duration, instant, pair};

/// Role of a user or a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleArg {
    /// Reads everything but secrets
    Viewer,
    /// Also operates nodes
    Operator,
    /// Reads, and writes artifacts
    Publisher,
    /// May do everything
    Admin,
}

impl From<RoleArg> for v1::Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Viewer => Self::Viewer,
            RoleArg::Operator => Self::Operator,
            RoleArg::Publisher => Self::Publisher,
            RoleArg::Admin => Self::Admin,
        }
    }
}

/// Subcommands of `users`.
#[derive(Debug, Subcommand)]
pub(crate) enum UsersCommand {
    /// Create a user, with a key generated on this machine and a certificate for it
    #[command(after_help = "\
The key never leaves this machine. NAME.key (mode 0600), NAME.crt and ca.crt are written, so that this works at once:
  marcoctl users create kim --role operator --selector room=a1 --out kim
  marcoctl --certs kim --identity kim nodes list")]
    Create(CreateUser),
    /// List users
    List(Paging),
    /// Change a user's rights; takes effect within 5 s, also on open streams
    Update(UpdateUser),
    /// Shut a user out and revoke its certificates; within 5 s also on open streams
    Revoke {
        /// Name or id
        user: String,
    },
}

/// Flags of `users create`.
#[derive(Debug, Args)]
pub(crate) struct CreateUser {
    /// Name of the user, and of the files
    pub(crate) name: String,
    /// Role of the user
    #[arg(long)]
    pub(crate) role: RoleArg,
    /// Limit it to nodes with this label; repeats, or takes a list with commas (viewers and operators)
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = pair)]
    pub(crate) selector: Vec<Pair>,
    /// Validity of the certificate
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "365d")]
    pub(crate) ttl: Duration,
    /// Folder for the files, created if necessary [default: the --certs folder]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}

/// Flags of `users update`.
#[derive(Debug, Args)]
// An update without a change is a mistake, not a success.
#[group(id = "change", required = true, multiple = true)]
pub(crate) struct UpdateUser {
    /// Name or id
    #[arg(group = "who")]
    pub(crate) user: String,
    /// New role of the user
    #[arg(long, group = "change")]
    pub(crate) role: Option<RoleArg>,
    /// Limit it to nodes with this label; repeats, or takes a list with commas
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = pair, group = "change")]
    pub(crate) selector: Vec<Pair>,
    /// Remove the limit to nodes
    // An empty selector means unchanged, so lifting the limit needs a flag of its own.
    #[arg(long, conflicts_with = "selector", group = "change")]
    pub(crate) all_nodes: bool,
}

/// Subcommands of `api-tokens`.
#[derive(Debug, Subcommand)]
pub(crate) enum ApiTokensCommand {
    /// Create a token for a service, to be sent as `authorization: Bearer TOKEN`; it is printed only once
    #[command(after_help = "\
The token alone goes to stdout, what it allows to stderr:
  marcoctl api-tokens create grafana --role viewer > token && chmod 600 token
  marcoctl --api-token-file token nodes list
  grpcurl -cacert certs/ca.crt -H \"authorization: Bearer $(cat token)\" HOST:1346 list")]
    Create(CreateApiToken),
    /// List tokens, without their secrets
    List(Paging),
    /// Invalidate a token; within 5 s also on open streams
    Revoke {
        /// Name or id
        token: String,
    },
}

/// Flags of `api-tokens create`.
#[derive(Debug, Args)]
pub(crate) struct CreateApiToken {
    /// Name of the token; a name is never used twice
    pub(crate) name: String,
    /// Role of the service
    #[arg(long)]
    pub(crate) role: RoleArg,
    /// Limit it to nodes with this label; repeats, or takes a list with commas (viewers and operators)
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = pair)]
    pub(crate) selector: Vec<Pair>,
    /// Lifetime of the token
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "90d")]
    pub(crate) ttl: Duration,
}

/// Subcommands of `certs`.
#[derive(Debug, Subcommand)]
pub(crate) enum CertsCommand {
    /// List the certificates of users and nodes, newest first
    List(ListCerts),
    /// Revoke a certificate; within 5 s also on open streams
    Revoke {
        /// Name or serial number
        certificate: String,
    },
}

/// Flags of `certs list`.
#[derive(Debug, Args)]
pub(crate) struct ListCerts {
    /// Only certificates of this user or node
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub(crate) subject: String,
    /// Only certificates that are neither revoked nor expired
    #[arg(long)]
    pub(crate) valid: bool,
    #[command(flatten)]
    pub(crate) paging: Paging,
}

/// Subcommands of `audit`.
#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// List calls that changed something or were refused, newest first
    List(ListAudit),
}

/// Flags of `audit list`.
#[derive(Debug, Args)]
pub(crate) struct ListAudit {
    /// Only calls of this user, node, or API token (apiTokens/ID)
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub(crate) caller: String,
    /// Only calls of this method, for example CreateOperation
    #[arg(long, value_name = "METHOD", default_value = "", hide_default_value = true)]
    pub(crate) method: String,
    /// Only calls on this resource, for example nodes/pi-01
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub(crate) resource: String,
    /// Only calls at this time or later
    #[arg(long, value_name = "RFC3339", value_parser = instant)]
    pub(crate) since: Option<DateTime<Utc>>,
    /// Only calls that were refused or failed
    #[arg(long)]
    pub(crate) refused: bool,
    /// Maximum number of entries; by default all
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    #[command(flatten)]
    pub(crate) paging: Paging,
}
