//! Pages of a list: sizes, and tokens that hold the key of the last row, so that rows that come or go in between
//! neither repeat nor hide others.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::status::ApiError;

const DEFAULT_SIZE: u32 = 100;
const MAX_SIZE: u32 = 1000;

/// Number of rows of the answer; 0: the default.
pub(super) fn size(asked: i32) -> Result<u32, ApiError> {
    match u32::try_from(asked) {
        Ok(0) => Ok(DEFAULT_SIZE),
        // A larger size is cut and not refused: the client sees the rest by the token.
        Ok(size) => Ok(size.min(MAX_SIZE)),
        Err(_) => Err(ApiError::invalid("page_size", "must not be negative")),
    }
}

/// The token that continues `list` after `key`.
pub(super) fn token(list: &str, key: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{list}:{key}"))
}

/// The key in a token of `list`; `None`: the first page.
pub(super) fn after(list: &str, token: &str) -> Result<Option<String>, ApiError> {
    if token.is_empty() {
        return Ok(None);
    }
    URL_SAFE_NO_PAD
        .decode(token)
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        // A token of another list would continue at a key that means nothing here.
        .and_then(|text| text.strip_prefix(list)?.strip_prefix(':').map(str::to_owned))
        // The key goes into queries and errors, and the token is the caller's to change.
        .filter(|key| !key.chars().any(char::is_control))
        .map(Some)
        .ok_or_else(|| ApiError::invalid("page_token", "is not one that this list gave out; leave it empty to begin"))
}

/// Cuts one row more than asked for into the page and its token.
pub(super) fn cut<T>(mut rows: Vec<T>, size: u32, list: &str, key: impl Fn(&T) -> String) -> (Vec<T>, String) {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if rows.len() <= size {
        return (rows, String::new());
    }
    // One row more was read, to know if another page follows.
    rows.truncate(size);
    let next = rows.last().map(|row| token(list, &key(row))).unwrap_or_default();
    (rows, next)
}

#[cfg(test)]
mod tests {
    use super::{after, cut, size, token};

    #[test]
    fn a_token_of_another_list_is_refused() {
        assert_eq!(after("nodes", &token("nodes", "pi-01")).unwrap().as_deref(), Some("pi-01"));
        assert!(after("nodes", &token("operations", "pi-01")).is_err());
        assert!(after("nodes", "!").is_err());
        assert_eq!(after("nodes", "").unwrap(), None);
    }

    #[test]
    fn a_full_page_has_a_token_and_the_last_one_none() {
        let (rows, next) = cut(vec![1, 2, 3], 2, "n", ToString::to_string);
        assert_eq!(rows, [1, 2]);
        assert_eq!(after("n", &next).unwrap().as_deref(), Some("2"));
        let (rows, next) = cut(vec![1, 2], 2, "n", ToString::to_string);
        assert_eq!((rows.len(), next.as_str()), (2, ""));
        assert!(size(-1).is_err());
        assert_eq!(size(5000).unwrap(), 1000);
    }
}
