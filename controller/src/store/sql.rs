//! Statements for both databases.
//!
//! Each is written once, with `?` for a value and with words in braces for what the databases spell differently:
//!
//! - `{each}`: a JSON array of texts, as a table with the column `value`;
//! - `{rows a BIGINT, b TEXT}`: a JSON array of objects, as a table `r` with these columns;
//! - `{within n.labels}`, `{within n.labels o.scope}`: true if the labels hold all those of a value, or of a column;
//! - `{lock}`, `{lock e}`, `{skip}`: on Postgres, locks the rows that a SELECT reads (those of table `e`; those that
//!   are free), so that they stay as read until they are written. SQLite has a single writer anyway.

use chrono::{DateTime, Utc};
use sea_orm::{QueryResult, Value};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::connection::{Connection, Want};
use super::{StoreError, micros};
use crate::calendar;

/// A statement with its values.
#[derive(Debug, Clone)]
pub(super) struct Sql {
    text: String,
    values: Vec<Value>,
}

/// Begins a statement.
pub(super) fn sql(text: &str) -> Sql {
    Sql { text: text.to_owned(), values: Vec::new() }
}

impl Sql {
    /// Appends text.
    pub(super) fn and(mut self, text: &str) -> Self {
        self.text.push_str(text);
        self
    }

    /// Binds the next value.
    pub(super) fn bind(mut self, value: impl Into<Value>) -> Self {
        self.values.push(value.into());
        self
    }

    /// Binds the next value, a time.
    pub(super) fn time(self, time: DateTime<Utc>) -> Self {
        self.bind(micros(time))
    }

    /// Binds the next value, as JSON.
    pub(super) fn json(self, value: &(impl Serialize + ?Sized)) -> Self {
        self.bind(to_json(value))
    }

    /// Binds the next value, for `{each}`.
    pub(super) fn each<T: AsRef<str>>(self, texts: impl IntoIterator<Item = T>) -> Self {
        // One value for the whole list, so the text of the statement does not depend on its length.
        let texts: Vec<serde_json::Value> =
            texts.into_iter().map(|text| serde_json::Value::from(text.as_ref())).collect();
        self.json(&texts)
    }

    /// Runs it and returns the number of changed rows.
    pub(super) async fn run(self, db: &impl Connection) -> Result<u64, StoreError> {
        Ok(db.ask(expand(&self.text, db.is_postgres()), self.values, Want::Changes).await?.changed)
    }

    /// Runs it and returns the first row.
    pub(super) async fn one(self, db: &impl Connection) -> Result<Option<Row>, StoreError> {
        let answer = db.ask(expand(&self.text, db.is_postgres()), self.values, Want::First).await?;
        Ok(answer.rows.into_iter().next().map(Row))
    }

    /// Runs it and returns every row.
    pub(super) async fn all(self, db: &impl Connection) -> Result<Vec<Row>, StoreError> {
        let answer = db.ask(expand(&self.text, db.is_postgres()), self.values, Want::All).await?;
        Ok(answer.rows.into_iter().map(Row).collect())
    }
}

/// A value as JSON text.
pub(super) fn to_json(value: &(impl Serialize + ?Sized)) -> String {
    serde_json::to_string(value).expect("what is stored has text keys only, and writing to memory does not fail")
}

/// Replaces words in braces and placeholders by the text of the database.
fn expand(text: &str, postgres: bool) -> String {
    let mut out = String::with_capacity(text.len() + 64);
    let mut values = 0_usize;
    let mut rest = text;
    // Statements must not contain these characters for another purpose, such as in a literal.
    while let Some(at) = rest.find(['?', '{']) {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let (word, after) = match from.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some(found) => found,
            None => ("?", from.get(1..).unwrap_or_default()),
        };
        out.push_str(&spell(word, postgres, &mut values));
        rest = after;
    }
    out.push_str(rest);
    out
}

fn spell(word: &str, postgres: bool, values: &mut usize) -> String {
    // One counter for all words that take a value, so that `$n` follows the order of `bind`.
    let mut value = || {
        *values += 1;
        if postgres { format!("${values}") } else { "?".to_owned() }
    };
    let (verb, object) = word.split_once(' ').unwrap_or((word, ""));
    match (verb, postgres) {
        ("?", _) => value(),
        ("each", true) => format!("(SELECT jsonb_array_elements_text(CAST({} AS jsonb)) AS value)", value()),
        ("each", false) => format!("(SELECT value FROM json_each({}))", value()),
        ("rows", true) => format!("jsonb_to_recordset(CAST({} AS jsonb)) AS r({object})", value()),
        ("rows", false) => {
            // SQLite takes the types from the JSON, so only the names are used.
            let columns: Vec<String> = object
                .split(',')
                .filter_map(|column| column.split_whitespace().next())
                .map(|name| format!("json_extract(value, '$.{name}') AS {name}"))
                .collect();
            format!("(SELECT {} FROM json_each({})) AS r", columns.join(", "), value())
        }
        ("within", _) => {
            // The columns are TEXT in both databases. SQLite has no operator for containment, so it compares key by
            // key.
            let (labels, scope) = object.split_once(' ').unwrap_or((object, ""));
            let scope = if scope.is_empty() { value() } else { scope.to_owned() };
            if postgres {
                format!("CAST({labels} AS jsonb) @> CAST({scope} AS jsonb)")
            } else {
                format!(
                    "NOT EXISTS (SELECT 1 FROM json_each({scope}) wanted WHERE NOT EXISTS \
                     (SELECT 1 FROM json_each({labels}) has WHERE has.key = wanted.key AND has.value = wanted.value))"
                )
            }
        }
        ("lock", true) if object.is_empty() => "FOR UPDATE".to_owned(),
        ("lock", true) => format!("FOR UPDATE OF {object}"),
        ("skip", true) => "FOR UPDATE SKIP LOCKED".to_owned(),
        _ => String::new(),
    }
}

/// A row of a result, read by the names of its columns.
pub(super) struct Row(QueryResult);

impl Row {
    pub(super) fn text(&self, column: &str) -> Result<String, StoreError> {
        Ok(self.0.try_get("", column)?)
    }

    pub(super) fn maybe_text(&self, column: &str) -> Result<Option<String>, StoreError> {
        Ok(self.0.try_get("", column)?)
    }

    pub(super) fn bytes(&self, column: &str) -> Result<Vec<u8>, StoreError> {
        Ok(self.0.try_get("", column)?)
    }

    pub(super) fn int(&self, column: &str) -> Result<i64, StoreError> {
        Ok(self.0.try_get("", column)?)
    }

    pub(super) fn maybe_int(&self, column: &str) -> Result<Option<i64>, StoreError> {
        Ok(self.0.try_get("", column)?)
    }

    /// A count or a size. A negative value is an error, because the store writes none.
    pub(super) fn number<T: TryFrom<i64>>(&self, column: &'static str) -> Result<T, StoreError> {
        let value = self.int(column)?;
        T::try_from(value).map_err(|_| StoreError::Unknown { what: column, value: value.to_string() })
    }

    pub(super) fn flag(&self, column: &str) -> Result<bool, StoreError> {
        Ok(self.0.try_get("", column)?)
    }

    pub(super) fn time(&self, column: &'static str) -> Result<DateTime<Utc>, StoreError> {
        as_time(column, self.int(column)?)
    }

    pub(super) fn maybe_time(&self, column: &'static str) -> Result<Option<DateTime<Utc>>, StoreError> {
        let value: Option<i64> = self.0.try_get("", column)?;
        value.map(|micros| as_time(column, micros)).transpose()
    }

    pub(super) fn json<T: DeserializeOwned>(&self, column: &'static str) -> Result<T, StoreError> {
        let text = self.text(column)?;
        serde_json::from_str(&text).map_err(|_| StoreError::Unknown { what: column, value: text })
    }

    pub(super) fn maybe_json<T: DeserializeOwned>(&self, column: &'static str) -> Result<Option<T>, StoreError> {
        if self.maybe_text(column)?.is_none() { Ok(None) } else { self.json(column).map(Some) }
    }

    /// A word of an enumeration, or an id.
    pub(super) fn word<T>(&self, column: &'static str, parse: impl FnOnce(&str) -> Option<T>) -> Result<T, StoreError> {
        let text = self.text(column)?;
        parse(&text).ok_or(StoreError::Unknown { what: column, value: text })
    }

    pub(super) fn maybe_word<T>(
        &self,
        column: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, StoreError> {
        match self.maybe_text(column)? {
            None => Ok(None),
            Some(text) => match parse(&text) {
                Some(value) => Ok(Some(value)),
                None => Err(StoreError::Unknown { what: column, value: text }),
            },
        }
    }
}

fn as_time(column: &'static str, micros: i64) -> Result<DateTime<Utc>, StoreError> {
    // Earlier releases stored a window that never opens as the end of chrono's calendar.
    DateTime::from_timestamp_micros(micros)
        .map(calendar::bounded)
        .ok_or_else(|| StoreError::Unknown { what: column, value: micros.to_string() })
}

/// The stored form of a number. A node may report one that no database can hold; it becomes the largest.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::expand;

    #[test]
    fn postgres_gets_numbered_values_and_locks() {
        assert_eq!(
            expand("SELECT 1 FROM a WHERE b = ? AND c IN {each} {lock e}", true),
            "SELECT 1 FROM a WHERE b = $1 AND c IN (SELECT jsonb_array_elements_text(CAST($2 AS jsonb)) AS value) \
             FOR UPDATE OF e"
        );
        assert_eq!(
            expand("FROM {rows a BIGINT, b TEXT} WHERE x = ?", true),
            "FROM jsonb_to_recordset(CAST($1 AS jsonb)) AS r(a BIGINT, b TEXT) WHERE x = $2"
        );
    }

    #[test]
    fn labels_are_compared_with_a_value_or_a_column() {
        assert_eq!(
            expand("x = ? AND {within n.labels}", true),
            "x = $1 AND CAST(n.labels AS jsonb) @> CAST($2 AS jsonb)"
        );
        assert_eq!(expand("{within n.labels o.s}", true), "CAST(n.labels AS jsonb) @> CAST(o.s AS jsonb)");
        assert!(expand("{within n.labels}", false).contains("json_each(?) wanted"));
        assert!(expand("{within n.labels o.s}", false).contains("json_each(o.s) wanted"));
    }

    #[test]
    fn sqlite_gets_json_tables_and_no_locks() {
        assert_eq!(expand("b = ? AND c IN {each} {lock}", false), "b = ? AND c IN (SELECT value FROM json_each(?)) ");
        assert_eq!(
            expand("{rows a BIGINT, b TEXT}", false),
            "(SELECT json_extract(value, '$.a') AS a, json_extract(value, '$.b') AS b FROM json_each(?)) AS r"
        );
    }
}
