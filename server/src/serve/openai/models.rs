//! `GET /v1/models`: what is served.

use super::super::app::App;
use super::super::error::{ApiError, ErrorBody};
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// The models of this server: one.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// `list`.
    object: &'static str,
    data: Vec<ModelCard>,
}

/// A model.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelCard {
    /// Its name in requests.
    id: String,
    /// `model`.
    object: &'static str,
    /// When it was loaded, in seconds since 1970.
    created: u64,
    /// `foretoken`.
    owned_by: &'static str,
    /// Most tokens of prompt and answer together.
    max_model_len: u32,
}

/// Lists the model.
#[utoipa::path(get, path = "/v1/models", responses(
    (status = 200, body = ModelList), (status = "default", body = ErrorBody),
))]
pub(crate) async fn models(State(app): State<Arc<App>>) -> Result<Json<ModelList>, ApiError> {
    let served = app.ready()?;
    let card = ModelCard {
        id: served.name.clone(),
        object: "model",
        created: app.created,
        owned_by: "foretoken",
        max_model_len: served.config.context_len,
    };
    Ok(Json(ModelList { object: "list", data: vec![card] }))
}
