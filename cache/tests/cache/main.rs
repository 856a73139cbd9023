//! The cache through its public API: what is written comes back, what is damaged is found, what was interrupted continues.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod alignment;
mod claims;
mod combine;
mod compare;
mod damage;
mod folder;
mod hostile;
mod layout;
mod made;
mod modes;
mod refusal;
mod repack;
mod repair;
mod resume;
mod roundtrip;
mod sizing;
mod streams;
mod summary;
mod verify_modes;
