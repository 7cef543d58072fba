//! `marcoctl nodes`.

use clap::{Args, Subcommand};

use super::Paging;
use super::values::{LabelEdit, Pair, label_edit, pair};

/// What can be done with nodes.
#[derive(Debug, Subcommand)]
pub(crate) enum NodesCommand {
    /// List nodes
    List(ListNodes),
    /// Show everything that is known of a node
    Get {
        /// Name or id
        node: String,
    },
    /// Show nodes as they are now and then each that changes, until interrupted
    Watch(NodeSelection),
    /// Set and remove labels, or the display name
    #[command(after_help = "\
Examples:
  marcoctl nodes label pi-01 room=a1 role=kiosk     sets two labels
  marcoctl nodes label pi-01 role-                  removes one
  marcoctl nodes label pi-01 --display-name \"Left of the door\"")]
    Label(Label),
    /// Admit nodes that are held or quarantined
    Approve {
        /// Names or ids
        #[arg(required = true)]
        nodes: Vec<String>,
    },
    /// Cut a node's stream and give it no more work
    Quarantine {
        /// Name or id
        node: String,
        /// Why, for the history
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        reason: String,
    },
    /// Decide about what a node says and the controller cannot take (`nodes get` shows it)
    #[command(after_help = "\
A node and the controller can disagree after the database was restored, or lost its last seconds.
Examples:
  marcoctl nodes resolve pi-01 --accept             the node is right
  marcoctl nodes resolve pi-01 --abandon            give up what it speaks of, and cancel it where that is possible")]
    Resolve(Resolve),
    /// Forget a node and revoke its certificate
    Delete {
        /// Name or id
        node: String,
        /// Also end its unfinished work: what waits is cancelled, the rest fails
        #[arg(long)]
        force: bool,
    },
}

/// Arguments of `nodes resolve`.
#[derive(Debug, Args)]
#[group(id = "decision", required = true, multiple = false, args = ["accept", "abandon"])]
pub(crate) struct Resolve {
    /// Name or id
    pub(crate) node: String,
    /// Take what the node says, without proof; what ended other than FAILED stays as it is
    #[arg(long)]
    pub(crate) accept: bool,
    /// End what is unfinished FAILED, and have the node cancel what it still does
    #[arg(long)]
    pub(crate) abandon: bool,
}

/// Flags of `nodes list`.
#[derive(Debug, Args)]
pub(crate) struct ListNodes {
    #[command(flatten)]
    pub(crate) selection: NodeSelection,
    #[command(flatten)]
    pub(crate) paging: Paging,
}

/// Which nodes.
#[derive(Debug, Args)]
pub(crate) struct NodeSelection {
    /// Only those with this label; repeats, or takes a list with commas
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = pair)]
    pub(crate) selector: Vec<Pair>,
    /// Only those that are connected
    #[arg(long)]
    pub(crate) connected: bool,
}

/// Arguments of `nodes label`.
#[derive(Debug, Args)]
pub(crate) struct Label {
    /// Name or id
    pub(crate) node: String,
    /// KEY=VALUE to set a label, KEY- to remove one
    #[arg(value_name = "KEY=VALUE|KEY-", value_parser = label_edit, required_unless_present = "display_name")]
    pub(crate) edits: Vec<LabelEdit>,
    /// A name for people
    #[arg(long, value_name = "TEXT")]
    pub(crate) display_name: Option<String>,
}
