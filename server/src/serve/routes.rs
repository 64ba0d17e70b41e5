//! Which path is served by whom.

use super::app::App;
use super::error::{ApiError, ErrorBody};
use super::openai::{chat, completions, embeddings, models};
use super::{openapi, page, tokens};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// All paths of a server.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(page::page))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models::models))
        .route("/v1/models/{*id}", get(models::model))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::tokenizer_info))
        .route("/apply-template", post(tokens::apply_template))
        .route("/version", get(version))
        .route("/openapi.json", get(openapi::document))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .with_state(app)
}

/// Whether requests are served: 503 while the model is loading and while the server stops.
#[utoipa::path(get, path = "/health", responses(
    (status = 200, body = String, content_type = "text/plain"),
    (status = "default", body = ErrorBody),
))]
pub(crate) async fn health(State(app): State<Arc<App>>) -> Result<&'static str, ApiError> {
    app.ready().map(|_| "ok")
}

/// The same as `/health`, under the name that some load balancers ask for.
#[utoipa::path(get, path = "/ready", responses(
    (status = 200, body = String, content_type = "text/plain"),
    (status = "default", body = ErrorBody),
))]
pub(crate) async fn ready(app: State<Arc<App>>) -> Result<&'static str, ApiError> {
    health(app).await
}

/// Which server this is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Version {
    /// Of Foretoken.
    version: &'static str,
}

/// The server's version.
#[utoipa::path(get, path = "/version", responses(
    (status = 200, body = Version), (status = "default", body = ErrorBody),
))]
pub(crate) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// Counters in the text format of Prometheus.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, body = String, content_type = "text/plain"),
    (status = "default", body = ErrorBody),
))]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text = app.metrics.text().map_err(|e| ApiError::failed(e.to_string()))?;
    let kind = [(axum::http::header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((kind, text).into_response())
}

async fn unknown_path(uri: axum::http::Uri) -> ApiError {
    let message = format!("there is nothing at {}; /openapi.json lists what there is", uri.path());
    ApiError { status: StatusCode::NOT_FOUND, ..ApiError::invalid(message) }
}

async fn unknown_method(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    let message = format!("{} does not take {method}", uri.path());
    ApiError { status: StatusCode::METHOD_NOT_ALLOWED, ..ApiError::invalid(message) }
}
