//! Opening a database.

use super::{Store, StoreError};

impl Store {
    /// Opens the database at `url` and brings its tables up to date. `sqlite:///dir/marco.db` is created if it is
    /// missing; one process can hold it. `postgres://` serves several controllers.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        let _ = url;
        todo!()
    }

    /// Asks the database for a sign of life.
    pub async fn ping(&self) -> Result<(), StoreError> {
        todo!()
    }
}
