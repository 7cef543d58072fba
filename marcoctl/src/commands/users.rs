//! `marcoctl users`.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use marco_proto::names::UserId;
use marco_proto::v1::{
    CreateUserRequest, ListUsersRequest, ListUsersResponse, RevokeUserRequest, Role, UpdateUserRequest, User,
};
use prost_types::FieldMask;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};

use super::access::{nodes, role, state};
use super::{all_pages, label_map, proto_duration};
use crate::args::{CreateUser, UpdateUser, UsersCommand};
use crate::connect::{Connection, call};
use crate::failure::Failure;
use crate::output::{Out, fields, id, listing, local};

/// Mode of private keys: only the owner reads them.
const SECRET: u32 = 0o600;
const PUBLIC: u32 = 0o644;

pub(super) async fn run(
    command: UsersCommand,
    certs: &Path,
    connection: &Connection,
    out: &mut Out,
) -> Result<(), Failure> {
    match command {
        UsersCommand::Create(flags) => create(flags, certs, connection, out).await,
        UsersCommand::List(paging) => {
            let users = all_pages(async |page_token| {
                let request = ListUsersRequest { page_size: paging.page_size, page_token };
                let page = connection.access().list_users(call(request)).await?.into_inner();
                Ok((page.users, page.next_page_token))
            })
            .await?;
            out.document(&ListUsersResponse { users, ..Default::default() }, |list, now| {
                let rows = list.users.iter().map(|user| {
                    vec![
                        id(&user.name),
                        role(user.role()),
                        nodes(&user.selector),
                        state(user.revoke_time.as_ref(), None, now),
                        local(user.create_time.as_ref()),
                        user.creator.clone(),
                    ]
                });
                listing("no users", &["USER", "ROLE", "NODES", "STATE", "CREATED", "CREATOR"], rows)
            })
        }
        UsersCommand::Update(flags) => update(flags, connection, out).await,
        UsersCommand::Revoke { user } => {
            let request = RevokeUserRequest { name: user };
            let user = connection.access().revoke_user(call(request)).await?.into_inner();
            out.document(&user, detail)
        }
    }
}

async fn create(flags: CreateUser, certs: &Path, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let name = UserId::parse(&flags.name).map_err(|error| Failure::Usage {
        message: format!("{error}"),
        hint: "the name is also that of the files".to_owned(),
    })?;
    // Its certificate would overwrite ca.crt in the same folder, and no controller would be trusted any longer.
    if name.as_str().eq_ignore_ascii_case("ca") {
        return Err(Failure::Usage {
            message: "ca.crt is the file of the CA's certificate, so that no user can be named ca".to_owned(),
            hint: "choose another name".to_owned(),
        });
    }
    let folder = flags.out.as_deref().unwrap_or(certs);
    fs::DirBuilder::new()
        // 0700: the folder holds a private key.
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let key_path = folder.join(format!("{name}.key"));
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("no key can be made")?;
    // The request carries the key only. The controller chooses name, role and validity.
    let csr = CertificateParams::default().serialize_request(&key).context("no certificate request can be made")?;
    // Written before the call: a certificate without its key is useless.
    write_new(&key_path, &key.serialize_pem(), SECRET)?;
    let user = User { role: Role::from(flags.role).into(), selector: label_map(&flags.selector), ..User::default() };
    let request = CreateUserRequest {
        user: Some(user),
        user_id: name.as_str().to_owned(),
        certificate_request: csr.pem().context("no certificate request can be made")?,
        ttl: Some(proto_duration(flags.ttl)?),
    };
    let user = match connection.access().create_user(call(request)).await {
        Ok(user) => user.into_inner(),
        Err(status) => {
            // No certificate was issued for this key.
            let _ = fs::remove_file(&key_path);
            return Err(status.into());
        }
    };
    write(&folder.join(format!("{name}.crt")), &user.certificate, PUBLIC)?;
    // The --certs folder has its own ca.crt, which the connection has just used.
    if folder != certs {
        write(&folder.join("ca.crt"), &user.ca_certificate, PUBLIC)?;
    }
    out.document(&user, detail)?;
    if !out.is_json() {
        let text = format!(
            "{} (mode 0600) and {name}.crt are in {}. Use them: marcoctl --certs {} --identity {name} nodes list\n",
            key_path.display(),
            folder.display(),
            folder.display()
        );
        // The user exists by now. A closed stderr does not undo that.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
    Ok(())
}

async fn update(flags: UpdateUser, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let mut paths = Vec::new();
    if flags.role.is_some() {
        paths.push("role".to_owned());
    }
    if flags.all_nodes || !flags.selector.is_empty() {
        paths.push("selector".to_owned());
    }
    let user = User {
        name: flags.user,
        role: flags.role.map_or(Role::Unspecified, Role::from).into(),
        selector: label_map(&flags.selector),
        ..User::default()
    };
    let request = UpdateUserRequest { user: Some(user), update_mask: Some(FieldMask { paths }) };
    out.document(&connection.access().update_user(call(request)).await?.into_inner(), detail)
}

fn detail(user: &User, now: DateTime<Utc>) -> String {
    fields(&[
        ("user", user.name.clone()),
        ("role", role(user.role())),
        ("nodes", nodes(&user.selector)),
        ("state", state(user.revoke_time.as_ref(), None, now)),
        ("created", local(user.create_time.as_ref())),
        ("creator", user.creator.clone()),
    ])
}

/// Writes a new file with its mode from the first moment. Fails if the file exists.
fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    match OpenOptions::new().write(true).create_new(true).mode(mode).open(path) {
        Ok(mut file) => {
            file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
            Ok(())
        }
        // An existing key may belong to a valid certificate. It is never overwritten.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(Failure::Usage {
            message: format!("{} is there already", path.display()),
            hint: "choose another folder with --out DIR, or move the old key away".to_owned(),
        }),
        Err(error) => Err(anyhow::Error::new(error).context(format!("cannot write {}", path.display())).into()),
    }
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let mut options = OpenOptions::new();
    let opened = options.write(true).create(true).truncate(true).mode(mode).open(path);
    let mut file = opened.with_context(|| format!("cannot write {}", path.display()))?;
    file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}
