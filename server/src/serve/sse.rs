//! Answers as server-sent events, piece by piece.
//!
//! Input: choices and a [`Writer`] that knows an endpoint's form. A client that goes away drops the
//! stream, and with it all choices. Not here: the pieces' JSON.

use super::error::ApiError;
use super::generation::Delta;
use super::openai::choices::Choices;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream};
use serde_json::Value;
use std::collections::VecDeque;
use std::convert::Infallible;

/// An endpoint's form of a stream.
pub(crate) trait Writer: Send + 'static {
    /// Objects for a piece of choice `index`.
    fn delta(&mut self, index: usize, delta: Delta) -> Result<Vec<Value>, ApiError>;

    /// Objects after all choices have ended.
    fn last(&mut self) -> Vec<Value>;
}

/// The response that sends all pieces of `choices`, `first` before them, and `[DONE]`.
pub(crate) fn response(choices: Choices, writer: impl Writer, first: &[Value]) -> Response {
    let ready = first.iter().map(object).collect();
    let source = Source { choices: Some(choices), writer, ready };
    Sse::new(events(source)).keep_alive(KeepAlive::default()).into_response()
}

struct Source<W> {
    /// None when there is nothing more to come.
    choices: Option<Choices>,
    writer: W,
    ready: VecDeque<Event>,
}

fn events<W: Writer>(source: Source<W>) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(source, |mut source| async move {
        loop {
            if let Some(event) = source.ready.pop_front() {
                return Some((Ok(event), source));
            }
            let choices = source.choices.as_mut()?;
            let next = match choices.next().await {
                Ok(Some((index, delta))) => source.writer.delta(index, delta),
                Ok(None) => {
                    source.choices = None;
                    Ok(source.writer.last())
                }
                Err(e) => Err(e),
            };
            source.write(next);
        }
    })
}

impl<W> Source<W> {
    fn write(&mut self, objects: Result<Vec<Value>, ApiError>) {
        match objects {
            Ok(objects) => self.ready.extend(objects.iter().map(object)),
            Err(e) => {
                self.choices = None;
                let body = serde_json::to_value(e.body()).unwrap_or_default();
                self.ready.push_back(object(&body));
            }
        }
        if self.choices.is_none() {
            self.ready.push_back(Event::default().data("[DONE]"));
        }
    }
}

fn object(value: &Value) -> Event {
    Event::default().data(value.to_string())
}
