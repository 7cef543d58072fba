//! Messages of other versions of the protocol, made by changing the encoded bytes of this one's.

/// The version of the controller that is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    Before,
    After,
}

/// The sender of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Node,
    Controller,
}

/// First number of the fields that the version before did not have, in messages of the session.
const NEWER: u64 = 45;
/// A field that no version has.
const UNKNOWN: u64 = 1900;
/// A value that no enum has.
const UNKNOWN_VALUE: u64 = 99;
/// Welcome, Assign, Ack: fields of the one message in a `ConnectResponse`.
const WELCOME: u64 = 1;
const ASSIGN: u64 = 2;
const ACK: u64 = 4;
/// Hello, and the reports in it.
const HELLO: u64 = 1;
const EXECUTIONS: u64 = 8;
/// `Assign.known_state`, an enum.
const KNOWN_STATE: u64 = 6;

/// A field: its number, its wire type, and its value with neither tag nor length.
struct Field<'a> {
    number: u64,
    kind: u64,
    value: &'a [u8],
}

/// Changes a message as the other version would have sent it, or understood it. `None`: it would not have sent it.
pub(crate) fn change(message: &[u8], version: Version, side: Side) -> Option<Vec<u8>> {
    let mut changed = Vec::new();
    for field in fields(message)? {
        match (version, side) {
            // It reads a message without contents.
            (Version::Before, Side::Node) if field.number >= NEWER => return Some(Vec::new()),
            (Version::Before, Side::Controller) if field.number >= NEWER => return None,
            (Version::Before, Side::Node) => {
                let hello = field.number == HELLO;
                put(&mut changed, field.number, &without_newer(field.value, NEWER, hello)?);
            }
            (Version::Before, Side::Controller) => {
                let newer = match field.number {
                    WELCOME => 5,
                    ASSIGN => KNOWN_STATE,
                    ACK => 3,
                    _ => NEWER,
                };
                put(&mut changed, field.number, &without_newer(field.value, newer, false)?);
            }
            (Version::After, Side::Node) => put(&mut changed, field.number, field.value),
            (Version::After, Side::Controller) => {
                let mut inner = field.value.to_vec();
                if field.number == ASSIGN {
                    tag(&mut inner, KNOWN_STATE, 0);
                    varint(&mut inner, UNKNOWN_VALUE);
                }
                tag(&mut inner, UNKNOWN, 0);
                varint(&mut inner, 1);
                put(&mut inner, UNKNOWN + 1, b"of the version after");
                put(&mut changed, field.number, &inner);
            }
        }
    }
    if (version, side) == (Version::After, Side::Controller) {
        tag(&mut changed, UNKNOWN, 0);
        varint(&mut changed, 1);
    }
    Some(changed)
}

/// Leaves out the fields from number `newer` on; of a Hello, also those of its reports.
fn without_newer(message: &[u8], newer: u64, is_hello: bool) -> Option<Vec<u8>> {
    let mut kept = Vec::new();
    for field in fields(message)?.into_iter().filter(|field| field.number < newer) {
        if is_hello && field.number == EXECUTIONS {
            put(&mut kept, field.number, &without_newer(field.value, NEWER, false)?);
            continue;
        }
        tag(&mut kept, field.number, field.kind);
        if field.kind == 2 {
            varint(&mut kept, u64::try_from(field.value.len()).ok()?);
        }
        kept.extend_from_slice(field.value);
    }
    Some(kept)
}

fn fields(mut message: &[u8]) -> Option<Vec<Field<'_>>> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let (key, rest) = read_varint(message)?;
        let (length, rest) = match key & 7 {
            0 => (rest.len() - read_varint(rest)?.1.len(), rest),
            1 => (8, rest),
            2 => {
                let (length, rest) = read_varint(rest)?;
                (usize::try_from(length).ok()?, rest)
            }
            5 => (4, rest),
            _ => return None,
        };
        let (value, rest) = rest.split_at_checked(length)?;
        fields.push(Field { number: key >> 3, kind: key & 7, value });
        message = rest;
    }
    Some(fields)
}

fn read_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (at, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Some((value, bytes.get(at + 1..)?));
        }
    }
    None
}

fn varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(u8::try_from(value & 0x7f).unwrap_or_default() | 0x80);
        value >>= 7;
    }
    to.push(u8::try_from(value).unwrap_or_default());
}

fn tag(to: &mut Vec<u8>, number: u64, kind: u64) {
    varint(to, number << 3 | kind);
}

fn put(to: &mut Vec<u8>, number: u64, value: &[u8]) {
    tag(to, number, 2);
    varint(to, u64::try_from(value.len()).unwrap_or_default());
    to.extend_from_slice(value);
}

#[test]
fn other_versions_differ_in_the_fields_that_they_have() {
    use marco_proto::v1::{ConnectResponse, Query, Welcome, connect_response::Message};
    use prost::Message as _;
    let welcome = Welcome { session: "s".into(), held: true, ..Welcome::default() };
    let message = ConnectResponse { message: Some(Message::Welcome(welcome.clone())) }.encode_to_vec();
    let after = change(&message, Version::After, Side::Controller).unwrap();
    assert!(after.len() > message.len());
    assert_eq!(ConnectResponse::decode(&*after).unwrap().message, Some(Message::Welcome(welcome.clone())));
    let before = change(&message, Version::Before, Side::Controller).unwrap();
    let held = Welcome { held: false, ..welcome };
    assert_eq!(ConnectResponse::decode(&*before).unwrap().message, Some(Message::Welcome(held)));
    let query = ConnectResponse { message: Some(Message::Query(Query::default())) }.encode_to_vec();
    assert_eq!(change(&query, Version::Before, Side::Controller), None);
}
