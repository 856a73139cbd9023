//! Every way an evaluation with a judge can fail, each as one sentence. None of them ever holds a key.

use potstill_cache::ErrorClass;
use std::path::PathBuf;

/// Ways to fail.
#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    /// A variable that says where an endpoint is or what opens it.
    #[error("{variable}: expected {expected}, found {found}")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// What it may hold.
        expected: &'static str,
        /// What it holds, never the key itself.
        found: String,
    },
    /// A setting out of its range, or two that do not go together.
    #[error("{setting}: expected {expected}, found {found}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// What is allowed.
        expected: String,
        /// What was given.
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
    /// A file that is not what it should be.
    #[error("{path}{place}: expected {expected}, found {found}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Where in it, as `, line 3`; empty where it is the file as a whole.
        place: String,
        /// What should stand there.
        expected: String,
        /// What does.
        found: String,
    },
    /// The endpoint does not let us in.
    #[error("{endpoint}: answered {status} ({said}); {variable} holds {key}")]
    Denied {
        /// Its address.
        endpoint: String,
        /// 401 or 403.
        status: u16,
        /// Its own words.
        said: String,
        /// Where the key comes from.
        variable: &'static str,
        /// `no key`, or `a key that it does not accept`.
        key: &'static str,
    },
    /// There is no money left.
    #[error("{endpoint}: the account's quota is used up ({said}); {kept}")]
    Quota {
        /// Its address.
        endpoint: String,
        /// Its own words.
        said: String,
        /// What is on disk.
        kept: String,
    },
    /// The endpoint refuses what is asked, before it answered anything.
    #[error(
        "{endpoint}: refused the first request with {status} ({said}); check the model's name, the address and what is asked for"
    )]
    Refused {
        /// Its address.
        endpoint: String,
        /// The status.
        status: u16,
        /// Its own words.
        said: String,
    },
    /// The endpoint fails, however often it is asked.
    #[error("{endpoint}: {requests}, at last: {found}; {kept}")]
    Unreachable {
        /// Its address.
        endpoint: String,
        /// How many requests failed how often.
        requests: String,
        /// What happened at last.
        found: String,
        /// What is on disk.
        kept: String,
    },
    /// A signal asked for a stop.
    #[error("stopped by a signal; {kept}")]
    Interrupted {
        /// What is on disk.
        kept: String,
    },
}

impl JudgeError {
    /// Of reading or writing `path`.
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Variable { .. } | Self::Setting { .. } => ErrorClass::Usage,
            Self::Interrupted { .. } => ErrorClass::Interrupted,
            _ => ErrorClass::Runtime,
        }
    }
}
