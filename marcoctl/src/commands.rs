//! Execution of the commands: one file per noun.

mod access;
mod artifacts;
mod bootcode;
mod card;
mod image;
mod nodes;
mod operations;
mod schedules;
mod several;
mod tokens;
mod users;

use std::collections::{HashMap, HashSet};

use anyhow::anyhow;
use marco_proto::v1::LabelMatch;
use tonic::Status;

use crate::args::values::Pair;
use crate::args::{Cli, Command};
use crate::clock;
use crate::connect::Connection;
use crate::failure::Failure;
use crate::output::Out;

/// Runs the command.
pub(crate) async fn run(cli: Cli) -> Result<(), Failure> {
    let mut out = Out::new(cli.global.output, clock::now());
    // Local mistakes are reported before a connection is opened.
    let command = match cli.command {
        Command::Artifacts(command) => Command::Artifacts(artifacts::checked(command)?),
        // These commands work on this machine only and need no controller.
        Command::Bootcode(command) => return bootcode::run(command, &mut out).await,
        Command::Image(command) => return image::run(command, &mut out).await,
        // This one needs a controller only for some of its flags.
        Command::Card(command) => return card::run(command, &cli.global, &mut out).await,
        command => command,
    };
    let connection = Connection::open(&cli.global).await?;
    // `users create` writes its files here unless --out is given.
    let certs = cli.global.certs;
    match command {
        Command::Tokens(command) => tokens::run(command, &connection, &mut out).await,
        Command::Nodes(command) => nodes::run(command, &connection, &mut out).await,
        Command::Artifacts(command) => artifacts::run(command, &connection, &mut out).await,
        Command::Operations(command) => operations::run(command, &connection, &mut out).await,
        Command::Schedules(command) => schedules::run(command, &connection, &mut out).await,
        Command::Users(command) => users::run(command, &certs, &connection, &mut out).await,
        Command::ApiTokens(command) => access::api_tokens(command, &connection, &mut out).await,
        Command::Certs(command) => access::certs(command, &connection, &mut out).await,
        Command::Audit(command) => access::audit(command, &connection, &mut out).await,
        // Handled above, before the connection.
        Command::Bootcode(_) | Command::Card(_) | Command::Image(_) => Ok(()),
    }
}

/// Fetches all pages of a list. `fetch` receives a page token and returns the entries and the next token.
async fn all_pages<T, F, A>(fetch: F) -> Result<Vec<T>, Failure>
where
    F: Fn(String) -> A,
    A: Future<Output = Result<(Vec<T>, String), Status>>,
{
    let mut all = Vec::new();
    let mut seen = HashSet::new();
    let mut token = String::new();
    loop {
        let (page, next) = fetch(token).await?;
        all.extend(page);
        if next.is_empty() {
            return Ok(all);
        }
        // A controller that repeats its tokens would otherwise keep this loop running forever.
        if !seen.insert(next.clone()) {
            return Err(Failure::Local(anyhow!("the controller answered the same page of a list twice")));
        }
        token = next;
    }
}

/// Converts labels to the API's form.
fn label_map(pairs: &[Pair]) -> HashMap<String, String> {
    pairs.iter().map(|pair| (pair.key.clone(), pair.value.clone())).collect()
}

/// Converts a selector to the API's filter. `None` if it is empty: no filter.
fn label_match(pairs: &[Pair]) -> Option<LabelMatch> {
    (!pairs.is_empty()).then(|| LabelMatch { match_labels: label_map(pairs) })
}

/// Converts a duration to the API's form.
fn proto_duration(length: std::time::Duration) -> Result<prost_types::Duration, Failure> {
    prost_types::Duration::try_from(length).map_err(|_| Failure::Usage {
        message: format!("{} is too long", humantime::format_duration(length)),
        hint: String::new(),
    })
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::all_pages;

    #[tokio::test]
    async fn every_page_is_fetched() {
        let pages = |token: String| async move {
            Ok::<_, Status>(match token.as_str() {
                "" => (vec![1, 2], "b".to_owned()),
                "b" => (vec![], "c".to_owned()),
                _ => (vec![3], String::new()),
            })
        };
        assert_eq!(all_pages(pages).await.unwrap(), [1, 2, 3]);
    }

    #[tokio::test]
    async fn a_list_that_turns_in_circles_ends() {
        let pages = |_: String| async { Ok::<_, Status>((vec![1], "again".to_owned())) };
        assert!(all_pages(pages).await.is_err());
    }
}
