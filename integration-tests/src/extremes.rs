//! Messages with each field in turn at its extremes, built from the descriptor set alone, so that tests cover a new
//! field as soon as it is added.

use prost::Message as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage as _, Value};

use crate::dynamic::{Place, shown};

/// Maximum nesting of messages.
const DEPTH: usize = 6;
/// Elements of a long list: the most nodes that one operation takes, far more than any other list.
const MANY: usize = 10_000;
/// Bytes of a long text: as many as fit into a message of 1 MiB beside its other fields.
const LONG: usize = 1_000_000;
/// Unix times of the first instants of the years 0, 1 and 10000. A `google.protobuf.Timestamp` ranges from the first
/// instant of year 1 to the last nanosecond of 9999.
const YEAR_0: i64 = -62_167_219_200;
const YEAR_1: i64 = -62_135_596_800;
const YEAR_10000: i64 = 253_402_300_800;
/// Placeholder that `spoil` replaces in the encoded message by bytes that are not UTF-8. The length stays the same, so
/// that no length prefix changes.
const MARK: &str = "~not-utf-8~";

/// A message with one field at an extreme.
#[derive(Debug, Clone)]
pub struct Extreme {
    /// Path of the field and name of the extreme, for failure messages.
    pub what: String,
    /// The message, encoded.
    pub bytes: Vec<u8>,
}

/// Variants of the message: each of its fields, also in nested messages, at each of its extremes.
pub fn extremes(base: &DynamicMessage) -> Vec<Extreme> {
    let mut found = Vec::new();
    for place in places(&base.descriptor()) {
        let Some(field) = place.last() else { continue };
        for (name, value) in values(field) {
            let mut message = base.clone();
            set(&mut message, &place, &value);
            let mut bytes = message.encode_to_vec();
            // Rust strings cannot hold it, so it is put into the encoded message.
            if name == "bad UTF-8" {
                spoil(&mut bytes);
            }
            found.push(Extreme { what: format!("{} = {name}", shown(&place)), bytes });
        }
    }
    found
}

/// All fields of a message, also of nested messages.
fn places(message: &MessageDescriptor) -> Vec<Place> {
    fn collect(message: &MessageDescriptor, path: &mut Place, found: &mut Vec<Place>) {
        if path.len() >= DEPTH {
            return;
        }
        for field in message.fields() {
            path.push(field.clone());
            found.push(path.clone());
            if let Kind::Message(inner) = field.kind()
                // Entries of a map are messages too, but `maps` makes them.
                && !field.is_map()
                // A message type that contains itself is entered once on a path.
                && path.iter().filter(|above| above.kind() == field.kind()).count() == 1
            {
                collect(&inner, path, found);
            }
            path.pop();
        }
    }
    let mut found = Vec::new();
    collect(message, &mut Vec::new(), &mut found);
    found
}

/// The extremes of a field, each with a name.
fn values(field: &FieldDescriptor) -> Vec<(String, Value)> {
    if field.is_map() {
        return maps(field);
    }
    let singles = singles(&field.kind());
    if !field.is_list() {
        return singles;
    }
    let first = singles.first().map(|(_, value)| value.clone());
    let many = first.map(|value| (format!("{MANY} times the first"), Value::List(vec![value; MANY])));
    singles.into_iter().map(|(name, value)| (name, Value::List(vec![value]))).chain(many).collect()
}

fn maps(field: &FieldDescriptor) -> Vec<(String, Value)> {
    let kind = field.kind();
    let Some(entry) = kind.as_message() else { return Vec::new() };
    // The API has only such maps.
    if (entry.map_entry_key_field().kind(), entry.map_entry_value_field().kind()) != (Kind::String, Kind::String) {
        return Vec::new();
    }
    let text = |text: &str| (MapKey::String(text.to_owned()), Value::String(text.to_owned()));
    let one = |value: &str| Value::Map([text(value)].into());
    vec![
        ("an empty key".to_owned(), one("")),
        ("a long key and value".to_owned(), one(&"x".repeat(LONG / 2))),
        ("bad UTF-8".to_owned(), one(MARK)),
        (format!("{MANY} keys"), Value::Map((0..MANY).map(|number| text(&number.to_string())).collect())),
    ]
}

fn singles(kind: &Kind) -> Vec<(String, Value)> {
    let named = |values: Vec<Value>| values.into_iter().map(|value| (format!("{value:?}"), value)).collect();
    match kind {
        Kind::Double => named([f64::NAN, f64::INFINITY, f64::MIN, f64::MAX, -0.0].map(Value::F64).to_vec()),
        Kind::Float => named([f32::NAN, f32::INFINITY, f32::MIN, f32::MAX, -0.0].map(Value::F32).to_vec()),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
            named([0, 1, -1, i32::MAX, i32::MAX - 1, i32::MIN].map(Value::I32).to_vec())
        }
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
            named([0, 1, -1, i64::MAX, i64::MAX - 1, i64::MIN].map(Value::I64).to_vec())
        }
        Kind::Uint32 | Kind::Fixed32 => named([0, 1, u32::MAX, u32::MAX - 1].map(Value::U32).to_vec()),
        Kind::Uint64 | Kind::Fixed64 => named([0, 1, u64::MAX, u64::MAX - 1].map(Value::U64).to_vec()),
        Kind::Bool => named([false, true].map(Value::Bool).to_vec()),
        Kind::Enum(numbers) => {
            let known: Vec<i32> = numbers.values().map(|value| value.number()).collect();
            let most = known.iter().max().copied().unwrap_or_default();
            let beside = [-1, most + 1, i32::MAX, i32::MIN];
            // Numbers that the enum does not define: proto3 decoders pass them on.
            named(known.into_iter().chain(beside).map(Value::EnumNumber).collect())
        }
        Kind::String => vec![
            ("empty".to_owned(), Value::String(String::new())),
            (format!("{LONG} characters"), Value::String("x".repeat(LONG))),
            ("bad UTF-8".to_owned(), Value::String(MARK.to_owned())),
        ],
        Kind::Bytes => vec![
            ("empty".to_owned(), Value::Bytes(bytes::Bytes::new())),
            (format!("{LONG} bytes"), Value::Bytes(vec![0xff; LONG].into())),
        ],
        Kind::Message(message) if message.full_name() == "google.protobuf.Timestamp" => {
            let years =
                [("year 0", YEAR_0), ("year 1", YEAR_1), ("year 9999", YEAR_10000 - 1), ("year 10000", YEAR_10000)];
            let times = years.map(|(name, seconds)| {
                let mut time = DynamicMessage::new(message.clone());
                time.set_field_by_name("seconds", Value::I64(seconds));
                (name.to_owned(), Value::Message(time))
            });
            times.into()
        }
        Kind::Message(message) => vec![("empty".to_owned(), Value::Message(DynamicMessage::new(message.clone())))],
    }
}

/// Sets a field and creates the messages on its path. In a list, the first element gets the value.
fn set(message: &mut DynamicMessage, place: &[FieldDescriptor], value: &Value) {
    let Some((field, rest)) = place.split_first() else { return };
    if rest.is_empty() {
        message.set_field(field, value.clone());
        return;
    }
    let Kind::Message(inner) = field.kind() else { return };
    let present = message.get_field(field);
    let first = if field.is_list() { present.as_list().and_then(|list| list.first()) } else { Some(&*present) };
    let mut inner = first.and_then(Value::as_message).cloned().unwrap_or_else(|| DynamicMessage::new(inner));
    set(&mut inner, rest, value);
    let inner = Value::Message(inner);
    message.set_field(field, if field.is_list() { Value::List(vec![inner]) } else { inner });
}

fn spoil(bytes: &mut [u8]) {
    let mark = MARK.as_bytes();
    let mut at = 0;
    while let Some(window) = bytes.get_mut(at..at + mark.len()) {
        if *window == *mark {
            window.fill(0xff);
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_reflect::DynamicMessage;

    use super::extremes;
    use crate::dynamic::pool;

    #[test]
    fn every_kind_of_field_has_its_extremes() {
        let pool = pool().unwrap();
        let request = pool.get_message_by_name("marco.bootstrap.v1.CreateOperationRequest").unwrap();
        let found = extremes(&DynamicMessage::new(request.clone()));
        let has = |what: &str| found.iter().any(|extreme| extreme.what == what);
        for what in [
            "request_id = bad UTF-8",
            "operation.nodes.nodes = 10000 times the first",
            "operation.schedule_time = year 10000",
            "operation.schedule_time.nanos = I32(-2147483648)",
            "operation.labels.match_labels = 10000 keys",
            "operation.state = EnumNumber(-1)",
        ] {
            assert!(has(what), "{what} is missing");
        }
        let bad = found.iter().find(|extreme| extreme.what == "request_id = bad UTF-8").unwrap();
        assert!(DynamicMessage::decode(request.clone(), &*bad.bytes).is_err(), "it is UTF-8 after all");
        let typed = marco_proto::v1::CreateOperationRequest::decode(&*bad.bytes);
        assert!(typed.is_err(), "prost takes it");
    }
}
