//! What a client hears when something is wrong, in the OpenAI API's form.
//!
//! Every refusal has a status, a sentence and, where a parameter is to blame, its name. Nothing of
//! the machine (paths, keys, addresses) gets into one.

use super::worker::Refused;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use engine::request::Rejected;
use serde::Serialize;
use utoipa::ToSchema;

/// Seconds after which a client that met a full queue may try again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// A refusal.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The parameter that is to blame.
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

/// A refusal as it is sent.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    error: ErrorObject,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorObject {
    /// One sentence.
    message: String,
    /// `invalid_request_error`, `authentication_error`, `rate_limit_error` or `server_error`.
    r#type: &'static str,
    /// The parameter that is to blame.
    param: Option<String>,
    /// A word for programs.
    code: Option<&'static str>,
}

impl ApiError {
    /// A mistake in the request.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        let (message, param, code) = (message.into(), None, None);
        Self { status: StatusCode::BAD_REQUEST, message, param, code }
    }

    /// A failure that is not the client's.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, ..Self::invalid(message) }
    }

    /// The model is not there yet, or not any more.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, ..Self::invalid(message) }
    }

    /// The same, blamed on a parameter.
    pub(crate) fn of(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    /// The same with a word for programs.
    pub(crate) fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// What is sent, also inside a stream.
    pub(crate) fn body(&self) -> ErrorBody {
        let r#type = match self.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let Self { message, param, code, .. } = self.clone();
        ErrorBody { error: ErrorObject { message, r#type, param, code } }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER);
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

impl From<Rejected> for ApiError {
    fn from(rejected: Rejected) -> Self {
        let error = Self::invalid(rejected.to_string());
        match rejected {
            Rejected::QueueFull { .. } => {
                Self { status: StatusCode::TOO_MANY_REQUESTS, ..error.code("queue_full") }
            }
            Rejected::PromptTooLong { .. } | Rejected::PromptExceedsKv { .. } => {
                error.of("prompt").code("context_length_exceeded")
            }
            Rejected::EmptyPrompt | Rejected::TokenOutOfRange { .. } => error.of("prompt"),
            Rejected::NoTokens => error.of("max_tokens"),
            Rejected::Parameter { parameter, .. } => error.of(parameter),
            _ => error,
        }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Rejected(rejected) => rejected.into(),
            Refused::Stopping => Self::unavailable(refused.to_string()).code("stopping"),
        }
    }
}
