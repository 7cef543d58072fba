//! The text of a secret in a file that an operator names. Additions of editors and shells of other systems are removed.
//! If a file holds something else, the error says its kind and never its contents.

/// Prefix of a join token.
pub const JOIN_TOKEN_FORM: &str = "mj1.";

/// The text of a file: UTF-8, or UTF-16 as PowerShell's `>` writes it; without byte order mark and blanks around it.
/// `None`: no text.
pub fn text(bytes: &[u8]) -> Option<String> {
    let units = |rest: &[u8], unit: fn([u8; 2]) -> u16| {
        let (pairs, odd) = rest.as_chunks::<2>();
        odd.is_empty().then(|| String::from_utf16(&pairs.iter().map(|pair| unit(*pair)).collect::<Vec<_>>()).ok())?
    };
    let text = match bytes {
        // Only a byte order mark tells UTF-16 from bytes that happen to be UTF-8.
        [0xff, 0xfe, rest @ ..] => units(rest, u16::from_le_bytes)?,
        [0xfe, 0xff, rest @ ..] => units(rest, u16::from_be_bytes)?,
        _ => String::from_utf8(bytes.to_vec()).ok()?,
    };
    // Editors append a line feed, and some write a byte order mark before UTF-8.
    Some(text.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}').to_owned())
}

/// The join token in a file.
///
/// # Errors
/// Returns the kind of contents as the object of a sentence. Nothing of the contents is repeated.
pub fn join_token(bytes: &[u8]) -> Result<String, &'static str> {
    let Some(text) = text(bytes) else { return Err("bytes that are no text") };
    let first = text.lines().next().unwrap_or_default();
    if text.starts_with(JOIN_TOKEN_FORM) {
        if text.split_whitespace().count() > 1 {
            return Err("more than one token, or a token and something else");
        }
        // The form only: the controller checks the rest.
        if text.split('.').count() == 4 {
            return Ok(text);
        }
        return Err("a join token that is not whole: one reads mj1.ID.SECRET.PIN");
    }
    Err(if text.is_empty() {
        "nothing"
    } else if text.contains("PRIVATE KEY-----") {
        "a private key"
    } else if text.contains("-----BEGIN CERTIFICATE REQUEST") {
        "a request for a certificate"
    } else if text.contains("-----BEGIN CERTIFICATE") {
        "a certificate"
    } else if text.starts_with(['{', '[']) && text.contains(JOIN_TOKEN_FORM) {
        "JSON that has a join token in its field `token`: take only that (jq -r .token)"
    } else if text.starts_with(['{', '[']) {
        "JSON"
    } else if text.lines().any(|line| line.trim_start().starts_with("token") && line.contains(JOIN_TOKEN_FORM)) {
        "a join file: it belongs on a card, as marco/join.toml; here only its token is wanted"
    } else if text.contains(JOIN_TOKEN_FORM) {
        "a join token with something else before it"
    } else if first.starts_with("ma1.") {
        "an API token, which lets a program in, not a node"
    } else if first.len() < text.len() {
        "several lines of something else"
    } else {
        "something else"
    })
}

#[cfg(test)]
mod tests {
    use super::join_token;

    const TOKEN: &str = "mj1.abc.AAAA.BBBB";

    #[test]
    fn token_is_taken_as_editors_of_other_systems_write_it() {
        let le: Vec<u8> = TOKEN.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let be: Vec<u8> = TOKEN.encode_utf16().flat_map(u16::to_be_bytes).collect();
        for bytes in [
            TOKEN.as_bytes().to_vec(),
            format!("\u{feff}{TOKEN}\r\n").into_bytes(),
            format!("  {TOKEN} \n\n").into_bytes(),
            [&[0xff, 0xfe], le.as_slice()].concat(),
            [&[0xfe, 0xff], be.as_slice()].concat(),
        ] {
            assert_eq!(join_token(&bytes).as_deref(), Ok(TOKEN), "{bytes:?}");
        }
    }

    #[test]
    fn file_that_is_no_token_is_named_by_what_it_holds() {
        for (holds, bytes) in [
            ("nothing", " \r\n"),
            ("a certificate", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"),
            ("a private key", "-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n"),
            ("jq -r .token", "{\"name\":\"joinTokens/a\",\"token\":\"mj1.abc.AAAA.BBBB\"}"),
            ("JSON", "{\"nodes\":[]}"),
            ("a join file", "controllers = [\"a\"]\ntoken = \"mj1.abc.AAAA.BBBB\"\n"),
            ("not whole", "mj1.abc.AAAA"),
            ("more than one", "mj1.abc.AAAA.BBBB\nmj1.abd.AAAA.BBBB\n"),
            ("something else before", "the token is mj1.abc.AAAA.BBBB"),
            ("several lines", "root:x:0:0\ndaemon:x:1:1\n"),
            ("something else", "hunter2"),
        ] {
            let said = join_token(bytes.as_bytes()).unwrap_err();
            assert!(said.contains(holds), "{bytes:?}: {said}");
            assert!(!said.contains("hunter2") && !said.contains("AAAA"), "{said}");
        }
        assert_eq!(join_token(&[0xff, 0xd8, 0xff, 0xe0, 0x80]), Err("bytes that are no text"));
    }
}
