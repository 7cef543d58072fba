//! The file mirror, used by the programs of the 2015 installer (wget, gunzip, tar) and by curl.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use integration_tests::fleet::Database;
use integration_tests::image::{Compression, lay_out_root, make_bootcode, make_image, noise, pack, sha256};
use integration_tests::postgres::Postgres;
use integration_tests::process::{Output, run, tool};
use integration_tests::proxy::{Direction, Proxy};
use integration_tests::upload::{header, push, upload};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::access_service_client::AccessServiceClient;
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::{
    ApiToken, AuditFilter, CreateApiTokenRequest, ListAuditEventsRequest, OpenArtifactRequest, QuarantineNodeRequest,
    Role,
};

/// Timeout of one program.
const LIMIT: std::time::Duration = seconds(60);

/// A client's files, as wget takes them.
struct Keys {
    certificate: String,
    key: String,
    ca: String,
}

impl Keys {
    fn of_node(fleet: &Fleet, id: &str) -> Self {
        let file = |name: &str| fleet.pi(id).path(&format!("agent/{name}")).display().to_string();
        Self { certificate: file("node.crt"), key: file("node.key"), ca: file("ca.crt") }
    }

    fn of_admin(fleet: &Fleet) -> Self {
        let file = |name: &str| fleet.certs().join(name).display().to_string();
        Self { certificate: file("admin.crt"), key: file("admin.key"), ca: file("ca.crt") }
    }

    async fn wget(&self, arguments: &[&str], url: &str) -> Result<Output> {
        let (certificate, key, ca) = (
            format!("--certificate={}", self.certificate),
            format!("--private-key={}", self.key),
            format!("--ca-certificate={}", self.ca),
        );
        let mut all = vec!["--no-config", "--no-verbose", "--waitretry=1", certificate.as_str(), &key, &ca];
        all.extend_from_slice(arguments);
        all.push(url);
        run(&tool("wget")?, &all, LIMIT).await
    }

    /// Fetches with curl. The body goes to `body`, the headers to `body.headers`. Returns the HTTP status.
    async fn curl(&self, arguments: &[&str], url: &str, body: &Path) -> Result<u16> {
        let headers = headers_of(body).display().to_string();
        let body = body.display().to_string();
        let mut all = vec!["--silent", "--show-error", "--cacert", &self.ca, "--cert", &self.certificate, "--key"];
        all.extend([self.key.as_str(), "--output", &body, "--dump-header", &headers, "--write-out", "%{http_code}"]);
        all.extend_from_slice(arguments);
        all.push(url);
        Ok(run(&tool("curl")?, &all, LIMIT).await?.success()?.parse()?)
    }
}

fn headers_of(body: &Path) -> PathBuf {
    body.with_extension("headers")
}

fn header_in(body: &Path, name: &str) -> Result<String> {
    let text = fs::read_to_string(headers_of(body))?;
    let line = text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
    });
    line.with_context(|| format!("no {name} in {text}"))
}

fn url(mirror: SocketAddr, path: &str) -> String {
    format!("https://localhost:{}{path}", mirror.port())
}

async fn push_image(fleet: &Fleet, name: &str, compression: Compression) -> Result<PathBuf> {
    let file = make_image(fleet.dir(), name, compression)?;
    push(&mut fleet.artifacts(), name, Kind::Image, Purpose::Unspecified, &file).await?;
    Ok(file)
}

/// Opens an artifact to all approved nodes: none of these nodes has work that names it.
async fn open(fleet: &Fleet, name: &str) -> Result<()> {
    let request = OpenArtifactRequest { name: name.to_owned(), open_to_mirror: true };
    assert!(fleet.artifacts().open_artifact(request).await?.into_inner().open_to_mirror);
    Ok(())
}

/// Unpacks as the 2015 installer did (`gunzip -f`, `tar -xf`), with GNU's programs or busybox's.
async fn unpack(tarball: &Path, into: &Path, busybox: bool) -> Result<()> {
    fs::create_dir_all(into)?;
    let (tarball, into) = (tarball.display().to_string(), into.display().to_string());
    let plain = tarball.trim_end_matches(".gz").to_owned();
    for (program, arguments) in [("gunzip", ["-f", &tarball].as_slice()), ("tar", &["-xf", &plain, "-C", &into])] {
        let mut all = arguments.to_vec();
        let program = if busybox {
            all.insert(0, program);
            tool("busybox")?
        } else {
            tool(program)?
        };
        run(&program, &all, LIMIT).await?.success()?;
    }
    Ok(())
}

#[tokio::test]
async fn wget_gunzip_and_tar_get_an_image_as_it_was() -> Result<()> {
    let mut fleet = Fleet::builder().start().await?;
    let pushed = push_image(&fleet, "os", Compression::Gzip).await?;
    let zip = make_bootcode("one")?;
    upload(&mut fleet.artifacts(), header("boot-1", Kind::Bootcode, Purpose::Installer, &zip), &zip).await?;
    open(&fleet, "os").await?;
    open(&fleet, "boot-1").await?;
    let keys = Keys::of_node(&fleet, "pi-01");
    let mirror = fleet.addresses().mirror;
    // Each TLS version and each kind of tools once; all four combinations would only take longer.
    for (tls, busybox) in [("--secure-protocol=TLSv1_2", false), ("--secure-protocol=TLSv1_3", true)] {
        let folder = fleet.dir().join(tls);
        let into = format!("--directory-prefix={}", folder.display());
        keys.wget(&[tls, &into], &url(mirror, "/tar/os.tar.gz")).await?.success()?;
        let tarball = folder.join("os.tar.gz");
        assert_eq!(sha256(&fs::read(&tarball)?), sha256(&fs::read(&pushed)?));
        unpack(&tarball, &folder.join("root"), busybox).await?;
        let (source, root) = (fleet.dir().join("os"), folder.join("root"));
        // `diff` and not the test's own comparison: these programs know nothing of the installer's changes.
        let trees = [&source.display().to_string(), &root.display().to_string()];
        run(&tool("diff")?, &["-r", "--no-dereference", trees[0], trees[1]], LIMIT).await?.success()?;
        for name in ["boot-1", "boot-1.zip"] {
            keys.wget(&[tls, &into], &url(mirror, &format!("/bootcode/download/{name}"))).await?.success()?;
            assert_eq!(fs::read(folder.join(name))?, zip);
        }
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_download_that_was_cut_goes_on_where_it_stopped() -> Result<()> {
    const CUT: u64 = 1_000_000;
    let mut fleet = Fleet::builder().start().await?;
    let pushed = fs::read(push_image(&fleet, "os", Compression::Gzip).await?)?;
    open(&fleet, "os").await?;
    let keys = Keys::of_node(&fleet, "pi-01");
    let network = Proxy::start(fleet.addresses().mirror).await?;
    let address = url(network.address(), "/tar/os.tar.gz");
    let target = fleet.dir().join("cut.tar.gz");
    let into = format!("--output-document={}", target.display());

    // wget resumes by itself after each cut,
    network.cut_after(Direction::Down, [CUT, CUT]);
    keys.wget(&[&into], &address).await?.success()?;
    assert_eq!(network.cuts_left(Direction::Down), 0);
    assert_eq!(fs::read(&target)?, pushed);

    // and when it is started again with `-c`.
    fs::remove_file(&target)?;
    network.cut_after(Direction::Down, [CUT]);
    let cut = keys.wget(&["--tries=1", "--continue", &into], &address).await?;
    assert!(!cut.status.success(), "{cut:?}");
    let first = fs::metadata(&target)?.len();
    assert!(first > 0 && first < u64::try_from(pushed.len())?, "{first}");
    let before = network.bytes(Direction::Down);
    keys.wget(&["--tries=1", "--continue", &into], &address).await?.success()?;
    assert_eq!(fs::read(&target)?, pushed);
    let second = network.bytes(Direction::Down) - before;
    // The allowance is for TLS and HTTP headers.
    assert!(second < u64::try_from(pushed.len())? - first + 100_000, "{second} more bytes after {first}");
    // A complete file is not fetched again.
    let whole = keys.wget(&["--continue", &into], &address).await?;
    assert!(whole.status.success(), "{whole:?}");
    assert_eq!(fs::read(&target)?, pushed);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn ranges_and_conditions_are_heeded() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let pushed = fs::read(push_image(&fleet, "os", Compression::Gzip).await?)?;
    let keys = Keys::of_admin(&fleet);
    let address = url(fleet.addresses().mirror, "/tar/os.tar.gz");
    let body = fleet.dir().join("body");
    let tag = format!("\"{}\"", sha256(&pushed));

    assert_eq!(keys.curl(&["--head"], &address, &body).await?, 200);
    assert_eq!(header_in(&body, "content-length")?, pushed.len().to_string());
    assert_eq!(header_in(&body, "etag")?, tag);
    assert_eq!(header_in(&body, "accept-ranges")?, "bytes");
    assert_eq!(header_in(&body, "content-type")?, "application/gzip");
    let modified = header_in(&body, "last-modified")?;

    assert_eq!(keys.curl(&["--range", "300000-700000"], &address, &body).await?, 206);
    assert_eq!(Some(fs::read(&body)?.as_slice()), pushed.get(300_000..=700_000));
    assert_eq!(header_in(&body, "content-range")?, format!("bytes 300000-700000/{}", pushed.len()));
    assert_eq!(keys.curl(&["--range", "-5"], &address, &body).await?, 206);
    assert_eq!(Some(fs::read(&body)?.as_slice()), pushed.get(pushed.len() - 5..));
    let past = format!("{}-", pushed.len());
    assert_eq!(keys.curl(&["--range", &past], &address, &body).await?, 416);
    assert_eq!(header_in(&body, "content-range")?, format!("bytes */{}", pushed.len()));

    // An If-Range that does not match must give the whole file, or a client would join two versions.
    for (condition, status) in [(tag.as_str(), 206), (modified.as_str(), 206), ("\"another\"", 200)] {
        let condition = format!("If-Range: {condition}");
        let status_now = keys.curl(&["--range", "10-19", "--header", &condition], &address, &body).await?;
        assert_eq!(status_now, status, "{condition}");
        let expected = if status == 206 { pushed.get(10..20) } else { Some(pushed.as_slice()) };
        assert_eq!(Some(fs::read(&body)?.as_slice()), expected, "{condition}");
    }
    for condition in [format!("If-None-Match: {tag}"), format!("If-Modified-Since: {modified}")] {
        assert_eq!(keys.curl(&["--header", &condition], &address, &body).await?, 304, "{condition}");
    }
    assert_eq!(keys.curl(&["--request", "POST", "--data", "x"], &address, &body).await?, 405);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn what_is_no_gzip_tarball_or_not_there_is_not_found() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    push_image(&fleet, "zst", Compression::Zstd).await?;
    push_image(&fleet, "gz", Compression::Gzip).await?;
    let zip = make_bootcode("one")?;
    upload(&mut fleet.artifacts(), header("boot", Kind::Bootcode, Purpose::Installer, &zip), &zip).await?;
    let keys = Keys::of_admin(&fleet);
    let body = fleet.dir().join("body");
    for path in [
        "/tar/zst.tar.gz",
        "/tar/none.tar.gz",
        "/tar/gz",
        "/tar/boot.tar.gz",
        // An encoded path must not leave the folder of artifacts.
        "/tar/..%2f..%2fmarco.db.tar.gz",
        "/tar/",
        "/bootcode/download/gz",
        "/bootcode/download/none.zip",
        "/",
        "/metrics",
    ] {
        let address = url(fleet.addresses().mirror, path);
        assert_eq!(keys.curl(&[], &address, &body).await?, 404, "{path}");
        assert!(fs::read_to_string(&body)?.ends_with('\n'), "{path}");
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn only_known_certificates_that_were_not_revoked_are_served() -> Result<()> {
    let mut fleet = Fleet::builder().start().await?;
    // Larger than the kernel's socket buffers: the rest stays in the controller for a slow reader.
    let root = fleet.dir().join("root");
    lay_out_root(&root, "os")?;
    fs::write(root.join("usr/lib/marker/more-noise"), noise("more", 32 << 20))?;
    let file = pack(&root, &fleet.dir().join("os.tar.gz"), Compression::Gzip)?;
    push(&mut fleet.artifacts(), "os", Kind::Image, Purpose::Unspecified, &file).await?;
    open(&fleet, "os").await?;
    let address = url(fleet.addresses().mirror, "/tar/os.tar.gz");
    let body = fleet.dir().join("body");
    let ca = fleet.certs().join("ca.crt").display().to_string();

    // Without a certificate, or with one of another CA, the handshake already fails.
    let anonymous = run(&tool("curl")?, &["--silent", "--show-error", "--cacert", &ca, &address], LIMIT).await?;
    assert!(!anonymous.status.success() && anonymous.stdout.is_empty(), "{anonymous:?}");
    let written = |name: &str, credentials: integration_tests::client::Credentials| -> Result<Keys> {
        let (certificate, key) = credentials.identity.context("no certificate")?;
        let path = |ending: &str| fleet.dir().join(format!("{name}.{ending}")).display().to_string();
        fs::write(path("crt"), certificate)?;
        fs::write(path("key"), key)?;
        Ok(Keys { certificate: path("crt"), key: path("key"), ca: ca.clone() })
    };
    // An API token does not replace a certificate here.
    let request = CreateApiTokenRequest {
        api_token: Some(ApiToken { role: Role::Admin.into(), ..ApiToken::default() }),
        api_token_id: "service".to_owned(),
        ttl: None,
    };
    let mut access = AccessServiceClient::new(fleet.admin_channel());
    let token = access.create_api_token(request).await?.into_inner().token;
    let bearer = format!("Authorization: Bearer {token}");
    let by_token = ["--silent", "--show-error", "--cacert", &ca, "--header", &bearer, &address];
    let by_token = run(&tool("curl")?, &by_token, LIMIT).await?;
    assert!(!by_token.status.success() && by_token.stdout.is_empty(), "{by_token:?}");
    let stranger = written("stranger", integration_tests::certs::stranger(&fleet.admin().ca, "pi-01", "node")?)?;
    assert!(stranger.curl(&[], &address, &body).await.is_err());

    for (role, status) in [("viewer", 403), ("operator", 403), ("publisher", 200), ("admin", 200), ("root", 403)] {
        let user = written(role, fleet.user(role)?)?;
        assert_eq!(user.curl(&["--head"], &address, &body).await?, status, "{role}");
    }
    // A node's certificate with the CA's signature that the controller never issued.
    let made_up = integration_tests::certs::issue(
        &fleet.certs().join("ca.crt"),
        &fleet.data().join("pki/ca.key"),
        "pi-99",
        "node",
    )?;
    assert_eq!(written("made-up", made_up)?.curl(&[], &address, &body).await?, 403);

    // A node that is quarantined during its download is cut off, and gets nothing afterwards.
    let node = Keys::of_node(&fleet, "pi-01");
    let network = Proxy::start(fleet.addresses().mirror).await?;
    // Slow enough that the quarantine comes while bytes are left.
    network.throttle(Direction::Down, 2_000_000);
    let slow = url(network.address(), "/tar/os.tar.gz");
    let half = fleet.dir().join("half");
    let (cut, quarantined) = tokio::join!(node.curl(&[], &slow, &half), async {
        wait_until(LIMIT, "the download is under way", async || {
            Ok((network.bytes(Direction::Down) > 200_000).then_some(()))
        })
        .await?;
        let request = QuarantineNodeRequest { name: "nodes/pi-01".to_owned(), reason: "lost".to_owned() };
        fleet.nodes().quarantine_node(request).await.context("quarantine")
    });
    quarantined?;
    assert!(cut.is_err(), "the download went on to its end");
    assert_eq!(node.curl(&[], &address, &body).await?, 403);
    assert!(fs::read_to_string(&body)?.contains("quarantined"), "{}", fs::read_to_string(&body)?);

    // The audit lists the refusals.
    let filter = AuditFilter { method: "FileMirror".to_owned(), ..AuditFilter::default() };
    let request = ListAuditEventsRequest { filter: Some(filter), ..ListAuditEventsRequest::default() };
    let refused = access.list_audit_events(request).await?.into_inner().audit_events;
    let refused: Vec<_> = refused.iter().map(|event| (event.caller.as_str(), event.code.as_str())).collect();
    let denied = "PERMISSION_DENIED";
    let unauthenticated = ("", denied);
    let roles = [("test-operator", denied), ("test-viewer", denied)];
    assert_eq!(refused, [("nodes/pi-01", denied), ("nodes/pi-99", denied), unauthenticated, roles[0], roles[1]]);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn bytes_that_another_controller_has_are_fetched_from_it() -> Result<()> {
    let database = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    let mut fleet = Fleet::builder().database(Database::Url(database)).controllers(2).pis(0).start().await?;
    let pushed = fs::read(push_image(&fleet, "os", Compression::Gzip).await?)?;
    let keys = Keys::of_admin(&fleet);
    let target = fleet.dir().join("os.tar.gz");
    let into = format!("--output-document={}", target.display());
    let other = fleet.addresses_of(1)?.mirror;
    keys.wget(&["--tries=1", &into], &url(other, "/tar/os.tar.gz")).await?.success()?;
    assert_eq!(fs::read(&target)?, pushed);
    fleet.went_well();
    Ok(())
}
