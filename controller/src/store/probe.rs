//! Makes one connection to Postgres before there is a pool. A pool retries until its time is up, and then knows only
//! that. One connection says at once why it failed.

use std::time::Duration;

use sea_orm::sqlx::postgres::PgConnectOptions;
use sea_orm::sqlx::{ConnectOptions as _, Connection as _, Error};

use super::StoreError;

/// Keeps a start that cannot work below two seconds.
const TIMEOUT: Duration = Duration::from_millis(1800);

/// Connects once, and closes the connection.
pub(super) async fn once(options: &PgConnectOptions) -> Result<(), StoreError> {
    let place = match options.get_socket() {
        Some(folder) => format!("{}/.s.PGSQL.{}", folder.display(), options.get_port()),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    };
    let failed = |why: String| StoreError::Postgres { place: place.clone(), why };
    match tokio::time::timeout(TIMEOUT, options.connect()).await {
        Ok(Ok(connection)) => {
            // The connection has served its purpose, so an error while closing it does not matter.
            let _ = connection.close().await;
            Ok(())
        }
        Ok(Err(error)) => Err(failed(why(&error))),
        Err(_) => Err(failed(format!("no answer within {} ms", TIMEOUT.as_millis()))),
    }
}

/// The cause alone: the driver's text around it adds nothing.
fn why(error: &Error) -> String {
    match error {
        Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            "connection refused: is Postgres running there, and does it listen on that address?".to_owned()
        }
        Error::Io(error) => error.to_string(),
        Error::Database(error) => error.message().to_owned(),
        Error::Tls(error) => format!("TLS: {error}"),
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use crate::store::Store;

    async fn said(url: &str) -> String {
        let begun = Instant::now();
        let error = Store::open(url).await.unwrap_err();
        assert!(begun.elapsed().as_secs() < 2, "{url}: {:?}", begun.elapsed());
        crate::chain(&error)
    }

    #[tokio::test]
    async fn refused_connection_names_host_and_port_once() {
        // A port that was given back just now has no listener.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let said = said(&format!("postgres://kim:s3cret@127.0.0.1:{port}/marco")).await;
        assert_eq!(said.matches("refused").count(), 1, "{said}");
        assert!(said.contains(&format!("127.0.0.1:{port}")) && !said.contains("s3cret"), "{said}");
    }

    #[tokio::test]
    async fn silent_host_is_given_up_in_time() {
        // The backlog of this listener takes the connection, but nothing ever answers.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = silent.local_addr().unwrap().port();
        let said = said(&format!("postgres://127.0.0.1:{port}/marco")).await;
        assert!(said.contains("no answer within"), "{said}");
    }
}
