//! One call for each of several names: all that can be done is done, and each outcome is a line.

use chrono::{DateTime, Utc};

use crate::ask::say;
use crate::failure::Failure;
use crate::output::{Out, Printable, clean, id};

/// How the outcomes are shown.
pub(super) struct Show<D> {
    /// The field of the JSON document that lists what was done, as a list answer has it; `None`: the answers are empty, and
    /// `deleted` lists the names.
    pub(super) field: Option<&'static str>,
    /// What was done, for the line of one name: "approved".
    pub(super) done: &'static str,
    /// The text for a name that stands alone.
    pub(super) detail: D,
}

/// What a command is about.
pub(super) enum Names {
    /// Named on the command line.
    Given(Vec<String>),
    /// Found by the controller: a list, also when it has one entry.
    Found(Vec<String>),
}

impl Names {
    /// All of them.
    pub(super) fn all(&self) -> &[String] {
        let (Self::Given(names) | Self::Found(names)) = self;
        names
    }
}

/// Calls `act` for each name. A name that was given alone is shown in full, and its failure is the command's. Of several,
/// each has its line (a failure's on stderr), and the command fails when one of them did.
///
/// # Errors
/// What went wrong; exit code 1, or 3 when the controller was lost: the remaining names are not tried then.
pub(super) async fn each<M: Printable, D: FnOnce(&M, DateTime<Utc>) -> String>(
    names: &Names,
    show: Show<D>,
    out: &mut Out,
    act: impl AsyncFn(String) -> Result<M, Failure>,
) -> Result<(), Failure> {
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
                say(&format!("{}  not {}: {}\n", clean(&id(name)), show.done, failure.message()));
                failed.push(id(name));
                if failure.exit_code() == 3 {
                    lost = Some(failure);
                    break;
                }
            }
        }
    }
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
