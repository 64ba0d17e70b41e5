//! Keeps web pages of other sites from using a server that asks for no key.
//!
//! A browser lets any page send requests to this machine: from the page's own site, which the
//! `Origin` header then names, or to a name of that site which now leads to this machine's address
//! (DNS rebinding), which the `Host` header then names. Programs send no origin, and ask for an
//! address, for `localhost`, or for a name that the user gave. Input: [`AccessArgs`]. Not here: what
//! pages may read ([`super::access`] tells browsers by CORS), keys.

use super::error::ApiError;
use crate::cli::AccessArgs;
use anyhow::bail;
use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{HeaderValue, StatusCode, header};
use std::net::IpAddr;

/// What a server without a key goes by.
#[derive(Debug)]
pub(crate) struct Hosts {
    /// Names that the user gave, in small letters.
    names: Vec<String>,
    /// Other sites whose pages may call, or `*`.
    origins: Vec<String>,
}

impl Hosts {
    /// What `args` allow.
    ///
    /// # Errors
    /// A host that is no plain name.
    pub(crate) fn new(args: &AccessArgs) -> anyhow::Result<Self> {
        for name in &args.allowed_host {
            let fits = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            if name.is_empty() || !name.bytes().all(fits) {
                bail!(
                    "--allowed-host is {name:?}, expected a name such as llm.example.org, without scheme, port and path"
                );
            }
        }
        let names = args.allowed_host.iter().map(|name| plain(name)).collect();
        Ok(Self { names, origins: args.cors_origin.clone() })
    }

    /// Refuses what a page of another site may have sent.
    pub(crate) fn check(&self, request: &Request) -> Result<(), ApiError> {
        let text = |value: &'_ HeaderValue| value.to_str().unwrap_or_default().to_owned();
        let of = |name| request.headers().get_all(name).iter().map(text);
        // HTTP/2 names the host beside the path.
        let beside = request.uri().authority().map(|authority| authority.as_str().to_owned());
        let hosts: Vec<String> = of(header::HOST).chain(beside).collect();
        if let Some(host) = hosts.iter().find(|host| !self.goes_by(host)) {
            let message = format!(
                "the request asks for the host {host:?}, and this server does not go by that name: start it with --allowed-host, or with a key"
            );
            return Err(refused(message, "unknown_host"));
        }
        if let Some(origin) = of(header::ORIGIN).find(|origin| !self.lets(origin, &hosts)) {
            let message = format!(
                "pages of {origin:?} may not use this server: start it with --cors-origin to let them"
            );
            return Err(refused(message, "foreign_origin"));
        }
        Ok(())
    }

    /// Whether no other site can have this host. Nobody can make an address lead elsewhere.
    fn goes_by(&self, host: &str) -> bool {
        let Ok(authority) = host.parse::<Authority>() else { return false };
        let name = plain(authority.host());
        let address = name.trim_start_matches('[').trim_end_matches(']');
        let local = name == "localhost" || name.ends_with(".localhost");
        local || address.parse::<IpAddr>().is_ok() || self.names.contains(&name)
    }

    /// Whether pages of `origin` may call a server that was asked for as `hosts`.
    fn lets(&self, origin: &str, hosts: &[String]) -> bool {
        if self.origins.iter().any(|allowed| allowed == "*" || allowed == origin) {
            return true;
        }
        let rest = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        let Some(rest) = rest else { return false };
        // Behind a proxy, a page's own host may be another than the one asked for here.
        let named = rest.parse::<Authority>().is_ok_and(|a| self.names.contains(&plain(a.host())));
        named || hosts.iter().any(|host| host.eq_ignore_ascii_case(rest))
    }
}

/// A name as it is compared.
fn plain(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn refused(message: String, code: &'static str) -> ApiError {
    ApiError { status: StatusCode::FORBIDDEN, ..ApiError::invalid(message).code(code) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::tests::TestServer;
    use axum::body::Body;
    use serde_json::{Value, json};

    /// Code of the refusal of a request with these headers; none if it is answered.
    async fn refusal(server: &TestServer, path: &str, headers: &[(&str, &str)]) -> Option<String> {
        let mut request = match path {
            "/v1/completions" => Request::post(path),
            _ => Request::get(path),
        };
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = json!({"prompt": "a", "max_tokens": 1}).to_string();
        let (status, text) = server.send(request.body(Body::from(body)).unwrap()).await;
        if status.is_success() {
            return None;
        }
        assert_eq!(status, StatusCode::FORBIDDEN, "{headers:?}: {text}");
        let error = serde_json::from_str::<Value>(&text).unwrap()["error"].take();
        assert!(error["message"].as_str().unwrap().contains("start it with"), "{error}");
        Some(error["code"].as_str().unwrap().to_owned())
    }

    const OWN: [&str; 8] = [
        "localhost:8080",
        "LOCALHOST.",
        "app.localhost",
        "127.0.0.1",
        "127.0.0.1:8080",
        "[::1]:8080",
        "192.168.1.2:80",
        "llm.example.org",
    ];

    #[tokio::test]
    async fn only_own_hosts_are_served_without_a_key() {
        let server = TestServer::start(&["--draft", "off", "--allowed-host", "LLM.example.org"]);
        for path in ["/", "/v1/models", "/metrics", "/v1/completions"] {
            assert_eq!(refusal(&server, path, &[]).await, None, "programs without a host");
            for host in OWN {
                assert_eq!(refusal(&server, path, &[("host", host)]).await, None, "{host}");
            }
            let others =
                ["evil.example", "evil.example:8080", "example.org", "xlocalhost", "", "a b"];
            for host in
                others.into_iter().chain(["127.0.0.1.evil.example", "localhost.evil.example"])
            {
                let found = refusal(&server, path, &[("host", host)]).await;
                assert_eq!(found.as_deref(), Some("unknown_host"), "{host:?}");
            }
            let two = [("host", "localhost"), ("host", "evil.example")];
            assert_eq!(refusal(&server, path, &two).await.as_deref(), Some("unknown_host"));
        }
        let found = refusal(&server, "http://evil.example/v1/models", &[]).await;
        assert_eq!(found.as_deref(), Some("unknown_host"), "as HTTP/2 names it");
        for path in ["/health", "/ready"] {
            assert_eq!(refusal(&server, path, &[("host", "evil.example")]).await, None);
        }
        let (_, text) = server.get("/metrics").await;
        assert!(
            text.contains("foretoken_requests_refused_total{reason=\"forbidden\"} 37"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn only_own_pages_are_served_without_a_key() {
        let (named, other) = ("llm.example.org", "https://app.example.com");
        let words = ["--draft", "off", "--allowed-host", named, "--cors-origin", other];
        let server = TestServer::start(&words);
        let from = async |host: &str, origin: &str| {
            refusal(&server, "/v1/completions", &[("host", host), ("origin", origin)]).await
        };
        for host in OWN {
            assert_eq!(from(host, &format!("http://{host}")).await, None);
            assert_eq!(from(host, &format!("https://{host}")).await, None);
        }
        // A proxy asks for an address of its own.
        assert_eq!(from("127.0.0.1:8080", "https://llm.example.org").await, None);
        assert_eq!(from("127.0.0.1:8080", other).await, None);
        for origin in
            ["http://127.0.0.1:3000", "http://localhost:8080", "https://evil.example", "null", ""]
        {
            let found = from("127.0.0.1:8080", origin).await;
            assert_eq!(found.as_deref(), Some("foreign_origin"), "{origin:?}");
        }
        let all = TestServer::start(&["--draft", "off", "--cors-origin", "*"]);
        let headers = [("host", "localhost"), ("origin", "null")];
        assert_eq!(refusal(&all, "/v1/completions", &headers).await, None);
    }

    #[tokio::test]
    async fn with_a_key_the_key_decides() {
        let server = TestServer::start(&["--draft", "off", "--api-key", "k"]);
        let headers = [
            ("host", "evil.example"),
            ("origin", "https://other.example"),
            ("authorization", "Bearer k"),
        ];
        assert_eq!(refusal(&server, "/v1/completions", &headers).await, None);
    }
}
