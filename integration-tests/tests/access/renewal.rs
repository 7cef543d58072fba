//! Certificates that are replaced before they expire: the controller's own, and the first admin's.

use std::time::Duration;

use anyhow::Result;
use integration_tests::process::{binary, run, tool};
use integration_tests::{Fleet, seconds, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_looks_at_its_certificate_when_it_is_told_to_and_goes_on() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let said = "the controller's certificate is the one that is presented";
    assert!(!fleet.controller_log(0)?.contains(said));
    let pid = fleet.controller_pid(0)?.to_string();
    // SIGHUP makes the controller look at once, instead of at its next interval.
    run(&tool("kill")?, &["-HUP", &pid], seconds(10)).await?.success()?;
    wait_until(seconds(30), "it says what it presents", async || {
        Ok(fleet.controller_log(0)?.contains(said).then_some(()))
    })
    .await?;
    // The reload cut no stream, and the session still works.
    assert!(fleet.node(&id).await?.connected);
    assert_eq!(fleet.agents_log()?.matches("session open").count(), 1, "{}", fleet.agents_log()?);
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_admin_takes_another_certificate_and_gives_up_the_one_before() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let address = format!("localhost:{}", fleet.addresses().api.port());
    let (before, after) = (fleet.certs().display().to_string(), fleet.dir().join("new").display().to_string());
    let marcoctl = async |certs: &str, arguments: &[&str]| {
        let mut all = vec!["--controller", &address, "--certs", certs];
        all.extend_from_slice(arguments);
        run(&binary("marcoctl")?, &all, Duration::from_secs(60)).await
    };
    let valid = async |certs: &str| {
        let list = ["certs", "list", "--subject", "admin", "--valid", "--output", "json"];
        let list: serde_json::Value = serde_json::from_str(&marcoctl(certs, &list).await?.success()?)?;
        let names = list["certificates"].as_array().into_iter().flatten();
        anyhow::Ok(names.filter_map(|found| found["name"].as_str().map(str::to_owned)).collect::<Vec<_>>())
    };
    let old = valid(&before).await?;
    marcoctl(&before, &["users", "create", "admin", "--role", "admin", "--out", &after]).await?.success()?;
    assert_eq!((old.len(), valid(&after).await?.len()), (1, 2));
    // No caller may revoke the certificate that it uses, so the new one revokes the old one.
    marcoctl(&after, &["certs", "revoke", &old[0]]).await?.success()?;
    assert_eq!(valid(&after).await?.len(), 1);
    let refused = marcoctl(&before, &["nodes", "list"]).await?;
    assert!(refused.status.code() == Some(1) && refused.stderr.contains("revoked"), "{refused:?}");
    marcoctl(&after, &["nodes", "list"]).await?.success()?;
    fleet.went_well();
    Ok(())
}
