//! Every way a name can fail to become files, each as one sentence with what was looked for, where, and what may help.

use super::settings::Network;
use potstill_cache::ErrorClass;
use std::path::PathBuf;

/// Ways a name can fail.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A name that is neither a path nor in the cache.
    #[error("{name}: there is no such path, and no {kind} of this name in the Hugging Face cache ({looked}); {ability}", ability = ability(*network))]
    NotFound {
        /// The name.
        name: String,
        /// `model` or `dataset`.
        kind: &'static str,
        /// What is not where.
        looked: String,
        /// Why it was not fetched.
        network: Network,
    },
    /// A snapshot that is not whole.
    #[error("{name}: {folder} lacks {lacking}; {ability}", folder = folder.display(), ability = ability(*network))]
    Incomplete {
        /// The name.
        name: String,
        /// The snapshot.
        folder: PathBuf,
        /// What is not there.
        lacking: String,
        /// Why it was not fetched.
        network: Network,
    },
    /// A split that is none of the dataset's.
    #[error("{name}: expected files of chats, found {found}")]
    NoSplit {
        /// The name.
        name: String,
        /// The splits there are.
        found: String,
    },
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An index that cannot be believed.
    #[error("{path}: expected a weight_map of plain .safetensors names, found {found}", path = path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What stands there.
        found: String,
    },
    /// A file of a snapshot that leads elsewhere.
    #[error("{path}: leads to {leads_to}, which is no part of the snapshot or its blobs", path = path.display(), leads_to = leads_to.display())]
    Outside {
        /// The file.
        path: PathBuf,
        /// Where it leads.
        leads_to: PathBuf,
    },
    /// The hub will not show it.
    #[error("{what}: the hub answered {status}: it may be private, gated, or not exist; {advice}")]
    Denied {
        /// What was asked for.
        what: String,
        /// 401 or 403.
        status: u16,
        /// What may help.
        advice: &'static str,
    },
    /// The hub does not have it.
    #[error("{what}: the hub at {endpoint} does not have it ({found})")]
    NotThere {
        /// What was asked for.
        what: String,
        /// The hub's address.
        endpoint: String,
        /// 404 and the hub's word for it.
        found: String,
    },
    /// The hub could not be reached, or gave up, however often it was asked.
    #[error(
        "{what}: the hub at {endpoint} failed {tries} times, at last: {found}; what was fetched is kept: run the same command again to continue"
    )]
    Unreachable {
        /// What was asked for.
        what: String,
        /// The hub's address.
        endpoint: String,
        /// What happened at last.
        found: String,
        /// How often it was asked.
        tries: u32,
    },
    /// An answer that cannot be believed.
    #[error("{what}: expected {expected}, found {found}")]
    Answer {
        /// What was asked for.
        what: String,
        /// What should have come.
        expected: String,
        /// What came.
        found: String,
    },
    /// A signal asked for a stop.
    #[error("stopped by a signal while fetching {name}; what was fetched is kept: run the same command again to continue")]
    Interrupted {
        /// The repository.
        name: String,
    },
}

/// Whether and how the missing can be had.
fn ability(network: Network) -> &'static str {
    match network {
        Network::Absent => "this build cannot download (cargo feature hub): fetch it with `hf download`, or give a path",
        Network::Offline => "nothing is downloaded, as HF_HUB_OFFLINE is set",
        Network::Allowed => "nothing was downloaded",
    }
}

impl HubError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            HubError::Interrupted { .. } => ErrorClass::Interrupted,
            _ => ErrorClass::Runtime,
        }
    }
}
