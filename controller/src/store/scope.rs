//! The nodes that a caller is limited to.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Labels that a node must carry to lie within the scope. Without labels every node does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Scope(BTreeMap<String, String>);

impl Scope {
    /// The nodes with all of these labels.
    pub fn new(labels: BTreeMap<String, String>) -> Self {
        Self(labels)
    }

    /// Every node.
    pub fn everything() -> Self {
        Self::default()
    }

    /// True if every node lies within it.
    pub fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    /// The labels that a node must carry.
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// True if a node with these labels lies within it.
    pub fn covers(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|(key, value)| labels.get(key) == Some(value))
    }

    /// True if every node that a selection by labels can ever match lies within it.
    pub fn covers_selection(&self, selection: &BTreeMap<String, String>) -> bool {
        // A selection matches nodes with at least these labels, so it is judged like a node that has no others.
        self.covers(selection)
    }

    /// The scope of the nodes that lie within both. `None` if no node can.
    pub fn and(&self, other: &Self) -> Option<Self> {
        let mut both = self.0.clone();
        for (key, value) in &other.0 {
            // No node carries two values of one key.
            if both.insert(key.clone(), value.clone()).is_some_and(|before| before != *value) {
                return None;
            }
        }
        Some(Self(both))
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<String> = self.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
        f.write_str(if pairs.is_empty() { "all nodes" } else { "" })?;
        f.write_str(&pairs.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::Scope;

    fn scope(pairs: &[(&str, &str)]) -> Scope {
        Scope::new(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn a_node_lies_within_when_it_carries_every_label() {
        let room = scope(&[("room", "a")]);
        assert!(room.covers(scope(&[("room", "a"), ("x", "y")]).labels()));
        assert!(!room.covers(scope(&[("room", "b")]).labels()) && !room.covers(scope(&[]).labels()));
        assert!(scope(&[]).covers(scope(&[]).labels()) && scope(&[]).is_everything());
    }

    #[test]
    fn two_scopes_together_are_narrower_or_nothing() {
        let (room, kind) = (scope(&[("room", "a")]), scope(&[("kind", "k")]));
        assert_eq!(room.and(&kind), Some(scope(&[("room", "a"), ("kind", "k")])));
        assert_eq!(room.and(&scope(&[("room", "b")])), None);
        assert_eq!(room.and(&Scope::everything()), Some(room.clone()));
        assert_eq!((room.to_string(), Scope::everything().to_string()), ("room=a".to_owned(), "all nodes".to_owned()));
    }
}
