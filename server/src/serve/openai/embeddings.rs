//! `POST /v1/embeddings`: refused, for the served models generate text.

use super::super::error::{ApiError, ErrorBody};

/// Refuses: there is no encoder.
#[utoipa::path(post, path = "/v1/embeddings", responses((status = "default", body = ErrorBody)))]
pub(crate) async fn embeddings() -> ApiError {
    let message = "this server has no encoder: embeddings need a model that is one, and the served \
                   model generates text";
    ApiError::invalid(message).code("no_encoder")
}
