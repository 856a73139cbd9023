//! Models and chats by name: from the cache alone, and, with the cargo feature `hub`, from a server in this process that plays the hub.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cache;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod hostile;
mod made;
#[cfg(feature = "hub")]
mod server;
mod splits;
