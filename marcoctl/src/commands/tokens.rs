//! `marcoctl tokens`.

use std::io::Write as _;

use chrono::{DateTime, Utc};
use marco_proto::v1::{
    CreateJoinTokenRequest, JoinToken, ListJoinTokensRequest, ListJoinTokensResponse, RevokeJoinTokenRequest,
};

use super::{all_pages, label_map, proto_duration};
use crate::args::{CreateToken, TokensCommand};
use crate::connect::{Connection, call};
use crate::failure::Failure;
use crate::output::{Out, ago, clean, fields, id, labels, listing, local, timestamp};

pub(super) async fn run(command: TokensCommand, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    match command {
        TokensCommand::Create(flags) => create(flags, connection, out).await,
        TokensCommand::List(paging) => {
            let join_tokens = all_pages(async |page_token| {
                let request = ListJoinTokensRequest { page_size: paging.page_size, page_token };
                let page = connection.nodes().list_join_tokens(call(request)).await?.into_inner();
                Ok((page.join_tokens, page.next_page_token))
            })
            .await?;
            out.document(&ListJoinTokensResponse { join_tokens, ..Default::default() }, |list, now| {
                let rows = list.join_tokens.iter().map(|token| {
                    vec![
                        id(&token.name),
                        state(token, now),
                        format!("{}/{}", token.uses, token.max_uses),
                        ago(token.expire_time.as_ref(), now),
                        if token.require_approval { "required" } else { "by token" }.to_owned(),
                        token.creator.clone(),
                        labels(&token.labels),
                    ]
                });
                listing("no join tokens", &["TOKEN", "STATE", "USES", "EXPIRES", "APPROVAL", "CREATOR", "LABELS"], rows)
            })
        }
        TokensCommand::Revoke { token } => {
            // No question before: a token that leaked must be useless at once (docs/decisions/0043).
            let request = RevokeJoinTokenRequest { name: token };
            let token = connection.nodes().revoke_join_token(call(request)).await?.into_inner();
            out.document(&token, detail)?;
            if !out.is_json() {
                // The token is revoked by now. A closed stderr does not undo that.
                let _ = std::io::stderr().write_all(left_out(&token).as_bytes());
            }
            Ok(())
        }
    }
}

async fn create(flags: CreateToken, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let request = CreateJoinTokenRequest {
        max_uses: flags.max_uses,
        ttl: Some(proto_duration(flags.ttl)?),
        require_approval: flags.require_approval,
        labels: label_map(&flags.labels),
        cidrs: flags.cidrs,
        serials: flags.serials,
        nodes: flags.nodes,
    };
    let token = connection.nodes().create_join_token(call(request)).await?.into_inner();
    // stdout gets only the token, for a file or a variable. People read the rest on stderr.
    out.document(&token, |token, _| token.token.clone())?;
    if !out.is_json() {
        let nodes = match token.max_uses {
            1 => "one Pi".to_owned(),
            uses => format!("{uses} Pis"),
        };
        let held = if token.require_approval { ", held until an admin approves it" } else { "" };
        let text = format!(
            "This token ({}) lets {nodes} join until {}{held}. It is not shown again.\n",
            id(&token.name),
            local(token.expire_time.as_ref())
        );
        // The token was printed. A closed stderr does not undo that.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
    Ok(())
}

fn state(token: &JoinToken, now: DateTime<Utc>) -> String {
    // REVOKED and USED outrank EXPIRED: they say more about the reason.
    let expired = timestamp(token.expire_time.as_ref()).is_some_and(|time| time <= now);
    if token.revoked {
        "REVOKED"
    } else if token.uses >= token.max_uses {
        "USED"
    } else if expired {
        "EXPIRED"
    } else {
        "VALID"
    }
    .to_owned()
}

/// Warns about nodes and cards that depended on the revoked token.
fn left_out(token: &JoinToken) -> String {
    let mut text = String::new();
    if !token.stranded.is_empty() {
        let names: Vec<String> = token.stranded.iter().map(|name| clean(name)).collect();
        let names = names.join(", ");
        text.push_str(&format!("warning: left without a way in, or not approved yet: {names}\n"));
    }
    // The controller does not know cards without a node name, only how many of them may still join.
    let unused = token.max_uses.saturating_sub(token.uses);
    if unused > 0 {
        text.push_str(&format!(
            "warning: cards that were written with it and have not joined ({unused} could) need another token\n"
        ));
    }
    text
}

fn detail(token: &JoinToken, now: DateTime<Utc>) -> String {
    fields(&[
        ("token", token.name.clone()),
        ("state", state(token, now)),
        ("uses", format!("{} of {}", token.uses, token.max_uses)),
        ("expires", local(token.expire_time.as_ref())),
        ("created", local(token.create_time.as_ref())),
        ("creator", token.creator.clone()),
        ("labels", labels(&token.labels)),
        ("networks", token.cidrs.join(" ")),
        ("serials", token.serials.join(" ")),
        ("nodes", token.nodes.join(" ")),
    ])
}
