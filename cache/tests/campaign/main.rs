//! Campaigns against the cache: kills, mutations, races, vandals beside readers, a full disk; and the shards of every format
//! version. A small share runs with every `cargo test`; `scripts/campaign.sh` runs them at full size.
//!
//! Each campaign says on stderr what it did. What is random comes from one seed, which every failure names.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod disk;
mod golden;
mod kills;
#[path = "../cache/made.rs"]
#[allow(dead_code)]
mod made;
mod modes;
mod mutations;
mod process;
mod races;
mod seeds;
mod vandals;

/// The size of a campaign: a number from the environment, or the share that every `cargo test` does.
fn size(name: &str, share: u64) -> u64 {
    let name = format!("POTSTILL_CAMPAIGN_{name}");
    std::env::var(&name).map_or(share, |text| text.parse().unwrap_or_else(|_| panic!("{name} = {text}: expected a number")))
}

/// The seed of all that is random.
fn seed() -> u64 {
    size("SEED", 1)
}
