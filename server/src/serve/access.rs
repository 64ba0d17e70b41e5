//! Who may call, from where, with how much: keys, pages of other origins, sizes of requests.
//!
//! Input: what was typed ([`AccessArgs`]). Stands before every path; what it refuses never reaches a
//! handler. Keys are kept and compared as hashes of one length in constant time, so that the time an
//! answer takes says nothing of them. Not here: encryption (a proxy's work), the engine's own limits.

use super::error::ApiError;
use super::hosts::Hosts;
use super::metrics::Metrics;
use crate::cli::AccessArgs;
use anyhow::{Context, bail};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use subtle::{Choice, ConstantTimeEq};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// Paths without a key: probes, and the page, which asks for one.
const OPEN_PATHS: [&str; 3] = ["/", "/health", "/ready"];
/// Paths whose refusals are no news.
const PROBES: [&str; 2] = ["/health", "/ready"];
/// Most bytes of all headers together.
const HEADER_BYTES_MAX: usize = 32 << 10;
/// A key in a header of its own, as some clients send it.
const KEY_HEADER: &str = "x-api-key";

type Hash = [u8; 32];

/// Who may call.
#[derive(Debug)]
pub(crate) struct Access {
    /// Of all keys; none lets everybody in.
    keys: Vec<Hash>,
    /// Origins whose pages may call; none allows no page but the server's own.
    origins: Option<AllowOrigin>,
    hosts: Hosts,
    body_bytes: usize,
}

struct Guard {
    keys: Vec<Hash>,
    hosts: Hosts,
    metrics: Arc<Metrics>,
}

impl Access {
    /// What `args` allow.
    ///
    /// # Errors
    /// A key, a file of keys, an origin or a host that cannot be used, in words without the key.
    pub(crate) fn new(args: &AccessArgs) -> anyhow::Result<Self> {
        let mut keys = args.api_key.clone();
        if let Some(path) = &args.api_key_file {
            keys.extend(keys_of_file(path)?);
        }
        if keys.iter().any(|key| key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic())) {
            bail!("a key is empty or has spaces or other characters that a header cannot hold");
        }
        let keys = keys.iter().map(|key| hash(key.as_bytes())).collect();
        let (origins, hosts) = (origins(&args.cors_origin)?, Hosts::new(args)?);
        Ok(Self { keys, origins, hosts, body_bytes: args.max_body_bytes })
    }

    /// Checks that an address others can reach is not open to all by mistake; a warning where it
    /// is on purpose.
    pub(crate) fn check_host(
        &self,
        host: IpAddr,
        args: &AccessArgs,
    ) -> anyhow::Result<Option<String>> {
        if host.to_canonical().is_loopback() || !self.keys.is_empty() {
            return Ok(None);
        }
        if !args.allow_public {
            bail!(
                "others can reach {host}, and no key is asked for: give --api-key or --api-key-file, or say --allow-public"
            );
        }
        Ok(Some(format!("warning: whoever can reach {host} can use this server; no key is asked")))
    }

    /// `router` behind all checks.
    pub(crate) fn guard(self, router: Router, metrics: Arc<Metrics>) -> Router {
        let guard = Arc::new(Guard { keys: self.keys, hosts: self.hosts, metrics });
        let router = router
            .layer(DefaultBodyLimit::max(self.body_bytes))
            .layer(from_fn_with_state(guard, check));
        match self.origins {
            None => router,
            Some(origins) => router.layer(
                CorsLayer::new()
                    .allow_origin(origins)
                    .allow_methods([Method::GET, Method::POST])
                    // Clients name themselves by headers of their own.
                    .allow_headers(AllowHeaders::mirror_request())
                    .expose_headers([header::RETRY_AFTER]),
            ),
        }
    }
}

/// Keys of a file, one a line; empty lines and those that begin with `#` are none.
fn keys_of_file(path: &Path) -> anyhow::Result<Vec<String>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    let lines = text.lines().map(str::trim);
    let keys: Vec<String> =
        lines.filter(|l| !l.is_empty() && !l.starts_with('#')).map(str::to_owned).collect();
    if keys.is_empty() {
        bail!("{shown} has no key: write one a line, or leave --api-key-file out");
    }
    Ok(keys)
}

fn origins(typed: &[String]) -> anyhow::Result<Option<AllowOrigin>> {
    if typed.iter().any(|origin| origin == "*") {
        return Ok(Some(AllowOrigin::any()));
    }
    let origin = |text: &String| {
        let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
        let plain = rest.is_some_and(|rest| !rest.is_empty() && !rest.contains(['/', '*']));
        let value = plain.then(|| HeaderValue::from_str(text).ok()).flatten();
        let expected = "expected an origin such as https://example.org, without a path, or *";
        value.with_context(|| format!("--cors-origin is {text:?}, {expected}"))
    };
    let list: Vec<HeaderValue> = typed.iter().map(origin).collect::<anyhow::Result<_>>()?;
    Ok((!list.is_empty()).then(|| AllowOrigin::list(list)))
}

async fn check(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let probe = PROBES.contains(&request.uri().path());
    let response = match guard.admit(&request) {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    };
    if !probe {
        guard.metrics.answered(response.status());
    }
    response
}

impl Guard {
    fn admit(&self, request: &Request) -> Result<(), ApiError> {
        let headers = request.headers();
        let bytes = headers.iter().map(|(name, value)| name.as_str().len() + value.len());
        if bytes.sum::<usize>() > HEADER_BYTES_MAX {
            let message = format!("the headers are longer than {HEADER_BYTES_MAX} bytes");
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            return Err(ApiError { status, ..ApiError::invalid(message) });
        }
        let path = request.uri().path();
        if self.keys.is_empty() && !PROBES.contains(&path) {
            self.hosts.check(request)?;
        }
        let open = self.keys.is_empty() || OPEN_PATHS.contains(&path);
        if open || key(headers).is_some_and(|key| self.knows(key)) {
            return Ok(());
        }
        let message = "this server asks for a key: send a valid one as Authorization: Bearer KEY";
        let error = ApiError::invalid(message).code("invalid_api_key");
        Err(ApiError { status: StatusCode::UNAUTHORIZED, ..error })
    }

    /// Whether `key` is one of the keys; takes as long whichever it is, and if it is none.
    fn knows(&self, key: &[u8]) -> bool {
        let found = hash(key);
        let same = |known: &Hash| known.as_slice().ct_eq(&found);
        self.keys.iter().map(same).fold(Choice::from(0), |any, same| any | same).into()
    }
}

fn hash(key: &[u8]) -> Hash {
    Sha256::digest(key).into()
}

/// The key that a request brings.
fn key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked("bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    bearer.or_else(|| headers.get(KEY_HEADER).map(HeaderValue::as_bytes))
}
