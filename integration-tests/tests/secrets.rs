//! After all of a fleet's activities no key and no token is readable by other users.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use integration_tests::fleet::{execution_name, reboot, update};
use integration_tests::image::{Compression, lay_out_root, make_image, pack};
use integration_tests::postgres::Postgres;
use integration_tests::process::{binary, run};
use integration_tests::smuggle::{NOTHING_KNOWN, smuggle};
use integration_tests::tree::list;
use integration_tests::upload::push;
use integration_tests::{Database, Fleet, raw, seconds};
use marco_proto::v1::access_service_client::AccessServiceClient;
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{ApiToken, CreateApiTokenRequest, CreateJoinTokenRequest, GetExecutionLogRequest, Role};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;

/// Password of a user of the installed system.
const PASSWORD: &str = "correct-horse-battery-staple";

/// Secrets with all their encodings, by owner.
type Secrets = BTreeMap<String, Vec<Vec<u8>>>;

/// All encodings in which a private key could leak by accident. The first bytes of a key's DER only name its kind and
/// are the same for all keys; the secret follows them.
fn forms_of_key(pem: &str) -> Result<Vec<Vec<u8>>> {
    let der = PrivateKeyDer::from_pem_slice(pem.as_bytes())?;
    let scalar = der.secret_der().get(36..68).context("a PKCS#8 key of P-256")?.to_vec();
    let text = pem.lines().nth(2).filter(|line| line.len() > 20).context("a second line of the key's text")?;
    let numbers = format!("{scalar:?}");
    Ok(vec![text.into(), hex::encode(&scalar).into(), numbers.trim_matches(['[', ']']).into(), scalar])
}

fn forms_of_token(token: &str) -> Result<Vec<Vec<u8>>> {
    let secret = token.split('.').nth(2).context("a token's secret")?;
    Ok(vec![token.into(), secret.into()])
}

/// The secrets of all files below a folder that contain a private key.
fn keys(folder: &Path) -> Result<Secrets> {
    let mut secrets = Secrets::new();
    for path in files(folder)? {
        let text = fs::read(&path)?;
        let Ok(text) = String::from_utf8(text) else { continue };
        if text.contains("BEGIN PRIVATE KEY") {
            secrets.insert(path.display().to_string(), forms_of_key(&text)?);
        }
    }
    Ok(secrets)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let all = list(folder)?.into_iter().map(|path| folder.join(path));
    Ok(all.filter(|path| path.symlink_metadata().is_ok_and(|found| found.is_file())).collect())
}

/// The owners of the secrets that these bytes contain.
fn found(secrets: &Secrets, bytes: &[u8]) -> Vec<String> {
    let has = |form: &Vec<u8>| bytes.windows(form.len()).any(|window| window == form.as_slice());
    secrets.iter().filter(|(_, forms)| forms.iter().any(has)).map(|(name, _)| name.clone()).collect()
}

/// True if other users can read a file: it is readable to them, and all folders above it are searchable.
fn others_can_read(path: &Path, top: &Path) -> Result<bool> {
    let mode = |path: &Path| anyhow::Ok(fs::metadata(path)?.permissions().mode());
    let mut open = mode(path)? & 0o044 != 0;
    for folder in path.ancestors().skip(1).take_while(|folder| *folder != top) {
        open &= mode(folder)? & 0o011 != 0;
    }
    Ok(open)
}

fn dump(database: &Database, fleet: &Fleet) -> Result<Vec<u8>> {
    match database {
        Database::Sqlite => {
            let data = files(&fleet.data())?
                .into_iter()
                .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains("db")));
            let bytes = data.map(fs::read).collect::<std::io::Result<Vec<_>>>()?;
            Ok(bytes.concat())
        }
        Database::Url(url) => Postgres::start()?.dump(url),
    }
}

/// The command lines of all processes on this machine.
fn command_lines() -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        // A process may end between listing and reading.
        all.extend(fs::read(entry?.path().join("cmdline")).unwrap_or_default());
        all.push(b'\n');
    }
    Ok(all)
}

/// Uses an API token for an allowed call, and for a forbidden one, which is audited.
async fn list_nodes_by(fleet: &Fleet, api_token: &str) -> Result<()> {
    let channel = fleet.admin().anonymous().channel(fleet.addresses().api)?;
    let list = "/marco.bootstrap.v1.NodeService/ListNodes";
    raw::call(&channel, list, Vec::new(), Some(api_token)).await?;
    let create = "/marco.bootstrap.v1.OperationService/CreateOperation";
    let refused = raw::call(&channel, create, Vec::new(), Some(api_token)).await;
    ensure!(refused.is_err(), "a viewer creates operations");
    Ok(())
}

/// Makes an installation fail on a node, and returns the node's log of it.
async fn fails(fleet: &mut Fleet, database: &Database, id: &str) -> Result<String> {
    let file = make_image(fleet.dir(), "not-a-system", Compression::Gzip)?;
    let image = push(&mut fleet.artifacts(), "not-a-system", Kind::Image, Purpose::Unspecified, &file).await?;
    let root = fleet.dir().join("without-boot-files");
    lay_out_root(&root, "not-a-system")?;
    fs::remove_dir_all(root.join("boot"))?;
    let file = pack(&root, &fleet.dir().join("without-boot-files.tar"), Compression::Gzip)?;
    smuggle(fleet, database, &[(&image, &fs::read(file)?)], NOTHING_KNOWN).await?;
    let operation = fleet.create(update(&[id], &image.name, "")).await?;
    fleet.ends(&operation.name, seconds(180), OperationState::Failed).await?;
    let request = GetExecutionLogRequest { name: execution_name(&operation, id) };
    let log = fleet.operations().get_execution_log(request).await?.into_inner().log;
    ensure!(log.contains("NOT_A_SYSTEM"), "the log does not tell of it: {log}");
    Ok(log)
}

async fn nobody_else_can_read_a_secret(database: Database) -> Result<()> {
    // At level debug, because that is where a secret is logged by accident.
    let mut fleet = Fleet::builder().database(database.clone()).pis(2).logs("debug").start().await?;
    let ids = fleet.ids().await?;
    for id in &ids {
        let folder = fleet.pi(id).path("recovery/marco/first-boot");
        fs::create_dir(&folder)?;
        let mut options = fs::File::options();
        let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(folder.join("user-data"))?;
        file.write_all(format!("#cloud-config\npassword: {PASSWORD}\n").as_bytes())?;
    }
    let image = make_image(fleet.dir(), "secrets", Compression::Zstd)?;
    let image = push(&mut fleet.artifacts(), "secrets", Kind::Image, Purpose::Unspecified, &image).await?;
    fleet.succeeds(update(&ids, &image.name, ""), seconds(180)).await?;
    fleet.succeeds(reboot(&ids, Duration::ZERO), seconds(60)).await?;
    let logged = fails(&mut fleet, &database, ids.first().context("a node")?).await?;

    let (api, certs) = (format!("localhost:{}", fleet.addresses().api.port()), fleet.certs().display().to_string());
    let user = ["--controller", &api, "--certs", &certs, "users", "create", "kim", "--role", "operator"];
    run(&binary("marcoctl")?, &user, seconds(60)).await?.success()?;

    let mut secrets = keys(fleet.dir())?;
    // The control: each kind of key must be among the secrets, or the search proves nothing.
    for kind in ["data/pki/ca.key", "certs/admin.key", "certs/kim.key", "certs/controller.key", "node.key"] {
        assert!(secrets.keys().any(|name| name.ends_with(kind)), "no {kind} among {:?}", secrets.keys());
    }
    let joined = fs::read_to_string(fleet.dir().join("join-token"))?;
    secrets.insert("the nodes' join token".to_owned(), forms_of_token(joined.trim())?);
    secrets.insert("a password for the first boot".to_owned(), vec![PASSWORD.into()]);
    let request = CreateApiTokenRequest {
        api_token: Some(ApiToken { role: Role::Viewer.into(), ..ApiToken::default() }),
        api_token_id: "service".to_owned(),
        ttl: None,
    };
    let api_token = AccessServiceClient::new(fleet.admin_channel()).create_api_token(request).await?.into_inner().token;
    list_nodes_by(&fleet, &api_token).await?;
    let secret = api_token.split('.').nth(1).context("a token's secret")?.as_bytes().to_vec();
    secrets.insert("an API token".to_owned(), vec![secret]);
    let unused = fleet.nodes().create_join_token(CreateJoinTokenRequest::default()).await?.into_inner();
    secrets.insert("an unused join token".to_owned(), forms_of_token(&unused.token)?);

    let commands = command_lines()?;
    // The control: the search finds a known argument of the controller.
    assert!(found(&[("the controller".to_owned(), vec![b"--data-dir".to_vec()])].into(), &commands).len() == 1);
    assert_eq!(found(&secrets, &commands), [""; 0], "in the process list");
    assert_eq!(found(&secrets, logged.as_bytes()), [""; 0], "in what a node logged");
    let dump = dump(&database, &fleet)?;
    // The control: the dump contains the nodes, so it is a real one.
    let known = [("the nodes".to_owned(), ids.iter().map(|id| id.clone().into_bytes()).collect())].into();
    assert_eq!(found(&known, &dump).len(), 1, "the dump is empty");
    assert_eq!(found(&secrets, &dump), [""; 0], "in the database");
    for path in files(fleet.dir())? {
        let (bytes, name) = (fs::read(&path)?, path.display().to_string());
        let found = found(&secrets, &bytes);
        // Logs are copied into bug reports, so they must hold no secret even if only the owner can read them.
        if name.ends_with(".log") || name.ends_with(".jsonl") {
            assert!(found.is_empty(), "{name} has {found:?}");
        }
        if !found.is_empty() {
            let mode = fs::metadata(&path)?.permissions().mode();
            assert!(!others_can_read(&path, fleet.dir())?, "{name} (mode {mode:o}) has {found:?}");
            assert_eq!(mode & 0o077, 0, "{name} has {found:?}");
        }
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn no_secret_is_in_a_log_a_database_the_process_list_or_a_file_for_all() -> Result<()> {
    nobody_else_can_read_a_secret(Database::Sqlite).await
}

#[tokio::test]
async fn none_is_on_postgres_either() -> Result<()> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    nobody_else_can_read_a_secret(Database::Url(url)).await
}
