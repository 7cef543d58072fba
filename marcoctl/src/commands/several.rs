//! Runs one call for each of several names. Failures do not stop the rest, and each outcome is a line.

use chrono::{DateTime, Utc};

use crate::ask::say;
use crate::failure::Failure;
use crate::output::{Out, Printable, clean, id};

/// Presentation of the outcomes.
pub(super) struct Show<D> {
    /// Field of the JSON document with the results, named as in a list response. `None`: the responses are empty, and
    /// `deleted` lists the names.
    pub(super) field: Option<&'static str>,
    /// Participle for the line of each name, for example "approved".
    pub(super) done: &'static str,
    /// Formats the result if a single name was given.
    pub(super) detail: D,
}

/// The names that a command works on.
pub(super) enum Names {
    /// Given on the command line.
    Given(Vec<String>),
    /// Found by the controller. Always shown as a list, even with one entry.
    Found(Vec<String>),
}

impl Names {
    /// Returns all names.
    pub(super) fn all(&self) -> &[String] {
        let (Self::Given(names) | Self::Found(names)) = self;
        names
    }
}

/// Calls `act` for each name. A single given name is shown in full, and its failure is the command's failure. Several
/// names get one line each (failures on stderr), and the command fails if any of them did.
///
/// # Errors
/// Exit code 1, or 3 if the controller was lost. The remaining names are then not tried.
pub(super) async fn each<M: Printable, D: FnOnce(&M, DateTime<Utc>) -> String>(
    names: &Names,
    show: Show<D>,
    out: &mut Out,
    act: impl AsyncFn(String) -> Result<M, Failure>,
) -> Result<(), Failure> {
    // A single name: the full answer, like that of `get`.
    if let Names::Given(names) = names
        && let [name] = names.as_slice()
    {
        let done = act(name.clone()).await?;
        return out.document(&done, show.detail);
    }
    let names = names.all();
    let mut done = Vec::new();
    let mut done_names = Vec::new();
    let mut failed = Vec::new();
    let mut lost = None;
    for name in names {
        match act(name.clone()).await {
            Ok(message) => {
                if !out.is_json() {
                    out.line(&format!("{}  {}", clean(&id(name)), show.done))?;
                }
                done.push(message);
                done_names.push(name);
            }
            Err(failure) => {
                // Not on stdout: in JSON mode that is one document.
                say(&format!("{}  not {}: {}\n", clean(&id(name)), show.done, failure.message()));
                failed.push(id(name));
                // Without a controller every further name would fail in the same way, each after its deadline.
                if failure.exit_code() == 3 {
                    lost = Some(failure);
                    break;
                }
            }
        }
    }
    // Printed also after failures: a script must see the part that was done.
    if out.is_json() {
        match show.field {
            Some(field) => out.documents(field, &done)?,
            None => out.value(&serde_json::json!({ "deleted": done_names }), |_| String::new())?,
        }
    }
    if let Some(lost) = lost {
        return Err(Failure::Unreachable {
            message: format!("{} of {} {}, then: {}", done.len(), names.len(), show.done, lost.message()),
            hint: "the rest was not tried".to_owned(),
        });
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failure::Unsuccessful {
        message: format!("{} of {} not {}: {}", failed.len(), names.len(), show.done, clean(&failed.join(" "))),
        hint: String::new(),
    })
}
