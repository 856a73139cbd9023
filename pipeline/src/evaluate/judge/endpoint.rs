//! Owns where an OpenAI-compatible endpoint is and the key that opens it: both from the environment. Refuses to show the key: not in
//! `Debug`, not in an error, not in words that an endpoint says.

use super::JudgeError;
use std::ffi::OsString;

/// The address where `OPENAI_BASE_URL` names none.
pub const OPENAI: &str = "https://api.openai.com/v1";
/// What stands in the place of the key in words of an endpoint.
const HIDDEN: &str = "[key]";
/// A shorter key is a placeholder (`EMPTY`, `none`): no secret, and too common a word to be hidden.
const SHORTEST_SECRET: usize = 8;

/// The variables of one endpoint.
#[derive(Debug, Clone, Copy)]
pub struct Variables {
    /// The address, up to and without `/chat/completions`.
    pub base_url: &'static str,
    /// The key; sent as a bearer token.
    pub key: &'static str,
    /// The address where the variable is not set.
    pub fallback: Option<&'static str>,
}

/// The judge's.
pub const JUDGE: Variables = Variables { base_url: "OPENAI_BASE_URL", key: "OPENAI_API_KEY", fallback: Some(OPENAI) };
/// Of the model whose answers are judged. The judge's key is never sent there.
pub const ANSWERS: Variables = Variables { base_url: "ANSWERS_BASE_URL", key: "ANSWERS_API_KEY", fallback: None };

/// Whether `HTTPS_PROXY` and its like are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proxy {
    /// As the environment says.
    Environment,
    /// Never.
    Never,
}

/// One endpoint.
#[derive(Clone)]
pub struct Endpoint {
    variables: Variables,
    base_url: String,
    key: Option<String>,
    /// Whether proxies named in the environment are used.
    pub proxy: Proxy,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let key = if self.key.is_some() { "hidden" } else { "none" };
        f.debug_struct("Endpoint").field("base_url", &self.base_url).field("key", &key).finish()
    }
}

impl Endpoint {
    /// From this process's environment.
    ///
    /// Errors: as [`Endpoint::from`].
    pub fn of_process(variables: Variables) -> Result<Self, JudgeError> {
        Self::from(variables, |name| std::env::var_os(name), Proxy::Environment)
    }

    /// From `variable`, which gives a variable's value; an empty one is none.
    ///
    /// Errors: no address, one that is none or holds a secret, a key that cannot be sent, or OpenAI's own address without a key.
    pub fn from(variables: Variables, variable: impl Fn(&str) -> Option<OsString>, proxy: Proxy) -> Result<Self, JudgeError> {
        let get = |name: &str| variable(name).filter(|v| !v.is_empty()).map(|v| v.to_string_lossy().trim().to_string());
        let wrong = |variable, expected, found: &str| JudgeError::Variable { variable, expected, found: found.to_string() };
        let given = get(variables.base_url).filter(|url| !url.is_empty());
        let Some(url) = given.or_else(|| variables.fallback.map(str::to_string)) else {
            return Err(wrong(variables.base_url, "an address such as http://localhost:8000/v1", "nothing"));
        };
        let base_url = address(&url).map_err(|found| wrong(variables.base_url, "an address such as https://host/v1", found))?;
        let key = get(variables.key).filter(|key| !key.is_empty());
        if key.as_deref().is_some_and(|key| !key.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(wrong(variables.key, "visible ASCII characters without a space", "others"));
        }
        if key.is_none() && base_url == OPENAI {
            return Err(wrong(variables.key, "the key of an account, or another address in OPENAI_BASE_URL", "nothing"));
        }
        Ok(Self { variables, base_url, key, proxy })
    }

    /// The address, without a slash at its end. It holds no secret.
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// A sentence for a person where the key can be read on its way.
    pub fn exposure(&self) -> Option<String> {
        let host = self.base_url.strip_prefix("http://")?.split(['/', ':']).next().unwrap_or_default();
        let near = ["localhost", "127.0.0.1", "["].iter().any(|own| host.starts_with(own));
        let exposed = self.secret().is_some() && !near;
        exposed
            .then(|| format!("{} is plain http: whoever is on the way can read the key of {}", self.base_url, self.variables.key))
    }

    /// `text` with the key hidden.
    pub(super) fn without_key(&self, text: &str) -> String {
        self.secret().map_or_else(|| text.to_string(), |key| text.replace(key, HIDDEN))
    }

    /// The value of the header `Authorization`, to be given to the endpoint alone.
    pub(super) fn authorization(&self) -> Option<String> {
        self.key.as_ref().map(|key| format!("Bearer {key}"))
    }

    /// An error of a key that does not open it.
    pub(super) fn denied(&self, status: u16, said: String) -> JudgeError {
        let key = if self.key.is_some() { "a key that it does not accept" } else { "no key" };
        JudgeError::Denied { endpoint: self.base_url.clone(), status, said, variable: self.variables.key, key }
    }

    fn secret(&self) -> Option<&str> {
        self.key.as_deref().filter(|key| key.len() >= SHORTEST_SECRET)
    }
}

/// An address that can be shown and extended, or what is wrong with it.
fn address(url: &str) -> Result<String, &'static str> {
    let rest = url
        .strip_prefix("http://")
        .or_else(|| url.strip_prefix("https://"))
        .ok_or("one that begins with neither http:// nor https://")?;
    let host = rest.split('/').next().unwrap_or_default();
    match () {
        () if host.contains('@') => Err("one with a user's name or password in it, which would be shown"),
        () if rest.contains(['?', '#']) => Err("one with ? or #, which cannot be extended"),
        () if host.is_empty() || url.parse::<ureq::http::Uri>().is_err() => {
            Err("one without a host, or with characters that no address has")
        }
        () => Ok(url.trim_end_matches('/').to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn endpoint(url: &str, key: &str) -> Result<Endpoint, JudgeError> {
        let variable = |name: &str| match name {
            "OPENAI_BASE_URL" => Some(OsString::from(url)),
            "OPENAI_API_KEY" => Some(OsString::from(key)),
            _ => None,
        };
        Endpoint::from(JUDGE, variable, Proxy::Never)
    }

    #[test]
    fn an_address_is_shown_and_a_key_is_not() {
        let found = endpoint(" http://localhost:8000/v1/ ", "sk-canary-0123456789").unwrap();
        assert_eq!(found.base_url(), "http://localhost:8000/v1");
        assert!(!format!("{found:?}").contains("canary"), "{found:?}");
        assert_eq!(found.without_key("wrong key sk-canary-0123456789!"), "wrong key [key]!");
        assert_eq!(found.authorization().as_deref(), Some("Bearer sk-canary-0123456789"));
        assert!(!found.denied(401, found.without_key("sk-canary-0123456789")).to_string().contains("canary"));
        assert_eq!(endpoint("http://localhost:8000/v1", "EMPTY").unwrap().without_key("EMPTY set"), "EMPTY set");
    }

    #[test]
    fn what_cannot_be_used_is_refused_and_not_repeated() {
        for url in
            ["host/v1", "ftp://host/v1", "http://", "https://user:canary@host/v1", "http://host/v1?key=canary", "http://a b/v1"]
        {
            let error = endpoint(url, "").unwrap_err();
            assert!(
                !error.to_string().contains("canary") && error.to_string().starts_with("OPENAI_BASE_URL: expected"),
                "{error}"
            );
        }
        for key in ["ca nary", "canary\r\nHost: elsewhere", "canäry"] {
            let error = endpoint("http://localhost/v1", key).unwrap_err().to_string();
            assert!(error.starts_with("OPENAI_API_KEY: expected") && !error.contains("nary"), "{error}");
        }
        assert!(endpoint("", "").unwrap_err().to_string().contains("OPENAI_API_KEY: expected the key of an account"));
        assert_eq!(endpoint("", "sk-1").unwrap().base_url(), OPENAI);
        assert!(
            Endpoint::from(ANSWERS, |_| None, Proxy::Never).unwrap_err().to_string().starts_with("ANSWERS_BASE_URL: expected")
        );
    }

    #[test]
    fn a_key_over_plain_http_to_elsewhere_is_said() {
        assert!(endpoint("http://judge.example/v1", "sk-canary-0123456789").unwrap().exposure().is_some());
        for (url, key) in [
            ("https://judge.example/v1", "sk-canary-0123456789"),
            ("http://localhost:1/v1", "sk-canary-0123456789"),
            ("http://judge.example/v1", ""),
        ] {
            assert_eq!(endpoint(url, key).unwrap().exposure(), None, "{url}");
        }
    }
}
