//! `GET /openapi.json`: the API in words for programs.
//!
//! Every path that [`super::routes`] serves is listed here; a test compares the two. The sentences
//! stand at the handlers and types themselves.

use super::openai::{chat, completions, embeddings, models};
use super::{page, routes, tokens};
use axum::Json;
use utoipa::openapi::RefOr;
use utoipa::{Modify, OpenApi};

#[derive(OpenApi)]
#[openapi(
    info(title = "Foretoken", description = "The OpenAI API over one local model."),
    paths(
        page::page,
        routes::health,
        routes::ready,
        routes::metrics,
        routes::version,
        models::models,
        models::model,
        completions::completions,
        chat::chat_completions,
        embeddings::embeddings,
        tokens::tokenize,
        tokens::detokenize,
        tokens::tokenizer_info,
        tokens::apply_template,
        document,
    ),
    modifiers(&Described)
)]
struct Document;

/// Gives responses the description that the format demands where their handler has none.
struct Described;

impl Modify for Described {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let items = api.paths.paths.values_mut();
        let operations = items.flat_map(|item| [&mut item.get, &mut item.post]).flatten();
        for (status, response) in operations.flat_map(|o| &mut o.responses.responses) {
            if let RefOr::T(response) = response
                && response.description.is_empty()
            {
                let description = if status == "200" { "The answer." } else { "A refusal." };
                response.description = description.to_owned();
            }
        }
    }
}

/// Describes this API.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = serde_json::Value)))]
pub(crate) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Document::openapi())
}

#[cfg(test)]
mod tests {
    use super::super::tests::TestServer;
    use axum::http::StatusCode;
    use serde_json::Value;
    use std::collections::BTreeSet;

    /// Methods and paths of the router, by the text of its source: a router does not list them.
    fn routed() -> BTreeSet<(String, String)> {
        let source: String = include_str!("routes.rs").split_whitespace().collect();
        let routes = source.split(".route(\"").skip(1);
        let route = |rest: &str| {
            let (path, rest) = rest.split_once("\",").unwrap();
            // What takes slashes too is one parameter all the same.
            (rest.split('(').next().unwrap().to_owned(), path.replace("{*", "{"))
        };
        routes.map(route).collect()
    }

    #[tokio::test]
    async fn the_document_lists_every_route_and_no_other() {
        let server = TestServer::start(&[]);
        let (status, text) = server.get("/openapi.json").await;
        assert_eq!(status, StatusCode::OK);
        let document: Value = serde_json::from_str(&text).unwrap();
        let mut listed = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            let methods = methods.as_object().unwrap().keys();
            listed.extend(methods.map(|method| (method.clone(), path.clone())));
        }
        assert_eq!(listed, routed());
        assert!(listed.len() >= 13);
    }

    #[tokio::test]
    async fn the_document_parses_and_its_references_lead_somewhere() {
        let (_, text) = TestServer::start(&[]).get("/openapi.json").await;
        // The crate cannot read what it writes for values of any type: parsed as plain JSON.
        let document: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["title"], "Foretoken");
        for item in document["paths"].as_object().unwrap().values() {
            for operation in item.as_object().unwrap().values() {
                let responses = operation["responses"].as_object().unwrap();
                assert!(!responses.is_empty(), "{operation}");
                for response in responses.values() {
                    let description = response["description"].as_str();
                    assert!(description.is_some_and(|d| !d.is_empty()), "{operation}");
                }
            }
        }
        let references =
            text.split("\"$ref\":\"#").skip(1).map(|rest| rest.split('"').next().unwrap());
        let references: BTreeSet<&str> = references.collect();
        assert!(references.len() > 10, "{references:?}");
        for reference in references {
            assert!(document.pointer(reference).is_some(), "{reference}");
        }
        let request = &document["components"]["schemas"]["ChatRequest"];
        assert!(request.to_string().contains("max_completion_tokens"), "{request}");
    }

    #[tokio::test]
    async fn versions_and_encoders() {
        let server = TestServer::start(&[]);
        let (_, version) = server.get("/version").await;
        let version: Value = serde_json::from_str(&version).unwrap();
        assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
        let (status, refused) = server.post("/v1/embeddings", serde_json::json!({})).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert_eq!(refused["error"]["code"], "no_encoder");
    }
}
