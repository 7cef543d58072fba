//! Statements for both databases.
