//! `marcoctl tokens`.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::Paging;
use super::values::{Pair, duration, pair};

/// Subcommands of `tokens`.
#[derive(Debug, Subcommand)]
pub(crate) enum TokensCommand {
    /// Create a token with which new Pis join; it is shown only once
    #[command(after_help = "\
The token alone goes to stdout, what it allows to stderr:
  marcoctl tokens create > token && chmod 600 token
  marcoctl tokens create --max-uses 30 --ttl 8h --label room=a1 --require-approval")]
    Create(CreateToken),
    /// List tokens, without their secrets
    List(Paging),
    /// Invalidate a token; names the nodes that then have no way to join
    Revoke {
        /// Name or id of the token, as `tokens list` shows it
        token: String,
    },
}

/// Flags of `tokens create`.
#[derive(Debug, Args)]
pub(crate) struct CreateToken {
    /// Number of Pis that may join with it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), default_value_t = 1)]
    pub(crate) max_uses: u32,
    /// Lifetime of the token
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "30m")]
    pub(crate) ttl: Duration,
    /// Pis that join with it wait until an admin approves them
    #[arg(long)]
    pub(crate) require_approval: bool,
    /// Label that its Pis get; repeats
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) labels: Vec<Pair>,
    /// Only Pis with an address in this network, as the controller sees it; repeats
    #[arg(long = "cidr", value_name = "NETWORK")]
    pub(crate) cidrs: Vec<String>,
    /// Only the board with this serial number; repeats. A known board with a new key then needs no approval
    #[arg(long = "serial", value_name = "SERIAL")]
    pub(crate) serials: Vec<String>,
    /// Only for a node with this id; repeats. A known board with a new key then needs no approval
    #[arg(long = "node", value_name = "ID")]
    pub(crate) nodes: Vec<String>,
}
