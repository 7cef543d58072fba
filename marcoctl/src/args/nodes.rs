//! `marcoctl nodes`.

use clap::{Args, Subcommand};

use super::Paging;
use super::values::{LabelEdit, Pair, label_edit, pair};

/// Subcommands of `nodes`.
#[derive(Debug, Subcommand)]
pub(crate) enum NodesCommand {
    /// List nodes
    List(ListNodes),
    /// Show everything that is known about a node
    Get {
        /// Name or id
        node: String,
    },
    /// Show nodes as they are now, then each one that changes, until interrupted
    Watch(NodeSelection),
    /// Set and remove labels, or the display name
    #[command(after_help = "\
Examples:
  marcoctl nodes label pi-01 room=a1 role=kiosk     sets two labels
  marcoctl nodes label pi-01 role-                  removes one
  marcoctl nodes label pi-01 pi-02 room=a1          sets one on two nodes
  marcoctl nodes label --selector room=a1 floor=1   sets one on all that have another
  marcoctl nodes label pi-01 --display-name \"Left of the door\"")]
    Label(Label),
    /// Admit held or quarantined nodes, or another key of a node; --all and --selector admit only held nodes
    #[command(after_help = "\
Examples:
  marcoctl nodes approve pi-01 pi-02
  marcoctl nodes get pi-01                              shows keys that wait, with their fingerprints
  marcoctl nodes approve pi-01 --fingerprint 3f9c...    puts one of them in service; the key before is out")]
    Approve {
        #[command(flatten)]
        nodes: Nodes,
        /// SHA-256 of the key to approve, 64 hexadecimal digits; needed if several keys wait
        #[arg(long, value_name = "SHA256", default_value = "", hide_default_value = true)]
        fingerprint: String,
    },
    /// Cut nodes' streams and assign them no work
    Quarantine {
        #[command(flatten)]
        nodes: Nodes,
        /// Reason, for the history
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        reason: String,
    },
    /// Settle a conflict between a node's report and the controller's record (`nodes get` shows it)
    #[command(after_help = "\
A node and the controller can disagree after the database was restored, or lost its last seconds.
Examples:
  marcoctl nodes resolve pi-01 --accept             the node is right
  marcoctl nodes resolve pi-01 --abandon            give up what it speaks of, and cancel it where that is possible")]
    Resolve(Resolve),
    /// Forget nodes and revoke their certificates
    Delete {
        #[command(flatten)]
        nodes: Nodes,
        /// Also end its unfinished work: pending parts are cancelled, others fail
        #[arg(long)]
        // Not `ask::Force`: this is a field of the request. The controller refuses to delete a node with active work.
        force: bool,
    },
}

/// Arguments of `nodes resolve`.
#[derive(Debug, Args)]
pub(crate) struct Resolve {
    /// Name or id
    pub(crate) node: String,
    #[command(flatten)]
    pub(crate) decision: Decision,
}

/// Which side is right. Neither is the default: the operator must decide. A struct of its own, because a group of clap takes in
/// every argument of the struct that it stands on.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Decision {
    /// Accept the node's report without proof; an end other than FAILED stays as it is
    #[arg(long)]
    pub(crate) accept: bool,
    /// End unfinished work as FAILED, and have the node cancel the rest
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

/// Filter of nodes.
#[derive(Debug, Args)]
pub(crate) struct NodeSelection {
    /// Only those with this label; repeats, or takes a list with commas
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = pair)]
    pub(crate) selector: Vec<Pair>,
    /// Only those that are connected
    #[arg(long)]
    pub(crate) connected: bool,
}

/// Nodes to change. Exactly one of the three must be given.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Nodes {
    /// Names or ids
    #[arg(value_name = "NODE")]
    pub(crate) nodes: Vec<String>,
    /// Every node
    #[arg(long)]
    pub(crate) all: bool,
    /// The nodes with this label; repeats, or takes a list with commas: all of them must be there
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = pair)]
    pub(crate) selector: Vec<Pair>,
}

/// Arguments of `nodes label`.
#[derive(Debug, Args)]
pub(crate) struct Label {
    /// Names or ids, then KEY=VALUE to set a label, KEY- to remove one
    #[arg(value_name = "NODE|KEY=VALUE|KEY-")]
    pub(crate) words: Vec<String>,
    /// Every node
    #[arg(long, conflicts_with = "selector")]
    pub(crate) all: bool,
    /// The nodes with this label; repeats, or takes a list with commas: all of them must be there
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = pair)]
    pub(crate) selector: Vec<Pair>,
    /// Display name
    #[arg(long, value_name = "TEXT")]
    pub(crate) display_name: Option<String>,
}

impl Label {
    /// Splits the words into nodes and edits. A word with `=` is an edit. A word ending in `-` is also an edit, except
    /// at the place where a node is required: the first word, without --all and --selector.
    ///
    /// # Errors
    /// Returns a sentence about the missing or superfluous argument.
    pub(crate) fn read(self) -> Result<(Nodes, Vec<LabelEdit>), String> {
        let by_name = !self.all && self.selector.is_empty();
        let mut nodes = Vec::new();
        let mut edits = Vec::new();
        for (place, word) in self.words.into_iter().enumerate() {
            // A node's id may end with a hyphen. In the first place the word can only be a node.
            let must_be_node = by_name && place == 0 && !word.contains('=');
            let is_edit = word.contains('=') || (word.ends_with('-') && !word.starts_with("nodes/"));
            if is_edit && !must_be_node {
                edits.push(label_edit(&word)?);
            } else if by_name {
                nodes.push(word);
            } else {
                return Err(format!("{word:?} is neither KEY=VALUE nor KEY-; name nodes, or give --all or --selector"));
            }
        }
        if by_name && nodes.is_empty() {
            return Err("no node is named; name some, or give --all or --selector KEY=VALUE".to_owned());
        }
        if edits.is_empty() && self.display_name.is_none() {
            return Err("nothing is to be changed; give KEY=VALUE, KEY- or --display-name TEXT".to_owned());
        }
        Ok((Nodes { nodes, all: self.all, selector: self.selector }, edits))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::{Label, Nodes, NodesCommand};
    use crate::args::{Cli, Command};

    fn label(words: &[&str]) -> Label {
        let line = ["marcoctl", "nodes", "label"].iter().chain(words);
        let Command::Nodes(NodesCommand::Label(label)) = Cli::try_parse_from(line).unwrap().command else {
            panic!("not nodes label")
        };
        label
    }

    #[test]
    fn nodes_and_labels_are_told_apart() {
        let (Nodes { nodes, .. }, edits) = label(&["pi-01", "pi-02", "room=a1", "role-"]).read().unwrap();
        assert_eq!((nodes, edits.len()), (vec!["pi-01".to_owned(), "pi-02".to_owned()], 2));
        // An id may end with a hyphen, and the first word is a node.
        let (Nodes { nodes, .. }, edits) = label(&["pi-", "nodes/b-", "role-"]).read().unwrap();
        assert_eq!((nodes, edits.len()), (vec!["pi-".to_owned(), "nodes/b-".to_owned()], 1));
        let (all, edits) = label(&["--all", "role-", "a=b"]).read().unwrap();
        assert!(all.all && all.nodes.is_empty() && edits.len() == 2);
    }

    #[test]
    fn label_without_nodes_or_edits_is_explained() {
        for (words, said) in [
            (&["room=a1"][..], "no node is named"),
            (&["pi-01"], "nothing is to be changed"),
            (&["pi-01", "--selector", "a=b", "c=d"], "neither KEY=VALUE nor KEY-"),
            (&["--all"], "nothing is to be changed"),
            (&["pi-01", "=x"], "no label before"),
        ] {
            let error = label(words).read().unwrap_err();
            assert!(error.contains(said), "{words:?}: {error}");
        }
    }

    #[test]
    fn several_nodes_are_named_in_one_way_only() {
        for command in ["approve", "quarantine", "delete"] {
            let parse = |rest: &[&str]| Cli::try_parse_from(["marcoctl", "nodes", command].iter().chain(rest)).is_ok();
            for good in [&["a", "b"][..], &["--all"], &["--selector", "room=a1"]] {
                assert!(parse(good), "{command} {good:?}");
            }
            for bad in [&[][..], &["a", "--all"], &["--all", "--selector", "room=a1"], &["a", "--selector", "x=y"]] {
                assert!(!parse(bad), "{command} {bad:?}");
            }
        }
    }
}
