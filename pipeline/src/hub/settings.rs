//! Owns where the cache lies, which hub is asked and with what token: the environment, read as Hugging Face's own library reads
//! it. Refuses to show the token.
//!
//! | variable | means | absent |
//! |---|---|---|
//! | `HF_HOME` | home of everything | `$XDG_CACHE_HOME/huggingface`, else `~/.cache/huggingface` |
//! | `HF_HUB_CACHE` (older: `HUGGINGFACE_HUB_CACHE`) | the cache | `$HF_HOME/hub` |
//! | `HF_ENDPOINT` | the hub's address | `https://huggingface.co` |
//! | `HF_TOKEN` (older: `HUGGING_FACE_HUB_TOKEN`) | the token | the file `HF_TOKEN_PATH`, else `$HF_HOME/token` |
//! | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | no token is sent | it is |
//! | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | nothing is downloaded | what is missing is |
//! | `HF_HUB_DOWNLOAD_TIMEOUT` | seconds that the hub may be silent | 10 |

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The hub when `HF_ENDPOINT` names none.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Seconds that the hub may be silent when `HF_HUB_DOWNLOAD_TIMEOUT` says nothing.
pub const DEFAULT_TIMEOUT_SECONDS: u64 = 10;
/// Pause before the first repeat of a request that failed; it doubles with each.
pub const DEFAULT_PAUSE: Duration = Duration::from_secs(1);
/// Longest token read from a file, in bytes.
const MAX_TOKEN_BYTES: u64 = 4096;

/// Whether something may be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Yes.
    Allowed,
    /// `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` is set.
    Offline,
    /// This build has no code for it: the cargo feature `hub` was off.
    Absent,
}

/// Where things are.
#[derive(Clone)]
pub struct HubSettings {
    /// The cache's folder; `None` where neither a variable nor a home says where.
    pub cache: Option<PathBuf>,
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// Whether something may be fetched.
    pub network: Network,
    /// How long the hub may be silent.
    pub timeout: Duration,
    /// Pause before the first repeat of a request that failed.
    pub pause: Duration,
    /// Whether proxies named in the environment are used (by requests).
    pub proxy: Proxy,
    token: Token,
}

/// Where a token comes from.
#[derive(Clone)]
enum Token {
    None,
    Value(String),
    File(PathBuf),
}

/// Whether `HTTPS_PROXY` and its like are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proxy {
    /// As the environment says.
    Environment,
    /// Never.
    Never,
}

impl HubSettings {
    /// From this process's environment.
    pub fn of_process() -> Self {
        Self::from(|name| std::env::var_os(name), Proxy::Environment)
    }

    /// From `variable`, which gives a variable's value. An empty value is none.
    pub fn from(variable: impl Fn(&str) -> Option<OsString>, proxy: Proxy) -> Self {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| get(name).map(|value| value.to_string_lossy().into_owned());
        let user = get("HOME").map(PathBuf::from).or_else(std::env::home_dir);
        let path = |name: &str| get(name).map(|value| expanded(&value, user.as_deref(), &get));
        let xdg = || path("XDG_CACHE_HOME").or_else(|| Some(user.as_deref()?.join(".cache")));
        let home = path("HF_HOME").or_else(|| Some(xdg()?.join("huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let on = |name: &str| text(name).is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&v.to_uppercase().as_str()));
        let offline = if get("HF_HUB_OFFLINE").is_some() { on("HF_HUB_OFFLINE") } else { on("TRANSFORMERS_OFFLINE") };
        let given = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
        let file = path("HF_TOKEN_PATH").or_else(|| Some(home.as_deref()?.join("token")));
        let token = match (on("HF_HUB_DISABLE_IMPLICIT_TOKEN"), given.as_deref().and_then(clean), file) {
            (true, _, _) => Token::None,
            (_, Some(token), _) => Token::Value(token),
            (_, None, file) => file.map_or(Token::None, Token::File),
        };
        let seconds = text("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|v| v.trim().parse().ok()).filter(|s| *s > 0);
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.into());
        Self {
            cache: cache.or_else(|| Some(home.as_deref()?.join("hub"))),
            endpoint: endpoint.trim_end_matches('/').to_string(),
            network: match (cfg!(feature = "hub"), offline) {
                (false, _) => Network::Absent,
                (true, true) => Network::Offline,
                (true, false) => Network::Allowed,
            },
            timeout: Duration::from_secs(seconds.unwrap_or(DEFAULT_TIMEOUT_SECONDS)),
            pause: DEFAULT_PAUSE,
            proxy,
            token,
        }
    }

    /// The token, read now, to be shown to the hub alone. A file that is not there, or that holds none, gives none.
    pub fn token(&self) -> Option<String> {
        match &self.token {
            Token::None => None,
            Token::Value(token) => Some(token.clone()),
            Token::File(path) => clean(&String::from_utf8(crate::bounded::read(path, MAX_TOKEN_BYTES).ok()?).ok()?),
        }
    }
}

impl std::fmt::Debug for HubSettings {
    /// All but the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("HubSettings");
        shown
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("network", &self.network)
            .finish_non_exhaustive()
    }
}

/// A token without line ends and blanks around it; `None` when nothing is left or it could break a header.
fn clean(token: &str) -> Option<String> {
    let token = token.replace(['\r', '\n'], "").trim().to_string();
    (!token.is_empty() && token.chars().all(|c| c.is_ascii_graphic())).then_some(token)
}

/// `~` at the start and `$NAME` or `${NAME}` anywhere become what they stand for; a variable that is not set stays as it is.
fn expanded(value: &OsString, user: Option<&Path>, get: &impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let Some(text) = value.to_str() else { return value.into() };
    let mut out = match (text.strip_prefix('~'), user) {
        (Some(rest), Some(user)) if rest.is_empty() || rest.starts_with('/') => format!("{}{rest}", user.display()),
        _ => text.to_string(),
    };
    let mut from = 0;
    while let Some(at) = out.get(from..).and_then(|rest| rest.find('$')).map(|at| from + at) {
        let rest = &out[at + 1..];
        let (name, length) = match rest.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, _)) => (name, name.len() + 3),
            None => {
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
                (&rest[..end], end + 1)
            }
        };
        let value = if name.is_empty() { None } else { get(name).and_then(|v| v.into_string().ok()) };
        from = match value {
            Some(value) => {
                out.replace_range(at..at + length, &value);
                at + value.len()
            }
            None => at + 1,
        };
    }
    PathBuf::from(out)
}
