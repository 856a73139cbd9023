//! The two stages of potstill and what they are made of.
//!
//! Stage one, [`precompute`], runs an AWQ teacher over chats and fills a cache. Stage two, [`train`], trains an NF4 + LoRA
//! student from that cache. They share no process state: the cache on disk is the only channel.
#![deny(missing_docs)]

pub mod adapter;
mod bounded;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod device;
pub mod dynamic_map;
mod error;
pub mod evaluate;
pub mod hub;
pub mod kernel;
pub mod linear;
pub mod loss;
mod memory;
pub mod miniature;
pub mod model;
pub mod ops;
mod pairing;
pub mod precompute;
pub mod run;
pub mod student;
pub mod teacher;
pub mod train;
pub mod whole_file;

pub use error::{Error, Result};
pub use pairing::PairingError;
