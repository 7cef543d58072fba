//! Agents of earlier protocols, as recorded when they were current: the controller serves them as long as it promises
//! to.

mod card;
mod played;
mod recorder;
mod recording;
mod spoken;
