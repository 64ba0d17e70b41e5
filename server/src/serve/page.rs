//! `GET /`: the page, one HTML file in this binary.
//!
//! Not here: what the page says (page/index.html) or asks, which is the public API alone. Its
//! script and its style run because the policy names their hashes; nothing else does.

use axum::http::header;
use axum::response::{Html, IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::sync::LazyLock;

const PAGE: &str = include_str!("page/index.html");

/// What a browser may do with the page: its own style and script, and this server.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let (style, script) = (hash(inside(PAGE, "style")), hash(inside(PAGE, "script")));
    format!(
        "default-src 'none'; style-src '{style}'; script-src '{script}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'"
    )
});

/// The page: talks to the model, and shows which tokens were guessed.
#[utoipa::path(get, path = "/", responses((status = 200, body = String, content_type = "text/html")))]
pub(crate) async fn page() -> Response {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Another version of the server has another page.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, Html(PAGE)).into_response()
}

/// What stands in the only element `name` of a page.
fn inside<'a>(page: &'a str, name: &str) -> &'a str {
    let after = page.split_once(&format!("<{name}>")).map_or("", |(_, after)| after);
    after.split_once(&format!("</{name}>")).map_or("", |(inside, _)| inside)
}

/// A text's hash in the form of a content security policy.
fn hash(text: &str) -> String {
    format!("sha256-{}", base64(&Sha256::digest(text)))
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0, |bits, i| bits << 8 | u32::from(*group.get(i).unwrap_or(&0)));
        for i in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= group.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::app::App;
    use super::super::metrics::Metrics;
    use super::super::{routes, worker};
    use super::*;
    use axum::body::Body;
    use axum::http::{Request, StatusCode};
    use std::sync::Arc;
    use tower::ServiceExt;

    #[tokio::test]
    async fn the_page_is_there_before_the_model_and_runs_nothing_but_its_own() {
        let (handle, _inbox) = worker::channel();
        let app = Arc::new(App::new(handle, Arc::new(Metrics::new().unwrap())));
        let request = Request::get("/").body(Body::empty()).unwrap();
        let response = routes::router(app).oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let headers = response.headers();
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap();
        assert_eq!(header(header::CONTENT_TYPE), "text/html; charset=utf-8");
        assert_eq!(header(header::X_CONTENT_TYPE_OPTIONS), "nosniff");
        let policy = header(header::CONTENT_SECURITY_POLICY);
        assert!(policy.starts_with("default-src 'none'"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        for name in ["style", "script"] {
            let hash = format!("'{}'", hash(inside(PAGE, name)));
            assert!(policy.contains(&format!("{name}-src {hash};")), "{policy}");
        }
        let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        assert_eq!(body, PAGE.as_bytes());
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_reads_no_text_as_html() {
        assert!(PAGE.len() < 40 << 10, "{} bytes", PAGE.len());
        for name in ["style", "script"] {
            // Another one would have no hash.
            assert_eq!(PAGE.matches(&format!("<{name}")).count(), 1);
            assert!(inside(PAGE, name).len() > 1000);
        }
        let banned = ["://", "innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("];
        for word in banned.iter().chain(&[" style=\"", "onclick=", "localStorage"]) {
            assert!(!PAGE.contains(word), "{word}");
        }
    }

    #[test]
    fn hashes_are_written_as_others_write_them() {
        let expected = ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"];
        for (len, expected) in expected.iter().enumerate() {
            assert_eq!(base64(&b"foobar"[..len]), *expected);
        }
        // printf '' | openssl dgst -sha256 -binary | base64
        assert_eq!(hash(""), "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
    }
}
