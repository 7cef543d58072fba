//! Calls built from the descriptor set alone, so that tests cover an RPC as soon as it is added.

use anyhow::{Context as _, Result};
use bytes::Bytes;
use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, MethodDescriptor, Value,
};
use tonic::Status;
use tonic::transport::Channel;

use crate::raw;

/// Maximum nesting of messages. A schedule's template holds an operation, which holds an action, which holds a message.
const DEPTH: usize = 6;

/// The API's descriptor pool.
pub fn pool() -> Result<DescriptorPool> {
    DescriptorPool::decode(marco_proto::DESCRIPTOR_SET).context("the descriptor set")
}

/// All methods of the API, in the order of the services.
pub fn methods(pool: &DescriptorPool) -> Vec<MethodDescriptor> {
    let ours = pool.services().filter(|service| service.package_name() == "marco.bootstrap.v1");
    ours.flat_map(|service| service.methods().collect::<Vec<_>>()).collect()
}

/// The path of a text field in a message: the fields from the outermost to the text.
pub type Place = Vec<FieldDescriptor>;

/// All text fields of a message, also in lists and maps.
pub fn texts(message: &MessageDescriptor) -> Vec<Place> {
    let mut found = Vec::new();
    collect(message, &mut Vec::new(), &mut found);
    found
}

fn collect(message: &MessageDescriptor, path: &mut Place, found: &mut Vec<Place>) {
    if path.len() >= DEPTH {
        return;
    }
    for field in message.fields() {
        path.push(field.clone());
        match field.kind() {
            Kind::String => found.push(path.clone()),
            Kind::Message(_) if field.is_map() => found.push(path.clone()),
            // A message type that contains itself would never end: each type is entered once on a path.
            Kind::Message(inner) if path.iter().filter(|above| above.kind() == field.kind()).count() == 1 => {
                collect(&inner, path, found);
            }
            _ => {}
        }
        path.pop();
    }
}

/// The path in dotted form, for example `operation.name`.
pub fn shown(place: &Place) -> String {
    place.iter().map(FieldDescriptor::name).collect::<Vec<_>>().join(".")
}

/// Sets a text field and creates the messages on its path. A map from string to string gets the text as key and as
/// value.
pub fn put(message: &mut DynamicMessage, place: &[FieldDescriptor], text: &str) {
    let Some((field, rest)) = place.split_first() else { return };
    if field.is_map() {
        let entry = field.kind().as_message().map(|entry| (entry.map_entry_key_field(), entry.map_entry_value_field()));
        if let Some((key, value)) = entry
            && (key.kind(), value.kind()) == (Kind::String, Kind::String)
        {
            let map = [(MapKey::String(text.to_owned()), Value::String(text.to_owned()))];
            message.set_field(field, Value::Map(map.into()));
        }
        return;
    }
    let value = match field.kind() {
        Kind::Message(inner) => {
            let present = message.get_field(field).as_message().filter(|_| message.has_field(field)).cloned();
            let mut inner = present.unwrap_or_else(|| DynamicMessage::new(inner));
            put(&mut inner, rest, text);
            Value::Message(inner)
        }
        _ => Value::String(text.to_owned()),
    };
    message.set_field(field, if field.is_list() { Value::List(vec![value]) } else { value });
}

/// Calls a method with one message, and returns its first answer.
///
/// # Errors
/// The status with which the call was refused.
pub async fn call(channel: &Channel, method: &MethodDescriptor, message: &DynamicMessage) -> Result<Bytes, Status> {
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    raw::call(channel, &path, message.encode_to_vec(), None).await
}
