//! What torchrun's variables say of this process as one of several that train together. A pure function of the environment.
//!
//! | variable | meaning |
//! |---|---|
//! | `WORLD_SIZE` | how many there are; without it, or with 1, a run is of one process |
//! | `RANK` | which of them this is, from 0 |
//! | `MASTER_ADDR`, `MASTER_PORT` | where rank 0 listens |
//! | `LOCAL_RANK` | which of its machine's processes this is, from 0: the GPU that it takes |
//!
//! The same `RANK` and `WORLD_SIZE` say which worker a `precompute` is (`cluster.rs`), where asked for; there, processes do not talk.

use crate::exit::UsageError;
use potstill_pipeline::train::ranks::{MOST_RANKS, Place};
use std::ffi::OsString;

const RANK: &str = "RANK";
const COUNT: &str = "WORLD_SIZE";
const HOST: &str = "MASTER_ADDR";
const PORT: &str = "MASTER_PORT";
const LOCAL: &str = "LOCAL_RANK";
/// Set by torchrun where its own store listens at `MASTER_PORT`.
const AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";

/// What is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// The process among its like.
    pub place: Place,
    /// Number of the GPU that it takes where none is named.
    pub gpu: u16,
}

fn wrong<T>(what: String) -> Result<T, UsageError> {
    Err(UsageError(what))
}

/// The rank that this process is; `None` where a run is of one process.
///
/// Errors: half of what is needed, or values that do not fit together.
pub fn said(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Option<Said>, UsageError> {
    let number = |name: &str, most: u32| match variable(name) {
        None => Ok(None),
        Some(text) => {
            match text.to_str().filter(|text| text.bytes().all(|b| b.is_ascii_digit())).and_then(|text| text.parse().ok()) {
                Some(number) if number <= most => Ok(Some(number)),
                _ => wrong(format!("{name} = {text:?}: expected a whole number from 0 to {most}")),
            }
        }
    };
    let Some(of) = number(COUNT, MOST_RANKS)?.filter(|of| *of > 1) else { return Ok(None) };
    let lacking = |name: &str| -> UsageError {
        UsageError(format!(
            "{COUNT} = {of}, but {name} is not set; training by {of} processes needs {RANK}, {HOST} and {PORT}, as torchrun sets them; unset {COUNT} to train by one"
        ))
    };
    let rank: u32 = number(RANK, MOST_RANKS)?.ok_or_else(|| lacking(RANK))?;
    if rank >= of {
        return wrong(format!("{RANK} = {rank}: expected a rank from 0 to below {COUNT} = {of}"));
    }
    let host = variable(HOST).ok_or_else(|| lacking(HOST))?;
    let Some(host) = host.to_str().filter(|host| !host.is_empty() && host.len() <= 253).map(String::from) else {
        return wrong(format!("{HOST} = {host:?}: expected a name or an address"));
    };
    let port = number(PORT, u16::MAX.into())?.ok_or_else(|| lacking(PORT))?;
    if port == 0 && rank > 0 {
        return wrong(format!("{PORT} = 0: only rank 0 can leave the choice to the system; give the port that it says"));
    }
    // The next port, where torchrun's own store has this one.
    let taken = variable(AGENT_STORE).is_some_and(|value| value == "True");
    let Ok(port) = u16::try_from(port + u32::from(taken)) else {
        return wrong(format!("{PORT} = {port}: is torchrun's own, and there is none after it"));
    };
    let gpu = number(LOCAL, u16::MAX.into())?.unwrap_or(0) as u16;
    Ok(Some(Said { place: Place { rank, of, host, port }, gpu }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn seen(variables: &str) -> Result<Option<Said>, String> {
        let set: Vec<(&str, &str)> = variables.split(' ').filter_map(|one| one.split_once('=')).collect();
        said(&|name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))).map_err(|e| e.0)
    }

    #[test]
    fn torchruns_variables_are_understood() {
        for alone in
            ["", "RANK=0", "WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1", "WORLD_SIZE=0", "MASTER_PORT=x"]
        {
            assert_eq!(seen(alone), Ok(None), "{alone}");
        }
        let place = |port| Place { rank: 1, of: 4, host: "node-0".into(), port };
        let plain = "RANK=1 WORLD_SIZE=4 MASTER_ADDR=node-0 MASTER_PORT=29500";
        assert_eq!(seen(plain), Ok(Some(Said { place: place(29500), gpu: 0 })));
        assert_eq!(seen(&format!("{plain} LOCAL_RANK=3")), Ok(Some(Said { place: place(29500), gpu: 3 })));
        let agent = format!("{plain} TORCHELASTIC_USE_AGENT_STORE=");
        assert_eq!(seen(&format!("{agent}True")).unwrap().unwrap().place, place(29501));
        assert_eq!(seen(&format!("{agent}False")).unwrap().unwrap().place, place(29500));
        assert_eq!(seen("RANK=0 WORLD_SIZE=2 MASTER_ADDR=::1 MASTER_PORT=0").unwrap().unwrap().place.port, 0);
    }

    #[test]
    fn half_of_it_and_contradictions_are_errors() {
        for (variables, words) in [
            (
                "WORLD_SIZE=2",
                "WORLD_SIZE = 2, but RANK is not set; training by 2 processes needs RANK, MASTER_ADDR and MASTER_PORT",
            ),
            ("WORLD_SIZE=2 RANK=0", "but MASTER_ADDR is not set"),
            ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=a", "but MASTER_PORT is not set"),
            ("WORLD_SIZE=2 RANK=2", "RANK = 2: expected a rank from 0 to below WORLD_SIZE = 2"),
            ("WORLD_SIZE=x", "WORLD_SIZE = \"x\": expected a whole number from 0 to 1024"),
            ("WORLD_SIZE=1025", "WORLD_SIZE = \"1025\": expected a whole number from 0 to 1024"),
            ("WORLD_SIZE=+2", "WORLD_SIZE = \"+2\""),
            ("WORLD_SIZE=2 RANK=0 MASTER_ADDR= MASTER_PORT=1", "MASTER_ADDR = \"\": expected a name or an address"),
            (
                "WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=65536",
                "MASTER_PORT = \"65536\": expected a whole number from 0 to 65535",
            ),
            ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=a MASTER_PORT=0", "MASTER_PORT = 0: only rank 0 can leave"),
            ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=a MASTER_PORT=65535 TORCHELASTIC_USE_AGENT_STORE=True", "there is none after it"),
            ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=a MASTER_PORT=5 LOCAL_RANK=-1", "LOCAL_RANK = \"-1\""),
        ] {
            let error = seen(variables).unwrap_err();
            assert!(error.contains(words), "{variables}: {error}");
        }
    }
}
