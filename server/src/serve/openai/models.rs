//! `GET /v1/models` and `GET /v1/models/{id}`: what is served.

use super::super::app::{App, Served};
use super::super::error::{ApiError, ErrorBody};
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
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

impl ModelCard {
    fn new(app: &App, served: &Served) -> Self {
        Self {
            id: served.name.clone(),
            object: "model",
            created: app.created,
            owned_by: "foretoken",
            max_model_len: served.config.context_len,
        }
    }
}

/// Lists the model.
#[utoipa::path(get, path = "/v1/models", responses(
    (status = 200, body = ModelList), (status = "default", body = ErrorBody),
))]
pub(crate) async fn models(State(app): State<Arc<App>>) -> Result<Json<ModelList>, ApiError> {
    let served = app.ready()?;
    Ok(Json(ModelList { object: "list", data: vec![ModelCard::new(&app, &served)] }))
}

/// Tells of one model; 404 if it is not the one that is served.
#[utoipa::path(get, path = "/v1/models/{id}",
    params(("id" = String, Path, description = "Its name, in which slashes may stand as they are")),
    responses((status = 200, body = ModelCard), (status = "default", body = ErrorBody)),
)]
pub(crate) async fn model(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelCard>, ApiError> {
    let served = app.ready()?;
    // Bytes that are no text are nobody's name.
    served.check_name(Some(id.as_ref().map_or("\u{fffd}", |Path(id)| id)))?;
    Ok(Json(ModelCard::new(&app, &served)))
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::TestServer;
    use axum::http::StatusCode;
    use serde_json::Value;

    #[tokio::test]
    async fn a_model_is_told_of_by_its_name_and_no_other() {
        let words = ["--draft", "off", "--served-model-name", "org/möd el"];
        let server = TestServer::start(&words);
        let get = async |path: &str| {
            let (status, text) = server.get(path).await;
            (status, serde_json::from_str::<Value>(&text).unwrap())
        };
        let (_, list) = get("/v1/models").await;
        for id in ["org/m%C3%B6d%20el", "org%2Fm%C3%B6d%20el", "org%2fm%c3%b6d%20el"] {
            let found = get(&format!("/v1/models/{id}")).await;
            assert_eq!(found, (StatusCode::OK, list["data"][0].clone()), "{id}");
        }
        for id in ["demo", "org", "org/", "org/m%C3%B6d%20el/", "%FF", "org%252Fm%C3%B6d%20el"] {
            let (status, refused) = get(&format!("/v1/models/{id}")).await;
            assert_eq!(status, StatusCode::NOT_FOUND, "{id}");
            assert_eq!(refused["error"]["code"], "model_not_found", "{id}: {refused}");
            assert_eq!(refused["error"]["type"], "invalid_request_error");
        }
    }
}
