//! Request bodies: JSON of a given form, or a refusal that says where it is wrong.

use super::error::ApiError;
use axum::extract::rejection::{BytesRejection, JsonRejection};
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Time that a client has to send a body.
const PATIENCE: Duration = Duration::from_secs(60);

/// A body of type `T`; any content type will do.
#[derive(Debug)]
pub(crate) struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = axum::body::Bytes::from_request(request, state);
        let bytes = tokio::time::timeout(PATIENCE, bytes).await.map_err(|_| {
            let message = format!("the body was not complete after {} seconds", PATIENCE.as_secs());
            ApiError { status: StatusCode::REQUEST_TIMEOUT, ..ApiError::invalid(message) }
        })?;
        let bytes = bytes.map_err(|e| unread(&e))?;
        match axum::Json::<T>::from_bytes(&bytes) {
            Ok(axum::Json(value)) => Ok(Self(value)),
            Err(e) => Err(refusal(&e)),
        }
    }
}

fn unread(e: &BytesRejection) -> ApiError {
    let message = match e.status() {
        StatusCode::PAYLOAD_TOO_LARGE => "the body is larger than this server takes".to_owned(),
        _ => format!("the body cannot be read: {e}"),
    };
    ApiError { status: e.status(), ..ApiError::invalid(message) }
}

fn refusal(e: &JsonRejection) -> ApiError {
    let cause = std::error::Error::source(e).map_or_else(|| e.to_string(), ToString::to_string);
    let message = match e {
        JsonRejection::JsonSyntaxError(_) => format!("the body is not valid JSON: {cause}"),
        _ => format!("the body does not fit: {cause}"),
    };
    ApiError { status: StatusCode::BAD_REQUEST, ..ApiError::invalid(message) }
}
