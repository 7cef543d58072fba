//! `marcoctl nodes`.

use chrono::{DateTime, Utc};
use marco_proto::v1::node::State;
use marco_proto::v1::{
    ApproveNodeRequest, DeleteNodeRequest, GetNodeRequest, ListNodesRequest, ListNodesResponse, Node, NodeCondition,
    NodeFilter, QuarantineNodeRequest, ResolveNodeRequest, UpdateNodeRequest, WatchNodesRequest,
    resolve_node_request::Decision,
};
use prost_types::FieldMask;

use super::access::expires_soon;
use super::several::{self, Names};
use super::{all_pages, label_match};
use crate::args::values::LabelEdit;
use crate::args::{Label, NodeSelection, Nodes, NodesCommand};
use crate::clock;
use crate::connect::{Connection, call};
use crate::failure::Failure;
use crate::output::{Out, ago, bytes, clean, clock_time, enum_word, fields, id, in_local_time, labels, listing, local};

/// Page size for calls that need all nodes.
const PAGE_SIZE: i32 = 500;

pub(super) async fn run(command: NodesCommand, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    match command {
        NodesCommand::List(flags) => {
            let nodes = all_pages(async |page_token| {
                let request = ListNodesRequest {
                    page_size: flags.paging.page_size,
                    page_token,
                    filter: filter(&flags.selection),
                };
                let page = connection.nodes().list_nodes(call(request)).await?.into_inner();
                Ok((page.nodes, page.next_page_token))
            })
            .await?;
            out.document(&ListNodesResponse { nodes, ..Default::default() }, |list, now| node_table(&list.nodes, now))
        }
        NodesCommand::Get { node } => {
            let request = GetNodeRequest { name: node };
            out.document(&connection.nodes().get_node(call(request)).await?.into_inner(), detail)
        }
        NodesCommand::Watch(selection) => watch(&selection, connection, out).await,
        NodesCommand::Label(label_args) => label(label_args, connection, out).await,
        NodesCommand::Approve { nodes, fingerprint } => {
            // A quarantined node was shut out for a reason. Only its explicit name readmits it.
            let names = chosen(&nodes, &[State::AwaitingApproval], connection).await?;
            // A fingerprint identifies one key. With several nodes it would be refused for all but one.
            if !fingerprint.is_empty() && names.all().len() != 1 {
                return Err(Failure::Usage {
                    message: "--fingerprint names the key of one node, and not one node is named".to_owned(),
                    hint: "approve the others with a command of their own".to_owned(),
                });
            }
            several::each(&names, show("approved"), out, async |name| {
                let request = ApproveNodeRequest { name, fingerprint: fingerprint.clone() };
                Ok(connection.nodes().approve_node(call(request)).await?.into_inner())
            })
            .await
        }
        NodesCommand::Quarantine { nodes, reason } => {
            // Nodes that are already in quarantine keep their reason.
            let names = chosen(&nodes, &[State::Approved, State::AwaitingApproval], connection).await?;
            several::each(&names, show("quarantined"), out, async |name| {
                let request = QuarantineNodeRequest { name, reason: reason.clone() };
                Ok(connection.nodes().quarantine_node(call(request)).await?.into_inner())
            })
            .await
        }
        NodesCommand::Resolve(resolve) => {
            let decision = if resolve.decision.accept { Decision::Accept } else { Decision::Abandon };
            let request = ResolveNodeRequest { name: resolve.node, decision: decision.into() };
            out.document(&connection.nodes().resolve_node(call(request)).await?.into_inner(), detail)
        }
        NodesCommand::Delete { nodes, force } => {
            let names = chosen(&nodes, &[], connection).await?;
            let one = names.all().first().map(|name| clean(name)).unwrap_or_default();
            let detail = move |_: &_, _| format!("{one} is deleted");
            let show = several::Show { field: None, done: "deleted", detail };
            several::each(&names, show, out, async |name| {
                let request = DeleteNodeRequest { name, force };
                Ok(connection.nodes().delete_node(call(request)).await?.into_inner())
            })
            .await
        }
    }
}

/// Presentation of a change to nodes.
fn show(done: &'static str) -> several::Show<fn(&Node, DateTime<Utc>) -> String> {
    several::Show { field: Some("nodes"), done, detail }
}

/// Returns the names of the nodes to change. Nodes found by --all or --selector are limited to `states`, unless that is
/// empty.
///
/// # Errors
/// Returns an error if no node matches.
async fn chosen(nodes: &Nodes, states: &[State], connection: &Connection) -> Result<Names, Failure> {
    if !nodes.nodes.is_empty() {
        return Ok(Names::Given(nodes.nodes.clone()));
    }
    let states: Vec<i32> = states.iter().map(|state| (*state).into()).collect();
    let filter = Some(NodeFilter { states, labels: label_match(&nodes.selector), connected: false });
    let found = all_pages(async |page_token| {
        let request = ListNodesRequest { page_size: PAGE_SIZE, page_token, filter: filter.clone() };
        let page = connection.nodes().list_nodes(call(request)).await?.into_inner();
        Ok((page.nodes, page.next_page_token))
    })
    .await?;
    // A selector with a typing error matches nothing. That must not look like success.
    if found.is_empty() {
        return Err(Failure::Unsuccessful {
            message: "no node matches; nothing was changed".to_owned(),
            hint: "`marcoctl nodes list` shows nodes, their states and labels".to_owned(),
        });
    }
    Ok(Names::Found(found.into_iter().map(|node| node.name).collect()))
}

fn filter(selection: &NodeSelection) -> Option<NodeFilter> {
    let labels = label_match(&selection.selector);
    let wanted = labels.is_some() || selection.connected;
    wanted.then(|| NodeFilter { states: Vec::new(), labels, connected: selection.connected })
}

async fn label(label: Label, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let display_name = label.display_name.clone();
    let (nodes, edits) = label.read().map_err(|message| Failure::Usage {
        message,
        hint: "marcoctl nodes label NODE... KEY=VALUE... KEY-...".to_owned(),
    })?;
    let names = chosen(&nodes, &[], connection).await?;
    several::each(&names, show("labelled"), out, async |name| {
        relabel(name, &edits, display_name.as_ref(), connection).await
    })
    .await
}

/// Changes the labels of a node. The API replaces labels as a whole, so the current ones are read first.
async fn relabel(
    name: String,
    edits: &[LabelEdit],
    display_name: Option<&String>,
    connection: &Connection,
) -> Result<Node, Failure> {
    let mut nodes = connection.nodes();
    let current = nodes.get_node(call(GetNodeRequest { name })).await?.into_inner();
    let mut node = Node { name: current.name, labels: current.labels, ..Default::default() };
    let mut paths = Vec::new();
    if !edits.is_empty() {
        // The mask names only the given flags: a change of labels leaves the display name alone.
        paths.push("labels".to_owned());
    }
    for edit in edits {
        match edit.clone() {
            LabelEdit::Set(pair) => node.labels.insert(pair.key, pair.value),
            LabelEdit::Remove(key) => node.labels.remove(&key),
        };
    }
    if let Some(display_name) = display_name {
        paths.push("display_name".to_owned());
        node.display_name = display_name.clone();
    }
    let request = UpdateNodeRequest { node: Some(node), update_mask: Some(FieldMask { paths }) };
    Ok(nodes.update_node(call(request)).await?.into_inner())
}

async fn watch(selection: &NodeSelection, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let request = WatchNodesRequest { filter: filter(selection) };
    let mut stream = connection.nodes().watch_nodes(request).await?.into_inner();
    while let Some(message) = stream.message().await? {
        if out.is_json() {
            out.json_line(&message)?;
        } else {
            let time = clock_time(clock::now());
            // The first message lists all nodes, the others only those that changed.
            for node in &message.nodes {
                let connected = if node.connected { "connected" } else { "not connected" };
                out.line(&format!("{time}  {}  {}  {connected}", clean(&id(&node.name)), state(node)))?;
            }
            for name in &message.deleted {
                out.line(&format!("{time}  {}  deleted", clean(&id(name))))?;
            }
        }
        if out.is_closed() {
            return Ok(());
        }
    }
    Err(Failure::Unreachable {
        message: "the controller ended the stream".to_owned(),
        hint: "start again in a moment".to_owned(),
    })
}

fn node_table(nodes: &[Node], now: DateTime<Utc>) -> String {
    let rows = nodes.iter().map(|node| {
        vec![
            id(&node.name),
            standing(node, now),
            if node.connected { "yes" } else { "no" }.to_owned(),
            mode(node),
            node.board.as_ref().map(|board| board.model.clone()).unwrap_or_default(),
            node.system.as_ref().map(|system| system.os.clone()).unwrap_or_default(),
            ago(node.last_seen_time.as_ref(), now),
            labels(&node.labels),
        ]
    });
    listing("no nodes", &["NODE", "STATE", "CONNECTED", "MODE", "MODEL", "OS", "LAST SEEN", "LABELS"], rows)
}

fn state(node: &Node) -> String {
    enum_word(node.state().as_str_name(), "STATE_")
}

/// Formats the state, and everything that needs an admin's attention.
fn standing(node: &Node, now: DateTime<Utc>) -> String {
    let mut text = state(node);
    if !node.conflicts.is_empty() {
        text.push_str(", CONFLICT");
    }
    if !node.conditions.is_empty() {
        let kinds: Vec<String> = node.conditions.iter().map(ailment).collect();
        text.push_str(&format!(", ILL: {}", kinds.join(" ")));
    }
    match node.pending_keys.len() {
        0 => {}
        1 => text.push_str(", 1 key waits"),
        many => text.push_str(&format!(", {many} keys wait")),
    }
    if expires_soon(node.certificate_expire_time.as_ref(), now) {
        let when = ago(node.certificate_expire_time.as_ref(), now);
        let verb = if when.ends_with("ago") { "expired" } else { "expires" };
        text.push_str(&format!(", certificate {verb} {when}"));
    }
    text
}

/// Returns the type of a condition.
fn ailment(condition: &NodeCondition) -> String {
    enum_word(condition.r#type().as_str_name(), "TYPE_")
}

/// Formats the end of the certificate's validity.
fn certificate(node: &Node, now: DateTime<Utc>) -> String {
    let end = node.certificate_expire_time.as_ref();
    if end.is_none() {
        return String::new();
    }
    // A node renews its certificate 15 days before the end. With 14 days left, the renewal has failed.
    let warning = if expires_soon(end, now) { ": it was not renewed in time" } else { "" };
    format!("until {} ({}){warning}", local(end), ago(end, now))
}

/// Formats the keys that wait for approval.
fn waiting(node: &Node, now: DateTime<Utc>) -> String {
    let lines = node.pending_keys.iter().map(|key| {
        let serial = if key.serial.is_empty() { String::new() } else { format!(", serial {}", key.serial) };
        let since = ago(key.create_time.as_ref(), now);
        format!("{} (from {}{serial}, {since}: {})", key.key_sha256, key.from, key.reason)
    });
    lines.collect::<Vec<_>>().join("; ")
}

fn mode(node: &Node) -> String {
    enum_word(node.mode().as_str_name(), "NODE_MODE_")
}

fn detail(node: &Node, now: DateTime<Utc>) -> String {
    let board = node.board.clone().unwrap_or_default();
    let system = node.system.clone().unwrap_or_default();
    let connected = if node.connected { "yes".to_owned() } else { "no".to_owned() };
    let conflicts: Vec<(&str, String)> = node
        .conflicts
        .iter()
        .map(|conflict| ("conflict", format!("{}: {}", conflict.execution, conflict.explanation)))
        .collect();
    let memory = if board.memory_bytes == 0 { String::new() } else { bytes(board.memory_bytes) };
    let mut shown = vec![
        ("node", node.name.clone()),
        ("display name", node.display_name.clone()),
        ("labels", labels(&node.labels)),
        ("state", state(node)),
        ("because", in_local_time(&node.state_reason)),
        ("key", node.key_sha256.clone()),
        ("keys that wait", waiting(node, now)),
        ("certificate", certificate(node, now)),
        ("connected", connected),
        ("last seen", ago(node.last_seen_time.as_ref(), now)),
        ("at work on", node.active_execution.clone()),
        ("mode", mode(node)),
        ("model", board.model),
        ("family", board.family),
        ("revision", board.revision),
        ("serial", board.serial),
        ("MAC addresses", board.mac_addresses.join(" ")),
        ("memory", memory),
        ("os", system.os.clone()),
        ("kernel", format!("{} {}", system.kernel_release, system.kernel_arch).trim().to_owned()),
        ("user space", system.userspace_arch.clone()),
        ("card layout", enum_word(system.layout().as_str_name(), "CARD_LAYOUT_")),
        ("image", system.image_sha256),
        ("boot files", system.boot_sha256),
        (
            "no update",
            system.update_refusal.map(|refusal| format!("{}: {}", refusal.reason, refusal.message)).unwrap_or_default(),
        ),
        ("on trial", system.trial_lacks),
        ("trouble", node.trouble.clone()),
        ("boot id", node.boot_id.clone()),
        ("agent", node.agent_version.clone()),
        ("joined", local(node.create_time.as_ref())),
    ];
    let ills = node.conditions.iter().map(|ill| ("ill", format!("{}: {}", ailment(ill), ill.message)));
    shown.extend(ills);
    shown.extend(conflicts);
    fields(&shown)
}
