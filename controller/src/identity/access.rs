//! Admission of callers. Certificates and API tokens are looked up in the store before every call, and every few
//! seconds during open calls, so that an admin's change acts on live streams of every controller.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use marco_proto::names::{ApiTokenId, UserId};
use tokio_util::sync::CancellationToken;

use super::api_tokens::ApiSecret;
use super::callers::{Callers, Credential, OpenCall};
use super::peer_log::{cut, of_peer};
use super::record::Recorder;
use super::roles::{self, Role};
use super::tls::{Look, PeerCertificate, PeerInfo};
use super::{Caller, Denied, Pass, authorize};
use crate::clock::Clock;
use crate::store::{ApiTokenRow, CertificateRow, Scope, Standing, Store, StoreError, UserRow};

/// Interval of the checks of open calls. A change acts within 5 s, including the time of one round.
const EVERY: Duration = Duration::from_secs(2);
/// Prefixes of methods that answer without the store; they reveal nothing that is stored.
const STORELESS: [&str; 2] = ["/grpc.health.", "/grpc.reflection."];

/// Admits callers.
pub struct Access {
    store: Store,
    clock: Arc<dyn Clock>,
    recorder: Recorder,
    open: Mutex<HashMap<u64, Open>>,
    next: AtomicU64,
    callers: Callers,
}

/// An open call.
struct Open {
    method: String,
    caller: Caller,
}

/// A refused call: the reason, and the caller if it is known.
pub(super) struct Refused {
    pub(super) denied: Denied,
    pub(super) caller: Option<Caller>,
}

impl From<StoreError> for Denied {
    fn from(error: StoreError) -> Self {
        tracing::debug!(error = &*crate::chain(&error), "a caller could not be looked up");
        Self::Unavailable
    }
}

impl Access {
    /// Admission by the data of this store.
    pub fn new(store: Store, clock: Arc<dyn Clock>) -> Arc<Self> {
        let recorder = Recorder::new(store.clone());
        Arc::new(Self {
            store,
            clock,
            recorder,
            open: Mutex::default(),
            next: AtomicU64::new(0),
            callers: Callers::default(),
        })
    }

    /// Records calls in the audit.
    pub fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// The time.
    pub(super) fn now(&self) -> DateTime<Utc> {
        self.clock.now()
    }

    /// Admits a call and returns its caller. A token counts before a certificate.
    pub(super) async fn admit(
        &self,
        method: &str,
        peer: Option<&PeerInfo>,
        authorization: Option<&str>,
    ) -> Result<Caller, Refused> {
        let nobody = |denied| Refused { denied, caller: None };
        let peer = peer.ok_or_else(|| nobody(Denied::Unauthenticated))?;
        let caller = match (authorization, peer.certificate.as_deref()) {
            // A proxy with a certificate of its own may pass on calls with tokens.
            (Some(text), _) => self.by_token(text, peer).await.map_err(nobody)?,
            (None, Some(certificate)) => {
                let caller = Caller::from_peer(peer).ok_or_else(|| nobody(Denied::Unauthenticated))?;
                if roles::is_session(method) && caller.role == Role::Node {
                    // Its handler checks a session at the beginning, and a sweep afterwards; there the agent learns
                    // more than a status.
                    return Ok(caller);
                }
                match self.by_certificate(method, caller.clone(), certificate).await {
                    Ok(caller) => caller,
                    Err(denied) => return Err(Refused { denied, caller: Some(caller) }),
                }
            }
            (None, None) => return Err(nobody(Denied::Unauthenticated)),
        };
        match authorize(method, Some(&caller)) {
            Ok(_) => Ok(caller),
            Err(denied) => Err(Refused { denied, caller: Some(caller) }),
        }
    }

    /// Admits a request to the file mirror and returns its caller. Only a certificate counts: the handshake asks for
    /// one, and installers of 2015 have nothing else.
    ///
    /// # Errors
    /// Returns the reason, and the caller if it is known.
    pub async fn admit_file(&self, peer: Option<&PeerInfo>) -> Result<Caller, (Denied, Option<Caller>)> {
        self.admit(roles::DOWNLOAD, peer, None).await.map_err(|Refused { denied, caller }| (denied, caller))
    }

    /// Looks certificates up when connections are accepted, so that the limits of strangers do not apply to an accepted
    /// one, even for its first call.
    pub fn look(self: &Arc<Self>) -> Look {
        let access = Arc::clone(self);
        Arc::new(move |peer| {
            let access = Arc::clone(&access);
            Box::pin(async move {
                if let Some((role, name)) = access.known(&peer).await {
                    peer.connection.accept(role, &name);
                }
            })
        })
    }

    /// Role and name of a certificate's owner; `None`: unknown or refused.
    async fn known(&self, peer: &PeerInfo) -> Option<(Role, String)> {
        let caller = Caller::from_peer(peer)?;
        let role = match self.standing(&caller.serial).await.ok()? {
            Some(standing) => check(&standing, caller.role, self.clock.now()).ok()?,
            // People's certificates are stored with their first call, other controllers' never.
            None if caller.role == Role::Node => return None,
            None => caller.role,
        };
        Some((role, caller.name))
    }

    async fn by_token(&self, text: &str, peer: &PeerInfo) -> Result<Caller, Denied> {
        let secret = ApiSecret::from_metadata(text).ok_or(Denied::BadToken)?;
        let row = {
            // One address may have only a few look-ups under way, so that guessed tokens cannot occupy the database.
            let _turn = self.callers.lookup(Credential::TokenFrom(peer.addr.ip())).await;
            self.store.api_token_of(&secret.sha256()).await?
        };
        // One answer for unknown, expired and revoked: a guess must not learn that a token once existed.
        let row = row.filter(|row| row.works(self.clock.now())).ok_or(Denied::BadToken)?;
        Ok(Caller {
            name: row.id.name(),
            role: person(&row.role).ok_or(Denied::BadToken)?,
            node: None,
            from: peer.addr,
            serial: String::new(),
            api_token: Some(row.id),
            pass: Arc::new(Pass::new(row.scope)),
        })
    }

    async fn by_certificate(
        &self,
        method: &str,
        mut caller: Caller,
        certificate: &PeerCertificate,
    ) -> Result<Caller, Denied> {
        let mut found = self.standing(&certificate.serial).await;
        if matches!(found, Ok(None)) && !matches!(caller.role, Role::Node | Role::Controller) {
            // It was made on the first start, or by hand with the CA's key.
            // Stored from now on, so that an admin can list and revoke it.
            self.enter(&caller, certificate).await?;
            found = self.standing(&certificate.serial).await;
        }
        let standing = match found {
            Ok(standing) => standing,
            // Load balancers and other controllers must learn that this one is not well.
            Err(_) if STORELESS.iter().any(|service| method.starts_with(service)) => return Ok(caller),
            Err(error) => return Err(error.into()),
        };
        match standing {
            Some(standing) => {
                // A node's key that waits for approval; its fingerprint tells the admin which one to approve.
                if standing.held {
                    return Err(Denied::KeyHeld(certificate.key_sha256.clone()));
                }
                caller.role = check(&standing, caller.role, self.clock.now())?;
                caller.pass = Arc::new(Pass::new(standing.scope));
                Ok(caller)
            }
            // Other controllers make a certificate for each connection, and store none.
            None if caller.role == Role::Controller => Ok(caller),
            None => {
                // A role that may not call the method gets that answer, even with an unknown certificate.
                authorize(method, Some(&caller))?;
                Err(Denied::Revoked)
            }
        }
    }

    async fn standing(&self, serial: &str) -> Result<Option<Standing>, StoreError> {
        let _turn = self.callers.lookup(Credential::Certificate(serial.to_owned())).await;
        Ok(self.store.standings(&[serial.to_owned()]).await?.pop())
    }

    async fn enter(&self, caller: &Caller, certificate: &PeerCertificate) -> Result<(), Denied> {
        let id = UserId::parse(&caller.name).map_err(|_| Denied::Unauthenticated)?;
        let user = UserRow {
            id,
            role: caller.role.as_str().to_owned(),
            scope: Scope::everything(),
            create_time: self.clock.now(),
            // No caller created this user: the certificate was signed with the CA's key outside the API.
            creator: "the CA's key".to_owned(),
            revoke_time: None,
        };
        let row = CertificateRow {
            serial: certificate.serial.clone(),
            node: None,
            subject: caller.name.clone(),
            role: caller.role.as_str().to_owned(),
            key_sha256: certificate.key_sha256.clone(),
            not_before: certificate.not_before,
            not_after: certificate.not_after,
            generation: 0,
            pem: String::new(),
            given_for: String::new(),
        };
        let (name, serial) = (caller.name.as_str(), &certificate.serial);
        of_peer!(info, name, user = %cut(name), serial, "a certificate was seen for the first time");
        Ok(self.store.enter_certificate(&user, &row).await?)
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers an open call until its answer is dropped; `None`: its caller has too many open.
    pub(super) async fn enter_call(self: &Arc<Self>, method: &str, caller: Caller) -> Option<Entered> {
        let call = self.callers.begin(&caller).await?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.open().insert(id, Open { method: method.to_owned(), caller });
        Some(Entered { access: Arc::clone(self), id, call })
    }

    /// Checks open calls every `EVERY`, until cancelled.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        loop {
            // Dropping the wait loses nothing.
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(EVERY) => {}
            }
            if let Err(error) = self.round().await {
                // Admitted callers stay while the store does not answer.
                tracing::debug!(error = &*crate::chain(&error), "open calls could not be checked");
            }
        }
    }

    /// Cuts the calls of callers that are no longer admitted, and limits the others to their current scope.
    async fn round(&self) -> Result<(), StoreError> {
        // Copied first: the lock must not be held while the store is asked.
        let (mut serials, mut tokens) = (Vec::new(), Vec::new());
        for call in self.open().values() {
            match &call.caller.api_token {
                Some(token) => tokens.push(token.clone()),
                None => serials.push(call.caller.serial.clone()),
            }
        }
        // One caller may have many calls open; the store is asked once for it.
        serials.sort_unstable();
        serials.dedup();
        tokens.sort_unstable();
        tokens.dedup();
        if serials.is_empty() && tokens.is_empty() {
            return Ok(());
        }
        let now = self.clock.now();
        let standings: HashMap<String, Standing> =
            self.store.standings(&serials).await?.into_iter().map(|found| (found.serial.clone(), found)).collect();
        let known: HashMap<ApiTokenId, ApiTokenRow> =
            self.store.api_tokens_by_id(&tokens).await?.into_iter().map(|row| (row.id.clone(), row)).collect();
        for call in self.open().values() {
            let caller = &call.caller;
            let (role, scope) = match (&caller.api_token, standings.get(&caller.serial)) {
                (Some(token), _) => match known.get(token).filter(|row| row.works(now)) {
                    Some(row) => (person(&row.role).ok_or(Denied::BadToken), row.scope.clone()),
                    None => (Err(Denied::BadToken), Scope::everything()),
                },
                (None, Some(standing)) => (check(standing, caller.role, now), standing.scope.clone()),
                // A certificate that is not stored yet, or never is, like another controller's.
                (None, None) => continue,
            };
            let may = role.and_then(|role| {
                let caller = Caller { role, ..caller.clone() };
                authorize(&call.method, Some(&caller)).map(|_| ())
            });
            match may {
                Ok(()) => caller.pass.limit(scope),
                Err(denied) => {
                    if caller.pass.cut(denied) {
                        let name = caller.name.as_str();
                        of_peer!(info, name, caller = %cut(name), method = call.method, "an open call was cut");
                    }
                }
            }
        }
        Ok(())
    }
}

/// The role in which a certificate is admitted. A call that began under a key may end normally after a renewal replaced
/// the key; it is cut if an operator did.
fn check(standing: &Standing, written: Role, now: DateTime<Utc>) -> Result<Role, Denied> {
    if standing.revoked || standing.not_after <= now || standing.replaced {
        return Err(Denied::Revoked);
    }
    if standing.quarantined {
        return Err(Denied::Quarantined);
    }
    match &standing.role {
        Some(role) => person(role).ok_or(Denied::Revoked),
        None => Ok(written),
    }
}

/// The role of a user or an API token; `None`: unknown, or one that only certificates give.
fn person(word: &str) -> Option<Role> {
    word.parse().ok().filter(|role| !matches!(role, Role::Node | Role::Controller))
}

/// An open call's entry among those that are checked.
pub(super) struct Entered {
    access: Arc<Access>,
    id: u64,
    pub(super) call: OpenCall,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.access.open().remove(&self.id);
    }
}
