//! `marcoctl card`.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use marco_proto::secrets;
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::download_artifact_response::Part;
use marco_proto::v1::{
    Artifact, ArtifactFilter, CreateJoinTokenRequest, DownloadArtifactRequest, JoinToken, ListArtifactsRequest,
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::{all_pages, label_map, proto_duration};
use crate::args::{Board, CardCommand, Global, WriteCard};
use crate::ask::{read_line, say};
use crate::card::{self, Contents, Join, Set, Target};
use crate::connect::{Connection, call};
use crate::failure::Failure;
use crate::output::{Out, id, local};
use crate::progress::byte_bar;

/// Result of writing cards, printed by `--output json`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    cards: Vec<String>,
    bootcode_sha256: String,
    controllers: Vec<String>,
    /// Name of the created token. Empty: the token came from a file.
    token: String,
    notes: Vec<String>,
}

pub(super) async fn run(command: CardCommand, global: &Global, out: &mut Out) -> Result<(), Failure> {
    let CardCommand::Write(flags) = command;
    let paths = paths(&flags)?;
    let mut connection = None;
    // All checks come before a token is created and before anything is overwritten.
    let first = paths.first().context("there is no card to write")?.clone();
    let first_target = card::inspect(&first)?;
    let set = match &flags.bootcode {
        Some(path) => std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?,
        None => fetch(connected(&mut connection, global).await?, flags.board).await?,
    };
    let set = Set::open(set).context("the bootcode cannot be put on a card")?;
    let (mut contents, lacks) = Contents::of(&set, flags.firmware.as_deref())?;
    let mut notes = Vec::new();
    if let Some(missing) = lacks {
        notes.push(format!("real boards do not start without {missing}: give --firmware DIR (a virtual machine does)"));
    }
    extras(&mut contents, &flags)?;
    let controllers = controllers(&flags, global);
    if controllers.is_empty() {
        notes.push(
            "the cards name no controller, so that Pis look for one on their network; --join HOST:PORT names one"
                .to_owned(),
        );
    }
    // Asked before the token is created: a refusal leaves no unused token behind.
    confirm(&first, &first_target, flags.yes)?;
    let (token, made) = match &flags.token_file {
        Some(path) => {
            let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            let token = secrets::join_token(&bytes).map_err(|holds| Failure::Usage {
                message: format!("{} is not a join token: it holds {holds}", path.display()),
                hint: "`marcoctl tokens create` prints one".to_owned(),
            })?;
            (token, None)
        }
        None => {
            let made = mint(connected(&mut connection, global).await?, &flags).await?;
            (made.token.clone(), Some(made))
        }
    };
    for note in &notes {
        say(&format!("note: {note}\n"));
    }

    let mut done = Vec::new();
    for (number, path) in (1_u32..).zip(&paths) {
        let target = if number == 1 { None } else { Some(next_card(path, number, &flags)?) };
        // Two nodes cannot have one id, so each card gets a number.
        let name = flags.node_name.clone().map(|name| if flags.count > 1 { format!("{name}-{number}") } else { name });
        let join = Join { controllers: controllers.clone(), enroll: flags.enroll.clone(), token: token.clone(), name };
        contents.join(&join)?;
        let (path, size, contents) = (path.clone(), flags.size, contents.clone());
        // The first card was inspected and confirmed above.
        let target = match target {
            Some(target) => target,
            None => card::inspect(&path)?,
        };
        let shown = path.display().to_string();
        // Writing blocks for minutes.
        tokio::task::spawn_blocking(move || card::write(&path, &target, size, &contents))
            .await
            .context("writing was given up")??;
        if !out.is_json() {
            out.line(&format!("{shown} is written and verified"))?;
        }
        done.push(shown);
    }
    let written = Written {
        cards: done,
        bootcode_sha256: set.sha256(),
        controllers,
        token: made.as_ref().map(|token| token.name.clone()).unwrap_or_default(),
        notes,
    };
    if out.is_json() {
        return out.value(&written, |_| String::new());
    }
    if let Some(token) = &made {
        let expires = local(token.expire_time.as_ref());
        out.line(&format!("token {} lets {} join until {expires}", id(&token.name), pis(token.max_uses)))?;
    }
    Ok(())
}

fn pis(count: u32) -> String {
    if count == 1 { "one Pi".to_owned() } else { format!("{count} Pis") }
}

/// Returns one path per card: the same device each time, or numbered files.
fn paths(flags: &WriteCard) -> Result<Vec<PathBuf>, Failure> {
    if flags.count == 1 {
        return Ok(vec![flags.target.clone()]);
    }
    // Without a terminal there is no pause to change the card, and one card would be written N times.
    if flags.target.starts_with("/dev") {
        if !std::io::stdin().is_terminal() {
            return Err(Failure::Usage {
                message: "several cards in one device need a terminal, to be asked for the next one".to_owned(),
                hint: "write one at a time, with the same --token-file (`marcoctl tokens create --max-uses N`)"
                    .to_owned(),
            });
        }
        return Ok((0..flags.count).map(|_| flags.target.clone()).collect());
    }
    let stem = flags.target.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let ending = flags.target.extension().map(|ending| format!(".{}", ending.to_string_lossy())).unwrap_or_default();
    Ok((1..=flags.count).map(|number| flags.target.with_file_name(format!("{stem}-{number}{ending}"))).collect())
}

async fn connected<'a>(connection: &'a mut Option<Connection>, global: &Global) -> Result<&'a Connection, Failure> {
    // Opened on demand: with --bootcode and --token-file no controller is needed.
    if connection.is_none() {
        *connection = Some(Connection::open(global).await?);
    }
    Ok(connection.as_ref().context("there is no connection")?)
}

/// Returns the controllers that the cards name. A loopback address means nothing to a Pi.
fn controllers(flags: &WriteCard, global: &Global) -> Vec<String> {
    if !flags.join.is_empty() {
        return flags.join.clone();
    }
    let host = global.controller.rsplit_once(':').map_or(global.controller.as_str(), |(host, _)| host);
    // `[::1]` without a port is split into `[:` and `1]`.
    let own = host == "localhost" || host.starts_with("127.") || matches!(host, "[::1]" | "::1" | "[:");
    if own { Vec::new() } else { vec![global.controller.clone()] }
}

fn extras(contents: &mut Contents, flags: &WriteCard) -> Result<(), Failure> {
    if let Some(path) = &flags.install_config {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        // Parsed here: a broken file would show only on the Pi, which then has no settings.
        toml::from_str::<toml::Table>(&text).with_context(|| format!("{} is no TOML", path.display()))?;
        contents.put("marco/install.toml", text.into_bytes());
    }
    if let Some(path) = &flags.userconf {
        contents.put_file("userconf.txt", path)?;
    }
    if flags.ssh {
        contents.put("ssh", Vec::new());
    }
    if let Some(folder) = &flags.first_boot {
        contents.first_boot(folder)?;
    }
    Ok(())
}

/// Downloads the controller's default bootcode and checks its digest.
async fn fetch(connection: &Connection, board: Option<Board>) -> Result<Vec<u8>, Failure> {
    let artifacts: Vec<Artifact> = all_pages(async |page_token| {
        let filter = Some(ArtifactFilter { kind: Kind::Bootcode.into() });
        let request = ListArtifactsRequest { page_size: 500, page_token, filter };
        let page = connection.artifacts().list_artifacts(call(request)).await?.into_inner();
        Ok((page.artifacts, page.next_page_token))
    })
    .await?;
    let family = board.map(|board| board.to_string());
    let default = |wanted: &str| {
        let fits = |artifact: &&Artifact| {
            artifact.purpose() == Purpose::Installer && artifact.default_for.iter().any(|board| board == wanted)
        };
        artifacts.iter().find(fits)
    };
    let found = family.as_deref().and_then(default).or_else(|| default("*"));
    let Some(artifact) = found else {
        return Err(Failure::Unsuccessful {
            message: "the controller has no default bootcode that starts the installer".to_owned(),
            hint: "give --bootcode ZIP, or push one and make it the default with `marcoctl artifacts default`"
                .to_owned(),
        });
    };
    // By digest: the name may point to other bytes by the time of the download.
    let request = DownloadArtifactRequest { name: format!("artifacts/sha256:{}", artifact.sha256), offset: 0 };
    let mut stream = connection.artifacts().download_artifact(request).await?.into_inner();
    let bar = byte_bar("fetching", artifact.size_bytes);
    let mut bytes = Vec::new();
    while let Some(message) = stream.message().await? {
        if let Some(Part::Chunk(chunk)) = message.part {
            bar.inc(u64::try_from(chunk.data.len()).unwrap_or_default());
            bytes.extend_from_slice(&chunk.data);
        }
    }
    bar.finish_and_clear();
    // The zip becomes the boot code of many nodes. TLS protects the way, not the controller's disk.
    if hex::encode(Sha256::digest(&bytes)) != artifact.sha256 {
        return Err(Failure::Local(anyhow!("what the controller sent is not {}", artifact.name)));
    }
    Ok(bytes)
}

async fn mint(connection: &Connection, flags: &WriteCard) -> Result<JoinToken, Failure> {
    let request = CreateJoinTokenRequest {
        max_uses: flags.count,
        ttl: Some(proto_duration(flags.ttl)?),
        require_approval: flags.require_approval,
        labels: label_map(&flags.labels),
        ..Default::default()
    };
    Ok(connection.nodes().create_join_token(call(request)).await?.into_inner())
}

/// Asks for confirmation before data is lost.
fn confirm(path: &Path, target: &Target, yes: bool) -> Result<(), Failure> {
    let what = match target {
        Target::File { exists: false } => return Ok(()),
        Target::File { exists: true } => format!("{} exists\n", path.display()),
        Target::Device { description } => description.clone(),
    };
    if yes {
        say(&what);
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Usage {
            message: format!("everything on it would be lost: {}", what.trim_end()),
            hint: "--yes says that this is meant".to_owned(),
        });
    }
    say(&format!("{what}Everything on it will be lost. Write \"yes\" to go on: "));
    if read_line()?.trim() == "yes" {
        Ok(())
    } else {
        Err(Failure::Unsuccessful { message: "nothing was written".to_owned(), hint: String::new() })
    }
}

/// Waits for the next card in a device, and inspects it like the first one.
fn next_card(path: &Path, number: u32, flags: &WriteCard) -> Result<Target, Failure> {
    if !path.starts_with("/dev") {
        let target = card::inspect(path)?;
        confirm(path, &target, flags.yes)?;
        return Ok(target);
    }
    loop {
        say(&format!("Put the next card into {} ({number} of {}) and press Enter: ", path.display(), flags.count));
        // An empty read is the end of input. Otherwise this loop would never end.
        if read_line()?.is_empty() {
            let message = format!("{} of {} cards are written", number - 1, flags.count);
            return Err(Failure::Unsuccessful { message, hint: String::new() });
        }
        match card::inspect(path) {
            Ok(target) => {
                confirm(path, &target, flags.yes)?;
                return Ok(target);
            }
            // No card yet, or a mounted one: the operator can fix this and press Enter again.
            Err(error) => say(&format!("{error:#}\n")),
        }
    }
}
